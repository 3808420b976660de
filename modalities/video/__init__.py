"""Video: a clip of frames sampled by time, one token a tube."""

from mmssl.modalities.image.augment import crop_extent, resize_extent
from mmssl.modalities.modality import Modality
from mmssl.modalities.video import augment, reader, spans, views
from mmssl.modalities.video.corrupt import CORRUPTIONS
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS

VIDEO = Modality(
    name="video",
    media="video",
    suffixes=frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".3gp"}),
    frontends={"tubes": Tubes},
    read=reader.read,
    probe=reader.probe,
    augments={
        "resize": augment.resize,
        "center_crop": augment.center_crop,
        "random_resized_crop": augment.random_resized_crop,
        "multi_scale_crop": augment.multi_scale_crop,
        "flip": augment.flip,
        "shift": augment.shift,
        "color_jitter": augment.color_jitter,
        "gray": augment.gray,
        "blur": augment.blur,
    },
    durations={"random_span": spans.span_extent, "center_span": spans.span_extent},
    sizes={
        "resize": resize_extent,
        "center_crop": crop_extent,
        "random_resized_crop": crop_extent,
        "multi_scale_crop": crop_extent,
    },
    targets=TARGETS,
    measured=("pixels", "pixels"),
    corruptions=CORRUPTIONS,
    hints=("decoder",),
    views={"frames": views.frames},
    view_checks={"frames": views.check_frames},
    spans={"random_span": spans.random_span, "center_span": spans.center_span},
)
