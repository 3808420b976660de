"""Two views: what is seen whole, what is hidden, and a decoder that looks from one to the other."""

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
from mmssl.nn.cross import CrossBlock
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Layout, Transformer
from mmssl.objectives.siam_mae import SiamMAE
from mmssl.types import Batch, Raw

SMALL = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}


def of_pictures(**settings: Any) -> SiamMAE:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[4, 4], channels=1, mean=[0.5], std=[0.25])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=1)
    target = TARGETS["pixels"]
    given = {"views": crops, **SMALL, **settings}
    return SiamMAE(encoder, target=target.values, target_dim=target.dim(frontend), **given)


def pictures(n: int = 3) -> Batch:
    data = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch({"image": Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])}, torch.arange(n))


def clips(lengths: list[int], rate: float = 7.5) -> Batch:
    """Frames that show their own number."""
    numbers = torch.arange(max(lengths)).float()[None, None, :, None, None]
    data = numbers.expand(len(lengths), 1, -1, 4, 4).contiguous()
    raw = Raw(data, torch.tensor(lengths), [str(n) for n in lengths], rate)
    return Batch({"video": raw}, torch.arange(len(lengths)))


def test_the_loss_is_over_the_hidden_tokens_of_the_second_view() -> None:
    objective, batch = of_pictures(mask_ratio=0.9), pictures()
    torch.nn.init.zeros_(objective.predictor.out.weight)
    torch.nn.init.constant_(objective.predictor.out.bias, 0.25)
    loss = objective(batch)
    _, part = crops(batch.raw, objective.encoder.frontend)
    plan = random_mask(torch.tensor([16, 16, 16]), ratio=0.9, seeds=batch.seeds)
    tokens = objective.encoder.tokens(part)
    assert loss.count == 3 * 14
    torch.testing.assert_close(loss.total, (tokens.feat[plan.masked] - 0.25).square().mean(1).sum())


def test_nothing_of_a_hidden_patch_reaches_the_prediction_and_all_of_the_seen_view_does() -> None:
    objective, batch = of_pictures(mask_ratio=0.9), pictures(1)
    seen, part = crops(batch.raw, objective.encoder.frontend)
    plan = random_mask(torch.tensor([16]), ratio=0.9, seeds=batch.seeds)

    def predicted(seen: Raw, part: Raw) -> torch.Tensor:
        others, tokens = objective.encoder.tokens(seen), objective.encoder.tokens(part)
        other, encoded = objective.encoder(others), objective.encoder(tokens, plan, "drop")
        return objective.predictor(encoded, tokens, plan, other, others)

    before = predicted(seen, part)
    for place in range(16):
        rows, columns = (slice(4 * i, 4 * i + 4) for i in divmod(place, 4))
        changed = part.data.clone()
        changed[..., rows, columns] = 1 - changed[..., rows, columns]
        after = predicted(seen, Raw(changed, part.lengths, part.ids))
        assert torch.equal(after, before) == bool(plan.masked[0, place])
        changed = seen.data.clone()
        changed[..., rows, columns] = 1 - changed[..., rows, columns]
        assert not torch.equal(predicted(Raw(changed, seen.lengths, seen.ids), part), before)


def test_attention_to_the_other_view_is_torchs() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 16, eps=1e-6)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([block.cross.q.weight, block.cross.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.cross.q.bias, block.cross.kv.bias]))
        theirs.out_proj.load_state_dict(block.cross.out.state_dict())
    h, other = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    full, beside = Layout(h, None), Layout(other, None)
    torch.testing.assert_close(block.cross(h, other, full, beside), theirs(h, other, other)[0], rtol=1e-5, atol=1e-6)
    assert block(h, other, full, beside).shape == (2, 5, 8)
    # views of several lengths: each token sees the real ones of its own clip
    own, seen = torch.tensor([5, 2]), torch.tensor([1, 3])
    ragged, beside = Layout(h, own), Layout(other, seen)
    mixed = ragged.unpack(block.cross(ragged.pack(h), beside.pack(other), ragged, beside))
    hidden = torch.arange(3) >= seen[:, None]
    expected = theirs(h, other, other, key_padding_mask=hidden)[0]
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1, :2], expected[1, :2], rtol=1e-5, atol=1e-6)
    alone = block.cross(h, beside.pack(other), full, beside)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


def test_a_crop_is_part_of_its_picture_and_the_same_in_any_batch() -> None:
    rows, columns = torch.meshgrid(torch.arange(32) / 31, torch.arange(32) / 31, indexing="ij")
    raw = Raw(torch.stack([rows, columns])[None].repeat(40, 1, 1, 1), torch.ones(40), [str(i) for i in range(40)])
    batch = Batch({"image": raw}, torch.arange(40))
    frontend = Patches(dim=4, size=[4, 4], channels=2, mean=[0.0] * 2, std=[1.0] * 2)
    seen, part = crops(batch.raw, frontend)
    assert torch.equal(seen.data, raw.data)
    assert part.data.shape == raw.data.shape
    tall, wide = (part.data[:, i].flatten(1).max(1).values - part.data[:, i].flatten(1).min(1).values for i in (0, 1))
    # the middles of the outer pixels of a crop lie a pixel's width apart from its edges
    area = (tall * 31 + 1) * (wide * 31 + 1) / 1024
    assert 0.2 < area.min() < 0.4
    assert 0.5 < area.max() < 0.7
    alone = crops(Batch({"image": Raw(raw.data[:1], raw.lengths[:1], ["5"])}, torch.tensor([5])).raw, frontend)[1]
    assert torch.equal(alone.data[0], part.data[5])


def test_two_moments_are_as_far_apart_as_said_where_the_clip_is_long_enough() -> None:
    frontend = Tubes(dim=4, size=[1, 4, 4], rate=7.5, channels=1, mean=[0.0], std=[1.0])
    lengths = [40] * 300 + [2, 3, 5]
    seen, later = frames(clips(lengths).raw, frontend)
    assert seen.lengths.unique().tolist() == [1]
    first, second = seen.data[:, 0, 0, 0, 0].long(), later.data[:, 0, 0, 0, 0].long()
    apart = second - first
    # 4 to 48 frames of 30 a second are 1 to 12 of 7.5
    assert apart[:300].unique().tolist() == list(range(1, 13))
    assert int(first[:300].min()) <= 1
    assert int(second[:300].max()) >= 38
    assert apart[300].item() == 1
    assert all(0 <= a < b < n for a, b, n in zip(first.tolist(), second.tolist(), lengths, strict=True))


def test_moments_of_whole_tubes_do_not_overlap() -> None:
    frontend = Tubes(dim=4, size=[2, 4, 4], rate=7.5, channels=1, mean=[0.0], std=[1.0])
    seen, later = frames(clips([4, 9, 30]).raw, frontend)
    assert seen.data.shape[2] == later.data.shape[2] == 2
    assert (later.data[:, 0, 0, 0, 0] - seen.data[:, 0, 0, 0, 0] >= 2).all()
    with pytest.raises(ValueError, match="3: 3 frames have no two moments of 2"):
        frames(clips([30, 3]).raw, frontend)


def test_a_video_is_learned_from_two_of_its_frames() -> None:
    torch.manual_seed(0)
    frontend = Tubes(dim=16, size=[1, 4, 4], rate=7.5, channels=1, mean=[0.0], std=[1.0])
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = VIDEO_TARGETS["pixels"]
    objective = SiamMAE(
        encoder, target=target.values, target_dim=target.dim(frontend), views=frames, mask_ratio=0.5, **SMALL
    )
    raw = Raw(torch.rand(2, 1, 6, 8, 8), torch.tensor([6, 3]), ["a", "b"], 7.5)
    loss = objective(Batch({"video": raw}, torch.arange(2)))
    assert loss.count == 2 * 2  # of 2 x 2 patches of one frame, half
    assert loss.total.isfinite()


def test_no_seeds_no_views() -> None:
    with pytest.raises(ValueError, match="no seeds to draw a crop from"):
        crops(Raw(torch.rand(1, 1, 8, 8), torch.ones(1), ["a"]), of_pictures().encoder.frontend)
    with pytest.raises(ValueError, match="there are none for Patches; choose mae"):
        of_pictures(views=None)
