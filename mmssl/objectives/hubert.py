"""HuBERT: say which unit each hidden token is, where the units were found by clustering beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.heads import mean_pool
from mmssl.nn.masking import span_mask
from mmssl.nn.predictor import places
from mmssl.nn.spread import spread
from mmssl.nn.units import (
    CosineHead,
    choices,
    label_names,
    label_sets,
    label_weights,
    units_at,
    units_of_tokens,
)
from mmssl.objectives.wav2vec2 import feature_size
from mmssl.types import Batch, Hide, Loss, Raw, Tokens


class HuBERT(nn.Module):
    """Hidden tokens must be nearest to the embedding of their unit.

    Source: Hsu et al. 2021 (arXiv:2106.07447), sections II and IV; defaults of the base model.
    Differs from the paper: `mask_prob` counts as in `span_mask`; the penalty on the size of the features, which is the
        released code's, is taken clip by clip (see `feature_size`), so that micro-batches add up; each label has a
        projection of its own, as the released configuration has it (`untie_final_proj`).
    Target: units of each clip that stand in the manifest, such as `mmssl units` writes: k-means of MFCC or of a layer
        of an encoder, the codes of a codec, several codebooks at once (MERT: Li et al. 2023, arXiv:2306.00107); and
        `topics`, one label for all of a clip, from the mean of its tokens (HuBERTopic: Maekaku et al. 2023,
        arXiv:2310.03975). With `regression` also `target`: values that the modality computes from the sound, such as
        MERT's constant-Q transform; never learned ones.

    Args:
        encoder: with a mask token.
        units: key of a manifest's row -> how many codes there are; a list of them where a label set has several labels
            at each step.
        topics: the same of label sets with one label for all of a clip.
        weights: key -> weight of its loss, or one for each of its labels; 1 by default.
        mask_prob, mask_span, min_spans: see `span_mask`.
        unmasked_weight: of the loss at visible tokens; those at hidden ones have 1.
        dim: width of projections and embeddings.
        logit_temperature: divides the cosine similarity.
        feature_penalty: weight of the mean square of the features before their last norm, where they are learned.
        regression: weight of the mean squared error of a linear map of hidden tokens to `target`.
        target, target_dim, target_learned: see `MAE`; none without `regression`.

    Raises:
        ValueError: no label set, weights for others, a regression without a fixed target, or an encoder without a mask
            token.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "replace"

    def __init__(
        self,
        encoder: Encoder,
        *,
        units: Mapping[str, int | Sequence[int]],
        topics: Mapping[str, int] | None = None,
        weights: Mapping[str, float | Sequence[float]] | None = None,
        mask_prob: float = 0.8,
        mask_span: int = 10,
        min_spans: int = 2,
        unmasked_weight: float = 0.0,
        dim: int = 256,
        logit_temperature: float = 0.1,
        feature_penalty: float = 10.0,
        regression: float = 0.0,
        target: Callable[[Raw, Tokens], Tensor] | None = None,
        target_dim: int = 0,
        target_learned: bool = False,
    ) -> None:
        super().__init__()
        if encoder.mask_token is None:
            raise ValueError("encoder.mask_token=false: HuBERT replaces hidden tokens, set it to true")
        if (regression > 0) != (target is not None) or regression < 0:
            raise ValueError(
                f"objective.regression={regression:g}: a weight above 0 goes with a target to regress to, and no "
                "target without one; set both, or neither"
            )
        encoder.refuse_learned(
            target_learned,
            "HuBERT regresses to",
            so="the regression would collapse",
            choose="a fixed target such as cqt or log_mel",
        )
        if not units:
            raise ValueError("objective.units={}: name a key of the manifest and its number of codes: {units: 500}")
        topics = dict(topics or {})
        for key in topics:
            if key in units:
                raise ValueError(f"objective.topics: {key} is in units already; a label set is one or the other")
        codes = label_sets({**units, **topics})
        self.encoder = encoder
        self.weights, self.names = label_weights(codes, weights), label_names(codes)
        self.topics = tuple(topics)
        self.heads = nn.ModuleDict(
            {
                key: nn.ModuleList(
                    CosineHead(encoder.dim, size, code_dim=dim, temperature=logit_temperature) for size in sizes
                )
                for key, sizes in codes.items()
            }
        )
        self.mask_prob, self.mask_span, self.min_spans = mask_prob, mask_span, min_spans
        self.unmasked_weight = unmasked_weight
        self.feature_penalty = feature_penalty
        self.regression, self.target = regression, target
        self.regress = None if target is None else nn.Linear(encoder.dim, target_dim)
        self.skips_parameters = encoder.skips_parameters(self.hide)

    def forward(self, batch: Batch) -> Loss:
        """The loss in nats, summed over hidden tokens, and over visible ones where they have a weight.

        A topic's loss counts once for each token that its clip has in that sum, as the penalty does.

        Raises:
            ValueError: the batch lacks a label set.
        """
        tokens = self.encoder.tokens(batch.raw)
        plan = span_mask(
            tokens.lengths, prob=self.mask_prob, span=self.mask_span, min_spans=self.min_spans, seeds=batch.seeds
        )
        encoded = self.encoder(tokens, plan, self.hide)
        found = {key: units_at(batch, key) for key in self.heads}
        aligned = {key: units_of_tokens(units, tokens) for key, units in found.items() if key not in self.topics}
        known = torch.stack([known for _, known in aligned.values()]).all(0)
        hidden, seen = known & plan.masked, known & ~plan.masked
        # visible tokens after the hidden ones, or none of them
        index = [places(hidden, encoded.x.device)]
        if self.unmasked_weight:
            index.append(places(seen, encoded.x.device))
        x = encoded.tokens.flatten(0, 1).index_select(0, torch.cat(index))
        targets = {key: values.flatten(0, 1).index_select(0, torch.cat(index)) for key, (values, _) in aligned.items()}
        n, count = len(index[0]), len(x)

        total = x.new_zeros((), dtype=torch.float32)
        metrics: dict[str, tuple[float | Tensor, float]] = {}
        for key, target in targets.items():
            for label, (name, logits) in enumerate(self._logits(key, x)):
                losses = F.cross_entropy(logits, target[:, label], reduction="none")
                part = losses[:n].sum() + self.unmasked_weight * losses[n:].sum()
                total = total + self.weights[key][label] * part
                if n:
                    metrics |= choices(name, logits[:n].detach(), target[:n, label], losses[:n].detach())
        for key in self.topics:
            pooled = mean_pool(encoded.x, encoded.lengths, encoded.n_prefix)
            [(name, logits)] = self._logits(key, pooled)
            target = found[key].values[:, 0, 0]
            losses = F.cross_entropy(logits, target, reduction="none")
            tokens_of = (hidden | seen if self.unmasked_weight else hidden).sum(1).to(losses.device)
            total = total + self.weights[key][0] * (losses * tokens_of).sum()
            metrics |= choices(name, logits.detach(), target, losses.detach())
        if self.regress is not None and self.target is not None:
            # a target may hold a product of its own, as a spectrum does
            with torch.autocast(x.device.type, enabled=False):
                measured = self.target(batch.raw, tokens).flatten(0, 1).index_select(0, index[0]).detach().float()
                errors = (self.regress(x[:n].float()) - measured).square().mean(1).sum()
            total = total + self.regression * errors
            if n:
                metrics |= {"regression": (errors.detach(), n), "regression_std": (spread(measured) * n, n)}
        if tokens.pre_norm is not None and self.feature_penalty:
            counts = (hidden | seen if self.unmasked_weight else hidden).sum(1)
            penalty = feature_size(tokens.pre_norm, tokens.lengths, counts)
            total = total + self.feature_penalty * penalty
            metrics["feature_penalty"] = penalty.detach(), count
        masked = int(plan.masked.sum())
        metrics["hidden"] = masked, int(tokens.lengths.sum())
        metrics["without_units"] = masked - n, masked
        if n:
            metrics |= {
                "loss": (total.detach(), count),
                "feature_std": (spread(tokens.x.flatten(0, 1).index_select(0, index[0])) * n, n),
                "prediction_std": (spread(F.normalize(x[:n].float(), dim=-1)) * x.shape[-1] ** 0.5 * n, n),
            }
        return Loss(total, count, metrics)

    def after_step(self, step: int) -> None:
        pass

    def _logits(self, key: str, x: Tensor) -> list[tuple[str, Tensor]]:
        """(what the log calls it, (M, V) logits) of each label of a label set."""
        heads = self.heads[key]
        assert isinstance(heads, nn.ModuleList)
        return [(name, head(x)) for name, head in zip(self.names[key], heads, strict=True)]
