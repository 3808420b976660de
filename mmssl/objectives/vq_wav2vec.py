"""vq-wav2vec: wav2vec over discrete units, which a language model can then be trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.contrast import binary_chance, binary_cross_entropy, contrast_metrics, contrast_steps
from mmssl.nn.predictor import places
from mmssl.nn.quantizer import GumbelQuantizer, KMeansQuantizer, code_perplexity, perplexity
from mmssl.nn.seeds import generators_of, gumbel_per_clip
from mmssl.nn.spread import spread
from mmssl.types import Batch, Hide, Loss, Raw, Tokens, valid_mask


class VQWav2Vec(nn.Module):
    """Quantize the features; from the quantized past, say of quantized features whether they come some steps later.

    Source: Baevski, Schneider and Auli 2020 (arXiv:1910.05453), sections 2 and 3.
    Differs from the paper: what `Wav2Vec` says of its own; codewords are not shared between groups; the logits of the
        Gumbel quantizer are one linear map of the features. The exported encoder reads features that are not
        quantized: what this objective gives is `codes`, and a run exports what they take.
    Target: the quantized features, learned with the rest and not detached.

    Args:
        encoder: causal, with positions that read no content.
        quantizer: "gumbel" chooses by logits with noise, "kmeans" the nearest codeword.
        groups, codes: codebooks, and codewords in each.
        gumbel: temperature at the start, least temperature, factor for one optimizer update.
        commitment: see `KMeansQuantizer`.
        steps, negatives: see `Wav2Vec`.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "none"

    def __init__(
        self,
        encoder: Encoder,
        *,
        quantizer: Literal["gumbel", "kmeans"] = "gumbel",
        groups: int = 2,
        codes: int = 320,
        gumbel: tuple[float, float, float] = (2.0, 0.5, 0.999995),
        commitment: float = 0.25,
        steps: int = 8,
        negatives: int = 10,
    ) -> None:
        super().__init__()
        encoder.refuse_lookahead("vq-wav2vec")
        if quantizer not in ("gumbel", "kmeans"):
            raise ValueError(f"objective.quantizer={quantizer!r}: choose gumbel or kmeans")
        if steps < 1 or negatives < 1:
            raise ValueError(f"objective.steps={steps}, negatives={negatives}: both must be at least 1")
        self.encoder = encoder
        dim = encoder.frontend.feature_dim
        self.quantizer: GumbelQuantizer | KMeansQuantizer
        if quantizer == "gumbel":
            self.quantizer = GumbelQuantizer(dim_in=dim, groups=groups, codes=codes, dim=dim, temperature=gumbel)
        else:
            self.quantizer = KMeansQuantizer(dim=dim, groups=groups, codes=codes, commitment=commitment)
        self.negatives = negatives
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.predict = nn.ModuleList(nn.Linear(encoder.dim, dim) for _ in range(steps))
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Loss:
        """The loss of `Wav2Vec` in nats; and for k-means the mean distance of each clip's vectors from their codewords,
        counted as often as the clip has predictions.
        """
        tokens = self.encoder.tokens(batch.raw)
        features, real = _features(tokens)
        extra = features.new_zeros(())
        means: dict[str, float | Tensor]
        if isinstance(self.quantizer, GumbelQuantizer):
            temperature = self.quantizer.temperature_at(self.updates)
            quantized = self.quantizer(features, temperature, self._noise(tokens, batch.seeds))
            vectors, codes = quantized.vectors, quantized.codes
            means = {"temperature": temperature, "soft_perplexity": perplexity(quantized.soft.detach().mean(0)).mean()}
        else:
            vectors, codes, distance = self.quantizer(features)
            shifts = torch.arange(1, len(self.predict) + 1) * math.prod(tokens.grid[1:])
            ahead = (tokens.lengths[:, None] - shifts).clamp_min(0).sum(1)
            weight = (ahead / tokens.lengths).repeat_interleave(tokens.lengths)
            extra = (distance * weight.to(distance.device)).sum()
            means = {"distance": distance.detach().mean()}
        quantized_rows = vectors.new_zeros(tokens.valid.numel(), vectors.shape[1]).index_copy(0, real, vectors)
        target = quantized_rows.view(*tokens.x.shape[:2], -1)
        x = torch.where(tokens.valid[..., None], self.encoder.frontend.project(target), 0.0)
        context = self.encoder(replace(tokens, x=x)).tokens
        predictions = [predict(context) for predict in self.predict]
        scores = torch.cat(contrast_steps(predictions, target, tokens, negatives=self.negatives, seeds=batch.seeds))
        contrastive, count = binary_cross_entropy(scores), len(scores)
        means |= {
            "code_perplexity": code_perplexity(codes, self.quantizer.codes).mean(),
            "codes": self.quantizer.codes,
            "chance": binary_chance(self.negatives),
            "feature_std": spread(features.detach()),
            "target_std": spread(vectors.detach()),
        }
        sums: dict[str, float | Tensor] = {**contrast_metrics(scores.detach())}
        sums |= {"loss": (contrastive + extra).detach(), "contrastive": contrastive.detach()}
        sums |= {name: value * count for name, value in means.items()}
        return Loss(contrastive + extra, count, {name: (value, count) for name, value in sums.items()})

    def after_step(self, step: int) -> None:
        self.updates.fill_(step)

    @torch.no_grad()
    def codes(self, raw: Raw) -> tuple[Tensor, Tokens]:
        """The codes of clips, without noise.

        Returns:
            (B, N, G) int64, zero past each length; and the tokens that they are of.
        """
        tokens = self.encoder.tokens(raw)
        features, real = _features(tokens)
        if isinstance(self.quantizer, GumbelQuantizer):
            found = self.quantizer(features).codes
        else:
            found = self.quantizer(features)[1]
        clips, size = tokens.x.shape[:2]
        out = found.new_zeros(clips * size, found.shape[1]).index_copy(0, real, found)
        return out.view(clips, size, -1), tokens

    def _noise(self, tokens: Tokens, seeds: Tensor) -> Tensor | None:
        """(M, G, V) Gumbel noise, each clip's from its own seed; None while evaluating."""
        if not self.training:
            return None
        shape = self.quantizer.groups, self.quantizer.codes
        return gumbel_per_clip(tokens.lengths, shape, generators_of(seeds, tokens.x.device))


def _features(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(M, C) features of all real tokens, and their (M,) places among the B * N."""
    if tokens.feat is None:
        raise ValueError("vq-wav2vec quantizes the frontend's features, and this frontend gives none")
    real = places(valid_mask(tokens.lengths, tokens.x.shape[1]), tokens.x.device)
    return tokens.feat.flatten(0, 1).index_select(0, real), real
