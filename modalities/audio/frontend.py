"""Audio: a waveform -> log-mel spectrogram -> patches of time and frequency, each one token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.modalities.filterbank import Filterbank, Window, fill_to
from mmssl.modalities.speech.frontend import refuse_short
from mmssl.nn.linear import Linear
from mmssl.nn.masking import stripes as draw_stripes
from mmssl.types import Frontend, Raw, Tokens, valid_mask


class SpectrogramPatches(Frontend):
    """Patches of a clip's log-mel spectrogram, of any length, projected to the model's width.

    Source: Gong et al. 2021 (AST, arXiv:2104.01778), section 2.1, and Huang et al. 2022 (Audio-MAE, arXiv:2207.06405),
    section 4.2, with their constants of AudioSet.
    Differs from both: without `frames` clips are not cut or padded. Where the last patch reaches past a clip's last
        frame, the clip goes on with digital silence up to the patch's end, and no further: no frame is lost and a
        clip's tokens are the same in any batch. Both papers put zeros before the normalization, where they are louder
        than most sound; so it is with `frames`, for encoders that were trained so.
    Differs from AST: time is the outer axis of the tokens and of the values of a patch.

    Args:
        dim: width of the tokens.
        size: frames and bands of a patch.
        stride: frames and bands from one patch to the next; `size` by default. AST takes [10, 10]. Patches that overlap
            leave out the highest bands where no whole patch fits.
        mean, std: of the log-mel energies of the training data; `mmssl manifest --stats` measures them.
        deviations: a normalized value of 1 lies so many deviations from the mean; CAV-MAE has 1.
        frames: cut every clip to so many frames, or fill it up with zeros to them, as AST does with 1024. Those are
            tokens like all others.
        bands, window_ms, hop_ms, window, low, high, preemphasis, rate: see `Filterbank`. Clips must have this rate.
        dither: see `Filterbank`; in training only.
        stripes: for fine-tuning, {t: share, f: share}: one run of a clip's frames and one of its bands, each up to that
            share of them, are put to the mean (SpecAugment, see `nn.masking.stripes`); in training only. Audio-MAE has
            up to 192 of 1024 frames and 48 of 128 bands, and puts them to 0 before the normalization, where that is
            louder than most sound.
    """

    axes: ClassVar[tuple[str, ...]] = ("t", "f")
    learned: ClassVar[bool] = False
    late: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        size: Sequence[int] = (16, 16),
        stride: Sequence[int] | None = None,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        deviations: float = 2.0,
        frames: int | None = None,
        bands: int = 128,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        window: Window = "hanning",
        low: float = 20.0,
        high: float = 0.0,
        preemphasis: float = 0.97,
        rate: int = 16_000,
        dither: float = 0.0,
        stripes: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.size = tuple(size)
        self.stride = self.size if stride is None else tuple(stride)
        if len(self.size) != 2 or len(self.stride) != 2 or min(self.size) < 1 or min(self.stride) < 1:
            raise ValueError(
                f"frontend.size={list(self.size)}, frontend.stride={list(self.stride)}: give two numbers above 0 each, "
                "frames and bands"
            )
        if any(step > length for step, length in zip(self.stride, self.size, strict=True)):
            raise ValueError(
                f"frontend.stride={list(self.stride)}: longer than frontend.size={list(self.size)}, so that sound "
                "between the patches would be lost"
            )
        rest = bands - self.size[1]
        if rest < 0 or (self.stride[1] == self.size[1] and rest % self.stride[1]):
            raise ValueError(
                f"frontend.bands={bands}: not a whole number of patches of {self.size[1]} bands; change it, or "
                "frontend.size"
            )
        if std <= 0 or deviations <= 0:
            raise ValueError(f"frontend.std={std:g}, frontend.deviations={deviations:g}: both must be above 0")
        self.stripes = {"t": 0.0, "f": 0.0} | dict(stripes or {})
        if len(self.stripes) > 2 or not all(0 <= share < 1 for share in self.stripes.values()):
            raise ValueError(f"frontend.stripes={dict(stripes or {})}: give a share from 0 to below 1 for t, f or both")
        if frames is not None and frames < self.size[0]:
            raise ValueError(f"frontend.frames={frames}: fewer than the {self.size[0]} of a patch")
        self.dim, self.feature_dim = dim, math.prod(self.size)
        self.frames = frames
        self.down = rest // self.stride[1] + 1
        self.mean, self.scale = mean, std * deviations
        self.rate = rate
        self.filterbank = Filterbank(
            bands=bands,
            window_ms=window_ms,
            hop_ms=hop_ms,
            window=window,
            low=low,
            high=high,
            preemphasis=preemphasis,
            rate=rate,
            dither=dither,
        )
        self.min_length = self.filterbank.width
        self.reader_settings: dict[str, Any] = {"rate": rate}
        self.project = Linear(self.feature_dim, dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def lengths(self, raw: Raw) -> Tensor:
        return self._steps(raw) * self.down

    def forward(self, raw: Raw, *, late: bool = False) -> Tokens:
        if raw.rate is not None and raw.rate != self.rate:
            raise ValueError(
                f"{raw.ids[0]}: {raw.rate:g} Hz, but this frontend reads {self.rate} Hz; resample the clip"
            )
        steps = self._steps(raw)
        across, lengths = int(steps.max()), steps * self.down
        (long, tall), (hop, up) = self.size, self.stride
        with torch.autocast(raw.data.device.type, enabled=False):
            seeds = raw.seeds if self.training else None
            frames = self.filterbank(raw.data, raw.lengths, seeds)
            counts = self.filterbank.frames(raw.lengths)
            if seeds is not None and any(self.stripes.values()):
                time, frequency = self.stripes["t"], self.stripes["f"]
                hidden = draw_stripes(counts, frames.shape[2], time=time, frequency=frequency, seeds=seeds)
                frames = frames.masked_fill(hidden.to(frames.device, non_blocking=True), self.mean)
            if self.frames is None:
                frames = fill_to(frames, (across - 1) * hop + long)
            else:
                real = valid_mask(counts, frames.shape[1], frames.device)[..., None]
                frames = F.pad(frames * real, (0, 0, 0, self.frames - frames.shape[1]))
            cells = ((frames - self.mean) / self.scale).unfold(1, long, hop).unfold(2, tall, up)
            feat = cells.reshape(len(raw), across * self.down, self.feature_dim)
        valid = None
        if int(lengths.min()) < feat.shape[1]:
            valid = valid_mask(lengths, feat.shape[1], feat.device)[..., None]
            feat = feat * valid
        x = feat if late else self.project(feat)
        if valid is not None and not late:
            x = x * valid
        times, bands = (torch.arange(n, device=x.device) for n in (across, self.down))
        coords = torch.stack(torch.meshgrid(times, bands, indexing="ij"), -1).view(1, -1, 2)
        frame_ms = 1000 * self.filterbank.hop / self.rate
        return Tokens(
            x=x,
            lengths=lengths,
            coords=coords.expand(len(x), -1, -1),
            axes=self.axes,
            grid=(across, self.down),
            feat=feat,
            step_ms=hop * frame_ms,
            span_ms=(long - 1) * frame_ms + 1000 * self.filterbank.width / self.rate,
            project=self.project if late else None,
        )

    def measured(self, raw: Raw) -> Tensor:
        """(M, 1): the log-mel energies of all real frames, of which `mean` and `std` are the constants."""
        refuse_short(raw, self.min_length)
        counts = self.filterbank.frames(raw.lengths)
        frames = self.filterbank(raw.data, raw.lengths)
        return frames[valid_mask(counts, frames.shape[1], frames.device)].view(-1, 1)

    def _steps(self, raw: Raw) -> Tensor:
        """(B,) patches along time: as many as it takes to cover every frame, or as fit into so many frames."""
        refuse_short(raw, self.min_length)
        if self.frames is not None:
            return torch.full((len(raw),), (self.frames - self.size[0]) // self.stride[0] + 1)
        frames = self.filterbank.frames(raw.lengths)
        return torch.div(frames - self.size[0] - 1, self.stride[0], rounding_mode="floor").clamp_min(-1) + 2
