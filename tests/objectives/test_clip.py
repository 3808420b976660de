"""CLIP: values worked by hand, and what a batch of pairs, of any number of modalities, may change and what not."""

import math
from dataclasses import replace

import pytest
import torch

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.text.frontend import TokenTable
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.clip import CLIP
from mmssl.types import Batch, Raw

DIM = 16
LENGTHS = {"text": [9, 4, 7, 5], "speech": [1600, 900, 1210, 640]}
POOL = {"image": "class", "text": "last", "speech": "mean"}


def encoders(*names: str, shared: bool = False) -> Encoders:
    torch.manual_seed(0)
    trunk = Transformer(dim=DIM, depth=2, heads=2)
    tokenizer = byte_bpe([""], entries=258)
    frontends = {
        "image": lambda: Patches(dim=DIM, size=(4, 4)),
        "text": lambda: TokenTable(dim=DIM, tokenizer=tokenizer),
        "speech": lambda: LogMel(dim=DIM, bands=8, window_ms=10, hop_ms=2.5, rate=8000),
    }
    return Encoders(
        {
            name: Encoder(
                frontends[name](),
                trunk if shared else Transformer(dim=DIM, depth=2, heads=2),
                SinCos(DIM),
                prefix=int(name == "image"),
            )
            for name in names
        }
    )


def clip(*names: str, shared: bool = False, **settings) -> CLIP:
    body = encoders(*(names or ("image", "text")), shared=shared)
    return CLIP(body, dim=8, pool={name: POOL[name] for name in body}, **settings)


def raw(name: str, rows=(0, 1, 2, 3)) -> Raw:
    made = torch.Generator().manual_seed(3)
    ids = [f"clip{row}" for row in rows]
    if name == "image":
        return Raw(torch.rand(4, 3, 8, 12, generator=made)[list(rows)], torch.ones(len(rows), dtype=torch.int64), ids)
    lengths = torch.tensor(LENGTHS[name])
    shape = (4, int(lengths.max()))
    data = torch.rand(shape, generator=made) if name == "speech" else torch.randint(2, 256, shape, generator=made)
    data = torch.where(torch.arange(shape[1]) < lengths[:, None], data, 0)[list(rows)]
    lengths = lengths[list(rows)]
    return Raw(data[:, : int(lengths.max())], lengths, ids, 8000.0 if name == "speech" else None)


def batch(*names: str, rows=(0, 1, 2, 3), labels=None) -> Batch:
    inputs = {name: raw(name, rows) for name in names or ("image", "text")}
    return Batch(inputs, torch.arange(len(rows)), None if labels is None else torch.tensor(labels))


class Given(CLIP):
    """The loss of vectors that are given."""

    def __init__(self, vectors, **settings):
        super().__init__(encoders("image", "text"), dim=2, pool={"image": "class", "text": "last"}, **settings)
        self.vectors = torch.nn.functional.normalize(torch.tensor(vectors).float(), dim=-1)

    def _embedded(self, batch):
        return self.vectors * self.log_scale / self.log_scale.detach(), torch.ones(self.vectors.shape[:2]).bool()


def test_two_pairs_by_hand() -> None:
    # the first pair is one direction, the second another at a right angle with its own text at 45 degrees
    model = Given([[[1, 0], [1, 0]], [[0, 1], [1, 1]]], temperature=0.5)
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
    model = Given(vectors, temperature=0.5, same="text")
    loss = model(batch(rows=(0, 1, 2), labels=[7, 7, 9]))
    table = 2 * model.vectors[:, 0] @ model.vectors[:, 1].T
    expected = 0.0
    for logits in (table, table.T):
        for row, others in enumerate([[0, 2], [1, 2], [0, 1, 2]]):
            expected += float(logits[row, others].logsumexp(0) - logits[row, row]) / 2
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    punished = Given(vectors, temperature=0.5)(batch(rows=(0, 1, 2)))
    assert punished.total.item() > expected + 1
    alone = model(batch(rows=(0, 1, 2), labels=[7, 7, 7]))
    assert alone.total.item() == pytest.approx(0, abs=1e-6)
    assert float(alone.metrics["accuracy"][0]) == 0


@pytest.mark.parametrize("names", [("image", "text"), ("speech", "image", "text")])
def test_permuting_the_pairs_changes_nothing(names) -> None:
    model = clip(*names)
    one, other = model(batch(*names)), model(batch(*names, rows=(2, 0, 3, 1)))
    assert one.count == other.count
    assert torch.allclose(one.total, other.total, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_reach_every_part_and_twenty_steps_lower_the_loss(shared) -> None:
    names = ("speech", "image", "text")
    model = clip(*names, shared=shared)
    assert model.encoder.shared == shared
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(1, 21):
        loss = model(batch(*names))
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        if step == 1:
            assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
        model.after_step(step)
        values.append(loss.total.item() / loss.count)
    assert sum(values[-3:]) < 0.8 * sum(values[:3])


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


def test_a_batch_without_one_of_three_modalities_still_learns() -> None:
    model = clip("speech", "image", "text")
    some = batch("speech", "text")
    loss = model(some)
    loss.total.backward()
    assert loss.count == 4
    assert loss.total.isfinite()
    assert model.encoder["image"].frontend.project.weight.grad is None
    assert model.skips_parameters
    assert not clip().skips_parameters


def test_the_scale_stays_within_one_and_a_hundred() -> None:
    model = clip()
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    for value, kept in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))):
        model.log_scale.data.fill_(value)
        model.after_step(1)
        assert model.log_scale.exp().item() == pytest.approx(kept)


def test_a_vector_is_the_same_alone_and_beside_others_and_has_length_one() -> None:
    model = clip().eval()
    for name in ("image", "text"):
        one = model.encoder[name]
        together = model.joint(name, one(one.tokens(raw(name))))
        assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-6)
        for row in range(4):
            alone = model.joint(name, one(one.tokens(raw(name, (row,)))))
            assert torch.allclose(alone[0], together[row], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pool": {"image": "class"}}, "name a pooling for each modality, image and text, and no other"),
        ({"pool": {"image": "class", "text": "class"}}, r"no class token \(modality.text.encoder.prefix=0\)"),
        ({"pool": POOL}, "and no other"),
        ({"pool": {"image": "mean", "text": "mean"}, "temperature": 0.0}, "objective.temperature=0: must be from 0.01"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(settings, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        CLIP(encoders("image", "text"), **settings)


def test_pairs_without_their_key_are_refused() -> None:
    with pytest.raises(ValueError, match="every clip needs its 'text'"):
        clip(same="text")(batch())
