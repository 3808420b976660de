"""BEST-RQ: name the code that a random, frozen quantizer gives to each hidden token."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.masking import span_mask
from mmssl.nn.predictor import places
from mmssl.nn.quantizer import RandomQuantizer, code_perplexity
from mmssl.nn.spread import spread
from mmssl.types import Batch, Hide, Loss, Raw, Tokens, valid_mask


class BestRQ(nn.Module):
    """A hidden token's code, by a quantizer that is random and stays so, must be read off what is beside it.

    Source: Chiu et al. 2022 (arXiv:2202.01855), section 3; several codebooks as in Zhang et al. 2023 (USM,
    arXiv:2303.01037).
    Differs from the paper: hidden tokens are replaced by a learned vector, where the paper puts noise into frames of
        the input; values are brought to mean 0 and deviation 1 over each clip rather than over the data; the encoder
        is this project's Transformer, where the paper has a Conformer.
    Target: `target`, values that the modality computes from the raw input, each of them normalized over the clip's real
        tokens (without that, projections fall on few codes), then quantized; never learned ones.

    Args:
        encoder: with a mask token.
        target: (raw, tokens) -> (B, N, P).
        target_dim: P.
        target_learned: whether the target is learned features of the frontend, whose codes would move with them.
        mask_prob, mask_span, min_spans: see `span_mask`.
        groups: codebooks, each with a softmax of its own; their losses are averaged.
        codes: codewords in each.
        code_dim: width of a codeword.
        quantizer_seed: of the quantizer's random numbers, whatever the seed of the run.

    Raises:
        ValueError: a target that is learned, or an encoder without a mask token.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "replace"

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Callable[[Raw, Tokens], Tensor],
        target_dim: int,
        target_learned: bool = False,
        mask_prob: float = 0.4,
        mask_span: int = 10,
        min_spans: int = 2,
        groups: int = 1,
        codes: int = 8192,
        code_dim: int = 16,
        quantizer_seed: int = 0,
    ) -> None:
        super().__init__()
        encoder.refuse_learned(target_learned, "BEST-RQ takes codes of", so="the codes would move under the prediction")
        if encoder.mask_token is None:
            raise ValueError("encoder.mask_token=false: BEST-RQ replaces hidden tokens, set it to true")
        if min(groups, codes - 1, code_dim) < 1:
            raise ValueError(
                f"objective.groups={groups}, codes={codes}, code_dim={code_dim}: a choice takes a codebook of 2 codes"
            )
        self.encoder = encoder
        self.target = target
        self.quantizer = RandomQuantizer(
            dim_in=target_dim, groups=groups, codes=codes, dim=code_dim, seed=quantizer_seed
        )
        self.head = nn.Linear(encoder.dim, groups * codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.mask_prob, self.mask_span, self.min_spans = mask_prob, mask_span, min_spans
        self.skips_parameters = encoder.skips_parameters(self.hide)

    def forward(self, batch: Batch) -> Loss:
        """The loss in nats, summed over hidden tokens: the mean over codebooks of each one's cross-entropy."""
        tokens = self.encoder.tokens(batch.raw)
        plan = span_mask(
            tokens.lengths, prob=self.mask_prob, span=self.mask_span, min_spans=self.min_spans, seeds=batch.seeds
        )
        encoded = self.encoder(tokens, plan, self.hide)
        hidden = places(plan.masked, encoded.x.device)
        codes = self.codes(batch.raw, tokens).flatten(0, 1).index_select(0, hidden)  # (M, G)
        x = encoded.tokens.flatten(0, 1).index_select(0, hidden)
        groups, size, n = self.quantizer.groups, self.quantizer.codes, len(hidden)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(x.float()).view(n * groups, size)
            total = F.cross_entropy(logits, codes.flatten(), reduction="sum") / groups
        metrics: dict[str, tuple[float | Tensor, float]] = {"hidden": (n, int(tokens.lengths.sum()))}
        if n:
            right = (logits.detach().argmax(1) == codes.flatten()).sum()
            commonest = torch.stack([torch.bincount(group, minlength=size).max() for group in codes.t()])
            metrics |= {
                "loss": (total.detach(), n),
                "accuracy": (right, n * groups),
                # of always naming the commonest code of the batch
                "chance_accuracy": (commonest.sum(), n * groups),
                "target_perplexity": (code_perplexity(codes, size).mean() * n, n),
                "prediction_std": (spread(F.normalize(x.float(), dim=-1)) * x.shape[-1] ** 0.5 * n, n),
            }
        return Loss(total, n, metrics)

    def after_step(self, step: int) -> None:
        pass

    @torch.no_grad()
    def codes(self, raw: Raw, tokens: Tokens) -> Tensor:
        """(B, N, G) int64, of no meaning past each length."""
        with torch.autocast(tokens.x.device.type, enabled=False):
            values = self.target(raw, tokens).float()
            valid = valid_mask(tokens.lengths, values.shape[1], values.device)[..., None]
            count = tokens.lengths.to(values.device)[:, None, None]
            # where, not a product: what a target leaves in the padding may be NaN
            mean = torch.where(valid, values, 0.0).sum(1, keepdim=True) / count
            centered = torch.where(valid, values - mean, 0.0)
            deviation = (centered.square().sum(1, keepdim=True) / count).sqrt()
            # a value that never changes says nothing, and has no deviation to divide by
            return self.quantizer((centered / deviation.clamp_min(1e-4)).flatten(0, 1)).view(*values.shape[:2], -1)
