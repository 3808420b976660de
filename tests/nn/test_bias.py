"""Biases of attention: by coordinates alone, the same for a clip beside longer ones and for visible tokens alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mmssl.build import build_encoder
from mmssl.nn import transformer as room
from mmssl.nn.bias import ALiBi, DistanceBuckets, Gate, GridTable, _slopes
from mmssl.nn.masking import random_mask
from mmssl.nn.transformer import Transformer
from mmssl.recipe import RecipeError, load
from mmssl.resolve import resolve
from mmssl.types import Raw, Tokens

BUCKETS = {"bias": {"name": "buckets", "buckets": 8, "furthest": 8}}
KINDS = {
    "buckets": BUCKETS,
    "gated buckets": BUCKETS | {"gated_bias": True},
    "alibi": {"bias": {"name": "alibi"}},
    "alibi of each layer": {"bias": {"name": "alibi", "per_layer": True}},
    "alibi on a grid": {"bias": {"name": "alibi"}},
    "grid": {"bias": {"name": "grid", "grid": [4, 2, 2]}},
    "one grid for all": {"bias": {"name": "grid", "grid": [4, 2, 2], "shared": True}},
}
FRONTENDS = {
    "speech": {"name": "waveform", "layers": [[8, 10, 5], [8, 3, 2], [8, 2, 2]]},
    "video": {"name": "tubes", "size": [2, 4, 4]},
}


def encoder(kind, **transformer):
    modality = "video" if "grid" in kind else "speech"
    torch.manual_seed(0)
    made = build_encoder(
        {
            "modality": modality,
            "frontend": FRONTENDS[modality],
            "positions": {"name": "none"},
            "transformer": {"dim": 16, "depth": 2, "heads": 2, **KINDS[kind], **transformer},
            "encoder": {"prefix": 1},
        }
    )
    if "alibi" in kind:
        torch.nn.init.uniform_(made.transformer.bias.table, 1, 9)
    else:
        torch.nn.init.normal_(made.transformer.bias.table)
    return made.eval()


def clips(kind):
    torch.manual_seed(1)
    if "grid" in kind:
        return Raw(torch.rand(3, 3, 8, 8, 8), torch.tensor([8, 6, 2]), list("abc"), 7.5)
    return Raw(torch.randn(3, 1200), torch.tensor([1200, 700, 300]), list("abc"), 16_000.0)


def tokens_on(*grid, axes):
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(1, -1, len(grid))
    return Tokens(torch.zeros(1, places.shape[1], 4), torch.tensor([places.shape[1]]), places, axes, grid)


def test_near_distances_have_values_of_their_own_and_far_ones_share_them():
    bias = DistanceBuckets(heads=1, depth=1, buckets=8, furthest=8)
    # a quarter of the buckets are exact on either side; from 2 on they grow as 2 + 2 log(d / 2) / log(8 / 2)
    behind = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 8: 3, 500: 3}
    for steps, number in behind.items():
        assert bias._bucket(torch.tensor(-steps)) == number
        assert bias._bucket(torch.tensor(steps)) == (number + 4 if steps else 0)


def test_a_value_stands_where_its_token_looks_at_that_of_its_distance():
    bias = DistanceBuckets(heads=2, depth=3, buckets=8, furthest=8)
    tokens = tokens_on(3, axes=("t",))
    found = bias(tokens.coords, tokens, 1)
    assert len(found) == 3
    assert torch.equal(found[0], found[2])
    # the row looks, the column is looked at; the class token in front has none
    number = [[0, 5, 6], [1, 0, 5], [2, 1, 0]]
    expected = F.pad(bias.table[torch.tensor(number)].permute(2, 0, 1), (1, 0, 1, 0))
    assert torch.equal(found[0][0], expected)


def test_a_grids_value_is_that_of_the_two_differences():
    bias = GridTable(heads=2, depth=2, grid=[2, 3])
    torch.nn.init.normal_(bias.table)
    tokens = tokens_on(2, 3, axes=("h", "w"))
    found = bias(tokens.coords, tokens, 1)
    places = list(itertools.product(range(2), range(3)))
    for block in range(2):
        table = bias.table[block]
        # 3 differences down, 5 across, and behind them looking from, at, and to itself of the class token
        for (i, one), (j, other) in itertools.product(enumerate(places, 1), enumerate(places, 1)):
            down, across = one[0] - other[0] + 1, one[1] - other[1] + 2
            assert torch.equal(found[block][0, :, i, j], table[5 * down + across])
        for i in range(1, 7):
            assert torch.equal(found[block][0, :, 0, i], table[15])
            assert torch.equal(found[block][0, :, i, 0], table[16])
        assert torch.equal(found[block][0, :, 0, 0], table[17])


def test_alibi_looks_away_by_slope_times_scale_times_distance():
    bias = ALiBi(heads=2, depth=3)
    with torch.no_grad():
        bias.table.copy_(torch.tensor([[2.0, -1.0]]))
    tokens = tokens_on(7, axes=("t",))
    # of masked copies the true places count: here those of tokens 0, 1 and 6
    found = bias(torch.tensor([[[0], [1], [6]]]), tokens, 1)
    assert len(found) == 3
    assert all(torch.equal(one, found[0]) for one in found)
    # slopes of two heads are 2^-4 and 2^-8; the first has twice its slope, and the second's scale ends at 0
    away = -2 / 16 * torch.tensor([[0.0, 1, 6], [1, 0, 5], [6, 5, 0]])
    assert torch.equal(found[0][0, 0], F.pad(away, (1, 0, 1, 0)))
    assert torch.equal(found[0][0, 1], torch.zeros(4, 4))
    own = ALiBi(heads=2, depth=2, per_layer=True)
    with torch.no_grad():
        own.table[1] = 3
    first, second = own(tokens.coords, tokens, 0)
    assert torch.equal(second, 3 * first)
    assert first[0, 1, 2, 6] == -4 * 2**-8


def test_alibi_on_a_grid_goes_by_the_straight_distance():
    tokens = tokens_on(4, 5, axes=("h", "w"))
    [found] = ALiBi(heads=1, depth=1)(tokens.coords, tokens, 0)
    assert found[0, 0, 0, -1] == -5 / 256  # 3 down and 4 across


def test_slopes_are_those_of_the_paper():
    """Section 3: of 8 heads 1/2, 1/4, ..., 1/256; of 12, as released, four more between those of 16 heads."""
    assert _slopes(8) == [2.0**-i for i in range(1, 9)]
    assert _slopes(12) == [*(2.0**-i for i in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert _slopes(1) == [2**-8]


def test_a_larger_picture_stretches_the_table_about_its_middle():
    bias = GridTable(heads=1, depth=1, grid=[2, 2])
    with torch.no_grad():
        # a plane over the differences, which stretching leaves a plane but for its edge
        bias.table[0, :9, 0] = torch.tensor([-1.0, 0.0, 1.0]).repeat(3)
    tokens = tokens_on(2, 4, axes=("h", "w"))
    [found] = bias(tokens.coords, tokens, 0)
    first_row = found[0, 0, :4, :4]
    assert torch.equal(first_row.diagonal(), torch.zeros(4))
    # 3 differences become 7, so a step of one is 3 / 7 of one before
    steps = first_row.diagonal(-1)
    assert torch.allclose(steps, torch.full((3,), 3 / 7))
    assert torch.allclose(first_row, -first_row.T, atol=1e-6)


def test_a_gate_of_no_weights_leaves_what_its_scale_says():
    gate = Gate(8, 2)
    torch.nn.init.zeros_(gate.project.weight)
    torch.nn.init.zeros_(gate.project.bias)
    with torch.no_grad():
        gate.scale.copy_(torch.tensor([1.0, 4.0]))
    # both gates are half open: .5 (.5 scale - 1) + 2
    assert gate(torch.randn(5, 8)).tolist() == [[1.75, 2.5]] * 5


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_the_same_alone_and_beside_longer_ones(kind, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    model, raw = encoder(kind), clips(kind)
    together = model(model.tokens(raw))
    for row, (n, real) in enumerate(zip(raw.lengths.tolist(), together.lengths.tolist(), strict=True)):
        alone = Raw(
            raw.data[row : row + 1].narrow(-1 if raw.data.ndim == 2 else 2, 0, n), raw.lengths[row : row + 1], ["a"]
        )
        own = model(model.tokens(alone))
        assert own.x.shape[1] == real
        assert torch.allclose(together.x[row, :real], own.x[0], atol=1e-5)


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_visible_tokens_alone_are_what_they_are_where_hidden_ones_are_not_looked_at(kind, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    model, raw = encoder(kind), clips(kind)
    tokens = model.tokens(raw)
    plan = random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(3), clones=2)
    few, all_of_them = model(tokens, plan, "drop"), model(tokens, plan, "unseen")
    for row, n in enumerate(plan.keep_lengths.tolist()):
        expected = torch.cat([all_of_them.x[row, :1], all_of_them.x[row, 1:][plan.keep[row, :n]]])
        assert torch.allclose(few.x[row, : n + 1], expected, atol=1e-5)
    without = Transformer(dim=16, depth=2, heads=2).eval()
    without.load_state_dict(
        {k: v for k, v in model.transformer.state_dict().items() if "gate" not in k and "bias.t" not in k}
    )
    model.transformer = without
    assert not torch.allclose(model(tokens, plan, "drop").x, few.x, atol=1e-2)


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_ragged_batch_are_the_sum_of_its_rows(kind, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    model, raw = encoder(kind).double(), clips(kind)
    tokens = model.tokens(Raw(raw.data.double(), raw.lengths, raw.ids, raw.rate))
    learned = [p for name, p in model.named_parameters() if "transformer" in name]
    together = torch.autograd.grad(model(tokens).x.pow(2).sum(), learned, retain_graph=True)
    apart = [torch.zeros_like(p) for p in learned]
    for row in range(3):
        size = int(tokens.lengths[row])
        grid = (size // (len(tokens.coords[0]) // tokens.grid[0]), *tokens.grid[1:])
        own = Tokens(
            tokens.x[row : row + 1, :size], tokens.lengths[row : row + 1], tokens.coords[:1, :size], tokens.axes, grid
        )
        for total, part in zip(
            apart, torch.autograd.grad(model(own).x.pow(2).sum(), learned, retain_graph=True), strict=True
        ):
            total += part
    names = [name for name, _ in model.named_parameters() if "transformer" in name]
    for name, one, other in zip(names, together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-9), name
        assert one.abs().sum() > 0 or "qkv" in name, name


def test_written_out_attention_takes_a_bias_as_torchs_does():
    q, k, v = torch.randn(3, 2, 2, 5, 4).unbind(0)
    bias = torch.randn(1, 2, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    plain = room._attend_plainly(q, k, v, attn_mask=bias, dropout_p=0.0)
    assert torch.allclose(plain, F.scaled_dot_product_attention(q, k, v, attn_mask=bias), atol=1e-6)


def test_in_bfloat16_it_is_the_same_to_its_precision():
    model, raw = encoder("gated buckets"), clips("gated buckets")
    tokens = model.tokens(raw)
    with torch.autocast("cpu", torch.bfloat16):
        halved = model(tokens).x
    expected = model(tokens).x
    # a bfloat16 has 8 bits, and two blocks in a row round a few dozen times
    assert (halved - expected).abs().max() < 2**-8 * 20
    assert (expected.abs().mean(-1)[expected.abs().sum(-1) > 0] > 0.3).all()


@pytest.mark.parametrize("kind", ["gated buckets", "alibi"])
def test_a_token_that_sees_no_later_ones_hears_nothing_of_them_by_the_bias(kind):
    model, raw = encoder(kind, causal=True), clips(kind)
    tokens = model.tokens(raw)
    before = model(tokens).x
    tokens.x.data[:, 5:] += torch.randn(16)
    after = model(tokens).x
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[0, 6:], after[0, 6:], atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": {"name": "bucket"}}, "name='bucket'; one of buckets, grid, alibi"),
        ({"bias": {"name": "buckets", "buckets": 6}}, "buckets=6 and furthest=800; buckets divide by 4"),
        ({"bias": {"name": "buckets", "buckets": 8, "furthest": 2}}, "furthest=2"),
        ({"gated_bias": True}, "gated_bias=true: there is no bias to weigh"),
    ],
)
def test_what_cannot_be_a_bias_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Transformer(dim=8, depth=1, heads=2, **settings)


def test_tokens_that_a_bias_does_not_reach_over_are_refused():
    tokens = tokens_on(5, 2, 2, axes=("t", "h", "w"))
    with pytest.raises(ValueError, match=r"a grid of \(4, 2, 2\) does not reach over \(5, 2, 2\) tokens"):
        GridTable(heads=1, depth=1, grid=[4, 2, 2])(tokens.coords, tokens, 0)
    with pytest.raises(ValueError, match=r"grid of \(4, 2\) does not reach over \(5, 2, 2\) tokens"):
        GridTable(heads=1, depth=1, grid=[4, 2])(tokens.coords, tokens, 0)
    with pytest.raises(ValueError, match="in time alone, and these tokens lie on the axes t, h, w"):
        DistanceBuckets(heads=1, depth=1)(tokens.coords, tokens, 0)


def test_a_recipe_says_it_in_the_transformers_section():
    grid = ["data.train=train.jsonl", "transformer.bias.name=grid", "transformer.bias.grid=[7, 7]"]
    resolved = resolve(load("small/mae_image", grid))
    assert resolved.values["transformer"]["bias"] == {"name": "grid", "grid": [7, 7], "shared": False}
    assert resolve(load("small/mae_image", grid[:1])).values["transformer"]["bias"] is None
    for override, message in (
        ("transformer.bias.name=grids", "Did you mean 'grid'"),
        ("transformer.bias.shade=1", "unknown key 'transformer.bias.shade'. Did you mean 'transformer.bias.shared'"),
        ("transformer.bias=grid", r"transformer.bias: input should be an object \(got 'grid'\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            resolve(load("small/mae_image", [*grid, override]))
