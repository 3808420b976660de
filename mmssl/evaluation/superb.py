"""The protocol of SUPERB: a frozen encoder, a learned weight for each of its layers, and a small head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.evaluation.protocol import Fitted, Folds, Known, accuracy, choices_on
from mmssl.nn.ctc import BLANK, best_path, frames_needed
from mmssl.nn.layer_weights import LayerWeights

RATES = (1e-4, 1e-3, 1e-2, 1e-1)
PROJECTED, HIDDEN = 256, 256
BATCH = 32
LEAST_UPDATES, EPOCHS = 300, 30  # so many updates, or so many times over the clips where that is more


class UtteranceHead(nn.Module):
    """Weighted layers, a linear map to `PROJECTED` dimensions, the mean over tokens, and a linear map to classes.

    All before the mean is linear, so the mean over tokens may come first: clips are given as the means of their layers,
    which is the same to rounding and takes little memory.
    """

    def __init__(self, layers: int, dim: int, n_classes: int) -> None:
        super().__init__()
        self.layers = LayerWeights(layers)
        self.project = nn.Linear(dim, PROJECTED)
        self.linear = nn.Linear(PROJECTED, n_classes)

    def vectors(self, x: Tensor) -> Tensor:
        """(B, layers, D) -> (B, PROJECTED)."""
        return self.project(self.layers(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.vectors(x))


class SpellingHead(nn.Module):
    """Weighted layers, a linear map, two bidirectional LSTMs and a linear map to characters.

    A clip is spelled as it is alone: the recurrence ends, and begins backwards, at its own last token.
    """

    def __init__(self, layers: int, dim: int, n_characters: int) -> None:
        super().__init__()
        self.layers = LayerWeights(layers)
        self.project = nn.Linear(dim, PROJECTED)
        self.lstm = nn.LSTM(PROJECTED, HIDDEN, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.linear = nn.Linear(2 * HIDDEN, n_characters)

    def forward(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Clips of (N, layers, D) -> (B, N, V) log probabilities and (B,) lengths on the CPU."""
        lengths = torch.tensor([len(clip) for clip in clips])
        x = nn.utils.rnn.pad_sequence([self.project(self.layers(clip)) for clip in clips], batch_first=True)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        heard, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.linear(heard).float().log_softmax(-1), lengths


@dataclass(frozen=True)
class UtteranceProbe:
    """A trained head, and the numbers of the classes that it tells."""

    head: UtteranceHead
    classes: Tensor

    @torch.no_grad()
    def vectors(self, features: Tensor) -> Tensor:
        """(Q, layers x D) -> (Q, PROJECTED), what verification compares."""
        return self.head.vectors(_unflat(self.head, features)).cpu()

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """(Q, layers x D) -> (Q,) classes."""
        return self.classes[self.head(_unflat(self.head, features)).argmax(1).cpu()]

    @property
    def weights(self) -> list[float]:
        return [float(weight) for weight in self.head.layers.weights]


def fit_utterances(
    features: Tensor, labels: Tensor, *, layers: int, rate: float, seed: int = 0, device: torch.device | str = "cpu"
) -> UtteranceProbe:
    """Train one head by Adam with a constant rate; weights and order of clips come from `seed`.

    Args:
        features: (B, layers x D): the means of each clip's layers, end to end.
        labels: (B,) int64.

    Raises:
        ValueError: fewer than two classes.
    """
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"superb: takes at least two classes, got {classes.tolist()}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = UtteranceHead(layers, features.shape[1] // layers, len(classes))
    head.to(device)
    targets = targets.to(device)

    def loss(places: Tensor) -> Tensor:
        return F.cross_entropy(head(_unflat(head, features[places])), targets[places.to(device)])

    _train(head, loss, len(features), rate, seed)
    return UtteranceProbe(head, classes)


def fit_superb(
    train: Known,
    valid: Known | None = None,
    folds: Folds | None = None,
    *,
    layers: int,
    rates: Sequence[float] = RATES,
    refit: Literal["train", "train+valid"] = "train",
    device: torch.device | str = "cpu",
) -> Fitted:
    """Classes of whole clips by SUPERB's protocol: keywords, intents, speakers.

    Source: Yang et al. 2021, "SUPERB" (arXiv:2105.01051), section 3: frozen encoder, learned weights of the layers, and
        only the rate searched, on validation; head and rates as in its toolkit s3prl.
    Differs from the paper: some tens of times over the clips in place of 200,000 updates, and four rates of its seven.

    Args:
        folds: of train, in place of `valid`.
        layers: of the features, see `fit_utterances`.
        refit: "train+valid" trains once more on both, with the rate that was chosen.

    Raises:
        ValueError: several rates, and no validation clips to choose on.
    """
    pairs, where = choices_on(train, valid, folds)
    if len(rates) > 1 and not pairs:
        raise ValueError("superb: to choose the rate takes validation clips; give some, or one rate")
    fit = partial(fit_utterances, layers=layers, device=device)
    best, chosen, highest = min(rates), None, None
    for rate in sorted(rates) if pairs else []:
        probes = [fit(*known, rate=rate) for known, _ in pairs]
        right = [accuracy(probe.predict(x), y) for probe, (_, (x, y)) in zip(probes, pairs, strict=True)]
        now = sum(right) / len(right)
        if highest is None or now > highest:
            best, chosen, highest = rate, probes[0], now
    features, labels = train
    if refit == "train+valid" and valid is not None:
        features, labels = torch.cat([features, valid[0]]), torch.cat([labels, valid[1]])
        chosen = None
    if chosen is None or valid is None:
        chosen = fit(features, labels, rate=best)
    weights = chosen.weights
    heaviest = max(range(layers), key=weights.__getitem__)
    return Fitted(
        predict=chosen.predict,
        valid_accuracy=highest,
        protocol=(
            f"SUPERB: frozen, learned weights of {layers} layers (most on {heaviest}: {weights[heaviest]:.2f}), "
            f"{PROJECTED} dimensions, mean, linear; fitted on {refit}, {n_updates(len(features))} updates of Adam, "
            f"rate = {best:g}{_of(rates, where)}"
        ),
        details={"rate": best, "refit": refit, "weights": {str(i): weight for i, weight in enumerate(weights)}},
        vectors=chosen.vectors,
    )


@dataclass(frozen=True)
class Speller:
    """A trained head, and what its choice was.

    rate: of training, the best on validation.
    valid_errors: the share of wrong characters there.
    clips: of training, without those too short for their transcripts.
    """

    head: SpellingHead
    rate: float
    valid_errors: float
    clips: int

    @torch.no_grad()
    def __call__(self, clips: Sequence[Tensor]) -> list[list[int]]:
        """Clips of (N, layers, D) -> characters, by the best path."""
        device = self.head.layers.scores.device
        found: list[list[int]] = []
        for start in range(0, len(clips), BATCH):
            found += best_path(*self.head([clip.to(device) for clip in clips[start : start + BATCH]]))
        return found


def fit_spelling(
    train: tuple[Sequence[Tensor], Sequence[Sequence[int]]],
    valid: Sequence[Tensor],
    *,
    n_characters: int,
    errors: Callable[[list[list[int]]], float],
    rates: Sequence[float] = (1e-4, 1e-3, 1e-2),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Speller:
    """Characters by CTC on frozen, weighted layers; the rate is the one with the fewest wrong characters on validation.

    Source: Yang et al. 2021 (arXiv:2105.01051), section 3.1, "automatic speech recognition".
    Differs from the paper: LSTMs of `HIDDEN` for 1,024, for small data, and no SpecAugment; clips too short for their
        transcript are left out.

    Args:
        train: clips of (N, layers, D) tokens, and their characters, without blanks.
        valid: clips to choose on.
        errors: the characters said of each of them -> the share of wrong ones.

    Raises:
        ValueError: no training clip is long enough for its transcript.
    """
    clips, texts = train
    sizes = torch.tensor([len(text) for text in texts])
    padded = nn.utils.rnn.pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True)
    fits = (frames_needed(padded, sizes) <= torch.tensor([len(clip) for clip in clips])).nonzero()[:, 0]
    if not len(fits):
        raise ValueError("superb: no training clip has as many tokens as its transcript has characters")
    best: Speller | None = None
    for rate in sorted(rates):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = SpellingHead(clips[0].shape[1], clips[0].shape[2], n_characters).to(device)

            def loss(places: Tensor, head: SpellingHead = head) -> Tensor:
                rows = fits[places]
                log_probs, lengths = head([clips[row].to(device) for row in rows.tolist()])
                return F.ctc_loss(log_probs.transpose(0, 1), padded[rows].to(device), lengths, sizes[rows], blank=BLANK)

            _train(head, loss, len(fits), rate, seed)  # here, because dropout draws from the same generator
        speller = Speller(head, rate, 0.0, len(fits))
        wrong = errors(speller(valid))
        if best is None or wrong < best.valid_errors:
            best = replace(speller, valid_errors=wrong)
    assert best is not None
    return best


def n_updates(clips: int) -> int:
    return max(LEAST_UPDATES, EPOCHS * math.ceil(clips / BATCH))


def _of(rates: Sequence[float], where: str) -> str:
    return "" if len(rates) == 1 else f" (of {', '.join(f'{rate:g}' for rate in sorted(rates))}, {where})"


def _train(head: nn.Module, loss: Callable[[Tensor], Tensor], clips: int, rate: float, seed: int) -> None:
    """Adam on batches of clips that are drawn without return, gradients of length 1 at most."""
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    head.train()
    for places in _batches(clips, n_updates(clips), seed):
        optimizer.zero_grad()
        loss(places).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    head.eval().requires_grad_(False)


def _batches(clips: int, updates: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(updates):
        if len(order) < min(BATCH, clips):
            order += rng.permutation(clips).tolist()
        yield torch.tensor(order[:BATCH])
        order = order[BATCH:]


def _unflat(head: UtteranceHead, features: Tensor) -> Tensor:
    scores: Any = head.layers.scores
    return features.float().to(scores.device).unflatten(1, (len(scores), -1))
