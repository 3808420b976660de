"""One trunk for several modalities: Transformers that hold the same blocks, all of them or those above the first few.

Each modality has a whole Transformer of its own to look at: what is shared is the same object in several, so nothing
that runs one needs to know of the others.
"""

from __future__ import annotations

import copy

from torch import nn

from mmssl.nn.transformer import Transformer


def twin(trunk: Transformer, *, own_blocks: int = 0, own_norms: bool = False) -> Transformer:
    """Another Transformer that holds the blocks of `trunk`; what it has of its own begins with the same weights.

    Source: Gong et al. 2022 (CAV-MAE, arXiv:2210.07839), modality-specific and joint encoders, for both settings.

    Args:
        own_blocks: so many of the first blocks are its own.
        own_norms: whether in the others the layer norms are, and those at the start and the end. Attention and MLP stay
            those of `trunk`.

    Raises:
        ValueError: no block would be shared.
    """
    if not 0 <= own_blocks < trunk.depth:
        raise ValueError(
            f"backbone.own_blocks={own_blocks}: must be from 0 to {trunk.depth - 1}, so that one of "
            f"transformer.depth={trunk.depth} blocks is shared; choose fewer, or backbone=separate"
        )
    return _tied(trunk, trunk.blocks[own_blocks:], own_norms)


def upper(trunk: Transformer, *, first: int, own_norms: bool) -> Transformer:
    """The blocks of `trunk` after the first `first`, for sequences of several modalities: what those blocks gave.

    Source: as for `twin`: the joint layer runs over each modality and over both, with norms for each of the three.

    Args:
        own_norms: see `twin`.

    Raises:
        ValueError: the blocks tell where tokens lie relative to each other, which those of two modalities do not.
    """
    if trunk.bias is not None:
        raise ValueError(
            "transformer.bias: tokens of several modalities have no places relative to each other; leave it out"
        )
    found = _tied(trunk, trunk.blocks, own_norms)
    found.blocks = found.blocks[first:]
    found.depth = len(found.blocks)
    # what stands before the first block has been done
    found.dropout, found.input_norm = 0.0, nn.Identity()
    if not found.pre:
        found.norm = nn.Identity()
    return found


def _tied(trunk: Transformer, blocks: nn.ModuleList, own_norms: bool) -> Transformer:
    """A copy of which these blocks, biases and, but for `own_norms`, the norms are those of `trunk`."""
    kept: list[nn.Module] = [] if trunk.bias is None else [trunk.bias]
    for block in blocks:
        kept += [block.get_submodule(part) for part in ("attention", "mlp")] if own_norms else [block]
    if not own_norms:
        kept += [trunk.norm, trunk.input_norm]
    return copy.deepcopy(trunk, {id(part): part for part in kept})
