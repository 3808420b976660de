"""What of a spectrogram can be reconstructed, and how to look at it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.filterbank import FLOOR
from mmssl.modalities.modality import Target
from mmssl.modalities.patches import moments, normalized, patches, width
from mmssl.types import Raw, Tokens

_HEARD, _SECONDS = 4, 5.0  # clips that can be heard, and of each so much


def spectrogram(raw: Raw, tokens: Tokens) -> Tensor:
    """The patches as the frontend reads them, normalized by its constants: (B, N, P)."""
    return patches(tokens)


def normalized_spectrogram(raw: Raw, tokens: Tokens) -> Tensor:
    """Each patch brought to mean 0 and deviation 1: (B, N, P). A patch of digital silence is zero.

    Source: Huang et al. 2022 (Audio-MAE, arXiv:2207.06405), section 3, "objective", after He et al. 2022
    (arXiv:2111.06377).
    """
    return normalized(tokens, plain="spectrogram")


def unpatch(values: Tensor, tokens: Tokens, frontend: SpectrogramPatches) -> Tensor:
    """Patches back to spectrograms; where real patches overlap their mean.

    Args:
        values: (B, N, P), each patch ordered time, frequency.

    Returns:
        (B, T, F), NaN where no real patch lies; T and F are what the patches reach over.
    """
    sizes = zip(tokens.grid, frontend.stride, frontend.size, strict=True)
    reach = tuple((n - 1) * step + size for n, step, size in sizes)

    def lay(x: Tensor) -> Tensor:
        # torch's fold goes over places in the same order: the first axis outermost
        return F.fold(x.transpose(1, 2), reach, frontend.size, stride=frontend.stride)[:, 0]

    valid = tokens.valid[..., None].expand_as(values).to(values.dtype)
    return lay(values * valid) / lay(valid)


def spectrogram_pictures(
    frontend: SpectrogramPatches, tokens: Tokens, masked: Tensor, values: Tensor
) -> dict[str, Any]:
    """Pictures of a reconstruction of `spectrogram`: time to the right, low frequencies at the bottom.

    Args:
        tokens: (B, N) of the input.
        masked: (B, N) bool, True = hidden; where patches overlap, hidden in any of them.
        values: (B, N, P), predictions where hidden and the target elsewhere.

    Returns:
        "input", "masked" (hidden patches gray), "reconstruction": (B, 1, F, T) in [0, 1], from digital silence to the
        clip's loudest value, 0 past a clip's end; "sounds", the first of them to be heard: name -> (clips, samples),
        hidden patches silent, and "rate", samples a second, where frames overlap by a half or more; "note": "".
    """
    source = patches(tokens)
    silence = (math.log(FLOOR) - frontend.mean) / frontend.scale
    heard = source.masked_fill(~tokens.valid[..., None], silence).flatten(1)
    loudest = heard.amax(1).clamp_min(silence + 1e-3)[:, None, None, None]

    def upright(x: Tensor) -> Tensor:
        return unpatch(x, tokens, frontend).nan_to_num(silence).transpose(1, 2).flip(1)[:, None]

    def draw(x: Tensor) -> Tensor:
        return ((upright(x) - silence) / (loudest - silence)).clamp(0, 1)

    shown = draw(source)
    hidden = upright(masked[..., None].expand_as(source).to(source.dtype)) > 0
    drawn = {"input": shown, "masked": torch.where(hidden, 0.5, shown), "reconstruction": draw(values), "note": ""}
    if 2 * frontend.filterbank.hop > frontend.filterbank.width:
        return drawn
    silent = source.masked_fill(masked[..., None], silence)
    sounds = {"input": source, "masked": silent, "reconstruction": values}
    return drawn | {
        "sounds": {name: _sound(frontend, tokens, x) for name, x in sounds.items()},
        "rate": frontend.rate,
    }


def _sound(frontend: SpectrogramPatches, tokens: Tokens, values: Tensor) -> Tensor:
    """(B, N, P) of which the first clips -> (clips, samples)."""
    few = replace(tokens, x=tokens.x[:_HEARD], lengths=tokens.lengths[:_HEARD])
    x = unpatch(values[:_HEARD], few, frontend)[:, : round(_SECONDS * frontend.rate / frontend.filterbank.hop)]
    energies = (x * frontend.scale + frontend.mean).nan_to_num(math.log(FLOOR))
    # where patches leave out the highest bands
    rest = frontend.filterbank.bands - energies.shape[-1]
    return frontend.filterbank.sound(F.pad(energies, (0, rest), value=math.log(FLOOR)))


def normalized_spectrogram_pictures(
    frontend: SpectrogramPatches, tokens: Tokens, masked: Tensor, values: Tensor
) -> dict[str, Any]:
    """Pictures of a reconstruction of `normalized_spectrogram`; see `spectrogram_pictures`.

    The model never predicts a patch's mean and deviation, so they can only be taken from the hidden patch itself: the
    picture shows more than the model knows, and its note says so.
    """
    mean, deviation = moments(patches(tokens))
    pictures = spectrogram_pictures(frontend, tokens, masked, values * deviation + mean)
    note = "the mean and deviation of each predicted patch are the true ones, which the model does not know (a leak)"
    return pictures | {"note": note}


TARGETS: dict[str, Target] = {
    "spectrogram": Target(values=spectrogram, dim=width, pictures=spectrogram_pictures),
    "normalized_spectrogram": Target(
        values=normalized_spectrogram, dim=width, pictures=normalized_spectrogram_pictures
    ),
}
