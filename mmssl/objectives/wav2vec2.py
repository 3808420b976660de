"""wav2vec 2.0: name the code of a hidden frame among those of other hidden frames of the same clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.contrast import contrast, contrast_metrics, draw_negatives
from mmssl.nn.masking import span_mask
from mmssl.nn.quantizer import GumbelQuantizer, code_perplexity, perplexity
from mmssl.nn.seeds import draw_per_clip, generators_of, gumbel_per_clip
from mmssl.nn.spread import spread
from mmssl.types import Batch, Hide, Loss, MaskPlan, Tokens, valid_mask


@dataclass(frozen=True)
class Draws:
    """All that is random in one loss, except the Transformer's dropout.

    plan: which tokens are hidden, one copy of each clip. Of the M hidden tokens that count, see `masked_places`.
    negatives: (M, K) int64 on the CPU, places among the hidden tokens of the same clip.
    kept: (M, C), what dropout multiplies the quantizer's input by; None for all 1.
    noise: (M, G, V) Gumbel noise; None for the likeliest codeword.
    """

    plan: MaskPlan
    negatives: Tensor
    kept: Tensor | None = None
    noise: Tensor | None = None


class Wav2Vec2(nn.Module):
    """A hidden frame's context must be nearer to its own quantized features than to those of other hidden frames.

    Source: Baevski, Zhou, Mohamed and Auli 2020 (arXiv:2006.11477), sections 2 and 3; defaults of the base model.
    Differs from the paper: `mask_prob` counts frames as the released code does (see `span_mask`). The penalty on the
    size of the features is the released code's, taken clip by clip so that micro-batches add up; it is the same where
    all clips are equally long. The mean code probability of the diversity loss is that of the whole batch over all
    micro-batches and processes, not of each. Negatives that are the same as the target are found by their codes.
    The target comes from the frontend's features before their projection, unmasked, through the quantizer; it is
    trained, not detached: nothing else trains the codebook.

    Args:
        encoder: with a mask token.
        mask_prob, mask_span, min_spans: see `span_mask`.
        negatives: K, drawn with replacement for each hidden frame.
        groups, codes: the quantizer's codebooks and codewords in each.
        dim: width of codewords, of context and of target where they are compared.
        logit_temperature: divides the cosine similarity.
        diversity_weight: of the share of codewords that are not in use.
        feature_penalty: weight of the mean square of the features before their last norm, where they are learned.
        gumbel: temperature at the start, least temperature, factor for one optimizer update.
        feature_dropout: on the quantizer's input.

    Raises:
        ValueError: the encoder has no mask token.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "replace"
    # sums over the whole batch, from `statistics`; set by the loop where a batch comes in several parts
    global_statistics: Tensor | None = None

    def __init__(
        self,
        encoder: Encoder,
        *,
        mask_prob: float = 0.65,
        mask_span: int = 10,
        min_spans: int = 2,
        negatives: int = 100,
        groups: int = 2,
        codes: int = 320,
        dim: int = 256,
        logit_temperature: float = 0.1,
        diversity_weight: float = 0.1,
        feature_penalty: float = 10.0,
        gumbel: tuple[float, float, float] = (2.0, 0.5, 0.999995),
        feature_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if encoder.mask_token is None:
            raise ValueError("encoder.mask_token=false: wav2vec 2.0 replaces hidden tokens, set it to true")
        if negatives < 1:
            raise ValueError(f"objective.negatives={negatives}: a contrast needs at least 1")
        self.encoder = encoder
        feature_dim = encoder.frontend.feature_dim
        self.quantizer = GumbelQuantizer(dim_in=feature_dim, groups=groups, codes=codes, dim=dim, temperature=gumbel)
        self.project_context = nn.Linear(encoder.dim, dim)
        self.project_target = nn.Linear(dim, dim)
        self.mask_prob, self.mask_span, self.min_spans = mask_prob, mask_span, min_spans
        self.negatives = negatives
        self.logit_temperature = logit_temperature
        self.diversity_weight = diversity_weight
        self.feature_penalty = feature_penalty
        self.feature_dropout = feature_dropout
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Loss:
        """The loss in nats, summed over the hidden frames of the batch."""
        tokens = self.encoder.tokens(batch.raw)
        return self.loss_from(tokens, self.draw(tokens, batch.seeds))

    def after_step(self, step: int) -> None:
        self.updates.fill_(step)

    def draw(self, tokens: Tokens, seeds: Tensor) -> Draws:
        """Masks, negatives and noise, each clip's from its own seed; noise and dropout while training only."""
        plan = self._plan(tokens, seeds)
        _, counts = masked_places(plan)
        generators = generators_of(seeds, tokens.x.device)
        kept = self._dropout(counts, generators)
        noise = self._gumbel(counts, generators)
        return Draws(plan, draw_negatives(counts, self.negatives, seeds), kept, noise)

    @torch.no_grad()
    def statistics(self, batch: Batch) -> Tensor:
        """(G * V + 1,) sums that add up over the parts of a batch: code probabilities, then hidden frames."""
        tokens = self.encoder.tokens(batch.raw)
        index, counts = masked_places(self._plan(tokens, batch.seeds))
        # the same dropout as in the loss, which draws it first
        kept = self._dropout(counts, generators_of(batch.seeds, tokens.x.device))
        soft = self.quantizer.probabilities(_features(tokens, index, kept))
        return torch.cat([soft.sum(0).flatten(), soft.new_tensor([len(index)])])

    def loss_from(self, tokens: Tokens, draws: Draws) -> Loss:
        """The loss for given masks, negatives and noise."""
        index, counts = masked_places(draws.plan)
        n = len(index)
        encoded = self.encoder(tokens, draws.plan, self.hide)
        context = encoded.tokens.flatten(0, 1).index_select(0, index.to(encoded.x.device))
        features = _features(tokens, index, draws.kept)
        quantized = self.quantizer(features, self.quantizer.temperature_at(self.updates), draws.noise)
        prediction = self.project_context(context)
        target = self.project_target(quantized.vectors)
        same = self.quantizer.combined(quantized.codes)
        logits = contrast(prediction, target, same, draws.negatives, counts) / self.logit_temperature
        contrastive = (logits.logsumexp(1) - logits[:, 0]).sum()
        diversity, used = self._diversity(quantized.soft)
        total = contrastive + self.diversity_weight * diversity
        metrics: dict[str, tuple[float | Tensor, float]] = {}
        if tokens.pre_norm is not None and self.feature_penalty:
            penalty = feature_size(tokens.pre_norm, tokens.lengths, counts)
            total = total + self.feature_penalty * penalty
            metrics["feature_penalty"] = penalty.detach(), n
        hidden = int(draws.plan.masked.sum())
        metrics["hidden"] = hidden, int(tokens.lengths.sum())
        metrics["without_negatives"] = hidden - n, hidden
        if n:
            metrics |= {
                "loss": (total.detach(), n),
                "contrastive": (contrastive.detach(), n),
                "diversity": (diversity.detach(), n),
                "soft_perplexity": (used.detach().mean() * n, n),
                "code_perplexity": (code_perplexity(quantized.codes, self.quantizer.codes).mean() * n, n),
                "codes": (self.quantizer.codes * n, n),
                "temperature": (self.quantizer.temperature_at(self.updates) * n, n),
                "feature_std": (spread(features) * n, n),
                "prediction_std": (spread(_unit(prediction)) * n, n),
                "target_std": (spread(_unit(target)) * n, n),
            }
            metrics |= {name: (value, n) for name, value in contrast_metrics(logits.detach()).items()}
        return Loss(total, n, metrics)

    def _plan(self, tokens: Tokens, seeds: Tensor) -> MaskPlan:
        return span_mask(
            tokens.lengths, prob=self.mask_prob, span=self.mask_span, min_spans=self.min_spans, seeds=seeds
        )

    def _dropout(self, counts: Tensor, generators: list[torch.Generator]) -> Tensor | None:
        """(M, C) of 0 and 1 / (1 - rate); None where nothing is dropped."""
        keep = 1 - self.feature_dropout
        if not self.training or keep == 1:
            return None
        width = self.encoder.frontend.feature_dim
        return draw_per_clip(counts, (width,), generators, lambda part, g: part.bernoulli_(keep, generator=g)) / keep

    def _gumbel(self, counts: Tensor, generators: list[torch.Generator]) -> Tensor | None:
        """(M, G, V); None while evaluating."""
        if not self.training:
            return None
        shape = self.quantizer.groups, self.quantizer.codes
        return gumbel_per_clip(counts, shape, generators)

    def _diversity(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """The share of codewords not in use, times M; and how many are in use in each group.

        The mean of the softmax, without noise or temperature, is that of the whole batch where the loop gives it: its
        value is a constant, its gradient is this part's, and both add up over the parts exactly.

        Args:
            soft: (M, G, V).

        Returns:
            scalar, (G,).
        """
        local = soft.sum(0)
        sums = self.global_statistics if self.training else None
        if sums is None:
            sums = torch.cat([local.detach().flatten(), local.new_tensor([len(soft)])])
        n = sums[-1]
        mean = (sums[:-1].view_as(local) + local - local.detach()) / n.clamp_min(1)
        used = perplexity(mean)
        unused = 1 - used.sum() / local.numel()
        return unused.detach() * len(soft) + n * (unused - unused.detach()), used


def masked_places(plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """Where hidden tokens are that have another in their clip to be told from.

    Returns:
        (M,) ascending places in the B * N tokens; (B,) how many of them each clip has. Both on the CPU.
    """
    masked = plan.masked.cpu()
    counts = masked.sum(1)
    counts = counts.masked_fill(counts < 2, 0)
    return (masked & (counts > 0)[:, None]).flatten().nonzero()[:, 0], counts


def feature_size(pre_norm: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """The mean square of each clip's features over its real tokens, times its hidden tokens, summed over clips.

    Source: the penalty of the released code (fairseq), which takes one mean over the batch.

    Args:
        pre_norm: (B, N, C).
        lengths, counts: (B,) real and hidden tokens.
    """
    squares = pre_norm.float().square().mean(-1)
    squares = squares.masked_fill(~valid_mask(lengths, squares.shape[1], squares.device), 0.0)
    return (squares.sum(1) * (counts / lengths).to(squares.device)).sum()


def _features(tokens: Tokens, index: Tensor, kept: Tensor | None) -> Tensor:
    """(M, C), the quantizer's input."""
    if tokens.feat is None:
        raise ValueError("wav2vec 2.0 quantizes the frontend's features, and this frontend gives none")
    features = tokens.feat.flatten(0, 1).index_select(0, index.to(tokens.feat.device))
    return features if kept is None else features * kept


def _unit(x: Tensor) -> Tensor:
    """(M, D) at unit mean square: only directions are compared, and unrelated ones spread by about 1."""
    return F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5
