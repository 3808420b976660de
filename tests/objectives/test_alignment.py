"""What every objective that brings clips of several modalities into one space must keep."""

import pytest
import torch
from pairs import POOL, batch, encoders, raw

from mmssl.modalities.image.views import distortions
from mmssl.objectives.clip import CLIP
from mmssl.objectives.clip_lite import CLIPLite
from mmssl.objectives.siglip import SigLIP
from mmssl.objectives.slip import SLIP

NAMES = ("speech", "image", "text")
OBJECTIVES = [CLIP, SigLIP, CLIPLite, SLIP]
SAID = {CLIP: "CLIP", SigLIP: "SigLIP", CLIPLite: "CLIP-Lite", SLIP: "SLIP"}
VIEWS = {"self_supervised": {"image": "distortions"}, "view_makers": {"image": distortions}}
OWN = {SLIP: {**VIEWS, "ssl_hidden": 12, "ssl_dim": 6}}
each = pytest.mark.parametrize("kind", OBJECTIVES)


def build(kind, *names: str, shared: bool = False, transformer=None, **settings):
    body = encoders(*(names or ("image", "text")), shared=shared, **(transformer or {}))
    return kind(body, dim=8, pool={name: POOL[name] for name in body}, **OWN.get(kind, {}), **settings)


def gradient(model, batch, precision=torch.float32):
    """The loss's gradient, and the loss."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        loss = model(batch)
    loss.total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), loss


@each
@pytest.mark.parametrize("names", [("image", "text"), NAMES])
@pytest.mark.parametrize("labels", [None, [3, 5, 3, 6]])
def test_permuting_the_pairs_changes_nothing(kind, names, labels) -> None:
    model, order = build(kind, *names, same=None if labels is None else "text"), [2, 0, 3, 1]
    moved = None if labels is None else [labels[i] for i in order]
    one, first = gradient(model, batch(*names, labels=labels))
    two, second = gradient(model, batch(*names, rows=order, labels=moved))
    assert first.count == second.count
    assert torch.allclose(first.total, second.total, rtol=1e-5)
    assert (one - two).norm() < 1e-5 * one.norm()
    for name, (value, count) in first.metrics.items():
        assert float(second.metrics[name][0]) == pytest.approx(float(value), rel=1e-4)
        assert second.metrics[name][1] == count


@each
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_reach_every_part_and_twenty_steps_lower_the_loss(kind, shared) -> None:
    model = build(kind, *NAMES, shared=shared)
    assert model.encoder.shared == shared
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(1, 21):
        loss = model(batch(*NAMES))
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        if step == 1:
            assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
        model.after_step(step)
        values.append(loss.total.item() / loss.count)
    assert sum(values[-3:]) < 0.8 * sum(values[:3])


@each
def test_a_batch_without_one_of_three_modalities_still_learns(kind) -> None:
    model = build(kind, *NAMES)
    loss = model(batch("speech", "text"))
    loss.total.backward()
    assert loss.count == 4
    assert loss.total.isfinite()
    assert model.encoder["image"].frontend.project.weight.grad is None
    assert model.skips_parameters
    assert not build(kind).skips_parameters


@each
def test_a_vector_is_the_same_alone_and_beside_others_and_has_length_one(kind) -> None:
    model = build(kind).eval()
    for name in ("image", "text"):
        one = model.encoder[name]
        together = model.joint(name, one(one.tokens(raw(name))))
        assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-6)
        for row in range(4):
            alone = model.joint(name, one(one.tokens(raw(name, (row,)))))
            assert torch.allclose(alone[0], together[row], atol=1e-5)


@each
def test_while_evaluating_the_loss_is_the_same_where_nothing_is_drawn(kind) -> None:
    model = build(kind)
    trained, count = model(batch()).total, model(batch()).count
    evaluated = model.eval()(batch())
    assert torch.allclose(trained, evaluated.total)
    assert count == evaluated.count


# gradient caching


@each
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9])
def test_a_batch_in_chunks_has_the_gradient_of_the_whole(kind, chunk) -> None:
    whole, first = gradient(build(kind, *NAMES), batch(*NAMES))
    parts, second = gradient(build(kind, *NAMES, chunk=chunk), batch(*NAMES))
    assert torch.allclose(first.total, second.total, rtol=1e-5)
    assert (whole - parts).norm() < 1e-5 * whole.norm()


@each
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_dropout_draws_for_a_chunk_is_drawn_again(kind, precision, monkeypatch) -> None:
    noise = {"dropout": 0.3, "attention_dropout": 0.2, "drop_path": 0.4}
    found = []
    for cached in (True, False):
        if not cached:  # the same chunks, each with its graph kept
            monkeypatch.setattr("mmssl.nn.joint.checkpoint", lambda encode, data, use_reentrant: encode(data))
        model = build(kind, *NAMES, chunk=2, transformer=noise)
        torch.manual_seed(5)
        found.append((*gradient(model, batch(*NAMES), precision), torch.rand(1)))
    (cached, first, after), (kept, second, then) = found
    assert torch.equal(first.total, second.total)
    assert (cached - kept).norm() < 1e-6 * kept.norm()
    # and what is drawn after it goes on as if each clip had been encoded once
    assert torch.equal(after, then)
    torch.manual_seed(6)
    other, _ = gradient(model, batch(*NAMES), precision)
    assert (other - kept).norm() > 0.01 * kept.norm()


@each
def test_no_more_than_a_chunk_is_in_memory(kind) -> None:
    """What autograd keeps of the forward pass: of four clips the activations, and in chunks their vectors alone."""
    sizes = []
    for chunk in (None, 1):
        model, kept = build(kind, chunk=chunk), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            model(batch())
        sizes.append(sum(kept))
    assert sizes[1] < 0.1 * sizes[0]


@each
def test_a_chunk_that_cannot_be_is_one_sentence(kind) -> None:
    with pytest.raises(ValueError, match="objective.chunk=0: must be at least 1; leave it out"):
        build(kind, chunk=0)
    with pytest.raises(ValueError, match="transformer.layer_drop leaves out other blocks each time; set it to 0"):
        build(kind, chunk=2, transformer={"layer_drop": 0.1})


@each
@pytest.mark.parametrize(
    ("pool", "sentence"),
    [
        ({"image": "class"}, "name a pooling for each modality, image and text, and no other"),
        ({"image": "class", "text": "class"}, r"no class token \(modality.text.encoder.prefix=0\)"),
        (POOL, "and no other"),
    ],
)
def test_a_pooling_that_cannot_be_is_one_sentence(kind, pool, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(encoders("image", "text"), pool=pool, **OWN.get(kind, {}))


@each
def test_pairs_without_their_key_are_refused(kind) -> None:
    with pytest.raises(ValueError, match=f"{SAID[kind]}: every clip needs its 'text'"):
        build(kind, same="text")(batch())
