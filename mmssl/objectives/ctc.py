"""CTC: transcribe speech with characters, without knowing when each is spoken."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.nn.ctc import BLANK, best_path, frames_needed
from mmssl.nn.freezing import FreezeSchedule
from mmssl.nn.layer_weights import LayerWeights
from mmssl.nn.masking import channel_mask, span_mask
from mmssl.types import Batch, Hide, Loss, MaskPlan, Raw, Tokens

log = logging.getLogger(__name__)


class CTC(nn.Module):
    """The sum of the probabilities of all ways to spell a transcript over the frames must be high.

    Source: Graves, Fernandez, Gomez and Schmidhuber 2006 (ICML); for fine-tuning Baevski et al. 2020
    (arXiv:2006.11477), section 4.3 and appendix B; defaults of its 10 hour split.
    Differs from the paper: masked channels are zeroed before hidden frames are replaced, so the mask token keeps all
    of its channels. Clips too short for their transcript are left out, counted and, the first of them, named,
    instead of getting an infinite loss or, silently, none.
    The target is the batch's labels: the characters of each transcript, without blanks.

    Args:
        encoder: with a mask token unless mask_prob is 0; its tokens must lie on time alone.
        n_characters: size of the vocabulary with the blank, which is number 0.
        freeze_updates: optimizer updates during which only what is new is trained, with masks and dropout on; as many
            as the run has, and the encoder stays as it is.
        unfreeze_every: optimizer updates from a block's first to that of the block below it, see `FreezeSchedule`; 0
            trains all blocks from the same one on.
        weighted_layers: spell from the sum of all layers by learned weights, see `LayerWeights`, and not from the
            encoder's output.
        freeze_frontend: never train what a learned frontend does before its last norm.
        mask_prob, mask_span, min_spans: time masking while training, see `span_mask`.
        channel_mask_prob, channel_mask_span: channels of the tokens zeroed while training, see `channel_mask`.
        dropout: on what the encoder gives.

    Raises:
        ValueError: the tokens do not lie on time alone, there is no character beside the blank, or the mask token is
            missing.
    """

    label: ClassVar[str | None] = "text"
    hide: ClassVar[Hide] = "replace"

    def __init__(
        self,
        encoder: Encoder,
        *,
        n_characters: int,
        freeze_updates: int = 10_000,
        unfreeze_every: int = 0,
        weighted_layers: bool = False,
        freeze_frontend: bool = True,
        mask_prob: float = 0.65,
        mask_span: int = 10,
        min_spans: int = 2,
        channel_mask_prob: float = 0.5,
        channel_mask_span: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        frontend = encoder.frontend
        if tuple(frontend.axes) != ("t",):
            raise ValueError(
                f"CTC spells along time, but the tokens of {type(frontend).__name__} lie on {tuple(frontend.axes)}; "
                "use a frontend whose only axis is t"
            )
        if n_characters < 2:
            raise ValueError(f"objective.n_characters={n_characters}: needs the blank and at least one character")
        if mask_prob and encoder.mask_token is None:
            raise ValueError("encoder.mask_token=false: time masking needs it; set it to true, or mask_prob to 0")
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, n_characters)
        self.n_characters = n_characters
        self.schedule = FreezeSchedule(
            depth=encoder.depth, freeze_updates=freeze_updates, unfreeze_every=unfreeze_every
        )
        self.layer_weights = LayerWeights(encoder.depth + 1) if weighted_layers else None
        self.mask_prob, self.mask_span, self.min_spans = mask_prob, mask_span, min_spans
        self.channel_mask_prob, self.channel_mask_span = channel_mask_prob, channel_mask_span
        self.dropout = dropout
        if freeze_frontend and frontend.learned:
            frontend.grad_mult = 0.0
        self.skips_parameters = self.schedule.freezes or encoder.skips_parameters(
            "replace" if mask_prob else "none", output=not weighted_layers
        )
        self.infeasible_ids: set[str] = set()
        self.told = 0
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def frozen(self) -> int:
        """How many layers of the encoder are not trained yet, from layer 0 up."""
        return self.schedule.frozen(self.updates)

    def forward(self, batch: Batch) -> Loss:
        """The loss in nats, summed over the clips that are long enough for their transcripts.

        The metric "frozen" is the share of the encoder's layers that are not trained yet.
        """
        labels, label_lengths = self._labels(batch)
        frozen = self.frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            tokens = self.encoder.tokens(batch.raw)
        x = self._encode(tokens, batch.seeds if self.training else None, frozen)
        log_probs = self._log_probs(x)
        needed = frames_needed(labels, label_lengths)
        feasible = needed <= tokens.lengths
        left_out = {
            batch.ids[i]: f"{int(tokens.lengths[i])} frames, and its transcript takes {int(needed[i])}"
            for i in (~feasible).nonzero().flatten().tolist()
        }
        self._name(list(left_out))
        # An infeasible clip is given an empty transcript, whose loss is finite, and then left out: zero_infinity
        # would hide every other infinite loss as well.
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            labels.to(x.device),
            tokens.lengths,
            label_lengths * feasible,
            blank=BLANK,
            reduction="none",
        )
        total = losses.masked_fill(~feasible.to(x.device), 0.0).sum()
        n, clips, frames = int(feasible.sum()), len(batch), int(tokens.lengths.sum())
        blanks = ((log_probs.detach().argmax(-1) == BLANK) & tokens.valid).sum()
        metrics: dict[str, tuple[float | Tensor, float]] = {
            "loss": (total.detach(), n),
            "infeasible": (clips - n, clips),
            "blank": (blanks, frames),
            "characters": (int((label_lengths * feasible).sum()), n),
            "frozen": (frozen / (self.encoder.depth + 1), 1),
        }
        nothing = "" if n else "transcripts cannot be spelled in so few frames"
        return Loss(total, n, metrics, nothing=nothing, left_out=left_out)

    def after_step(self, step: int) -> None:
        self.updates.fill_(step)

    @torch.no_grad()
    def log_probs(self, raw: Raw) -> tuple[Tensor, Tensor]:
        """Of each character at each frame, nothing masked: (B, N, V) float32 and the (B,) real frames of each clip."""
        tokens = self.encoder.tokens(raw)
        return self._log_probs(self._encode(tokens, None)), tokens.lengths

    def predict(self, batch: Batch) -> list[list[int]]:
        """The characters of each clip, by the best path."""
        return best_path(*self.log_probs(batch.raw))

    def _encode(self, tokens: Tokens, seeds: Tensor | None, frozen: int = 0) -> Tensor:
        """(B, N, D); masked by the clips' seeds, or not at all where there are none."""
        plan: MaskPlan | None = None
        hide: Hide = "none"
        if seeds is not None and self.channel_mask_prob:
            hidden = channel_mask(
                len(tokens.x),
                tokens.x.shape[-1],
                prob=self.channel_mask_prob,
                span=self.channel_mask_span,
                seeds=seeds,
            )
            tokens = replace(tokens, x=tokens.x.masked_fill(hidden.to(tokens.x.device)[:, None], 0.0))
        if seeds is not None and self.mask_prob:
            hide = self.hide
            plan = span_mask(
                tokens.lengths, prob=self.mask_prob, span=self.mask_span, min_spans=self.min_spans, seeds=seeds
            )
        layers = range(self.encoder.depth + 1) if self.layer_weights is not None else ()
        encoded = self.encoder(tokens, plan, hide, layers=layers, frozen=frozen)
        return (encoded if self.layer_weights is None else self.layer_weights.output(encoded)).tokens

    def _log_probs(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, self.dropout, self.training)).float().log_softmax(-1)

    def _labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.labels is None or batch.label_lengths is None:
            raise ValueError("CTC needs the transcript of every clip: add `text` to the rows of the manifest")
        labels, lengths = batch.labels.cpu(), batch.label_lengths.cpu()
        real = torch.arange(labels.shape[1]) < lengths[:, None]
        wrong = (((labels <= BLANK) | (labels >= self.n_characters)) & real).nonzero().tolist()
        if wrong:
            clip, place = wrong[0]
            raise ValueError(
                f"{batch.ids[clip]}: character {int(labels[clip, place])} at place {place} is not one of the "
                f"{self.n_characters - 1} after the blank; encode with the vocabulary the model was built with"
            )
        return labels, lengths

    def _name(self, ids: list[str]) -> None:
        """Tell of infeasible clips, again only when they have become twice as many: a bad manifest has thousands."""
        new = [name for name in ids if name not in self.infeasible_ids]
        self.infeasible_ids.update(new)
        if new and len(self.infeasible_ids) >= 2 * self.told:
            self.told = len(self.infeasible_ids)
            shown = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
            log.warning(
                "%s: shorter than the transcript can be spelled in; left out of the loss, as are %d clips so far",
                shown,
                self.told,
            )
