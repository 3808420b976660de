"""Codes: what a quantizer or a codec made of a recording, one token a step."""

from mmssl.modalities.codes import reader
from mmssl.modalities.codes.frontend import Codes
from mmssl.modalities.codes.targets import TARGETS
from mmssl.modalities.modality import Modality
from mmssl.modalities.speech import augment

CODES = Modality(
    name="codes",
    media="codes",
    suffixes=frozenset({".safetensors"}),
    frontends={"codes": Codes},
    read=reader.read,
    probe=reader.probe,
    augments={"random_crop": augment.random_crop, "center_crop": augment.center_crop},
    durations={"random_crop": augment.crop_extent, "center_crop": augment.crop_extent},
    cuts={"center_crop": augment.center_part},
    targets=TARGETS,
    hints=("first", "count"),
)
