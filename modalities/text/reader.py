"""A caption to the ids of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.modalities.text.tokenizer import Tokenizer, is_whole
from mmssl.types import BadClip


def read(source: object, *, tokenizer: Tokenizer) -> Tensor:
    """A caption as ids, with the marks that its tokenizer puts around it; what is longer than the context is cut.

    Args:
        source: the caption itself, as a row of a manifest has it.

    Returns:
        (L,) int64.

    Raises:
        BadClip: no text, nothing in it, or half a character.
    """
    if not isinstance(source, str):
        raise BadClip("text", f"the caption {source!r} is no text; write it in quotes")
    if not is_whole(source):
        raise BadClip("text", f"the caption {source!r} holds half a character, as where it was cut off; write it whole")
    ids = tokenizer.encode(source) if source.strip() else []
    if not ids:
        raise BadClip("text", f"the caption {source!r} is empty")
    return torch.tensor(ids, dtype=torch.int64)
