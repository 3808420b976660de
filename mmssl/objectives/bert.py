"""BERT: say which codes stood at hidden places of a sequence of codes."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.masking import span_mask
from mmssl.nn.predictor import places
from mmssl.nn.spread import feature_spread
from mmssl.nn.units import CodeHead, choices
from mmssl.types import Batch, Hide, Loss


class BERT(nn.Module):
    """Hide spans of a sequence of codes, and predict each hidden one from what is left.

    The input is discrete here and so is what is predicted: `HuBERT` predicts codes from what the frontend measures.

    Source: Baevski, Schneider and Auli 2020, vq-wav2vec (arXiv:1910.05453), section 4, after Devlin et al. 2019
        (arXiv:1810.04805) without its loss of next sentences, as Liu et al. 2019, RoBERTa (arXiv:1907.11692), leave it.
    Differs from the paper: the codes of several codebooks at one step are predicted each by itself, given the same
        context, where the paper has one vocabulary of all combinations (see the frontend `codes`); all hidden tokens
        are replaced by the mask token, none is left as it is or replaced by another code, which the paper does not
        mention and BERT does; the number of spans counts as in `span_mask`, at least `min_spans` of them.
    Target: the codes of the hidden steps themselves.

    Args:
        encoder: with a mask token, and a frontend that reads codes.
        mask_prob, mask_span, min_spans: see `span_mask`; the paper draws a share of .05 as starts of spans of 10.

    Raises:
        ValueError: the encoder reads no codes, or has no mask token.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "replace"

    def __init__(self, encoder: Encoder, *, mask_prob: float = 0.5, mask_span: int = 10, min_spans: int = 1) -> None:
        super().__init__()
        if not encoder.frontend.codes:
            raise ValueError(
                f"BERT predicts the codes that it reads, and {type(encoder.frontend).__name__} reads none; write codes "
                "with `mmssl units` and choose modality codes, or choose HuBERT"
            )
        if encoder.mask_token is None:
            raise ValueError("encoder.mask_token=false: BERT replaces hidden tokens, set it to true")
        self.encoder = encoder
        self.mask_prob, self.mask_span, self.min_spans = mask_prob, mask_span, min_spans
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.head = CodeHead(encoder.dim, encoder.frontend.codes)

    def forward(self, batch: Batch) -> Loss:
        """Sum over hidden tokens of the cross-entropy in nats of all their codes; the count is hidden tokens."""
        raw = batch.raw
        tokens = self.encoder.tokens(raw)
        plan = span_mask(
            tokens.lengths, prob=self.mask_prob, span=self.mask_span, min_spans=self.min_spans, seeds=batch.seeds
        )
        encoded = self.encoder(tokens, plan, self.hide)
        hidden = places(plan.masked, encoded.x.device)
        x = encoded.tokens.flatten(0, 1).index_select(0, hidden)
        codes = (
            raw.data[..., : tokens.x.shape[1]].transpose(1, 2).flatten(0, 1).index_select(0, hidden).long()
        )  # (M, G)
        total = x.new_zeros((), dtype=torch.float32)
        count = len(hidden)
        metrics: dict[str, tuple[float | Tensor, float]] = {}
        for place, logits in enumerate(self.head(x)):
            losses = F.cross_entropy(logits, codes[:, place], reduction="none")
            total = total + losses.sum()
            name = f"codes_{place}_" if place else ""
            metrics |= choices(name, logits.detach(), codes[:, place], losses.detach()) if count else {}
        metrics["hidden"] = count, int(tokens.lengths.sum())
        metrics["loss"] = total.detach(), count
        metrics["feature_std"] = feature_spread(tokens) * count, count
        return Loss(total, count, metrics)

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
