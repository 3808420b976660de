"""Our blocks with windows, plain and shifted, are Swin's as transformers has them, without its bias for distances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmssl.nn.transformer import Transformer
from mmssl.nn.windows import Windows, window_cells

transformers = pytest.importorskip("transformers")
swin = pytest.importorskip("transformers.models.swin.modeling_swin")

DIM, HEADS, WINDOW, GRID = 16, 4, 4, (8, 12)


def theirs(block: nn.Module, *, shift: int) -> nn.Module:
    """A layer of theirs with the weights of one of our blocks."""
    config = transformers.SwinConfig(window_size=WINDOW, mlp_ratio=4.0, layer_norm_eps=1e-6, qkv_bias=True)
    layer = swin.SwinLayer(config, DIM, GRID, HEADS, shift_size=shift).eval()
    pairs = [(layer.layernorm_before, block.norm1), (layer.layernorm_after, block.norm2)]
    pairs += [(layer.attention.o_proj, block.attention.out)]
    pairs += [(layer.mlp.fc1, block.mlp.up), (layer.mlp.fc2, block.mlp.down)]
    for to, ours in pairs:
        to.load_state_dict(ours.state_dict())
    parts = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
    weights, biases = block.attention.qkv.weight.chunk(3), block.attention.qkv.bias.chunk(3)
    for to, weight, bias in zip(parts, weights, biases, strict=True):
        to.load_state_dict({"weight": weight, "bias": bias})
    nn.init.zeros_(layer.attention.relative_position_bias.relative_position_bias_table)
    return layer


@torch.no_grad()
def test_windows_and_shifted_windows_are_swins() -> None:
    torch.manual_seed(0)
    ours = Transformer(dim=DIM, depth=2, heads=HEADS).eval()
    for parameter in ours.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    x, lengths = torch.randn(2, 96, DIM), torch.tensor([96, 96])
    windows = [
        Windows(window_cells(GRID, (WINDOW, WINDOW), shifted=shifted).expand(2, -1), lengths)
        for shifted in (False, True)
    ]
    h = x
    for block, shift in zip(ours.blocks, (0, WINDOW // 2), strict=True):
        h = theirs(block, shift=shift)(h, GRID)[0]
    found = ours(x, lengths, windows=windows)[0]
    torch.testing.assert_close(found, ours.norm(h), rtol=1e-4, atol=1e-5)
    unshifted = ours(x, lengths, windows=windows[:1] * 2)[0]
    assert (unshifted - found).abs().max() > 1e-2
