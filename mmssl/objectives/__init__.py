"""Objectives: a loss and the parts it owns, one paper a file. None of them knows a modality."""

from torch import nn

from mmssl.objectives.best_rq import BestRQ
from mmssl.objectives.classify import Classify
from mmssl.objectives.ctc import CTC
from mmssl.objectives.hubert import HuBERT
from mmssl.objectives.mae import MAE
from mmssl.objectives.wav2vec2 import Wav2Vec2

OBJECTIVES: dict[str, type[nn.Module]] = {
    "wav2vec2": Wav2Vec2,
    "hubert": HuBERT,
    "best_rq": BestRQ,
    "mae": MAE,
    "ctc": CTC,
    "classify": Classify,
}
# objective -> the key of a manifest's rows that it learns from
LABELLED: dict[str, str] = {
    name: label for name, objective in OBJECTIVES.items() if (label := getattr(objective, "label", None)) is not None
}
