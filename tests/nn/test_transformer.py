"""The Transformer: equal to torch's own, exact on ragged rows, regularized as the papers have it."""

import math

import pytest
import torch

from mmssl.nn import transformer as room
from mmssl.nn.transformer import Transformer


def build(**settings):
    torch.manual_seed(0)
    return Transformer(**{"dim": 32, "depth": 3, "heads": 4, **settings})


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_torchs_encoder_layer(norm):
    ours = build(norm=norm, depth=1, eps=1e-5).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        32, 4, 128, 0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
    ).eval()
    block = ours.blocks[0]
    pairs = {
        theirs.self_attn.in_proj_weight: block.attention.qkv.weight,
        theirs.self_attn.in_proj_bias: block.attention.qkv.bias,
        theirs.self_attn.out_proj.weight: block.attention.out.weight,
        theirs.linear1.weight: block.mlp.up.weight,
        theirs.linear2.weight: block.mlp.down.weight,
    }
    with torch.no_grad():
        for to, source in pairs.items():
            to.copy_(source)
        for bias in (theirs.self_attn.out_proj.bias, theirs.linear1.bias, theirs.linear2.bias):
            bias.zero_()
        x = torch.randn(2, 9, 32)
        expected = ours.norm(theirs(x)) if norm == "pre" else theirs(ours.norm(x))
        assert torch.allclose(ours(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_row_is_the_same_alone_and_beside_longer_ones(norm, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    ours = build(norm=norm).eval()
    lengths = torch.tensor([20, 11, 1])
    x = torch.randn(3, 20, 32)
    x[1, 11:] = torch.nan  # whatever padding holds
    x[2, 1:] = 1e9
    out, layers = ours(x, lengths, layers=[0, 2, 3])
    for row, n in enumerate(lengths):
        alone, own = ours(x[row : row + 1, :n])[0], ours(x[row : row + 1, :n], layers=[0, 2, 3])[1]
        assert torch.allclose(out[row, :n], alone[0], atol=1e-5)
        assert out[row, n:].abs().sum() == 0
        for i in (0, 2, 3):
            assert torch.allclose(layers[i][row, :n], own[i][0], atol=1e-5)


@pytest.mark.parametrize("row_by_row", [1, 1000])
def test_gradients_of_a_ragged_batch_are_the_sum_of_its_rows(row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    ours = build().double()
    lengths = torch.tensor([9, 4])
    x = torch.randn(2, 9, 32).double()
    ours(x, lengths)[0].pow(2).sum().backward()
    together = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    for row, n in enumerate(lengths):
        ours(x[row : row + 1, :n])[0].pow(2).sum().backward()
    for ours_grad, p in zip(together, ours.parameters(), strict=True):
        assert torch.allclose(ours_grad, p.grad, atol=1e-9)


def test_layer_zero_is_the_input_and_the_last_has_no_final_norm():
    ours = build(norm="pre").eval()
    x = torch.randn(2, 5, 32)
    out, layers = ours(x, layers=[0, 3])
    assert torch.equal(layers[0], x)
    assert torch.allclose(ours.norm(layers[3]), out)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_it_may_stop_after_a_block_and_gives_what_that_block_gave(norm):
    model, x, lengths = build(norm=norm).eval(), torch.randn(2, 7, 32), torch.tensor([7, 4])
    for layer in range(4):
        stopped, kept = model(x, lengths, layers=[0], until=layer)
        _, layers = model(x, lengths, layers=[0, layer])
        assert torch.equal(stopped, layers[layer])
        assert torch.equal(kept[0], layers[0])


@pytest.mark.parametrize("row_by_row", [1, 99])
@pytest.mark.parametrize("lengths", [None, [9, 3, 6]])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "post"}, {"layer_scale": 0.5, "causal": True}, {"depth": 0}, {"layer_drop": 0.6}, {"drop_path": 0.9}],
    ids=str,
)
def test_rows_that_are_wanted_are_those_of_all_with_their_gradients(settings, lengths, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    model = build(**settings)
    x = torch.randn(3, 9, 32)
    lengths = None if lengths is None else torch.tensor(lengths)
    wanted = torch.tensor([0, 4, 8, 9, 11, 19, 23])  # of the second row its first and third, of the third 1 and 5
    results = []
    for given in (None, wanted):
        model.zero_grad()
        model.draws.zero_()
        torch.manual_seed(1)
        h, _ = model(x, lengths, wanted=given)
        rows = h.flatten(0, 1)[wanted] if given is None else h
        rows.square().sum().backward()
        results.append((rows.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (whole, expected), (some, found) = results
    assert some.shape == (7, 32)
    assert torch.allclose(some, whole, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    stopped = model(x, lengths, wanted=wanted, until=0)[0]
    assert torch.equal(stopped, model(x, lengths, until=0)[0].flatten(0, 1)[wanted])


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="layer=4: this Transformer has layers 0"):
        build()(torch.randn(1, 2, 32), layers=[4])


def test_layer_drop_leaves_out_the_same_blocks_on_every_rank_and_none_in_evaluation():
    first, second = build(layer_drop=0.5, depth=8), build(layer_drop=0.5, depth=8)
    torch.manual_seed(1)  # ranks differ in their generators
    one = [first._left_out() for _ in range(40)]
    torch.manual_seed(2)
    assert one == [second._left_out() for _ in range(40)]
    assert 120 < sum(map(len, one)) < 200  # 160 expected of 320
    assert first.eval()._left_out() == set()


def test_layer_drop_goes_on_where_it_stopped():
    first = build(layer_drop=0.5, depth=8)
    for _ in range(3):
        first._left_out()
    resumed = build(layer_drop=0.5, depth=8)
    resumed.load_state_dict(first.state_dict())
    assert first._left_out() == resumed._left_out()


def test_drop_path_leaves_out_whole_clips_and_keeps_the_mean():
    ours = build(depth=2, drop_path=0.5)
    torch.manual_seed(0)
    lengths = torch.tensor([6] * 300 + [5] * 300)
    layout = room.Layout(torch.zeros(600, 6, 32), lengths)
    branch = layout.unpack(ours.blocks[1]._branch(layout.pack(torch.ones(600, 6, 32)), layout))
    per_clip = branch[:, :5]
    assert set(per_clip.unique().tolist()) == {0.0, 2.0}
    assert (per_clip == per_clip[:, :1, :1]).all()
    assert abs(per_clip.mean() - 1) < 0.2
    assert ours.blocks[0].drop_path == 0


def test_the_input_is_dropped_behind_the_norm_that_stands_before_the_blocks():
    torch.manual_seed(0)
    model = Transformer(dim=64, depth=1, heads=2, norm="post", dropout=0.25)
    x = torch.randn(4, 10, 64)
    _, kept = model(x, layers=[0])
    alive = kept[0] != 0
    assert abs((~alive).float().mean() - 0.25) < 0.05
    torch.testing.assert_close(kept[0][alive], (torch.nn.functional.layer_norm(x, (64,), eps=1e-6) / 0.75)[alive])


@pytest.mark.parametrize("name", ["activation_dropout", "dropout"])
def test_what_is_dropped_whole_leaves_the_residual_alone(name):
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "drop_path": 0.0, name: 1.0}
    block = room.Block(8, 2, 16, norm="pre", eps=1e-6, activation="gelu", layer_scale=None, gated=False, **rates)
    x = torch.randn(2, 3, 8)
    layout = room.Layout(x, None)
    # without activations the MLP gives its bias, which is zero here; without branches nothing is added at all
    torch.nn.init.zeros_(block.mlp.down.bias)
    attended = x + block.attention(block.norm1(x), layout)
    assert torch.equal(block(x, layout)[0], attended if name == "activation_dropout" else x)
    assert not torch.equal(block.eval()(x, layout)[0], attended)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_can_be_read_at_its_mlp(norm):
    ours = build(norm=norm).eval()
    x, lengths = torch.randn(2, 9, 32), torch.tensor([9, 4])
    _, kept = ours(x, lengths, layers=range(ours.depth + 1))
    _, added = ours(x, lengths, layers=range(1, ours.depth + 1), point="mlp")
    for i, block in enumerate(ours.blocks, start=1):
        # before the residual: the rest of the block, worked out from its input, is what it is added to
        h = kept[i - 1][1:, :4]
        layout = room.Layout(h, None)
        if norm == "pre":
            h = h + block.attention(block.norm1(h), layout)
            expected = kept[i][1:, :4] - h
        else:
            expected = block.mlp(block.norm1(h + block.attention(h, layout)))
        torch.testing.assert_close(added[i][1:, :4], expected, rtol=1e-4, atol=1e-5)
        assert not added[i][1, 4:].any()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=5"):
        build(heads=5)


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]])
def test_bfloat16_is_float32_within_its_precision(lengths):
    # attention is another piece of code there
    ours, lengths = build(), torch.tensor(lengths)
    x = torch.randn(2, 9, 32)

    def run():
        ours.zero_grad()
        out = ours(x, lengths)[0]
        out.float().pow(2).sum().backward()
        return out.detach().float(), torch.cat([p.grad.flatten() for p in ours.parameters()])

    exact, gradient = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rough = run()
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert torch.cosine_similarity(gradient, rough, dim=0) > 0.999
    assert rough.isfinite().all()


def test_attention_written_out_is_torchs():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    for given in (None, mask[:, None, None, :]):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
        assert torch.allclose(room._attend_plainly(q, k, v, attn_mask=given, dropout_p=0.0), expected, atol=1e-5)


def test_scores_beyond_a_bound_are_never_held_at_once(monkeypatch):
    ours, x = build(), torch.randn(2, 9, 32)
    called = []
    plainly = room._attend_plainly
    monkeypatch.setattr(room, "_attend_plainly", lambda *args, **kwargs: called.append(1) or plainly(*args, **kwargs))
    with torch.autocast("cpu", torch.bfloat16):
        ours(x)
        assert len(called) == ours.depth
        monkeypatch.setattr(room, "_PLAIN_SCORES", 2 * ours.blocks[0].attention.heads * 9 * 9 - 1)
        ours(x)
    assert len(called) == ours.depth


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_drops_while_training_only(precision):
    ours = build(attention_dropout=0.5)
    x = torch.randn(2, 9, 32)

    def run():
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32), torch.no_grad():
            return ours(x)[0]

    assert not torch.equal(run(), run())
    ours.eval()
    assert torch.equal(run(), run())


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize(
    ("settings", "sees"),
    [
        ({"causal": True}, lambda of, other: other <= of),
        ({"window": 2}, lambda of, other: abs(of - other) <= 2),
        ({"causal": True, "window": 1}, lambda of, other: of - 1 <= other <= of),
        ({"window": 0}, lambda of, other: of == other),
    ],
)
def test_a_token_depends_on_those_that_it_sees_and_on_no_others(settings, sees, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    ours = build(depth=1, **settings)
    lengths = torch.tensor([7, 4])
    x = torch.randn(2, 7, 32, requires_grad=True)
    for row, n in enumerate(lengths.tolist()):
        for of in range(n):
            (grad,) = torch.autograd.grad(ours(x, lengths)[0][row, of].square().sum(), x)
            reached = grad.abs().sum(-1) > 0
            assert reached[row].tolist() == [other < n and sees(of, other) for other in range(7)]
            assert not reached[1 - row].any()


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize("settings", [{"causal": True}, {"window": 2}])
def test_a_row_that_sees_less_is_the_same_alone_too(settings, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    ours = build(**settings).eval()
    lengths = torch.tensor([20, 11, 1])
    x = torch.randn(3, 20, 32)
    out, _ = ours(x, lengths)
    for row, n in enumerate(lengths):
        assert torch.allclose(out[row, :n], ours(x[row : row + 1, :n])[0][0], atol=1e-5)


def test_a_causal_block_is_torchs_with_its_own_mask():
    ours = build(depth=1, causal=True, eps=1e-5).double()
    x = torch.randn(2, 9, 32).double()
    block = ours.blocks[0]
    h = block.norm1(x)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    attention = block.attention
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        *[h.transpose(0, 1)] * 3,
        32,
        4,
        attention.qkv.weight,
        attention.qkv.bias,
        None,
        None,
        False,
        0.0,
        attention.out.weight,
        attention.out.bias,
        attn_mask=mask,
    )
    layout = room.Layout(x, None, causal=True)
    assert torch.allclose(attention(h, layout), expected.transpose(0, 1), atol=1e-9)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="transformer.window=-1"):
        build(window=-1)


@pytest.mark.parametrize("row_by_row", [1, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_attended_to_reaches_itself_alone(causal, row_by_row, monkeypatch):
    monkeypatch.setattr(room, "_ROW_BY_ROW", row_by_row)
    ours = build(depth=1, causal=causal)
    attended = torch.tensor(
        [[False, True, False, True, True, False, True], [True, False, False, True, True, True, True]]
    )
    x = torch.randn(2, 7, 32, requires_grad=True)
    for lengths in (torch.tensor([7, 4]), None):
        out, _ = ours(x, lengths, attended=attended)
        for row, n in enumerate([7, 7] if lengths is None else lengths.tolist()):
            for of in range(n):
                (grad,) = torch.autograd.grad(out[row, of].square().sum(), x, retain_graph=True)
                reached = grad.abs().sum(-1)[row] > 0
                assert reached.tolist() == [
                    other == of or bool(other < n and attended[row, other] and (other < of or not causal))
                    for other in range(7)
                ]


def test_layer_scale_multiplies_what_a_branch_adds():
    ours = build(depth=1, layer_scale=0.5).eval()
    plain = build(depth=1).eval()
    plain.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if not name.endswith("scale")})
    x = torch.randn(1, 4, 32)
    layout = room.Layout(x, None)
    block, other = ours.blocks[0], plain.blocks[0]
    assert torch.allclose(block.attention(x, layout), other.attention(x, layout) / 2)
    assert torch.allclose(block.mlp(x), other.mlp(x) / 2)


def test_activations_by_hand():
    x = torch.tensor([2.0])
    gelu = 2 * 0.9772498680518208  # times the normal distribution's share below 2
    assert room.ACTIVATIONS["gelu"](x).item() == pytest.approx(gelu, abs=1e-6)
    assert room.ACTIVATIONS["gelu_tanh"](x).item() == pytest.approx(gelu, abs=5e-4)
    assert room.ACTIVATIONS["quick_gelu"](x).item() == pytest.approx(2 / (1 + math.exp(-3.404)), abs=1e-6)
    # the first half opens the second: 1 * sigmoid(1) * 5
    assert room.ACTIVATIONS["swiglu"](torch.tensor([1.0, 5.0])).item() == pytest.approx(5 / (1 + math.exp(-1)))


def test_a_norm_at_the_start_and_none_at_the_end():
    ours = build(depth=0, input_norm=True, final_norm=False, eps=1e-5)
    x = torch.randn(2, 4, 32)
    out, layers = ours(x, layers=[0])
    assert torch.allclose(out, torch.nn.functional.layer_norm(x, (32,)), atol=1e-6)
    assert torch.equal(out, layers[0])
    with pytest.raises(ValueError, match="norm=post"):
        build(norm="post", final_norm=False)
