"""EnCodecMAE: from the frames that are left visible, say which codes of a codec all frames have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.block_masks import block_mask
from mmssl.nn.predictor import Predictor, places
from mmssl.nn.spread import spread, token_spread
from mmssl.nn.units import choices, label_names, label_sets, label_weights, units_at, units_of_tokens
from mmssl.types import Batch, Hide, Loss


class EncodecMAE(nn.Module):
    """Hide spans, encode the rest, and name the units of hidden and of visible tokens with a small decoder.

    Source: Pepino et al. 2023 (arXiv:2309.07391); defaults of the base model's released configuration.
    Differs from the paper: hidden and visible tokens are weighed by the shares that are to be hidden and visible, and
        not by those that a batch happens to have; spans go on at a clip's other end, see `block_mask`; the decoder has
        a mask vector, where the released code has zeros.
    Target: units of each clip that stand in the manifest, such as `mmssl units` writes: the codes of EnCodec, or any
        others.

    Args:
        encoder: encodes the visible tokens only.
        units: key of a manifest's row -> how many codes there are; a list of them where a label set has several labels
            at each step, one for each codebook.
        weights: key -> weight of its loss, or one for each of its labels; 1 by default.
        mask_ratio: share of each clip's tokens to hide.
        mask_size: tokens of a span; or of a block along each axis.
        masked_weight: of the mean loss of hidden tokens; that of visible ones has the rest to 1.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, decoder_eps: of the Predictor.

    Raises:
        ValueError: no label set, weights for others, or shares that are none.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"

    def __init__(
        self,
        encoder: Encoder,
        *,
        units: Mapping[str, int | Sequence[int]],
        weights: Mapping[str, float | Sequence[float]] | None = None,
        mask_ratio: float = 0.5,
        mask_size: int | Sequence[int] = 15,
        masked_weight: float = 0.9,
        decoder_dim: int = 768,
        decoder_depth: int = 2,
        decoder_heads: int = 12,
        decoder_mlp_dim: int | None = None,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not units:
            raise ValueError("objective.units={}: name a key of the manifest and its number of codes: {units: 500}")
        if not (0 < mask_ratio < 1 and 0 <= masked_weight <= 1):
            raise ValueError(
                f"objective.mask_ratio={mask_ratio:g}, objective.masked_weight={masked_weight:g}: a share of the "
                "tokens to hide lies between 0 and 1, and so does the weight of their loss"
            )
        self.codes = label_sets(units)
        self.weights, self.names = label_weights(self.codes, weights), label_names(self.codes)
        self.encoder = encoder
        self.mask_ratio, self.mask_size = mask_ratio, mask_size
        self.hidden_weight, self.seen_weight = masked_weight / mask_ratio, (1 - masked_weight) / (1 - mask_ratio)
        # nothing is replaced here, so a mask token that the encoder may have gets no gradient
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predictor = Predictor(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            mlp_dim=decoder_mlp_dim,
            out_dim=sum(map(sum, self.codes.values())),
            eps=decoder_eps,
        )

    def forward(self, batch: Batch) -> Loss:
        """The loss in nats, summed over all tokens with units, hidden ones and visible ones by their weights.

        Raises:
            ValueError: the batch lacks a label set.
        """
        tokens = self.encoder.tokens(batch.raw, late=True)
        plan = block_mask(tokens, ratio=self.mask_ratio, size=self.mask_size, seeds=batch.seeds)
        aligned = {key: units_of_tokens(units_at(batch, key), tokens) for key in self.codes}
        known = torch.stack([known for _, known in aligned.values()]).all(0)
        encoded = self.encoder(tokens, plan, self.hide)
        logits = self.predictor(encoded, tokens, plan, predicted=known).float()  # (M, sum of all codes)
        index = places(known, logits.device)
        masked = plan.masked[known]  # (M,) on the CPU
        hidden = places(masked, logits.device)
        weight = torch.where(masked, self.hidden_weight, self.seen_weight).to(logits.device)

        total = logits.new_zeros(())
        metrics: dict[str, tuple[float | Tensor, float]] = {}
        first = 0
        for key, (values, _) in aligned.items():
            targets = values.flatten(0, 1).index_select(0, index)
            for label, size in enumerate(self.codes[key]):
                own, target = logits[:, first : first + size], targets[:, label]
                losses = F.cross_entropy(own, target, reduction="none")
                total = total + self.weights[key][label] * (weight * losses).sum()
                if len(hidden):
                    of_hidden = (x.detach().index_select(0, hidden) for x in (own, target, losses))
                    metrics |= choices(self.names[key][label], *of_hidden)
                first += size
        count, n = len(index), len(hidden)
        metrics["hidden"] = n, count
        if n:
            shown = logits.detach().index_select(0, hidden)
            metrics |= {
                "loss": (total.detach(), count),
                "feature_std": (token_spread(encoded) * n, n),
                "prediction_std": (spread(F.normalize(shown, dim=-1)) * shown.shape[-1] ** 0.5 * n, n),
            }
        return Loss(total, count, metrics)

    def after_step(self, step: int) -> None:
        """Nothing here changes with time."""
