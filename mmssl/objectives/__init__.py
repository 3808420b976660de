"""Objectives: a loss and the parts it owns, one paper a file. None of them knows a modality."""

from torch import nn

from mmssl.objectives.apc import APC
from mmssl.objectives.av_mae import AVMAE
from mmssl.objectives.bert import BERT
from mmssl.objectives.best_rq import BestRQ
from mmssl.objectives.cae import CAE
from mmssl.objectives.cav_mae import CAVMAE
from mmssl.objectives.classify import Classify
from mmssl.objectives.clip import CLIP
from mmssl.objectives.clip_lite import CLIPLite
from mmssl.objectives.cpc import CPC
from mmssl.objectives.cross_video_mae import CrossVideoMAE
from mmssl.objectives.ctc import CTC
from mmssl.objectives.data2vec import Data2Vec
from mmssl.objectives.data2vec2 import Data2Vec2
from mmssl.objectives.dbot import DBOT
from mmssl.objectives.denoise import Denoise
from mmssl.objectives.encodec_mae import EncodecMAE
from mmssl.objectives.hubert import HuBERT
from mmssl.objectives.jepa import JEPA
from mmssl.objectives.mae import MAE
from mmssl.objectives.mp3 import MP3
from mmssl.objectives.npc import NPC
from mmssl.objectives.omni import Omni
from mmssl.objectives.siam_mae import SiamMAE
from mmssl.objectives.siglip import SigLIP
from mmssl.objectives.slip import SLIP
from mmssl.objectives.tera import TERA
from mmssl.objectives.vic_mae import ViCMAE
from mmssl.objectives.vq_wav2vec import VQWav2Vec
from mmssl.objectives.wav2vec import Wav2Vec
from mmssl.objectives.wav2vec2 import Wav2Vec2

OBJECTIVES: dict[str, type[nn.Module]] = {
    "wav2vec2": Wav2Vec2,
    "hubert": HuBERT,
    "best_rq": BestRQ,
    "bert": BERT,
    "mae": MAE,
    "cae": CAE,
    "encodec_mae": EncodecMAE,
    "tera": TERA,
    "apc": APC,
    "cpc": CPC,
    "wav2vec": Wav2Vec,
    "npc": NPC,
    "mp3": MP3,
    "vq_wav2vec": VQWav2Vec,
    "siam_mae": SiamMAE,
    "vic_mae": ViCMAE,
    "cross_video_mae": CrossVideoMAE,
    "denoise": Denoise,
    "dbot": DBOT,
    "data2vec": Data2Vec,
    "data2vec2": Data2Vec2,
    "jepa": JEPA,
    "clip": CLIP,
    "siglip": SigLIP,
    "clip_lite": CLIPLite,
    "slip": SLIP,
    "av_mae": AVMAE,
    "cav_mae": CAVMAE,
    "omni": Omni,
    "ctc": CTC,
    "classify": Classify,
}
# those whose own weights are exported beside the encoder's without labels: they give codes
CODERS = ("vq_wav2vec",)
# and those that show what they make of what is hidden
DRAWING = [name for name, objective in OBJECTIVES.items() if hasattr(objective, "reconstruct")]
# those that bring several modalities together, and take their `Encoders`
PAIRED = [name for name, objective in OBJECTIVES.items() if getattr(objective, "pairs", False)]
# those that tell the clips of a micro-batch apart, so that several have another loss than one
CONTRASTING = [name for name, objective in OBJECTIVES.items() if getattr(objective, "contrasts", False)]
# and those that take `Encoders` whether or not their batches are of pairs
SEVERAL = [name for name, objective in OBJECTIVES.items() if name in PAIRED or getattr(objective, "several", False)]
# objective -> the key of a manifest's rows that it learns from
LABELLED: dict[str, str] = {
    name: label for name, objective in OBJECTIVES.items() if (label := getattr(objective, "label", None)) is not None
}
