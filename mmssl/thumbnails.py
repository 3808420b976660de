"""What clips look and sound like, small enough that hundreds of them fit into one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.clips import Clips
from mmssl.modalities.speech.targets import WINDOW_MS, mel_bank
from mmssl.training.pictures import sound_file

if TYPE_CHECKING:
    from PIL import Image

SIDE = 64  # pixels
SECONDS = 5.0  # of sound, of a spectrogram and of a clip that moves, from its beginning
MOST_BYTES = 8_000_000  # of all that can be heard or moves; a third more as text
BANDS, RANGE = 48, 14.0  # of a spectrogram: its bands, and how far below the loudest it goes (nepers of power, 60 dB)
MOST_FRAMES = 16


@dataclass
class Thumbnail:
    """Data URLs, None where there is nothing.

    picture: it may move.
    sound: what is heard.
    cut: whether there was no room for the sound, or for what moves.
    """

    picture: str | None = None
    sound: str | None = None
    cut: bool = False


def thumbnails(clips: Clips, first: Iterable[int] = ()) -> list[Thumbnail]:
    """Clips as the encoder gets them: pictures, of sound the spectrogram, and of video what moves.

    What can be heard or moves has room up to `MOST_BYTES`; of the clips after that there is a picture alone.

    Args:
        first: places of clips that have room before all others.
    """
    found = [Thumbnail() for _ in range(len(clips))]
    room = MOST_BYTES
    for place in dict.fromkeys([*first, *range(len(clips))]):
        sample = clips.read(place).sample
        x = None if sample is None else sample.inputs[clips.modality]
        if x is None or not x.is_floating_point():  # codes and captions have nothing to see
            continue
        if x.ndim == 3:
            found[place].picture = data_url(_still(x), "image/jpeg")
            continue
        assert clips.rate is not None
        length = max(1, round(SECONDS * clips.rate))
        if x.ndim == 1:
            content = sound_file(x[:length], clips.rate)
            still = _spectrogram(x[:length], clips.rate)
        else:
            content = _moving(x[:, :length], clips.rate)
            still = _still(x[:, x.shape[1] // 2])
        cut = len(content) > room
        room -= 0 if cut else len(content)
        if cut or x.ndim == 1:
            sound = None if cut else data_url(content, "audio/mpeg")
            found[place] = Thumbnail(data_url(still, "image/jpeg"), sound, cut)
        else:
            found[place] = Thumbnail(data_url(content, "image/webp"))
    return found


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _image(x: Tensor) -> Image.Image:
    """(C, H, W) in [0, 1], no side of it longer than `SIDE`; of other than 3 channels the first."""
    from PIL import Image

    x = x if x.shape[0] == 3 else x[:1].expand(3, -1, -1)
    image = Image.fromarray((x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    return image


def _still(x: Tensor) -> bytes:
    """(C, H, W) as JPEG."""
    file = io.BytesIO()
    _image(x).save(file, format="JPEG", quality=80)
    return file.getvalue()


def _moving(x: Tensor, rate: float) -> bytes:
    """(C, T, H, W), so many frames a second, as an animated WebP."""
    shown = torch.linspace(0, x.shape[1] - 1, min(MOST_FRAMES, x.shape[1])).round().long()
    frames = [_image(x[:, frame]) for frame in shown.tolist()]
    file, each = io.BytesIO(), round(1000 * x.shape[1] / rate / len(frames))
    frames[0].save(file, format="WEBP", save_all=True, append_images=frames[1:], duration=each, loop=0, quality=60)
    return file.getvalue()


def _spectrogram(wave: Tensor, rate: float) -> bytes:
    """(L,) samples: time to the right, low frequencies at the bottom, white is the loudest."""
    width = round(rate * WINDOW_MS / 1000)
    fft, bank = mel_bank(int(rate), width, BANDS)
    wave = F.pad(wave, (0, max(0, width - len(wave))))
    frames = wave.unfold(0, width, max(1, min(width // 2, len(wave) // SIDE))) * torch.hann_window(width)
    energies = (torch.fft.rfft(frames, n=fft).abs().square() @ bank).clamp_min(1e-12).log()
    shade = (1 + (energies - energies.max()) / RANGE).clamp(0, 1).T.flip(0)[None]
    return _still(F.adaptive_avg_pool2d(shade, (BANDS, min(SIDE, shade.shape[-1]))))
