import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.ctc import CTC
from mmssl.types import Batch, Encoded, Raw

DIM = 16
LAYERS = [[8, 10, 5], [8, 4, 4]]
HOP = 20  # samples from a token to the next; the first takes 25


def samples_for(frames: int) -> int:
    return 25 + HOP * (frames - 1)


def encoder(*, norm: str = "layer", mask_token: bool = True, dropout: float = 0.0) -> Encoder:
    frontend = Waveform(dim=DIM, layers=LAYERS, norm=norm, rate=1000)
    transformer = Transformer(dim=DIM, depth=2, heads=2, dropout=dropout)
    return Encoder(frontend, transformer, Convolutional(DIM, kernel=5, groups=2), mask_token=mask_token)


def build(**settings: object) -> CTC:
    torch.manual_seed(0)
    settings = {"n_characters": 5, "freeze_updates": 0, "mask_span": 3, "channel_mask_span": 3, **settings}
    return CTC(encoder(), **settings)  # type: ignore[arg-type]


def clips(frames: list[int], texts: list[list[int]], first: int = 0) -> Batch:
    samples = [samples_for(n) for n in frames]
    data = torch.zeros(len(samples), max(samples))
    for row, n in enumerate(samples):
        data[row, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + row))
    labels = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        labels[row, : len(text)] = torch.tensor(text)
    ids = [f"clip{first + row}" for row in range(len(samples))]
    return Batch(
        {"speech": Raw(data, torch.tensor(samples), ids, 1000)},
        torch.arange(len(samples)) + 100 + first,
        labels,
        torch.tensor([len(text) for text in texts]),
    )


class Given(nn.Module):
    """Gives chosen scores in the place of the head's."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores + 0 * x[..., :1]


def test_two_frames_by_hand() -> None:
    """Blank .5, a .3, b .2 in frame one and .1, .6, .3 in frame two. "a" is spelled by a-, -a and aa."""
    objective = build(n_characters=3).eval()
    objective.head = Given(torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]]).log())
    loss = objective(clips([2], [[1]]))
    assert loss.total.item() == pytest.approx(-math.log(0.3 * 0.1 + 0.5 * 0.6 + 0.3 * 0.6))
    assert loss.count == 1
    loss = objective(clips([2], [[2, 1]]))
    assert loss.total.item() == pytest.approx(-math.log(0.2 * 0.6))


def test_padding_of_frames_and_characters_is_not_read() -> None:
    objective = build(n_characters=3).eval()
    alone = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    objective.head = Given(torch.stack([torch.cat([alone, torch.randn(3, 3)]), torch.randn(5, 3)]))
    both = clips([2, 5], [[1], [1, 2, 1]])
    one = objective(replace(both, labels=both.labels.clone())).total
    objective.head.scores.data[0, 2:] = 40.0
    dirty = both.labels.clone()
    dirty[0, 1:] = 4  # not even in the vocabulary
    assert torch.equal(objective(replace(both, labels=dirty)).total, one)


def test_a_clip_too_short_for_its_transcript_is_left_out_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """[1, 1, 2, 2, 3] is five characters, but two pairs need a blank between: five frames do not do, seven do."""
    objective = build().eval()
    short, long = clips([5], [[1, 1, 2, 2, 3]]), clips([7], [[1, 1, 2, 2, 3]], first=1)
    both = clips([5, 7], [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3]])
    with caplog.at_level(logging.WARNING):
        loss = objective(both)
        objective(both)
    alone = objective(long)
    assert loss.count == alone.count == 1
    assert loss.total.item() == pytest.approx(alone.total.item(), rel=1e-5)
    assert loss.metrics["infeasible"] == (1, 2)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["clip0"]
    assert objective.infeasible_ids == {"clip0"}
    assert loss.left_out == {"clip0": "5 frames, and its transcript takes 7"}
    nothing = objective(short)
    assert nothing.count == 0
    assert (nothing.nothing, loss.nothing) == ("transcripts cannot be spelled in so few frames", "")
    assert nothing.total.item() == 0.0


def test_many_infeasible_clips_take_few_lines_of_few_names(caplog: pytest.LogCaptureFixture) -> None:
    objective = build().eval()
    with caplog.at_level(logging.WARNING):
        for first in range(0, 20, 4):
            objective(clips([5] * 4, [[1, 1, 2, 2, 3]] * 4, first=first))
    # told of 4, 8 and 16
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[0] for line in said] == [
        f"clip{n}, clip{n + 1}, clip{n + 2} and 1 more" for n in (0, 4, 12)
    ]
    assert "as are 16 clips so far" in said[-1]
    assert len(objective.infeasible_ids) == 20


def test_an_infeasible_clip_gives_no_gradient() -> None:
    objective = build().train()
    objective(clips([5], [[1, 1, 2, 2, 3]])).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


def test_an_infinite_score_is_not_hidden() -> None:
    """zero_infinity would turn this loss into 0 as well."""
    objective = build(n_characters=3).eval()
    objective.head = Given(torch.tensor([[[0.0, -math.inf, 0.0]] * 4]))
    assert objective(clips([4], [[1]])).total.item() == math.inf


def test_gradients_reach_every_parameter_once_nothing_is_frozen() -> None:
    objective = build(freeze_frontend=False).train()
    objective(clips([20, 30], [[1, 2, 3], [4, 4]])).total.backward()
    silent = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_the_frozen_start_trains_the_head_only_and_ends_by_updates() -> None:
    objective = build(freeze_updates=2).train()
    batch = clips([20, 30], [[1, 2, 3], [4, 4]])
    for update in range(4):
        objective.zero_grad()
        loss = objective(batch)
        loss.total.backward()
        trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
        assert ({"head.weight", "head.bias"} == trained) == (update < 2)
        assert loss.metrics["frozen"] == (float(update < 2), 1)
        objective.after_step(update + 1)


def test_whoever_trains_the_head_only_or_masks_nothing_leaves_parameters_out() -> None:
    trained = {"freeze_updates": 0, "freeze_frontend": False}
    assert not build(**trained).skips_parameters
    for setting in ({"freeze_updates": 1}, {"freeze_frontend": True}, {"mask_prob": 0.0}):
        assert build(**(trained | setting)).skips_parameters


def test_the_frozen_start_survives_saving() -> None:
    objective, other = build(freeze_updates=5), build(freeze_updates=5)
    objective.after_step(5)
    other.load_state_dict(objective.state_dict())
    assert not other.frozen
    assert build(freeze_updates=5).frozen


def test_dropout_is_on_while_the_encoder_is_frozen() -> None:
    torch.manual_seed(0)
    objective = CTC(encoder(dropout=0.5), n_characters=5, mask_prob=0.0, channel_mask_prob=0.0).train()
    batch = clips([20], [[1, 2]])
    assert objective(batch).total != objective(batch).total
    objective.eval()
    assert objective(batch).total == objective(batch).total


def test_a_frozen_frontend_still_trains_its_projection() -> None:
    """As the released code: the convolutions stop learning, what reads them goes on."""
    objective = build(freeze_frontend=True).train()
    objective(clips([20, 30], [[1, 2, 3], [4, 4]])).total.backward()
    frontend = objective.encoder.frontend
    assert all(weight.grad is None for weight in frontend.weights)
    assert frontend.project.weight.grad.abs().sum() > 0


def test_eight_micro_batches_give_the_gradient_of_one_batch() -> None:
    frames = [10, 30, 22, 15, 18, 26, 5, 12]
    texts = [[1, 2], [3, 3, 1], [4], [2, 1, 2], [1], [4, 3, 2, 1], [1, 1, 2, 2, 3], [2, 2]]
    objective = build(freeze_frontend=False).train()

    def run(parts: list[Batch]) -> tuple[Tensor, float]:
        objective.zero_grad()
        losses = [objective(part) for part in parts]
        count = sum(loss.count for loss in losses)
        for loss in losses:
            (loss.total / count).backward()
        return torch.cat([p.grad.flatten() for p in objective.parameters()]), count

    one, count = run([clips(frames, texts)])
    eight, same = run([clips([n], [text], first=i) for i, (n, text) in enumerate(zip(frames, texts, strict=True))])
    assert count == same == 7  # one is infeasible
    assert torch.cosine_similarity(one, eight, dim=0) > 0.99999
    assert one.norm().item() == pytest.approx(eight.norm().item(), rel=1e-4)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_garbage_in_the_padding_changes_nothing(norm: str) -> None:
    torch.manual_seed(0)
    objective = CTC(encoder(norm=norm), n_characters=5, freeze_updates=0).train()
    batch = clips([20, 30], [[1, 2, 3], [4, 4]])
    dirty = batch.raw.data.clone()
    dirty[0, int(batch.raw.lengths[0]) :] = 1e3
    clean = objective(batch).total
    assert torch.equal(objective(replace(batch, inputs={"speech": replace(batch.raw, data=dirty)})).total, clean)


def test_twenty_steps_lower_the_loss_on_a_toy() -> None:
    objective = build(freeze_frontend=False, mask_prob=0.0, channel_mask_prob=0.0).train()
    batch = clips([20, 24, 18], [[1, 2, 3], [4, 4], [2, 1]])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    seen = []
    for step in range(1, 21):
        loss = objective(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        objective.after_step(step)
        seen.append(loss.total.item() / loss.count)
    assert seen[-1] < 0.5 * seen[0]


def test_masks_are_drawn_while_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build(mask_prob=0.5, channel_mask_prob=0.5)
    seen: list[tuple[Tensor, object]] = []
    forward = Encoder.forward

    def spy(self: Encoder, tokens, plan=None, hide="none", **kwargs) -> Encoded:
        seen.append((tokens.x, plan))
        return forward(self, tokens, plan, hide, **kwargs)

    monkeypatch.setattr(Encoder, "forward", spy)
    batch = clips([20, 30], [[1, 2, 3], [4, 4]])
    objective.train()(batch)
    objective.eval()(batch)
    objective.train().predict(batch)
    (trained, plan), *others = seen
    assert plan is not None
    assert plan.masked.any()
    zeroed = (trained == 0).all(1)
    assert zeroed.any(1).all()
    assert not torch.equal(zeroed[0], zeroed[1])
    for x, none in others:
        assert none is None
        assert not (x == 0).all(1).any()


def test_prediction_is_the_best_path_of_the_log_probabilities() -> None:
    objective = build(n_characters=3).eval()
    path = torch.tensor([[1, 1, 0, 1, 2]])
    objective.head = Given(5 * nn.functional.one_hot(path, 3).float())
    batch = clips([5], [[1]])
    assert objective.predict(batch) == [[1, 1, 2]]
    log_probs, lengths = objective.log_probs(batch.raw)
    assert lengths.tolist() == [5]
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 5))


def test_the_share_of_blanks_is_that_of_real_frames() -> None:
    objective = build(n_characters=3).eval()
    paths = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 0, 1, 2]])
    objective.head = Given(5 * nn.functional.one_hot(paths, 3).float())
    value, frames = objective(clips([2, 5], [[1], [1]])).metrics["blank"]
    assert (int(value), frames) == (3, 7)


def test_pictures_are_refused() -> None:
    frontend = Patches(dim=DIM, size=[2, 2], channels=1, mean=[0.5], std=[0.5])
    net = Encoder(frontend, Transformer(dim=DIM, depth=1, heads=2), SinCos(DIM), mask_token=True)
    with pytest.raises(ValueError, match=r"CTC spells along time, but the tokens of Patches lie on \('h', 'w'\)"):
        CTC(net, n_characters=5)


def test_wrong_characters_name_the_clip() -> None:
    objective = build()
    with pytest.raises(ValueError, match="clip1: character 5 at place 1 is not one of the 4 after the blank"):
        objective(clips([20, 20], [[1, 2], [1, 5]]))
    with pytest.raises(ValueError, match="clip0: character 0 at place 0"):
        objective(clips([20], [[0, 2]]))
    with pytest.raises(ValueError, match="CTC needs the transcript of every clip"):
        objective(replace(clips([20], [[1]]), labels=None))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="objective.n_characters=1"):
        CTC(encoder(), n_characters=1)
    with pytest.raises(ValueError, match="encoder.mask_token=false"):
        CTC(encoder(mask_token=False), n_characters=5)
    CTC(encoder(mask_token=False), n_characters=5, mask_prob=0.0)
