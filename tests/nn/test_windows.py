"""Windows of the token grid: who attends to whom, worked by hand, and nothing of it depending on padding."""

import pytest
import torch

from mmssl.nn.transformer import Transformer
from mmssl.nn.windows import Windows, window_cells
from mmssl.types import valid_mask


def test_windows_lie_on_the_grid_as_drawn() -> None:
    # 5 x 4 tokens in windows of 2 x 2
    assert window_cells((5, 4), (2, 2), shifted=False).view(5, 4).unique(return_inverse=True)[1].tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
        [4, 4, 5, 5],
    ]
    # half a window further: what is left over at an edge is a window of its own
    assert window_cells((5, 4), (2, 2), shifted=True).view(5, 4).unique(return_inverse=True)[1].tolist() == [
        [0, 1, 1, 2],
        [3, 4, 4, 5],
        [3, 4, 4, 5],
        [6, 7, 7, 8],
        [6, 7, 7, 8],
    ]


def test_every_pair_of_windows_is_told_apart_on_three_axes() -> None:
    for shifted in (False, True):
        cells = window_cells((4, 6, 5), (2, 4, 3), shifted=shifted)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(6), torch.arange(5))
        offset = torch.tensor([1, 2, 2]) if shifted else torch.zeros(3, dtype=torch.int64)
        blocks = (places + offset) // torch.tensor([2, 4, 3])
        same = (blocks[:, None] == blocks[None]).all(-1)
        assert torch.equal(cells[:, None] == cells[None], same)


def test_what_is_split_is_joined_again() -> None:
    lengths = torch.tensor([12, 4, 8])
    windows = Windows(window_cells((3, 4), (2, 2), shifted=True).expand(3, -1), lengths)
    packed = torch.randn(24, 5)
    assert torch.equal(windows.join(windows.split(packed), packed), packed)
    assert windows.largest == 4
    # 3 + 3 + 3 windows over two steps, 3 more that the third step begins, of the first clip alone 3 more again
    assert windows.count == 6 + 3 + 6


def test_attention_in_windows_is_attention_with_a_mask() -> None:
    """Against torch's own attention over the whole clip, told by a mask which tokens share a window."""
    torch.manual_seed(0)
    model = Transformer(dim=8, depth=2, heads=2).eval()
    lengths = torch.tensor([20, 8, 16])
    x = torch.randn(3, 20, 8) * valid_mask(lengths, 20)[..., None]
    cells = [window_cells((5, 4), (2, 2), shifted=shifted) for shifted in (False, True)]
    found, _ = model(x, lengths, windows=[Windows(one.expand(3, -1), lengths) for one in cells])
    for row, n in enumerate(lengths.tolist()):
        h = x[row : row + 1, :n]
        for block, one in zip(model.blocks, cells, strict=True):
            apart = one[:n, None] == one[None, :n]
            q, k, v = block.attention.qkv(block.norm1(h)).view(1, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=apart)
            h = h + block.attention.out(mixed.transpose(1, 2).reshape(1, n, 8))
            h = h + block.mlp(block.norm2(h))
        torch.testing.assert_close(found[row, :n], model.norm(h)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_reaches_its_own_window_and_no_further(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Transformer(dim=8, depth=1, heads=2).eval().to(dtype)
    cells, lengths = window_cells((4, 4), (2, 2), shifted=True), torch.tensor([16])
    windows = [Windows(cells.expand(1, -1), lengths)]
    x = torch.randn(1, 16, 8, dtype=dtype)
    other = x.clone()
    other[0, 5] = 10 * torch.randn(8)
    moved = (model(x, lengths, windows=windows)[0] != model(other, lengths, windows=windows)[0]).any(-1)[0]
    assert torch.equal(moved, cells == cells[5])
