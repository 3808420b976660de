"""SigLIP: values worked by hand, and what its answers count."""

import math

import pytest
import torch
from pairs import batch, encoders, given

from mmssl.objectives.siglip import SigLIP


def nats(logit: float) -> float:
    """Of the answer yes to a logit."""
    return math.log1p(math.exp(-logit))


def test_two_pairs_by_hand() -> None:
    # the first pair is one direction, the second another at a right angle with its own text at 45 degrees
    model = given(SigLIP, [[[1, 0], [1, 0]], [[0, 1], [1, 1]]], temperature=0.5, bias=-1.0)
    loss = model(batch(rows=(0, 1)))
    half = math.sqrt(0.5)
    # picture 0 and text 0, picture 1 and text 1: yes; the other two: no
    expected = nats(2 - 1) + nats(2 * half - 1) + nats(-(2 * half - 1)) + nats(-(0 - 1))
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count == 2
    # picture 0 is nearest to text 0, picture 1 to text 1; text 0 to picture 0; and text 1 as near to both
    assert float(loss.metrics["accuracy"][0]) == 1.5
    assert float(loss.metrics["scale"][0]) == pytest.approx(4)
    assert float(loss.metrics["bias"][0]) == -2


def test_pairs_that_are_the_same_are_no_negatives() -> None:
    vectors = [[[1, 0], [0.8, 0.6]], [[0.6, 0.8], [0.8, 0.6]], [[0, 1], [-0.6, 0.8]]]
    model = given(SigLIP, vectors, temperature=0.5, bias=-1.0, same="text")
    loss = model(batch(rows=(0, 1, 2), labels=[7, 7, 9]))
    table = 2 * torch.tensor(vectors)[:, 0] @ torch.tensor(vectors)[:, 1].T - 1
    expected = sum(nats(float(table[i, i])) for i in range(3))
    expected += sum(nats(-float(table[i, j])) for i, j in ((0, 2), (1, 2), (2, 0), (2, 1)))
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)


def test_it_begins_with_the_scale_and_bias_of_the_paper() -> None:
    model = SigLIP(encoders("image", "text"), dim=8, pool={"image": "class", "text": "last"})
    assert model.log_scale.exp().item() == pytest.approx(10)
    assert model.bias.item() == -10


def test_attention_pools_real_tokens_by_a_learned_query_and_projects_nothing() -> None:
    side = encoders("image", "text")
    dim = side["image"].dim
    model = SigLIP(side, dim=dim, pool={"image": "attention", "text": "last"}, affine=True)
    assert set(model.project) == {"text"}
    assert model.project["text"].bias is not None
    inputs = batch(rows=(0, 1)).of("image")
    encoded = side["image"](side["image"].tokens(inputs))
    head, x = model.attend["image"], encoded.x[:, encoded.n_prefix :]
    keys, values = head.attention.kv(x).chunk(2, -1)
    parts = []
    for own in range(head.attention.heads):
        part = slice(own * dim // head.attention.heads, (own + 1) * dim // head.attention.heads)
        scores = keys[..., part] @ head.attention.query[part] / (part.stop - part.start) ** 0.5
        parts.append((scores.softmax(1)[..., None] * values[..., part]).sum(1))
    pooled = head.attention.out(torch.cat(parts, 1))
    expected = torch.nn.functional.normalize(pooled + head.mlp(head.norm(pooled)), dim=1)
    assert torch.allclose(model.joint("image", encoded), expected, atol=1e-6)
    with pytest.raises(
        ValueError, match=f"objective.pool: image: attention: .* which is {dim}, and objective.dim is 3"
    ):
        SigLIP(side, dim=3, pool={"image": "attention", "text": "last"})


def test_a_temperature_out_of_range_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="objective.temperature=0: must be above 0 and at most 1"):
        given(SigLIP, [[[1, 0], [1, 0]]], temperature=0.0)
