"""One loop for all objectives, and what it keeps: rates, checkpoints, verdicts, logs."""

from mmssl.training.loop import RunStopped, train
from mmssl.training.optimizer import build_optimizer
from mmssl.training.schedule import SCHEDULES
from mmssl.training.settings import TrainSettings

__all__ = ["SCHEDULES", "RunStopped", "TrainSettings", "build_optimizer", "train"]
