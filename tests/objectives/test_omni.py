"""Omni: each modality learns as it would by itself, on parts that it shares."""

import pytest
import torch

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS as PICTURES
from mmssl.modalities.speech.logmel import LogMel
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.nn.trunk import twin
from mmssl.objectives.data2vec2 import Data2Vec2
from mmssl.objectives.mae import MAE
from mmssl.objectives.omni import Omni
from mmssl.objectives.wav2vec2 import Wav2Vec2
from mmssl.types import Batch, Raw

DIM = 16


def encoders(**settings) -> Encoders:
    torch.manual_seed(0)
    trunk = Transformer(dim=DIM, depth=2, heads=2)
    image = Encoder(Patches(dim=DIM, size=(4, 4)), trunk, SinCos(DIM))
    heard = LogMel(dim=DIM, bands=8, window_ms=10, hop_ms=2.5, rate=8000)
    return Encoders({"image": image, "speech": Encoder(heard, twin(trunk, **settings), SinCos(DIM), mask_token=True)})


def mae(encoder: Encoder) -> MAE:
    target = PICTURES["normalized_pixels"]
    dim = target.dim(encoder.frontend)
    return MAE(encoder, target=target.values, target_dim=dim, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def data2vec2(encoder: Encoder) -> Data2Vec2:
    return Data2Vec2(
        encoder, mask="blocks", mask_size=2, clones=2, decoder_dim=8, decoder_depth=1, decoder_groups=2, top_k=2
    )


def omni(speech=data2vec2, weights=None, **settings) -> Omni:
    body = encoders(**settings)
    return Omni(body, of={"image": mae(body["image"]), "speech": speech(body["speech"])}, weights=weights)


def batch(name: str) -> Batch:
    made = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1600, 900, 1210, 640])
    data = torch.rand((4, 3, 8, 12) if name == "image" else (4, 1600), generator=made)
    if name == "speech":
        data = torch.where(torch.arange(1600) < lengths[:, None], data, 0.0)
    ones = torch.ones(4, dtype=torch.int64)
    rate = 8000.0 if name == "speech" else None
    raw = Raw(data, lengths if name == "speech" else ones, [f"{name}{n}" for n in range(4)], rate)
    return Batch({name: raw}, torch.arange(4))


def test_the_loss_is_that_of_the_modality_alone_and_its_metrics_are_named_after_it() -> None:
    model = omni()
    for name in ("image", "speech"):
        whole, alone = model(batch(name)), model.of[name](batch(name))
        assert torch.equal(whole.total, alone.total)
        assert whole.count == alone.count
        assert list(whole.metrics) == [f"{name}/{metric}" for metric in (*alone.metrics, "updates")]
    both = Batch(dict(batch("image").inputs) | dict(batch("speech").inputs), torch.arange(4))
    with pytest.raises(ValueError, match="a batch is of one modality, and this one has image and speech"):
        model(both)


def test_a_gradient_reaches_the_trunk_and_its_own_modality_alone() -> None:
    model = omni(own_blocks=1, own_norms=True)
    for name, other in (("image", "speech"), ("speech", "image")):
        model.zero_grad()
        model(batch(name)).total.backward()
        moved = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        trunk = model.encoder[name].transformer.blocks[1]
        assert all(p.grad is not None for p in (*trunk.attention.parameters(), *trunk.mlp.parameters()))
        own = {id(p) for p in model.encoder[other].parameters()} - {id(p) for p in model.encoder[name].parameters()}
        assert own
        assert not [key for key, p in model.named_parameters() if id(p) in own and key in moved]
        assert not [key for key in moved if key.startswith(f"of.{other}.")]


def test_every_modality_learns_in_twenty_updates() -> None:
    model = omni()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    values: dict[str, list[float]] = {"image": [], "speech": []}
    for step in range(1, 41):
        name = ("image", "speech")[step % 2]
        loss = model(batch(name))
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        model.after_step(step)
        values[name].append(loss.total.item() / loss.count)
    for losses in values.values():
        assert sum(losses[-3:]) < sum(losses[:3])
    assert model.updates.tolist() == [20, 20]


def test_a_teacher_moves_when_its_modality_learned_and_counts_its_own_updates() -> None:
    model, told = omni(), []
    for name in ("image", "speech"):
        model.of[name].after_step = lambda step, name=name: told.append((name, step))
    for step, name in enumerate(["image", "speech", "image", "image"], 1):
        model(batch(name))
        # what is evaluated between an update's loss and its end is none that learned
        model.eval()
        model(batch("speech"))
        model.train()
        model.after_step(step)
    assert told == [("image", 1), ("speech", 1), ("image", 2), ("image", 3)]
    again = omni()
    again.load_state_dict(model.state_dict())
    assert again.updates.tolist() == [3, 1]


def test_sums_over_the_whole_batch_go_to_the_objective_that_asks_for_them() -> None:
    model = omni(lambda encoder: Wav2Vec2(encoder, negatives=5, codes=8, dim=8, mask_prob=0.4, mask_span=2))
    inner = model.of["speech"]
    torch.manual_seed(0)
    expected = inner.statistics(batch("speech"))
    torch.manual_seed(0)
    assert torch.equal(model.statistics(batch("speech")), expected)
    assert model.statistics(batch("image")).tolist() == [0.0]
    model.global_statistics = expected
    assert inner.global_statistics is expected
    assert not hasattr(model.of["image"], "global_statistics")
    model.global_statistics = None
    assert inner.global_statistics is None


@pytest.mark.parametrize("weights", [{"image": 1}, {"image": 1, "speech": 0}, {"image": 1, "speech": 1, "text": 1}])
def test_weights_are_numbers_above_0_of_all_modalities(weights) -> None:
    with pytest.raises(
        ValueError, match=r"objective.weights=.*: give a number above 0 for each modality, image and sp"
    ):
        omni(weights=weights)
    assert omni().weights == {"image": 1.0, "speech": 1.0}
