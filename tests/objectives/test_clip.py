"""CLIP: values worked by hand, and what a batch of pairs, of any number of modalities, may change and what not."""

import math
from dataclasses import replace

import pytest
import torch
from pairs import POOL, batch, encoders, given, raw

from mmssl.encoder import Encoders
from mmssl.objectives.clip import CLIP


def clip(*names: str, shared: bool = False, **settings) -> CLIP:
    body = encoders(*(names or ("image", "text")), shared=shared)
    return CLIP(body, dim=8, pool={name: POOL[name] for name in body}, **settings)


def test_two_pairs_by_hand() -> None:
    # the first pair is one direction, the second another at a right angle with its own text at 45 degrees
    model = given(CLIP, [[[1, 0], [1, 0]], [[0, 1], [1, 1]]], temperature=0.5)
    loss = model(batch(rows=(0, 1)))
    half = math.sqrt(0.5)
    logits = 2 * torch.tensor([[1, half], [0, half]])
    expected = sum((-table.log_softmax(1).diag()).sum() for table in (logits, logits.T)) / 2
    assert loss.total.item() == pytest.approx(float(expected), rel=1e-6)
    assert loss.count == 2
    # picture 0 is nearest to text 0, picture 1 to text 1; text 0 to picture 0; and text 1 as near to both
    assert float(loss.metrics["accuracy"][0]) == 1.5
    assert float(loss.metrics["chance_accuracy"][0]) == 1.0
    assert float(loss.metrics["scale"][0]) == pytest.approx(4)


def test_pairs_that_are_the_same_are_no_negatives() -> None:
    vectors = [[[1, 0], [0.8, 0.6]], [[0.6, 0.8], [0.8, 0.6]], [[0, 1], [-0.6, 0.8]]]
    model = given(CLIP, vectors, temperature=0.5, same="text")
    loss = model(batch(rows=(0, 1, 2), labels=[7, 7, 9]))
    unit = torch.nn.functional.normalize(torch.tensor(vectors), dim=-1)
    table = 2 * unit[:, 0] @ unit[:, 1].T
    expected = 0.0
    for logits in (table, table.T):
        for row, others in enumerate([[0, 2], [1, 2], [0, 1, 2]]):
            expected += float(logits[row, others].logsumexp(0) - logits[row, row]) / 2
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    punished = given(CLIP, vectors, temperature=0.5)(batch(rows=(0, 1, 2)))
    assert punished.total.item() > expected + 1
    alone = model(batch(rows=(0, 1, 2), labels=[7, 7, 7]))
    assert alone.total.item() == pytest.approx(0, abs=1e-6)
    assert float(alone.metrics["accuracy"][0]) == 0


def test_a_shared_trunk_is_one_memory() -> None:
    apart, together = (clip(shared=shared) for shared in (False, True))
    trunk = sum(p.numel() for p in apart.encoder["image"].transformer.parameters())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (apart, together)]
    assert sizes[0] - sizes[1] == trunk


def test_three_modalities_are_all_their_pairs() -> None:
    names = ("speech", "image", "text")
    model = clip(*names)
    whole, parts = model(batch(*names)), []
    for pair in (names[:2], names[1:], names[::2]):
        two = clip(*names)
        two.encoder = Encoders({name: two.encoder[name] for name in pair})
        parts.append(two(batch(*pair)))
    assert whole.count == sum(part.count for part in parts) == 12
    assert torch.allclose(whole.total, sum(part.total for part in parts), rtol=1e-5)


def test_a_clip_that_lacks_a_member_is_in_the_pairs_that_it_has() -> None:
    names = ("speech", "image", "text")
    model = clip(*names)
    full = batch(*names)
    some = replace(
        full, inputs={**full.inputs, "image": raw("image", (0, 2, 3))}, rows={"image": torch.tensor([0, 2, 3])}
    )
    expected = [
        two(batch(*pair, rows=rows))
        for pair, rows in ((names[:2], (0, 2, 3)), (names[1:], (0, 2, 3)), (names[::2], (0, 1, 2, 3)))
        if (two := clip(*names)) is not None
        and setattr(two, "encoder", Encoders({name: two.encoder[name] for name in pair})) is None
    ]
    loss = model(some)
    assert loss.count == sum(part.count for part in expected) == 10
    assert torch.allclose(loss.total, sum(part.total for part in expected), rtol=1e-5)
    assert some.ids == full.ids


def test_the_scale_stays_within_one_and_a_hundred() -> None:
    model = clip()
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    for value, kept in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))):
        model.log_scale.data.fill_(value)
        model.after_step(1)
        assert model.log_scale.exp().item() == pytest.approx(kept)


def test_a_temperature_out_of_range_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="objective.temperature=0: must be from 0.01"):
        clip(temperature=0.0)


def test_pairs_without_their_key_are_refused() -> None:
    with pytest.raises(ValueError, match="every clip needs its 'text'"):
        clip(same="text")(batch())
