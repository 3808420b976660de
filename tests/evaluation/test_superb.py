import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.evaluation import superb
from mmssl.evaluation.protocol import Split, measure
from mmssl.evaluation.superb import SpellingHead, UtteranceHead, fit_spelling, fit_superb, fit_utterances

LAYERS, DIM = 3, 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superb, "LEAST_UPDATES", 60)
    monkeypatch.setattr(superb, "EPOCHS", 1)
    monkeypatch.setattr(superb, "PROJECTED", 16)
    monkeypatch.setattr(superb, "HIDDEN", 16)


def told_by_layer(count: int, *, layer: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of three layers, end to end, of which one tells the class."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, LAYERS, DIM)), rng.integers(2, size=count)
    x[:, layer, 0] += 3 * (2 * y - 1)
    return torch.from_numpy(x).flatten(1), torch.from_numpy(y)


def test_the_mean_over_tokens_may_come_before_all_that_is_linear() -> None:
    torch.manual_seed(0)
    head, clip = UtteranceHead(LAYERS, DIM, 5), torch.randn(7, LAYERS, DIM)
    after = head.linear(head.project(head.layers(clip)).mean(0))
    torch.testing.assert_close(head(clip.mean(0, keepdim=True))[0], after)


def test_the_layer_that_tells_the_classes_gets_the_most_weight() -> None:
    x, y = told_by_layer(96)
    probe = fit_utterances(x, y, layers=LAYERS, rate=1e-2)
    assert int(np.argmax(probe.weights)) == 1
    assert sum(probe.weights) == pytest.approx(1.0)
    test, truth = told_by_layer(64, seed=1)
    assert float((probe.predict(test) == truth).double().mean()) >= 0.95
    assert probe.vectors(test).shape == (64, 16)


def test_the_same_seed_gives_the_same_head() -> None:
    x, y = told_by_layer(20)
    state = torch.random.get_rng_state()
    first, again, other = (fit_utterances(x, y, layers=LAYERS, rate=1e-3, seed=seed).vectors(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_the_rate_is_chosen_and_the_weights_are_told() -> None:
    train, valid, test = (Split(*told_by_layer(n, seed=n)) for n in (48, 32, 40))

    def fit(train: tuple[Tensor, Tensor], valid: object = None, folds: object = None) -> object:
        return fit_superb(train, valid, folds, layers=LAYERS, rates=(1e-6, 1e-2))  # type: ignore[type-var]

    score = measure(fit, train, valid, test, task="superb")  # type: ignore[arg-type]
    assert score.details["rate"] == 1e-2
    assert list(score.details["weights"]) == ["0", "1", "2"]
    assert "rate = 0.01 (of 1e-06, 0.01, on validation)" in score.protocol
    few = measure(fit, train, valid, test, task="superb", per_class=4, draws=2)  # type: ignore[arg-type]
    assert [draw["n_train"] for draw in few.details["draws"]] == [8, 8]
    with pytest.raises(ValueError, match="takes validation clips"):
        fit_superb(told_by_layer(8), layers=LAYERS)
    with pytest.raises(ValueError, match="at least two classes"):
        fit_utterances(torch.zeros(4, 12), torch.zeros(4, dtype=torch.int64), layers=LAYERS, rate=0.1)


def spelled(count: int, *, seed: int = 0) -> tuple[list[Tensor], list[list[int]]]:
    """Clips of one to three characters, each three tokens long, that one layer tells."""
    rng = np.random.default_rng(seed)
    clips, texts = [], []
    for _ in range(count):
        text = rng.integers(1, 4, size=rng.integers(1, 4)).tolist()
        clip = 0.1 * rng.normal(size=(4 * len(text), LAYERS, DIM))
        for place, character in enumerate(text):
            clip[4 * place : 4 * place + 3, 1, character] += 3
        clips.append(torch.from_numpy(clip).float())
        texts.append(text)
    return clips, texts


def test_a_clip_is_spelled_alone_as_beside_longer_ones() -> None:
    torch.manual_seed(0)
    head, (clips, _) = SpellingHead(LAYERS, DIM, 4).eval(), spelled(8)
    with torch.no_grad():
        together, lengths = head(clips)
        for row, clip in enumerate(clips):
            torch.testing.assert_close(together[row, : lengths[row]], head([clip])[0][0], atol=1e-5, rtol=0)


def test_characters_are_learned_and_the_rate_is_the_one_with_the_fewest_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superb, "LEAST_UPDATES", 80)
    (clips, texts), (held, truth) = spelled(32), spelled(24, seed=1)
    texts[0] = [1] * 20  # too long for its clip: left out, and no infinite loss

    def errors(said: list[list[int]]) -> float:
        return sum(map(list.__ne__, said, truth)) / len(truth)

    speller = fit_spelling((clips, texts), held, n_characters=4, errors=errors, rates=(1e-6, 1e-2))
    assert speller.rate == 1e-2
    assert speller.valid_errors == errors(speller(held)) <= 0.2
    with pytest.raises(ValueError, match="no training clip has as many tokens"):
        fit_spelling((clips[:1], [[1] * 30]), held, n_characters=4, errors=errors)
