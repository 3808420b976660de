"""ViC-MAE: two views, each reconstructed, and both nearer to each other than to the views of other clips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS
from mmssl.modalities.image.views import crops
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS as VIDEO_TARGETS
from mmssl.modalities.video.views import frames
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.vic_mae import ViCMAE
from mmssl.types import Batch, Frontend, Raw

SMALL = {"hidden_dim": 16, "dim": 8, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def of_pictures(**settings: Any) -> ViCMAE:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[4, 4], channels=1, mean=[0.5], std=[0.25])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=1)
    target = TARGETS["pixels"]
    given = {"views": crops, **SMALL, **settings}
    return ViCMAE(encoder, target=target.values, target_dim=target.dim(frontend), **given)


def pictures(n: int = 3) -> Batch:
    data = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch({"image": Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])}, torch.arange(n))


def test_both_losses_are_those_of_each_view_for_itself() -> None:
    objective, batch = of_pictures(mask_ratio=0.5, weight=0.3, temperature=0.2), pictures()
    loss = objective(batch)
    expected, vectors = torch.zeros(()), []
    for side, view in enumerate(crops(batch.raw, objective.encoder.frontend)):
        tokens = objective.encoder.tokens(view)
        masks = random_mask(tokens.lengths, ratio=0.5, seeds=batch.seeds, clones=2)
        for row in range(3):
            keep = masks.keep[2 * row + side]
            place = objective.encoder.positions(tokens.x, tokens)[0]
            x = torch.cat([objective.encoder.prefix, (tokens.x[row] + place)[keep]])[None]
            seen, _ = objective.encoder.transformer(x)
            vectors.append(objective.projector(seen[:, 1:].mean(1))[0])
            # the decoder, one clip at a time
            whole = random_mask(tokens.lengths, ratio=0.5, seeds=batch.seeds, clones=2)
            one = type(whole)(torch.tensor([0]), whole.masked[2 * row + side][None], keep[None], whole.keep_lengths[:1])
            alone = objective.encoder.tokens(Raw(view.data[row : row + 1], view.lengths[:1], ["a"]))
            values = objective.predictor(objective.encoder(alone, one, "drop"), alone, one)
            expected = expected + (values - alone.feat[one.masked]).square().mean() / 2
    z = torch.stack(vectors)  # the first views, then the second ones
    scores = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    contrast = torch.nn.functional.cross_entropy(scores, (torch.arange(6) + 3) % 6, reduction="sum") / 2
    torch.testing.assert_close(loss.metrics["reconstruction"][0], expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.metrics["contrast"][0], contrast.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, 0.7 * expected + 0.3 * contrast, rtol=1e-5, atol=1e-5)
    assert loss.count == 3


def test_the_two_views_of_a_clip_have_different_masks() -> None:
    masks = random_mask(torch.full((20,), 16), ratio=0.5, seeds=torch.arange(20), clones=2).masked.view(20, 2, 16)
    assert (masks[:, 0] != masks[:, 1]).any(1).all()


def test_a_clip_that_is_alone_has_nothing_to_be_told_from() -> None:
    loss = of_pictures()(pictures(1))
    assert float(loss.metrics["contrast"][0]) == pytest.approx(0, abs=1e-6)
    assert float(loss.metrics["accuracy"][0]) == float(loss.metrics["chance_accuracy"][0]) == 0


def test_clips_that_look_the_same_are_told_apart_by_chance() -> None:
    batch = pictures(4)
    same = Raw(batch.raw.data[:1].expand(4, -1, -1, -1).clone() * 0 + 0.5, batch.raw.lengths, batch.raw.ids)
    objective = of_pictures(mask_ratio=0.5)
    torch.nn.init.zeros_(objective.projector.layers[-1].weight)
    torch.nn.init.ones_(objective.projector.layers[-1].bias)
    loss = objective(Batch({"image": same}, batch.seeds))
    # each vector has one partner among seven others
    assert float(loss.metrics["contrast"][0]) / 4 == pytest.approx(float(torch.tensor(7.0).log()), rel=1e-5)
    value, count = loss.metrics["chance_accuracy"]
    assert float(value) / count == pytest.approx(1 / 7)
    assert float(loss.metrics["accuracy"][0]) == 0


def test_a_video_is_learned_from_two_of_its_frames() -> None:
    torch.manual_seed(0)
    frontend = Tubes(dim=16, size=[1, 4, 4], rate=7.5, channels=1, mean=[0.0], std=[1.0])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = VIDEO_TARGETS["pixels"]
    objective = ViCMAE(encoder, target=target.values, target_dim=target.dim(frontend), views=frames, **SMALL)
    raw = Raw(torch.rand(2, 1, 6, 8, 8), torch.tensor([6, 3]), ["a", "b"], 7.5)
    loss = objective(Batch({"video": raw}, torch.arange(2)))
    assert loss.count == 2
    assert loss.total.isfinite()


def test_views_of_several_sizes_are_refused() -> None:
    def cut(raw: Raw, frontend: Frontend) -> tuple[Raw, Raw]:
        return raw, replace(raw, data=raw.data[..., :8])

    with pytest.raises(
        ValueError, match="views: those of a clip must be of one size, and these are 1 x 16 x 16 and 1 x"
    ):
        of_pictures(views=cut)(pictures())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"views": None}, "there are none for Patches; choose mae"),
        ({"weight": 1.0}, "objective.weight=1: the contrast's share of the loss lies between 0 and 1"),
        ({"temperature": 0.0}, "objective.temperature=0: must be above 0"),
        ({"target_learned": True}, "Patches learns what it measures"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        of_pictures(**settings)
