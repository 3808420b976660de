"""MP3: tokens that are told nothing of their places, and have to tell them."""

import math
from dataclasses import replace

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.logmel import LogMel
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import NoPositions, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mp3 import MP3
from mmssl.types import Batch, Raw

DIM = 16


def encoder(positions=None, **transformer):
    torch.manual_seed(0)
    frontend = Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5])
    body = Transformer(dim=DIM, depth=2, heads=2, **transformer)
    return Encoder(frontend, body, positions or NoPositions(DIM), prefix=1)


def pictures(number=3):
    data = torch.rand(number, 1, 6, 8, generator=torch.Generator().manual_seed(1))
    ids = [str(i) for i in range(number)]
    return Batch({"image": Raw(data, torch.ones(number, dtype=torch.int64), ids)}, torch.arange(number))


def test_one_answer_for_all_is_at_chance():
    model = MP3(encoder(), positions=20)
    torch.nn.init.zeros_(model.predict.weight)
    loss = model(pictures())
    assert loss.count == 3 * 12
    assert loss.total.item() == pytest.approx(36 * math.log(12), rel=1e-6)
    found = {name: float(value) / n for name, (value, n) in loss.metrics.items()}
    assert found["chance"] == pytest.approx(math.log(12))
    assert found["accuracy"] == found["chance_accuracy"] == pytest.approx(1 / 12)
    assert found["prediction_std"] == pytest.approx(0.0, abs=1e-6)


def test_a_clip_chooses_among_its_own_places():
    torch.manual_seed(0)
    frontend = LogMel(dim=DIM, bands=6, window_ms=10, hop_ms=10, rate=2000, stack=1)
    net = Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), NoPositions(DIM))
    model = MP3(net, positions=50)
    torch.nn.init.zeros_(model.predict.weight)
    raw = Raw(torch.randn(2, 200), torch.tensor([200, 80]), ["a", "b"], 2000.0)  # ten tokens and four
    loss = model(Batch({"speech": raw}, torch.arange(2)))
    assert loss.total.item() == pytest.approx(10 * math.log(10) + 4 * math.log(4), rel=1e-6)
    assert loss.metrics["chance"][0] == pytest.approx(loss.total.item(), rel=1e-6)
    assert loss.metrics["chance_accuracy"] == (2, 14)


def test_the_order_of_tokens_plays_no_part():
    net = encoder()
    tokens = net.tokens(pictures().raw)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(3, 12, dtype=torch.bool)
    masked[:, [1, 4, 5, 9]] = True
    first = net(tokens, plan_of(masked, tokens.lengths), "unseen").tokens
    moved = replace(tokens, x=tokens.x[:, order])
    second = net(moved, plan_of(masked[:, order], tokens.lengths), "unseen").tokens
    assert torch.allclose(first[:, order], second, atol=1e-6)


def test_no_other_token_sees_what_is_unseen():
    net = encoder()
    tokens = net.tokens(pictures(1).raw)
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, [2, 7]] = True
    plan = plan_of(masked, tokens.lengths)
    before = net(tokens, plan, "unseen").x[0]
    x = tokens.x.clone()
    x[0, 2] += 1.0
    after = net(replace(tokens, x=x), plan, "unseen").x[0]
    changed = (before != after).any(1)
    assert changed.nonzero()[:, 0].tolist() == [1 + 2]  # behind the class token


def test_it_learns_where_tokens_stand():
    """A picture that brightens from patch to patch tells each one its place."""
    model = MP3(encoder(), positions=12)
    shade = torch.linspace(0, 1, 12).view(1, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch = Batch({"image": Raw(shade, torch.ones(1, dtype=torch.int64), ["a"])}, torch.arange(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    found = {name: float(value) / n for name, (value, n) in loss.metrics.items()}
    assert found["accuracy"] > 0.5
    assert found["accuracy_unseen"] > 0.5
    assert found["loss"] < found["chance"]


def test_what_tells_tokens_their_places_is_refused():
    with pytest.raises(ValueError, match="positions: SinCos tells tokens where they stand"):
        MP3(encoder(SinCos(DIM)), positions=12)
    with pytest.raises(ValueError, match="transformer.causal, transformer.window"):
        MP3(encoder(causal=True), positions=12)
    with pytest.raises(ValueError, match="transformer.causal, transformer.window"):
        MP3(encoder(window=3), positions=12)
    with pytest.raises(ValueError, match="transformer.bias: whom a token sees, and how far off"):
        MP3(encoder(bias={"name": "alibi"}), positions=12)
    with pytest.raises(ValueError, match="objective.positions=1"):
        MP3(encoder(), positions=1)


def test_a_clip_with_more_tokens_than_positions_is_named():
    with pytest.raises(ValueError, match="0: 12 tokens, but objective.positions=11; crop the clips, or raise it"):
        MP3(encoder(), positions=11)(pictures())
