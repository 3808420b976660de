"""The attentive probe: a learned query looks at the frozen tokens of a clip, and a linear layer tells its class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.evaluation.protocol import Fitted, Folds, Ragged, RaggedKnown, accuracy, choices_on
from mmssl.nn.heads import AttentionPool, ClassifierHead

RATES = (3e-4, 1e-3, 3e-3)
BATCH = 64
LEAST_UPDATES, EPOCHS = 300, 20  # so many updates, or so many times over the clips where that is more
WEIGHT_DECAY, WARM_UP = 0.01, 0.1


@dataclass(frozen=True)
class AttentiveProbe:
    """Standardization of tokens, attention pooling and classifier, ready for use.

    mean, std: (D,) of the tokens that it was fitted on.
    classes: (M,) the numbers of the classes that training has seen.
    """

    mean: Tensor
    std: Tensor
    pool: AttentionPool
    head: ClassifierHead
    classes: Tensor

    @torch.no_grad()
    def logits(self, tokens: Ragged) -> Tensor:
        """(Q, M) float32 on the CPU; those of a clip are the same alone and beside others."""
        parts = []
        for places in torch.arange(len(tokens)).split(BATCH):
            x, lengths = _batch(tokens[places], self.mean, self.std)
            parts.append(self.head(self.pool(x, lengths)).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, len(self.classes))

    def predict(self, tokens: Ragged) -> Tensor:
        """(Q,) classes."""
        return self.classes[self.logits(tokens).argmax(1)]


def fit_probe(
    tokens: Ragged, labels: Tensor, *, rate: float, seed: int = 0, device: torch.device | str = "cpu"
) -> AttentiveProbe:
    """Train one probe by AdamW with a cosine after a warm-up of a tenth; weights and order of clips come from `seed`.

    Args:
        tokens: of B clips.
        labels: (B,) int64.

    Raises:
        ValueError: tokens that are not finite, or fewer than two classes.
    """
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"attentive probe: takes at least two classes, got {classes.tolist()}")
    if not all(bool(torch.isfinite(clip).all()) for clip in tokens.clips):
        raise ValueError("attentive probe: tokens are not finite; leave out the clips they belong to")
    mean, std = (x.to(device) for x in _moments(tokens))
    width = len(mean)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool, head = AttentionPool(width, heads_of(width)), ClassifierHead(width, len(classes))
    weights = nn.ModuleList([pool, head]).to(device)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    updates = n_updates(len(tokens))
    rng = np.random.default_rng(seed)
    order: list[int] = []
    targets = targets.to(device)
    for update in range(updates):
        while len(order) < min(BATCH, len(tokens)):
            order += rng.permutation(len(tokens)).tolist()
        places, order = torch.tensor(order[:BATCH]), order[BATCH:]
        done, warm = (update + 0.5) / updates, WARM_UP
        share = done / warm if done < warm else 0.5 + 0.5 * math.cos(math.pi * (done - warm) / (1 - warm))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        logits = head(pool(*_batch(tokens[places], mean, std)))
        loss = F.cross_entropy(logits, targets[places.to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights.eval().requires_grad_(False)
    return AttentiveProbe(mean, std, pool, head, classes)


def fit_attentive(
    train: RaggedKnown,
    valid: RaggedKnown | None = None,
    folds: Folds | None = None,
    *,
    rates: Sequence[float] = RATES,
    refit: Literal["train", "train+valid"] = "train",
    device: torch.device | str = "cpu",
) -> Fitted:
    """An attentive probe; of several rates the best on validation is kept, of equal ones the smallest.

    Source: Chen et al. 2022, CAE (arXiv:2202.03026), "attentive probing"; Bardes et al. 2024, V-JEPA
        (arXiv:2404.08471), section 4.3.
    Differs from the papers: there is no block or MLP beside the attention, tokens are standardized over the training
        clips, and nothing is augmented, because tokens are computed once.

    Args:
        folds: of train, in place of `valid`.
        refit: "train+valid" trains once more on both, with the rate that was chosen.

    Raises:
        ValueError: several rates, and no validation clips to choose on.
    """
    pairs, where = choices_on(train, valid, folds)
    if len(rates) > 1 and not pairs:
        raise ValueError("attentive probe: to choose the rate takes validation clips; give some, or one rate")
    best, chosen, highest = min(rates), None, None
    for rate in sorted(rates) if pairs else []:
        probes = [fit_probe(*known, rate=rate, device=device) for known, _ in pairs]
        right = [accuracy(probe.predict(x), y) for probe, (_, (x, y)) in zip(probes, pairs, strict=True)]
        now = sum(right) / len(right)
        if highest is None or now > highest:
            best, chosen, highest = rate, probes[0], now
    tokens, labels = train
    if refit == "train+valid" and valid is not None:
        tokens, labels = Ragged([*tokens.clips, *valid[0].clips]), torch.cat([labels, valid[1]])
        chosen = None
    if chosen is None or valid is None:
        chosen = fit_probe(tokens, labels, rate=best, device=device)
    how = "" if len(rates) == 1 else f" (of {', '.join(f'{rate:g}' for rate in sorted(rates))}, {where})"
    return Fitted(
        predict=chosen.predict,
        valid_accuracy=highest,
        protocol=(
            f"one query of {chosen.pool.heads} heads over frozen tokens, then a linear layer, fitted on {refit}, "
            f"{n_updates(len(tokens))} updates of AdamW, rate = {best:g}{how}"
        ),
        details={"rate": best, "refit": refit},
    )


def heads_of(width: int) -> int:
    """The most heads that divide a width, 8 at most."""
    return next(heads for heads in range(8, 0, -1) if width % heads == 0)


def n_updates(clips: int) -> int:
    return max(LEAST_UPDATES, EPOCHS * math.ceil(clips / BATCH))


def _moments(tokens: Ragged) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over all tokens, in float64 and clip by clip: they are never copied."""
    count = sum(len(clip) for clip in tokens.clips)
    mean = torch.stack([clip.double().sum(0) for clip in tokens.clips]).sum(0) / count
    square = torch.stack([(clip.double() - mean).square().sum(0) for clip in tokens.clips]).sum(0) / count
    std = square.sqrt()
    return mean.float(), torch.where(std > 1e-6 * mean.abs() + 1e-12, std, 1.0).float()


def _batch(tokens: Ragged, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, D) standardized, and (B,) lengths on the CPU."""
    x = nn.utils.rnn.pad_sequence(list(tokens.clips), batch_first=True).to(mean.device)
    return (x - mean) / std, torch.tensor([len(clip) for clip in tokens.clips])
