"""What is visible and what is hidden meet in the regressor alone, and the latents to align with teach nobody."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS
from mmssl.modalities.speech.frontend import Waveform
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.speech.targets import TARGETS as SPEECH_TARGETS
from mmssl.nn.block_masks import beit_mask
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import SinCos
from mmssl.nn.regressor import Regressor, RegressorBlock
from mmssl.nn.transformer import Transformer
from mmssl.objectives.cae import CAE
from mmssl.types import Batch, Encoded, Raw

SMALL = {"regressor_depth": 1, "regressor_heads": 2, "decoder_depth": 1, "decoder_heads": 2}


def of_pictures(depth: int = 1, **settings: Any) -> CAE:
    torch.manual_seed(0)
    frontend = Patches(dim=16, size=[4, 4], channels=1, mean=[0.5], std=[0.25])
    encoder = Encoder(frontend, Transformer(dim=16, depth=depth, heads=2, dropout=0.2), SinCos(16), prefix=1)
    target = TARGETS["pixels"]
    given: dict[str, Any] = {"mask_size": 2, "pictures": target.pictures, **SMALL, **settings}
    return CAE(encoder, target=target.values, target_dim=target.dim(frontend), **given)


def of_speech() -> CAE:
    torch.manual_seed(0)
    frontend = LogMel(dim=16, bands=8, rate=8000)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = SPEECH_TARGETS["log_mel"]
    given: dict[str, Any] = {"mask": "blocks", "mask_size": 2, **SMALL}
    return CAE(encoder, target=target.values, target_dim=target.dim(frontend), **given)


def pictures(n: int = 3) -> Batch:
    torch.manual_seed(1)
    raw = Raw(torch.rand(n, 1, 16, 24), torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return Batch({"image": raw}, torch.arange(n))


def test_the_loss_is_that_of_predictions_and_latents_worked_by_hand() -> None:
    """With norms that give constants: values .25, predicted latents .5, the encoder's own latents 2."""
    objective, batch = of_pictures(alignment_weight=2.0), pictures()
    for module, value in ((objective.out, 0.25), (objective.regressor.norm, 0.5)):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.constant_(module.bias, value)
    norm = objective.encoder.transformer.norm
    torch.nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
    torch.nn.init.constant_(norm.bias, 2.0)  # type: ignore[arg-type]
    loss = objective(batch)
    tokens = objective.encoder.tokens(batch.raw)
    plan = beit_mask(tokens, ratio=0.5, size=2, seeds=batch.seeds)
    assert loss.count == 3 * 12
    assert tokens.feat is not None
    reconstruction = (tokens.feat[plan.masked] - 0.25).square().mean(1).sum()
    torch.testing.assert_close(loss.total, reconstruction + 2.0 * 36 * 1.5**2)
    torch.testing.assert_close(loss.metrics["alignment"][0], torch.tensor(36 * 1.5**2))


def test_half_of_the_patches_are_hidden_in_rectangles() -> None:
    objective, shown = of_pictures(), []
    encode = objective.encoder.forward

    def watched(tokens, plan, hide):
        shown.append((plan, hide))
        return encode(tokens, plan, hide)

    objective.encoder.forward = watched  # type: ignore[method-assign]
    objective(pictures())
    (seen, how), (hidden, also) = shown
    assert how == also == "drop"
    assert seen.masked.sum(1).tolist() == [12, 12, 12]
    assert torch.equal(hidden.masked, ~seen.masked)
    tokens = objective.encoder.tokens(pictures().raw)
    assert torch.equal(seen.masked, beit_mask(tokens, ratio=0.5, size=2, seeds=torch.arange(3)).masked)


def test_what_is_shown_keeps_visible_patches_and_predicts_hidden_ones() -> None:
    objective, batch = of_pictures(), pictures()
    torch.nn.init.zeros_(objective.out.weight)
    torch.nn.init.constant_(objective.out.bias, 0.4)
    own = torch.zeros(3, 24, dtype=torch.bool)
    own[:, :6] = True  # the first row of patches
    shown = objective.reconstruct(batch, masked=own)
    torch.testing.assert_close(shown["input"], batch.raw.data)
    assert (shown["masked"][:, :, :4] == 0.5).all()
    torch.testing.assert_close(shown["reconstruction"][:, :, :4], torch.full((3, 1, 4, 24), 0.4 * 0.25 + 0.5))
    torch.testing.assert_close(shown["reconstruction"][:, :, 4:], batch.raw.data[:, :, 4:])
    assert objective.training
    # one that is drawn is that of training, half of the patches
    assert (objective.reconstruct(batch)["masked"] == 0.5).float().mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="there is no picture of this target"):
        of_speech().reconstruct(batch)


def test_no_gradient_reaches_the_latents_to_align_with() -> None:
    """With a decoder that is not read, what is left is alignment; its gradient is that of a constant target."""
    objective, batch = of_pictures(alignment_weight=1.0), pictures()
    objective.eval()
    torch.nn.init.zeros_(objective.out.weight)
    asked: list[Tensor] = []
    aligned = objective.aligned

    def watched(tokens, hidden):
        asked.append(aligned(tokens, hidden))
        return asked[-1]

    objective.aligned = watched  # type: ignore[method-assign]
    objective(batch).total.backward()
    gradient = [p.grad.clone() for p in objective.encoder.parameters() if p.grad is not None]
    assert not asked[0].requires_grad
    objective.zero_grad()
    fixed = asked[0].clone()
    objective.aligned = lambda tokens, hidden: fixed  # type: ignore[method-assign]
    objective(batch).total.backward()
    again = [p.grad for p in objective.encoder.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradient, again, strict=True))
    assert any(a.any() for a in again)


def test_the_latents_to_align_with_are_those_of_hidden_patches_alone_and_without_dropout() -> None:
    objective, batch = of_pictures(), pictures(1)
    tokens = objective.encoder.tokens(batch.raw)
    plan = beit_mask(tokens, ratio=0.5, size=2, seeds=batch.seeds)
    hidden = plan_of(~plan.masked, tokens.lengths)
    before = objective.aligned(tokens, hidden)
    assert objective.encoder.training
    for place in range(24):
        x = tokens.x.clone()
        x[0, place] += 1
        after = objective.aligned(replace(tokens, x=x), hidden)
        assert torch.equal(after, before) != bool(plan.masked[0, place])


def test_the_decoder_reads_predicted_latents_only() -> None:
    """Once the regressor looks at nothing, values no longer depend on what is visible."""
    objective, batch = of_pictures(), pictures(1)
    objective.eval()
    for block in objective.regressor.blocks:
        torch.nn.init.zeros_(block.out.weight)  # type: ignore[union-attr, arg-type]
    read: list[Tensor] = []
    objective.decoder.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    with torch.no_grad():
        objective(batch)
        objective(replace(batch, inputs={"image": replace(batch.raw, data=1 - batch.raw.data)}))
    assert read[0].shape == (1, 12, 16)
    assert torch.equal(read[0], read[1])


def test_predicted_latents_are_of_all_visible_patches_and_no_hidden_one() -> None:
    objective, batch = of_pictures(), pictures(1)
    objective.eval()
    plan = beit_mask(objective.encoder.tokens(batch.raw), ratio=0.5, size=2, seeds=batch.seeds)
    read: list[Tensor] = []
    objective.decoder.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    with torch.no_grad():
        objective(batch)
        for place in range(24):
            rows, columns = (slice(4 * i, 4 * i + 4) for i in divmod(place, 6))
            data = batch.raw.data.clone()
            data[..., rows, columns] = 1 - data[..., rows, columns]
            objective(replace(batch, inputs={"image": replace(batch.raw, data=data)}))
            assert torch.equal(read[-1], read[0]) == bool(plan.masked[0, place])


def test_the_regressors_attention_is_torchs_and_leaves_padding_out() -> None:
    torch.manual_seed(0)
    block = RegressorBlock(8, 2, 16, eps=1e-6)
    torch.nn.init.normal_(block.q.bias)
    torch.nn.init.normal_(block.v.bias)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([block.q.weight, block.k.weight, block.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.q.bias, torch.randn(8), block.v.bias]))
        theirs.out_proj.load_state_dict(block.out.state_dict())
    h, at, latents, latents_at = (torch.randn(2, n, 8) for n in (3, 3, 5, 5))
    attended = torch.tensor([[True] * 8, [True, True, False, False, False, True, True, False]])
    seen, seen_at = torch.cat([latents, h], 1), torch.cat([latents_at, at], 1)
    norm = torch.nn.functional.layer_norm
    q, k, v = norm(h + at, (8,), eps=1e-6), norm(seen + seen_at, (8,), eps=1e-6), norm(seen, (8,), eps=1e-6)
    mixed = h + theirs(q, k, v, key_padding_mask=~attended)[0]
    expected = mixed + block.mlp(norm(mixed, (8,), eps=1e-6))
    found = block(h, at, latents, latents_at, attended[:, None, None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_clip_alone_has_the_latents_that_it_has_in_a_batch() -> None:
    torch.manual_seed(0)
    regressor = Regressor(dim=8, depth=2, heads=2)
    known, lengths = torch.tensor([5, 2]), torch.tensor([1, 4])
    x, x_at, at = torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    together = regressor(Encoded(x, known + 1, {}, n_prefix=1), x_at, at, lengths)
    for row, (k, q) in enumerate(zip(known.tolist(), lengths.tolist(), strict=True)):
        own = slice(row, row + 1)
        encoded = Encoded(x[own, : k + 1], known[own] + 1, {}, n_prefix=1)
        alone = regressor(encoded, x_at[own, :k], at[own, :q], lengths[own])
        torch.testing.assert_close(together[own, :q], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [(2000, 360), (360, 360)])
def test_a_clip_of_one_token_has_nothing_hidden_and_brings_no_nan(samples: tuple[int, ...]) -> None:
    objective = of_speech()
    raw = Raw(torch.randn(2, max(samples)), torch.tensor(samples), ["long", "short"], 8000.0)
    loss = objective(Batch({"speech": raw}, torch.arange(2)))
    loss.total.backward()
    assert objective.encoder.frontend.lengths(raw)[1] == 1
    assert loss.count == (6 if samples[0] == 2000 else 0)
    assert loss.total.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="objective.decoder_heads=3: must divide transformer.dim=16"):
        of_pictures(decoder_heads=3)
    with pytest.raises(ValueError, match="objective.regressor_heads=5: must divide transformer.dim=16"):
        of_pictures(regressor_heads=5)
    encoder = Encoder(Waveform(dim=16, rate=8000), Transformer(dim=16, depth=1, heads=2), SinCos(16))
    target = SPEECH_TARGETS["features"]
    with pytest.raises(ValueError, match="Waveform learns what it measures"):
        CAE(encoder, target=target.values, target_dim=512, target_learned=target.learned)
