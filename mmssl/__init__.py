"""Self-supervised learning across modalities: one encoder contract from raw file to embedding.

The public names are looked up when they are first used, so that `mmssl --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.assemble import train
    from mmssl.embed import load
    from mmssl.encoder import Encoder
    from mmssl.tasks.evaluate import evaluate

__all__ = ["Encoder", "__version__", "evaluate", "load", "train"]

_HOMES = {
    "Encoder": "mmssl.encoder",
    "evaluate": "mmssl.tasks.evaluate",
    "load": "mmssl.embed",
    "train": "mmssl.assemble",
}
# whose names are public too
_ROOMS = ("embed", "hear", "index")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mmssl")
    if name in _ROOMS:
        return import_module(f"mmssl.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmssl' has no attribute '{name}'; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
