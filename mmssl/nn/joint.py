"""One space for the clips of several modalities: how they get there, in parts too, and which are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmssl.memory import hand_back_freed_memory
from mmssl.nn.heads import POOLS
from mmssl.nn.partners import Metrics
from mmssl.nn.spread import spread
from mmssl.types import Batch, Encoded, Raw

Pooling = Literal["mean", "class", "last"]


def refuse_pools(pool: Mapping[str, str], prefixes: Mapping[str, int]) -> None:
    """See that there is a pooling for each modality.

    Args:
        pool: modality -> name.
        prefixes: modality -> class token and registers of its encoder.

    Raises:
        ValueError: there is not, or an encoder has no class token to pool by.
    """
    if set(pool) != set(prefixes):
        raise ValueError(
            f"objective.pool={dict(pool)}: name a pooling for each modality, {' and '.join(prefixes)}, and no other"
        )
    for name, pooling in pool.items():
        if pooling == "class" and prefixes[name] == 0:
            raise ValueError(
                f"objective.pool: {name}: class: this encoder has no class token (modality.{name}.encoder.prefix="
                "0); set it to 1, or choose mean or last"
            )


def projections(widths: Mapping[str, int], dim: int, *, bias: bool = False) -> nn.ModuleDict:
    """Modality -> the linear map from the width of its encoder to that of the space, begun as CLIP's are."""
    maps = {name: nn.Linear(width, dim, bias=bias) for name, width in widths.items()}
    for linear in maps.values():
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if bias:
            nn.init.zeros_(linear.bias)
    return nn.ModuleDict(maps)


def unit_vectors(pooling: str, project: nn.Module, encoded: Encoded) -> Tensor:
    """(B, J) float32, of length 1."""
    pooled = POOLS[pooling](encoded.x, encoded.lengths, encoded.n_prefix)
    return F.normalize(project(pooled.float()).float(), dim=1)


def refuse_chunk(chunk: int | None, layer_drops: Iterable[float]) -> None:
    """See that clips can be encoded so many at a time.

    Raises:
        ValueError: they cannot.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"objective.chunk={chunk}: must be at least 1; leave it out to encode all clips at once")
    if chunk is not None and any(layer_drops):
        raise ValueError(
            f"objective.chunk={chunk}: encodes each clip twice, and transformer.layer_drop leaves out other blocks "
            "each time; set it to 0"
        )


def in_parts(encode: Callable[[Raw], Tensor], raw: Raw, parts: int) -> Tensor:
    """What `encode` makes of clips, (B, ...) -> (B, ...), of which only a part is in memory at a time.

    Source: Gao et al. 2021 (GradCache, arXiv:2101.06983), section 3: encode all clips and keep their vectors alone;
    with the loss's gradient for these, encode them again part by part, and go back through each. What dropout drew the
    first time is drawn again, and so is what depends on the clips' seeds; what `encode` remembers must not.
    As torch's checkpoint does it autograd sees the graph of a single pass, so gradients that are exchanged between
    processes are complete when they are.

    Args:
        parts: as many calls of `encode` are made, whatever B is: where weights are sharded, all processes make equally
            many.
    """
    if parts == 1:
        return encode(raw)
    found = []
    for rows in torch.arange(len(raw)).tensor_split(parts):
        own = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 1)
        part, count = raw.part(own), len(rows)

        def again(data: Tensor, part: Raw = part, count: int = count) -> Tensor:
            if data.device.type == "cpu":
                hand_back_freed_memory()
            return encode(replace(part, data=data))[:count]

        # the data by itself: where it lies is where the random numbers are drawn that must come again
        found.append(checkpoint(again, part.data, use_reentrant=False))
    return torch.cat(found)


def embedded(
    batch: Batch, names: Iterable[str], embed: Callable[[str, Raw], Tensor], *, dim: int, like: Tensor, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """The clips of a batch in the space.

    Args:
        embed: (modality, its clips) -> (B, J) vectors.
        dim: J.
        like: (1,) a parameter; zeros that depend on it stand for clips that lack a modality, as all processes must have
            something to send back.
        parts: see `in_parts`.

    Returns:
        (B, modalities, J) vectors; and on the CPU, (B, modalities) bool, whether a clip has the modality.
    """
    vectors, present, zero = [], [], like.new_zeros(dim) * like
    for name in names:
        rows = batch.rows.get(name, torch.arange(len(batch)) if name in batch.inputs else torch.arange(0))
        full = zero.expand(len(batch), -1)
        if len(rows):
            found = in_parts(lambda raw, name=name: embed(name, raw), batch.of(name), parts)  # type: ignore[misc]
            full = found if len(rows) == len(batch) else full.index_copy(0, rows.to(full.device), found)
        vectors.append(full)
        present.append(torch.zeros(len(batch), dtype=torch.bool).index_fill(0, rows, True))
    return torch.stack(vectors, 1), torch.stack(present, 1)


def labels_of(batch: Batch, same: str | None, own: Tensor, objective: str) -> Tensor:
    """(B,) int64, equal where two clips belong to the same; `own`, which of all each clip is, where each is its own.

    Raises:
        ValueError: a batch without the key that says so.
    """
    if same is None:
        return own
    if batch.labels is None:
        raise ValueError(f"{objective}: every clip needs its {same!r}, by which pairs are the same (objective.same)")
    return batch.labels.to(own.device)


def spreads(names: Iterable[str], vectors: Tensor, present: Tensor) -> Metrics:
    """How far the unit vectors of each modality spread, times the root of their width: about 1 where everywhere."""
    found: Metrics = {}
    for place, name in enumerate(names):
        own = vectors.detach()[:, place][present[:, place].to(vectors.device)] * vectors.shape[-1] ** 0.5
        found[f"{name}_std"] = spread(own) * len(own), len(own)
    return found
