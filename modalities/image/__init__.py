"""Image: a picture, one token a patch."""

from mmssl.modalities.image import augment, reader, views
from mmssl.modalities.image.corrupt import CORRUPTIONS
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS
from mmssl.modalities.modality import Modality

IMAGE = Modality(
    name="image",
    media="image",
    suffixes=frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}),
    frontends={"patches": Patches},
    read=reader.read,
    probe=reader.probe,
    augments={
        "resize": augment.resize,
        "center_crop": augment.center_crop,
        "random_resized_crop": augment.random_resized_crop,
        "flip": augment.flip,
        "shift": augment.shift,
        "color_jitter": augment.color_jitter,
        "gray": augment.gray,
        "blur": augment.blur,
    },
    sizes={
        "resize": augment.resize_extent,
        "center_crop": augment.crop_extent,
        "random_resized_crop": augment.crop_extent,
    },
    targets=TARGETS,
    measured=("pixels", "pixels"),
    corruptions=CORRUPTIONS,
    views={"crops": views.crops, "distortions": views.distortions},
)
