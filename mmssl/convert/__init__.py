"""Encoders as transformers lays them out: what is published there opens here, and what is trained here opens there.

A layout is a row of `LAYOUTS`: which settings of theirs are which of ours, and which tensors are which.
"""

from mmssl.convert.ast import AST
from mmssl.convert.beit import BEIT, DATA2VEC_VISION
from mmssl.convert.clip import CLIP, CLIP_VISION, SIGLIP, SIGLIP_VISION
from mmssl.convert.layout import Layout, Towers
from mmssl.convert.speech import DATA2VEC_AUDIO, HUBERT, WAV2VEC2, WAVLM
from mmssl.convert.videomae import VIDEOMAE
from mmssl.convert.vit import DINOV2, DINOV2_WITH_REGISTERS, VIT, VIT_MAE

# of two that can say the same, what is trained here is written in the first
LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout
    for layout in (
        WAV2VEC2,
        HUBERT,
        DATA2VEC_AUDIO,
        WAVLM,
        VIT,
        VIT_MAE,
        DINOV2,
        DINOV2_WITH_REGISTERS,
        BEIT,
        DATA2VEC_VISION,
        CLIP_VISION,
        SIGLIP_VISION,
        VIDEOMAE,
        AST,
    )
}
# models of an image and a text tower
TOWERS: dict[str, Towers] = {towers.model_type: towers for towers in (CLIP, SIGLIP)}
