"""data2vec 2.0: data2vec on visible tokens only, with a convolutional decoder and many masks for one teacher's pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.block_masks import BLOCK_MASKS, BlockMask
from mmssl.nn.conv_decoder import ConvDecoder
from mmssl.nn.latent import Copied, Norm, averaged_target, parts_to_copy, regression, top_layers
from mmssl.nn.seeds import normal_per_clip
from mmssl.nn.spread import feature_spread, spread
from mmssl.nn.teacher import Teacher, ema_decay
from mmssl.types import Batch, Hide, Loss, MaskPlan, Point, Raw, Tokens


class Data2Vec2(nn.Module):
    """Encode the visible tokens of several masked copies of a clip, and regress to one target for all of them.

    Source: Baevski et al. 2023 (arXiv:2212.07525), section 3; defaults of the image model, without its class loss. With
        `utterance_weight` 1, Chen et al. 2024, EAT (arXiv:2401.03497), section 3.1.
    Differs from the papers: every clip has exactly the share `mask_ratio` hidden (see `nn.block_masks`); the statistics
        of the instance norm leave padding out; the noise in the place of hidden tokens comes from the clips' own seeds.
        ALiBi is the Transformer's (`transformer.bias`). The utterance loss is a mean over copies, as in
        EAT's equation, where the released code takes their sum.
    Target: as for `Data2Vec`. One pass of the teacher over the whole clip serves all of its copies.

    Args:
        encoder: works on the visible tokens only.
        mask, mask_ratio, mask_size: see `Data2Vec`; "inverse_blocks" leaves blocks visible.
        clones: masked copies of each clip.
        mask_noise: deviation of the noise that the decoder gets in the place of hidden tokens.
        decoder_dim, decoder_depth, decoder_kernel, decoder_groups: of the ConvDecoder.
        utterance_weight: of the error of the class token against the mean target of the clip, beside that of a hidden
            token; needs a class token.
        top_k, target_point, layer_norm, target_norm, beta: see `Data2Vec`.
        ema_decay, ema_decay_end, ema_updates, copied: see `Data2Vec`.

    Raises:
        ValueError: settings that do not fit the encoder.
    """

    label: ClassVar[str | None] = None
    hide: ClassVar[Hide] = "drop"

    def __init__(
        self,
        encoder: Encoder,
        *,
        mask: BlockMask = "inverse_blocks",
        mask_ratio: float = 0.8,
        mask_size: int | Sequence[int] = 3,
        clones: int = 16,
        mask_noise: float = 0.01,
        decoder_dim: int = 768,
        decoder_depth: int = 6,
        decoder_kernel: int = 3,
        decoder_groups: int = 16,
        utterance_weight: float = 0.0,
        top_k: int = 10,
        target_point: Point = "mlp",
        layer_norm: Norm = "instance",
        target_norm: Norm = "layer",
        beta: float = 0.0,
        ema_decay: float = 0.9998,
        ema_decay_end: float = 0.99999,
        ema_updates: int = 100_000,
        copied: Sequence[Copied] = (),
    ) -> None:
        super().__init__()
        if clones < 1:
            raise ValueError(f"objective.clones={clones}: a clip has at least 1 masked copy")
        if utterance_weight and not encoder.n_prefix:
            raise ValueError(
                f"objective.utterance_weight={utterance_weight}: the class token is what predicts a whole clip, and "
                "this encoder has none; set encoder.prefix to 1, or the weight to 0"
            )
        self.encoder = encoder
        self.mask, self.mask_ratio, self.mask_size = BLOCK_MASKS[mask], mask_ratio, mask_size
        self.clones, self.mask_noise, self.utterance_weight = clones, mask_noise, utterance_weight
        self.layers = top_layers(encoder.depth, top_k)
        self.target_point, self.layer_norm, self.target_norm = target_point, layer_norm, target_norm
        self.beta = beta
        self.first_decay, self.last_decay, self.ema_updates = ema_decay, ema_decay_end, ema_updates
        self.shares_tokens = "frontend" in copied
        self.skips_parameters = encoder.skips_parameters(self.hide)
        self.teacher = Teacher(encoder, copy=parts_to_copy(encoder, copied))
        self.decoder = ConvDecoder(
            dim_in=encoder.dim,
            dim=decoder_dim,
            depth=decoder_depth,
            kernel=decoder_kernel,
            groups=decoder_groups,
            axes=len(encoder.frontend.axes),
            out_dim=encoder.dim,
        )

    def forward(self, batch: Batch) -> Loss:
        """Sum over hidden tokens of all copies of the error, see `nn.latent.regression`; the count is hidden tokens."""
        tokens = self.encoder.tokens(batch.raw)
        plan = self.mask(tokens, ratio=self.mask_ratio, size=self.mask_size, seeds=batch.seeds, clones=self.clones)
        encoded = self.encoder(tokens, plan, self.hide)
        prediction = self.decoder(encoded, tokens, plan, self._noise(plan, batch.seeds, encoded.x))
        whole = self.target(batch.raw, tokens)
        # a hidden token's place among the B x N of the clips
        copy, place = plan.masked.nonzero().unbind(1)
        of = (plan.rows[copy] * plan.masked.shape[1] + place).to(whole.device, non_blocking=True)
        target = whole.flatten(0, 1).index_select(0, of)
        total = regression(prediction, target, beta=self.beta).sum()
        count = len(target)
        metrics: dict[str, Tensor | float] = {
            "target_std": spread(target) * count,
            "prediction_std": spread(prediction) * count,
            "feature_std": feature_spread(tokens) * count,
            "teacher_decay": self.teacher.decay * count,
            "target_norms": ((self.layer_norm != "none") + (self.target_norm != "none")) * count,
        }
        if self.utterance_weight:
            mean = whole.sum(1) / tokens.lengths.to(whole.device)[:, None]
            rows, hidden = plan.rows.to(whole.device), plan.masked.sum(1).to(whole.device)
            # as often as the copy has hidden tokens, so that it weighs the same whatever the count is
            utterance = (regression(encoded.x[:, 0], mean[rows], beta=self.beta) * hidden).sum()
            metrics |= {"token_loss": total.detach(), "utterance_loss": utterance.detach()}
            total = total + self.utterance_weight * utterance
        metrics["loss"] = total.detach()
        return Loss(total, count, {name: (value, count) for name, value in metrics.items()})

    def after_step(self, step: int) -> None:
        decay = ema_decay(step, first=self.first_decay, last=self.last_decay, updates=self.ema_updates)
        self.teacher.update(self.encoder, decay)

    def target(self, raw: Raw, tokens: Tokens) -> Tensor:
        """(B, N, D) float32: what is to be predicted for every token of a batch, and the student's tokens of it."""
        return averaged_target(
            self.teacher,
            raw,
            tokens if self.shares_tokens else None,
            layers=self.layers,
            point=self.target_point,
            layer_norm=self.layer_norm,
            target_norm=self.target_norm,
        )

    def _noise(self, plan: MaskPlan, seeds: Tensor, like: Tensor) -> Tensor:
        """(M, D), each clip's from its own seed, one copy after the other."""
        counts = plan.masked.sum(1).view(len(seeds), -1).sum(1)
        return normal_per_clip(counts, like.shape[-1], seeds, like.device) * self.mask_noise
