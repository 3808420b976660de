"""Classification of whole clips: fine-tuning, or a linear probe when the encoder is frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.freezing import FreezeSchedule
from mmssl.nn.heads import POOLS, AttentionPool, ClassifierHead
from mmssl.nn.layer_weights import LayerWeights
from mmssl.nn.masking import axis_mask
from mmssl.nn.spread import token_spread
from mmssl.types import Batch, Hide, Loss, Raw, valid_mask

_TIME = {2: 1, 5: 2}  # axes of a batch that may be ragged -> the axis of time


class Classify(nn.Module):
    """Pool a clip's tokens and tell its class.

    Source: He et al. 2022 (arXiv:2111.06377), appendix A.1, "end-to-end fine-tuning" and "linear probing"; mixup is
        Zhang et al. 2018 (arXiv:1710.09412).
    Differs from the paper: tokens are pooled after the encoder's final norm; each clip has a mixing share of its own,
        drawn from its seed; no cutmix.
    Target: the manifest's label, or with `multi_label` a list of labels: a binary cross-entropy for each class, as Gong
        et al. 2021 (AST, arXiv:2104.01778) have it for AudioSet.

    Args:
        n_classes: labels are 0 to n_classes - 1.
        pooling: "mean" of the tokens, the "class" token (the encoder's first prefix vector), the mean of all "prefix"
            vectors, the "last" token, or "attention" with `pool_heads` heads. All over real tokens only.
        label_smoothing: share of the target spread evenly over the classes.
        mixup: alpha of the Beta distribution that the share is drawn from; 0 mixes nothing. Clip i is mixed with clip
            B - 1 - i of its micro-batch.
        mask: axis -> share of its steps to hide while training, such as {t: 0.2, f: 0.2}; see `axis_mask`. Hidden
            tokens are left out, so that a step gets cheaper.
        multi_label: a clip has any number of classes, none too.
        freeze_encoder: train the head only; the encoder is in evaluation mode and gets no gradient.
        freeze_updates: optimizer updates during which only what is new is trained, with masks and dropout on.
        unfreeze_every: optimizer updates from a block's first to that of the block below it, see `FreezeSchedule`; 0
            trains all blocks from the same one on.
        weighted_layers: pool the sum of all layers by learned weights, see `LayerWeights`, in the place of the output.
        class_weights: "balanced" weighs the loss of a clip by how rare its class is: by the clips of the training set
            over the number of classes and the clips of that class, which is 1 in the mean over all clips.
        class_counts: clips of each class in the training set, for these weights.
        head_norm, head_dropout, head_std: see `ClassifierHead`.
        head_eps: added to the variance by that norm; heads of transformers come with their own.
    """

    label: ClassVar[str | None] = "label"
    hide: ClassVar[Hide] = "none"

    def __init__(
        self,
        encoder: Encoder,
        *,
        n_classes: int,
        pooling: Literal["mean", "class", "prefix", "last", "attention"] = "mean",
        pool_heads: int = 8,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        mask: Mapping[str, float] | None = None,
        multi_label: bool = False,
        freeze_encoder: bool = False,
        freeze_updates: int = 0,
        unfreeze_every: int = 0,
        weighted_layers: bool = False,
        class_weights: Literal["balanced"] | None = None,
        class_counts: Sequence[int] | None = None,
        head_norm: Literal["layer", "none"] = "layer",
        head_dropout: float = 0.0,
        head_std: float = 0.01,
        head_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(
                f"n_classes={n_classes}: there must be at least two classes to tell apart; check the labels"
            )
        if pooling not in ("attention", *POOLS):
            raise ValueError(f"objective.pooling={pooling!r}: choose one of attention, {', '.join(POOLS)}")
        if pooling in ("class", "prefix") and encoder.n_prefix == 0:
            raise ValueError(
                f"objective.pooling={pooling}: this encoder has no class token (encoder.prefix=0); choose mean or "
                "attention"
            )
        if multi_label and label_smoothing:
            raise ValueError(
                f"objective.label_smoothing={label_smoothing:g}: there is no share to spread where each class is told "
                "for itself (objective.multi_label=true); set it to 0"
            )
        if class_weights is not None and (multi_label or class_counts is None):
            raise ValueError(
                f"objective.class_weights={class_weights}: weighs clips by their class, and here a clip has several "
                "(objective.multi_label=true), or nothing is known of how many there are; leave it out"
            )
        self.schedule = FreezeSchedule(
            depth=encoder.depth, freeze_updates=freeze_updates, unfreeze_every=unfreeze_every
        )
        if self.schedule.freezes and freeze_encoder:
            given = f"freeze_updates={freeze_updates}" if freeze_updates else f"unfreeze_every={unfreeze_every}"
            raise ValueError(
                f"objective.{given}: the encoder is never trained (objective.freeze_encoder=true); leave one of the "
                "two out"
            )
        shares = dict(mask or {})
        axes = encoder.frontend.axes
        for axis, share in shares.items():
            if axis not in axes or not 0 <= share < 1:
                raise ValueError(
                    f"objective.mask={{{axis}: {share}}}: give a share from 0 to below 1 for an axis of the tokens, "
                    f"{', '.join(axes)}"
                )
        self.mask = [shares.get(axis, 0.0) for axis in axes] if any(shares.values()) else None
        self.multi_label = multi_label
        self.encoder = encoder
        self.n_classes = n_classes
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.freeze_encoder = freeze_encoder
        self.layer_weights = LayerWeights(encoder.depth + 1) if weighted_layers else None
        self.skips_parameters = self.schedule.freezes or encoder.skips_parameters(self.hide, output=not weighted_layers)
        # saved where something depends on it, so that a run that is resumed goes on
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64), persistent=self.schedule.freezes)
        self.weights: Tensor | None
        counts = None if class_weights is None else torch.tensor(class_counts, dtype=torch.float64)
        weights = None if counts is None else (counts.sum() / (n_classes * counts)).float()
        self.register_buffer("weights", weights, persistent=False)
        self.pool: Callable[[Tensor, Tensor, int], Tensor]
        if pooling == "attention":
            self.pool = AttentionPool(encoder.dim, pool_heads)
        else:
            self.pool = POOLS[pooling]
        self.head = ClassifierHead(
            encoder.dim, n_classes, norm=head_norm, dropout=head_dropout, std=head_std, eps=head_eps
        )
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Classify:
        super().train(mode)
        if self.freeze_encoder:
            # dropout would make frozen features noisy
            self.encoder.eval()
        return self

    def forward(self, batch: Batch) -> Loss:
        """Sum of the clips' cross-entropies in nats, with `multi_label` each the mean over classes; the count is clips.

        The metric "accuracy" is the share of clips whose likeliest class is theirs, or one of theirs.
        """
        raw, labels = batch.raw, self._labels(batch)
        share = None
        if self.training and self.mixup > 0:
            raw, share = mix(raw, batch.seeds, alpha=self.mixup)
        logits, spread = self._logits(raw, batch.seeds)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            losses = self._losses(logits, labels)
            if share is not None:
                share = share.to(losses.device)
                losses = share * losses + (1 - share) * self._losses(logits, labels.flip(0))
        total = losses.sum()
        if share is not None:
            own = share >= 0.5
            labels = torch.where(own[:, None] if self.multi_label else own, labels, labels.flip(0))
        guess = logits.argmax(1)
        right = (labels.gather(1, guess[:, None])[:, 0] if self.multi_label else guess == labels).sum()
        n = len(batch)
        chance = (labels.sum() if self.multi_label else n) / self.n_classes
        metrics: dict[str, tuple[float | Tensor, float]] = {
            "loss": (total.detach(), n),
            "accuracy": (right, n),
            "chance_accuracy": (chance, n),
            "feature_std": (spread * n, n),
        }
        ranks = self.multi_label and not self.training
        return Loss(total, n, metrics, (logits.detach(), labels.bool()) if ranks else None)

    def predict(self, batch: Batch) -> Tensor:
        """(B, classes) float32 logits."""
        return self._logits(batch.raw)[0].float()

    def after_step(self, step: int) -> None:
        self.updates.fill_(step)

    @property
    def frozen(self) -> int:
        """How many layers of the encoder are not trained, or not yet, from layer 0 up."""
        return self.encoder.depth + 1 if self.freeze_encoder else self.schedule.frozen(self.updates)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) cross-entropies, each with the weight of its class."""
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses if self.weights is None else losses * self.weights[labels]

    def _logits(self, raw: Raw, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The logits, and how far the encoder's tokens lie apart; with seeds, what a training step sees."""
        frozen = self.frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            tokens = self.encoder.tokens(raw)
        plan, hide = None, self.hide
        if self.training and self.mask is not None and seeds is not None:
            plan, hide = axis_mask(tokens.lengths, grid=tokens.grid, ratios=self.mask, seeds=seeds), "drop"
        layers = range(self.encoder.depth + 1) if self.layer_weights is not None else ()
        encoded = self.encoder(tokens, plan, hide, layers=layers, frozen=frozen)
        if self.layer_weights is not None:
            encoded = self.layer_weights.output(encoded)
        pooled = self.pool(encoded.x, encoded.lengths, encoded.n_prefix)
        return self.head(pooled), token_spread(encoded)

    def _labels(self, batch: Batch) -> Tensor:
        """(B,) classes, or with `multi_label` (B, classes) float, 1 for each class that a clip has."""
        labels = batch.labels
        if self.multi_label:
            if labels is None or labels.ndim != 2 or batch.label_lengths is None:
                raise ValueError("Classify: every clip needs a list of labels; give each manifest row a 'label'")
            # what fills up a row is one class more, which is cut off
            real = valid_mask(batch.label_lengths, labels.shape[1], labels.device)
            place = labels.masked_fill(~real, self.n_classes)
            several = torch.zeros(len(labels), self.n_classes + 1, device=labels.device)
            return several.scatter_(1, place, 1.0)[:, : self.n_classes]
        if labels is None or labels.ndim != 1:
            raise ValueError("Classify: every clip needs one label; give each manifest row a 'label'")
        if labels.device.type == "cpu":  # elsewhere a look would wait for the device
            wrong = ((labels < 0) | (labels >= self.n_classes)).nonzero()[:, 0].tolist()
            if wrong:
                raise ValueError(
                    f"{batch.ids[wrong[0]]}: label {int(labels[wrong[0]])} is none of the {self.n_classes} classes "
                    f"0 to {self.n_classes - 1}; correct the manifest"
                )
        return labels


def mix(raw: Raw, seeds: Tensor, *, alpha: float) -> tuple[Raw, Tensor]:
    """Mix each clip with its counterpart in the reversed batch.

    Source: Zhang et al. 2018 (arXiv:1710.09412), section 2. Clips of different length are mixed where they overlap;
    past the other's end a clip stays as it is, and its share of the label grows accordingly: silence has no label.

    Args:
        seeds: (B,) int64, one for each clip's draw.
        alpha: shares are drawn from Beta(alpha, alpha).

    Returns:
        the mixed clips, each as long as before, and (B,) on the CPU the share that each clip has of itself.

    Raises:
        ValueError: clips of different length that are neither waveforms nor video.
    """
    draws = [np.random.default_rng(seed & (2**63 - 1)).beta(alpha, alpha) for seed in seeds.tolist()]
    own = torch.tensor(draws, dtype=torch.float32)
    data = raw.data
    if not data.is_floating_point():
        raise ValueError(f"objective.mixup={alpha:g}: ids of tokens cannot be mixed; set it to 0")
    overlap = torch.minimum(raw.lengths, raw.lengths.flip(0))
    ones = [1] * (data.ndim - 1)
    weight = own.to(data.device, data.dtype).view(-1, *ones)
    mixed = weight * data + (1 - weight) * data.flip(0)
    if int(raw.lengths.min()) < int(raw.lengths.max()):
        if data.ndim not in _TIME:
            raise ValueError(f"objective.mixup: cannot mix clips of different length of shape {tuple(data.shape[1:])}")
        axis = _TIME[data.ndim]
        ones[axis - 1] = data.shape[axis]
        mixed = torch.where(valid_mask(overlap, data.shape[axis], data.device).view(-1, *ones), mixed, data)
    return replace(raw, data=mixed), 1 - (1 - own) * overlap / raw.lengths
