"""Frames and sound reconstructed from each other (AV-MAE), and told from those of other clips as well (CAV-MAE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities import MODALITIES
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.video.frontend import Tubes
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.reconstruction import Reconstructed
from mmssl.nn.transformer import Transformer
from mmssl.nn.trunk import twin
from mmssl.objectives.av_mae import AVMAE
from mmssl.objectives.cav_mae import CAVMAE
from mmssl.types import Batch, Raw

DIM, RATE = 16, 8000
LENGTHS = {"video": [8, 4, 6, 2], "audio": [1600, 900, 1210, 640]}
RATIOS = {"video": 0.5, "audio": 0.5}
SMALL = {"mask_ratio": RATIOS, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
BOTH = pytest.mark.parametrize("kind", [AVMAE, CAVMAE])


def encoders(*, own_blocks: int = 1, own_norms: bool = True, prefix: int = 0, depth: int = 2) -> Encoders:
    torch.manual_seed(0)
    trunk = Transformer(dim=DIM, depth=depth, heads=2)
    other = twin(trunk, own_blocks=own_blocks, own_norms=own_norms) if own_blocks or own_norms else trunk
    frontends = {
        "video": Tubes(dim=DIM, size=[2, 4, 4], rate=5),
        "audio": SpectrogramPatches(dim=DIM, bands=8, size=[4, 4], window_ms=10, hop_ms=5, rate=RATE),
    }
    for p in other.parameters():  # so that no part of the two is the same by chance
        p.data += 0.02 * torch.randn_like(p)
    bodies = {"video": trunk, "audio": other}
    return Encoders(
        {name: Encoder(front, bodies[name], SinCos(DIM), prefix=prefix) for name, front in frontends.items()}
    )


def objective(kind: type[nn.Module], body: Encoders | None = None, **settings: Any) -> Any:
    body = body or encoders()
    targets = {}
    for name in body:
        target = MODALITIES[name].targets[{"video": "pixels", "audio": "spectrogram"}[name]]
        targets[name] = Reconstructed(target.values, target.dim(body[name].frontend))
    torch.manual_seed(1)
    return kind(body, targets=targets, **{**SMALL, **settings})


def raw(name: str, rows: tuple[int, ...] = (0, 1, 2, 3), fill: float = 0.0) -> Raw:
    made = torch.Generator().manual_seed(3)
    lengths = torch.tensor(LENGTHS[name])
    if name == "video":
        data = torch.rand(4, 3, 8, 8, 4, generator=made)
        real = (torch.arange(8) < lengths[:, None])[:, None, :, None, None]
    else:
        data = 0.1 * torch.randn(4, 1600, generator=made)
        real = torch.arange(1600) < lengths[:, None]
    data, lengths = torch.where(real, data, fill)[list(rows)], lengths[list(rows)]
    longest = int(lengths.max())
    data = data[:, :, :longest] if name == "video" else data[:, :longest]
    return Raw(data, lengths, [f"clip{row}" for row in rows], 5.0 if name == "video" else float(RATE))


def batch(rows: tuple[int, ...] = (0, 1, 2, 3), fill: float = 0.0) -> Batch:
    return Batch({name: raw(name, rows, fill) for name in ("video", "audio")}, torch.tensor(rows) + 10)


def plainly(model: Any, row: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The error of each modality of one clip, and its mean token, without anything of the machinery."""
    one, tokens, plans, below, means = batch((row,)), {}, {}, {}, {}
    for place, (name, encoder) in enumerate(model.encoder.items()):
        tokens[name] = encoder.tokens(one.of(name))
        plans[name] = random_mask(tokens[name].lengths, ratio=RATIOS[name], seeds=one.seeds + place)
        x = (tokens[name].x + encoder.positions(tokens[name].x, tokens[name]))[:, plans[name].keep[0]]
        own = model.encoder.own_blocks
        alone, layers = encoder.transformer(x, layers=[own])
        below[name], means[name] = layers[own], F.normalize(alone.mean(1), dim=1)[0]
    fused, _ = model.fusion(torch.cat(list(below.values()), 1))
    decoder, parts, first = model.predictor, [], 0
    for name, seen in below.items():
        n, hidden = tokens[name].x.shape[1], plans[name].masked[0]
        h = decoder.mask_vector.expand(n, -1).clone()
        h[~hidden] = decoder.embed(fused[0, first : first + seen.shape[1]])
        first += seen.shape[1]
        parts.append(h + SinCos(16)(h, tokens[name])[0] + decoder.kinds[name])
    out, _ = decoder.transformer(torch.cat(parts)[None])
    errors, first = {}, 0
    for name, part in zip(below, parts, strict=True):
        hidden, values = plans[name].masked[0], out[0, first : first + len(part)]
        first += len(part)
        errors[name] = (decoder.outs[name](values[hidden]) - tokens[name].feat[0, hidden]).square().mean()
    return errors, means


@pytest.mark.parametrize(("own_blocks", "own_norms"), [(0, False), (1, False), (1, True)])
def test_av_mae_is_the_mean_of_both_errors_clip_by_clip(own_blocks: int, own_norms: bool) -> None:
    model = objective(AVMAE, encoders(own_blocks=own_blocks, own_norms=own_norms))
    loss = model(batch())
    errors = [plainly(model, row)[0] for row in range(4)]
    for name in ("video", "audio"):
        found, count = loss.metrics[f"{name}_loss"]
        assert count == 4
        torch.testing.assert_close(found, sum(each[name] for each in errors).detach(), rtol=1e-5, atol=1e-5)
    expected = sum(each["video"] + each["audio"] for each in errors) / 2
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    assert loss.count == 4


def test_cav_mae_adds_the_contrast_of_each_modality_alone() -> None:
    model = objective(CAVMAE, weight=0.2, temperature=0.1)
    loss = model(batch())
    errors, means = zip(*(plainly(model, row) for row in range(4)), strict=True)
    video, audio = (torch.stack([each[name] for each in means]) for name in ("video", "audio"))
    scores, own = video @ audio.T / 0.1, torch.arange(4)
    contrast = (F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(scores.T, own, reduction="sum")) / 2
    torch.testing.assert_close(loss.metrics["contrast"][0], contrast.detach(), rtol=1e-5, atol=1e-5)
    expected = sum(each["video"] + each["audio"] for each in errors) + 0.2 * contrast
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    # at equal vectors a guess
    even = objective(CAVMAE)
    for name in even.encoder:
        even.encoder[name].transformer.norm.weight.data.zero_()
        even.encoder[name].transformer.norm.bias.data.fill_(1)
    assert float(even(batch()).metrics["contrast"][0]) / 4 == pytest.approx(float(torch.tensor(4.0).log()), rel=1e-5)


def test_clips_that_are_the_same_are_no_negatives_of_each_other() -> None:
    model = objective(CAVMAE, weight=0.2, temperature=0.1, same="label")
    loss = model(replace(batch(), labels=torch.tensor([7, 9, 7, 8])))
    errors, means = zip(*(plainly(model, row) for row in range(4)), strict=True)
    video, audio = (torch.stack([each[name] for each in means]) for name in ("video", "audio"))
    contrast = torch.zeros(())
    for scores in (video @ audio.T / 0.1, audio @ video.T / 0.1):
        for row, others in enumerate([[0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]):
            contrast = contrast + (scores[row, others].logsumexp(0) - scores[row, row]) / 2
    torch.testing.assert_close(loss.metrics["contrast"][0], contrast.detach(), rtol=1e-5, atol=1e-5)
    expected = sum(each["video"] + each["audio"] for each in errors) + 0.2 * contrast
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="CAV-MAE: every clip needs its 'label'"):
        model(batch())


@BOTH
def test_each_modality_is_told_by_the_other(kind: type[nn.Module]) -> None:
    model = objective(kind).eval()
    before = model(batch()).metrics
    for changed, other in (("video", "audio"), ("audio", "video")):
        inputs = dict(batch().inputs)
        inputs[changed] = replace(inputs[changed], data=inputs[changed].data.flip(-1))
        after = model(replace(batch(), inputs=inputs)).metrics
        assert abs(float(after[f"{other}_loss"][0] - before[f"{other}_loss"][0])) > 1e-4


@BOTH
@pytest.mark.parametrize("prefix", [0, 1])
def test_what_padding_holds_and_who_stands_beside_change_nothing(kind: type[nn.Module], prefix: int) -> None:
    model = objective(kind, encoders(prefix=prefix)).eval()
    clean = model(batch())
    for fill in (3.0, torch.inf):
        assert torch.equal(model(batch(fill=fill)).total, clean.total)
    torch.testing.assert_close(model(batch((2, 0, 3, 1))).total, clean.total, rtol=1e-5, atol=1e-5)
    alone = [model(batch((row,))).metrics for row in range(4)]
    for name in ("video_loss", "audio_loss"):
        expected = sum(float(each[name][0]) for each in alone)
        assert float(clean.metrics[name][0]) == pytest.approx(expected, rel=1e-5)


def test_av_mae_in_parts_has_the_gradient_of_the_whole() -> None:
    def gradient(parts: list[Batch]) -> Tensor:
        model = objective(AVMAE, encoders(own_norms=False))
        losses = [model(part) for part in parts]
        for loss in losses:
            loss.total.backward()
        return torch.cat([p.grad.flatten() / sum(loss.count for loss in losses) for p in model.parameters()])

    one, many = gradient([batch()]), gradient([batch((row,)) for row in range(4)])
    assert torch.cosine_similarity(one, many, dim=0) > 0.99999
    assert torch.allclose(one.norm(), many.norm(), rtol=1e-4)


@BOTH
@pytest.mark.parametrize("own_norms", [False, True])
def test_gradients_reach_what_is_said_and_twenty_steps_lower_the_loss(kind: type[nn.Module], own_norms: bool) -> None:
    model = objective(kind, encoders(own_norms=own_norms))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(1, 21):
        loss = model(batch())
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        if step == 1:
            missing = [name for name, p in model.named_parameters() if p.grad is None]
            # the shared block's norms for each modality alone are what AV-MAE never calls upon
            assert bool(missing) == model.skips_parameters == (kind is AVMAE and own_norms)
            assert all("norm" in name for name in missing)
        optimizer.step()
        model.after_step(step)
        values.append(loss.total.item() / loss.count)
    assert sum(values[-3:]) < 0.8 * sum(values[:3])


def test_pairs_find_each_other_after_forty_updates() -> None:
    model = objective(CAVMAE, weight=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    told = []
    for _ in range(40):
        loss = model(batch())
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        told.append({name: float(loss.metrics[name][0]) / loss.metrics[name][1] for name in ("contrast", "accuracy")})
    assert told[0]["contrast"] > 1
    assert told[-1]["contrast"] < 0.3
    assert told[-1]["accuracy"] == 1


@BOTH
def test_in_bfloat16_it_is_nearly_the_same(kind: type[nn.Module]) -> None:
    model = objective(kind)
    exact = model(batch())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch())
    half.total.backward()
    assert half.total.dtype == torch.float32
    assert abs(half.total.item() - exact.total.item()) < 0.02 * exact.total.item()


def test_the_joint_block_has_norms_for_sound_for_frames_and_for_both() -> None:
    model = objective(CAVMAE)
    video, audio, both = (
        body.blocks[-1] for body in (*(each.transformer for each in model.encoder.values()), model.fusion)
    )
    assert video.attention is audio.attention is both.attention
    assert video.mlp is audio.mlp is both.mlp
    assert len({id(block.norm1) for block in (video, audio, both)}) == 3
    assert len(model.fusion.blocks) == 1


def test_a_vector_of_the_space_of_both_is_the_mean_token_at_length_one() -> None:
    model = objective(CAVMAE, encoders(prefix=1)).eval()
    for name, encoder in model.encoder.items():
        together = model.joint(name, encoder(encoder.tokens(raw(name))))
        assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-6)
        for row in range(4):
            encoded = encoder(encoder.tokens(raw(name, (row,))))
            assert torch.allclose(F.normalize(encoded.x[0, 1:].mean(0), dim=0), together[row], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_ratio": {"video": 0.5}}, "objective.mask_ratio=.*: give a share .* for each of video and audio"),
        ({"mask_ratio": {"video": 0.5, "audio": 1.0}}, "between 0 and 1"),
        ({"weight": 0.0}, "objective.weight=0: must be above 0; without the contrast choose av_mae"),
        ({"temperature": 0.0}, "objective.temperature=0: must be above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        objective(CAVMAE, **settings)


@BOTH
def test_other_encoders_are_refused(kind: type[nn.Module]) -> None:
    body = encoders()
    with pytest.raises(ValueError, match="joins two modalities, and these are video"):
        objective(kind, Encoders({"video": body["video"]}))
    apart = {
        name: Encoder(each.frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM)) for name, each in body.items()
    }
    with pytest.raises(ValueError, match="backbone=separate: no block sees several modalities"):
        objective(kind, Encoders(apart))
