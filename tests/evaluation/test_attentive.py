import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.evaluation import attentive
from mmssl.evaluation.attentive import fit_attentive, fit_probe, heads_of, n_updates
from mmssl.evaluation.protocol import Ragged, Split, measure


def marked(count: int, *, seed: int = 0, width: int = 6) -> tuple[Ragged, Tensor]:
    """Clips of 3 to 12 tokens of noise; one token, anywhere, says the class."""
    rng = np.random.default_rng(seed)
    labels, clips = rng.integers(2, size=count), []
    for label in labels:
        clip = rng.normal(size=(rng.integers(3, 13), width))
        clip[:, 0] = 0
        clip[rng.integers(len(clip)), :2] = 8, 4 * (2 * label - 1)
        clips.append(torch.from_numpy(clip).float())
    return Ragged(clips), torch.from_numpy(labels)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive, "LEAST_UPDATES", 60)


def test_a_token_that_says_the_class_is_found_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive, "LEAST_UPDATES", 120)
    probe = fit_probe(*marked(128), rate=3e-3)
    tokens, labels = marked(64, seed=1)
    assert float((probe.predict(tokens) == labels).double().mean()) >= 0.9


def test_a_clip_alone_is_told_as_beside_longer_ones() -> None:
    tokens, labels = marked(40)
    probe = fit_probe(tokens, labels, rate=1e-3)
    together = probe.logits(tokens)
    alone = torch.cat([probe.logits(tokens[torch.tensor([place])]) for place in range(40)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_probe_and_leaves_the_generator_alone() -> None:
    tokens, labels = marked(20)
    state = torch.random.get_rng_state()
    first, again, other = (fit_probe(tokens, labels, rate=1e-3, seed=seed).logits(tokens) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_scale_and_shift_of_a_feature_do_not_count() -> None:
    tokens, labels = marked(20)
    factor, shift = torch.tensor([1e3, 1e-3, 1.0, 10.0, 2.0, 1.0]), torch.arange(6) * 5.0
    moved = Ragged([clip * factor + shift for clip in tokens.clips])
    plain, scaled = (fit_probe(x, labels, rate=1e-3).logits(x) for x in (tokens, moved))
    torch.testing.assert_close(plain, scaled, atol=1e-2, rtol=0)


def test_the_rate_is_chosen_on_validation_and_the_test_is_touched_once() -> None:
    train, valid = marked(40), marked(20, seed=1)
    right = {
        rate: float((fit_probe(*train, rate=rate).predict(valid[0]) == valid[1]).double().mean())
        for rate in (1e-6, 3e-3)
    }
    fitted = fit_attentive(train, valid, rates=(3e-3, 1e-6), refit="train")
    assert fitted.valid_accuracy == max(right.values())
    assert fitted.details["rate"] == min(rate for rate, value in right.items() if value == max(right.values()))
    both = fit_attentive(train, valid, rates=[1e-3], refit="train+valid")
    whole = fit_probe(Ragged([*train[0].clips, *valid[0].clips]), torch.cat([train[1], valid[1]]), rate=1e-3)
    assert torch.equal(both.predict(valid[0]), whole.predict(valid[0]))
    split = [Split(*marked(n, seed=n)) for n in (40, 20, 30)]
    score = measure(lambda *given: fit_attentive(*given, rates=[3e-3]), *split, task="attentive", per_class=8, draws=2)
    assert [draw["n_train"] for draw in score.details["draws"]] == [16, 16]
    assert score.n == 30


def test_heads_divide_the_width_and_every_clip_is_seen_some_twenty_times() -> None:
    assert [heads_of(width) for width in (768, 6, 7, 13)] == [8, 6, 7, 1]
    assert n_updates(64 * 100) == 2000


def test_what_cannot_be_fitted_is_refused() -> None:
    tokens, labels = marked(6)
    with pytest.raises(ValueError, match="at least two classes"):
        fit_probe(tokens, torch.zeros(6, dtype=torch.int64), rate=1e-3)
    with pytest.raises(ValueError, match="not finite"):
        fit_probe(Ragged([*tokens.clips[:5], torch.full((2, 6), torch.nan)]), labels, rate=1e-3)
    with pytest.raises(ValueError, match="takes validation clips"):
        fit_attentive((tokens, labels))
