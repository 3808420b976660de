"""What `mmssl units` does: k-means over the tokens of many clips, and the units of each clip beside its row.

Clips are read one after the other and forgotten. What k-means is fitted on is a sample that lies in a file, and the
units of some thousand clips at a time go into a shard, so that memory is the same for any number of clips, and a run
that was cut off goes on with the next shard.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.convert.folder import find
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.units import LARGEST, read_lengths, write_shard
from mmssl.embed import Embedder, load
from mmssl.modalities.filterbank import Filterbank
from mmssl.modalities.speech.mfcc import MFCC
from mmssl.progress import bar
from mmssl.training.checkpoint import read_tensors, write_tensors
from mmssl.types import Encoded, Raw, Tokens

Features = Literal["mfcc", "logmel"]
SHARD = 2000  # clips in one file: some hours of speech, which is what a run that was cut off does again at most
_AHEAD = 200  # clips looked at together while a sample is drawn


@dataclass(frozen=True)
class Written:
    """What became of one manifest.

    manifest: the rows with their units; None while other parts are still to be written.
    clips, units: how many there are.
    perplexity: how many codes (of the first codebook) are in use, as if all were used alike.
    bad: name -> reason of the clips that could not be read and have no row, of those met this time.
    """

    manifest: Path | None
    clips: int
    units: int
    perplexity: float
    bad: dict[str, str] = field(default_factory=dict)


class Spectral(nn.Module):
    """In place of an encoder and its frontend: MFCC or log-mel energies of 25 ms, one token every 10 ms.

    A token starts a whole number of samples after the one before, which at 22,050 Hz is 9.977 ms.
    """

    depth = 0

    def __init__(self, features: Features, *, rate: int) -> None:
        super().__init__()
        if features not in ("mfcc", "logmel"):
            raise ValueError(f"features={features!r}: choose mfcc or logmel, or give a model and a layer")
        self.reader_settings = {"rate": rate}
        mfcc = MFCC(rate=rate)
        self.measure: nn.Module = mfcc
        if features == "logmel":
            self.measure = Filterbank(
                bands=80, window_ms=25.0, hop_ms=10.0, window="povey", low=20.0, high=0.0, preemphasis=0.97, rate=rate
            )
        self.filterbank = mfcc.filterbank  # counts frames alike for both
        self.min_length = self.filterbank.width
        self.step_ms, self.span_ms = (1000 * n / rate for n in (self.filterbank.hop, self.filterbank.width))

    @property
    def frontend(self) -> Spectral:
        return self

    def lengths(self, raw: Raw) -> Tensor:
        found: Tensor = self.filterbank.frames(raw.lengths)
        if not int(found.min()):
            name = raw.ids[int(found.argmin())]
            raise ValueError(f"{name}: {int(raw.lengths.min())} samples are shorter than one token, {self.min_length}")
        return found

    def tokens(self, raw: Raw) -> Tokens:
        x, lengths = self.measure(raw.data, raw.lengths), self.lengths(raw)
        coords = torch.arange(x.shape[1], device=x.device)[None, :, None].expand(len(x), -1, -1)
        return Tokens(x, lengths, coords, ("t",), (x.shape[1],), step_ms=self.step_ms, span_ms=self.span_ms)

    def forward(self, tokens: Tokens, *, layers: Sequence[int] = ()) -> Encoded:
        return Encoded(tokens.x, tokens.lengths, dict.fromkeys(layers, tokens.x), n_prefix=0)


class Codec(nn.Module):
    """In place of an encoder and its frontend: the codes of EnCodec, as numbers, one token a step of the codec.

    Source: Defossez et al. 2022 (arXiv:2210.13438), by transformers' class. Clips go through it one by one, so that a
    clip's codes are its own.

    Args:
        path: a folder, or a name of the hub, with weights as safetensors; the network is touched for such a name only.
        bandwidth: kbit per second, of those that the codec knows; it says how many codebooks there are.
    """

    depth = 0
    min_length = 1

    def __init__(self, path: str | Path, *, bandwidth: float) -> None:
        super().__init__()
        try:
            from transformers import EncodecModel
        except ImportError:
            raise ValueError("codec: needs transformers; pip install 'mmssl[codec]'") from None
        self.codec: Any = EncodecModel.from_pretrained(find(path), use_safetensors=True, local_files_only=True)
        config = self.codec.config
        if config.chunk_length_s is not None or config.audio_channels != 1:
            raise ValueError(
                f"codec={path}: only codecs of one channel without chunks are read; take the one of 24 kHz"
            )
        if bandwidth not in config.target_bandwidths:
            raise ValueError(f"bandwidth={bandwidth:g}: {path} knows {config.target_bandwidths}")
        self.bandwidth, self.hop = bandwidth, math.prod(config.upsampling_ratios)
        self.codes = int(config.codebook_size)
        self.step_ms = 1000 * self.hop / config.sampling_rate
        self.reader_settings = {"rate": int(config.sampling_rate)}

    @property
    def frontend(self) -> Codec:
        return self

    def lengths(self, raw: Raw) -> Tensor:
        return torch.div(raw.lengths + self.hop - 1, self.hop, rounding_mode="floor")

    def tokens(self, raw: Raw) -> Tokens:
        lengths = self.lengths(raw)
        x = []
        for wave, samples in zip(raw.data, raw.lengths.tolist(), strict=True):
            [[codes]] = self.codec.encode(wave[None, None, :samples], bandwidth=self.bandwidth).audio_codes
            x.append(codes.t().float())
        padded = nn.utils.rnn.pad_sequence(x, batch_first=True)
        coords = torch.arange(padded.shape[1], device=padded.device)[None, :, None].expand(len(padded), -1, -1)
        return Tokens(padded, lengths, coords, ("t",), (padded.shape[1],), step_ms=self.step_ms, span_ms=self.step_ms)

    def forward(self, tokens: Tokens, *, layers: Sequence[int] = ()) -> Encoded:
        return Encoded(tokens.x, tokens.lengths, dict.fromkeys(layers, tokens.x), n_prefix=0)


class RunCodes(nn.Module):
    """In place of an encoder and its frontend: the codes of a run that gives some, as numbers, one token a step.

    Args:
        embedder: of a run of vq_wav2vec.

    Raises:
        ValueError: the run gives no codes.
    """

    depth = 0

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.objective = embedder.objective
        if not hasattr(self.objective, "quantizer"):
            name = embedder.config["objective"]["name"]
            raise ValueError(
                f"codec={embedder.name}: {name} gives no codes; take a run of vq_wav2vec, or cluster the tokens of "
                "this one as a model"
            )
        self.reader_settings = self.objective.encoder.frontend.reader_settings
        self.min_length = self.objective.encoder.frontend.min_length

    @property
    def frontend(self) -> RunCodes:
        return self

    @property
    def stamp(self) -> str:
        """What tells these codes from others."""
        digest = blake2b(digest_size=8)
        for tensor in self.objective.quantizer.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def lengths(self, raw: Raw) -> Tensor:
        found: Tensor = self.objective.encoder.frontend.lengths(raw)
        return found

    def tokens(self, raw: Raw) -> Tokens:
        codes, tokens = self.objective.codes(raw)
        return replace(tokens, x=codes.float())

    def forward(self, tokens: Tokens, *, layers: Sequence[int] = ()) -> Encoded:
        return Encoded(tokens.x, tokens.lengths, dict.fromkeys(layers, tokens.x), n_prefix=0)


def write_units(
    manifests: Sequence[str | Path | Manifest],
    out: str | Path,
    *,
    codes: int | None = None,
    features: Features | None = None,
    codec: str | Path | None = None,
    bandwidth: float = 6.0,
    model: str | Path | None = None,
    layer: int = -1,
    key: str = "units",
    frames: int = 1_000_000,
    rate: int = 16_000,
    modality: str = "speech",
    seed: int = 0,
    part: tuple[int, int] = (1, 1),
    batch_size: int = 16,
    device: str = "auto",
    on_bad_clip: Literal["raise", "skip"] = "raise",
    progress: bool = False,
) -> list[Written]:
    """Cluster tokens, and write the unit of each beside the rows of manifests.

    Source: Hsu et al. 2021, HuBERT (arXiv:2106.07447), section IV-B; k-means as its authors released it: mini-batches
    of 10,000, 20 starts by k-means++, at most 100 passes, until 100 mini-batches bring nothing more.
    Differs from the paper: k-means is fitted on all tokens of as many clips as make `frames` of them, drawn evenly from
        the first manifest, rather than on a tenth of the data.

    The folder gets `codebook.safetensors` and `codebook.json`, shards of units (see `data.units`), and for each
    manifest one of the same name, whose rows say at `key` where their units are. Where the folder holds the codebook
    already, nothing is fitted; shards that are there are not written again.

    Args:
        manifests: k-means is fitted on the first; all get units.
        out: the folder.
        codes: clusters; a codec has codes of its own.
        features: "mfcc" (39 numbers) or "logmel" (80), every 10 ms; or
        codec, bandwidth: nothing is clustered, and the units are the codes of EnCodec, see `Codec`, or, where `codec`
            is the folder of a run of vq_wav2vec, its own; or
        model, layer: the output of block `layer` of an encoder, as `Embedder.embed` counts them.
        key: of the rows.
        frames: tokens that k-means is fitted on; they lie in a file in the meantime.
        rate, modality: how `features` and what a codec reads are read: samples per second (a codec has its own),
            "speech" or "audio". A run has settings of its own.
        seed: of the sample and of k-means.
        part: (n, of): write each of-th shard only, from the n-th on, so that several processes share the work. The last
            one to be ready writes the manifests.
        batch_size, device, on_bad_clip: see `Embedder.embed`.
        progress: show bars.

    Raises:
        BadClip: a clip cannot be read.
        ValueError: settings that do not go together, a folder with another codebook, or too few tokens.
    """
    opened = open_all(manifests, out)
    if [features, codec, model].count(None) != 2:
        raise ValueError(
            "features: say what is clustered, either features (mfcc, logmel) or a model and its layer; or give a codec"
        )
    if (codes is None) != (codec is not None):
        raise ValueError(
            f"codes={codes}: how many clusters there are is for features and models, and a codec has its own"
        )
    if codes is not None and not 2 <= codes <= LARGEST:
        raise ValueError(f"codes={codes}: from 2 to {LARGEST} clusters can be told apart")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: parts are numbered from 1 to how many there are")
    folder = Path(out)
    made: Any
    stamp = f"{codec} at {bandwidth:g}"
    if model is not None:
        embedder = load(model, device=device)
    elif codec is not None and (Path(codec) / "encoder.safetensors").is_file():
        run = load(codec, device=device)
        made = RunCodes(run)
        embedder, stamp = Embedder(made, run.config, device=device, name=run.name), made.stamp
    else:
        made = Codec(codec, bandwidth=bandwidth) if codec is not None else Spectral(features or "mfcc", rate=rate)
        embedder = Embedder(
            made, {"modality": modality, "augment_eval": []}, device=device, name=str(codec or features)
        )
    settings: dict[str, Any] = {"layer": layer, "batch_size": batch_size, "on_bad_clip": on_bad_clip}
    folder.mkdir(parents=True, exist_ok=True)
    if codec is not None:
        return [
            _finish(
                manifest,
                folder,
                key,
                stamp,
                _write_shards(embedder, manifest, folder, _as_they_are, stamp, part, settings, progress),
            )
            for manifest in opened
        ]
    assert codes is not None
    said = {"features": features, "model": None if model is None else str(model), "layer": layer, "codes": codes}
    # a folder may hold other weights by now
    said |= {"rate": rate, "modality": modality} if model is None else {"weights": embedder.digest()}
    kept = read_kept(folder, "codebook", said)
    centers = None if kept is None else kept["centers"]
    if centers is None:
        if part[0] > 1:
            raise ValueError(f"{folder}: holds no codebook yet; part 1 fits it, start the others when it is there")
        centers = _fit(embedder, opened[0], folder, codes, frames, seed, settings, progress)
        keep(folder, "codebook", said, {"centers": centers})
    nearest = _Nearest(centers, embedder.device)
    stamp = blake2b(centers.numpy().tobytes(), digest_size=8).hexdigest()
    if model is None and made.step_ms != 10.0:
        stamp += f" every {made.step_ms!r} ms"  # earlier versions wrote those units down as if they were 10 ms apart
    found = []
    for manifest in opened:
        bad = _write_shards(embedder, manifest, folder, nearest, stamp, part, settings, progress)
        found.append(_finish(manifest, folder, key, stamp, bad))
    return found


class _Nearest:
    """Tokens to the numbers of their nearest centers."""

    def __init__(self, centers: Tensor, device: torch.device) -> None:
        self.centers = centers.to(device).t().contiguous()
        self.half = self.centers.square().sum(0) / 2

    def __call__(self, x: Tensor) -> np.ndarray:
        """(N, D) -> (N, 1) uint16."""
        if x.shape[1] != len(self.centers):
            raise ValueError(f"the codebook is of {len(self.centers)} numbers a token, and these have {x.shape[1]}")
        # the square of a distance, less what is the same for all centers, halved
        return (x @ self.centers - self.half).argmax(1, keepdim=True).cpu().numpy().astype(np.uint16)


def _as_they_are(x: Tensor) -> np.ndarray:
    """Codes of a codec, (N, G) float32 -> uint16."""
    return x.cpu().numpy().astype(np.uint16)


def open_all(manifests: Sequence[str | Path | Manifest], out: str | Path) -> list[Manifest]:
    """Manifests of which others of the same names are to be written into a folder.

    Raises:
        ValueError: none, two of one name, or one that lies in that folder.
    """
    opened = [given if isinstance(given, Manifest) else Manifest(given) for given in manifests]
    names = [manifest.path.stem for manifest in opened]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"manifests: {', '.join(names) or 'none'}; give at least one, each with a name of its own")
    if any(manifest.path.parent.resolve() == Path(out).resolve() for manifest in opened):
        raise ValueError(f"out={out}: the manifests there would be written over; give another folder")
    return opened


def keep(folder: Path, name: str, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what was fitted, and by which settings, for `read_kept`."""
    write_tensors(folder / f"{name}.safetensors.tmp", tensors)
    os.replace(folder / f"{name}.safetensors.tmp", folder / f"{name}.safetensors")
    _write_json(folder / f"{name}.json", said)


def read_kept(folder: Path, name: str, said: dict[str, Any]) -> dict[str, Tensor] | None:
    """What a folder holds of an earlier fit; None where there is nothing.

    Raises:
        ValueError: it is of something else.
    """
    description = folder / f"{name}.json"
    if not description.is_file():
        return None
    there = json.loads(description.read_text(encoding="utf-8"))
    other = next((key for key in said if there.get(key) != said[key]), None)
    if other is not None:
        raise ValueError(
            f"{description}: the {name} here was made with {other}={there.get(other)!r}, and not {said[other]!r}; "
            "choose another folder, or remove this one"
        )
    return read_tensors(folder / f"{name}.safetensors")


def _fit(
    embedder: Embedder,
    manifest: Manifest,
    folder: Path,
    codes: int,
    frames: int,
    seed: int,
    settings: dict[str, Any],
    progress: bool,
) -> Tensor:
    """(codes, D) float32 centers."""
    from sklearn.cluster import MiniBatchKMeans

    file = folder / "sample.npy.tmp"
    try:
        sample = _sample(embedder, manifest, file, frames, seed, settings, progress)
        if len(sample) < codes:
            raise ValueError(f"{manifest.path}: has {len(sample)} tokens, fewer than codes={codes}; take fewer codes")
        kmeans = MiniBatchKMeans(
            n_clusters=codes,
            init="k-means++",
            n_init=20,
            max_iter=100,
            batch_size=10_000,
            tol=0.0,
            max_no_improvement=100,
            reassignment_ratio=0.0,
            compute_labels=False,
            random_state=seed,
        )
        with bar("k-means", 1, shown=progress) as advance, warnings.catch_warnings():
            # of a leak in a library of Windows, which is said on every system
            warnings.filterwarnings("ignore", message="MiniBatchKMeans is known to have a memory leak")
            kmeans.fit(sample)
            advance(1)
        del sample
        return torch.from_numpy(np.ascontiguousarray(kmeans.cluster_centers_, np.float32))
    finally:
        file.unlink(missing_ok=True)


def _sample(
    embedder: Embedder,
    manifest: Manifest,
    file: Path,
    frames: int,
    seed: int,
    settings: dict[str, Any],
    progress: bool,
) -> np.ndarray:
    """(frames or all there are, D) float32 tokens of clips from all over a manifest, in a file and not in memory."""
    kept: np.ndarray | None = None
    count = 0

    def see(place: int, x: Tensor, tokens: Tokens) -> None:
        nonlocal kept, count
        if kept is None:
            kept = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(frames, x.shape[1]))
        room = min(len(x), frames - count)
        kept[count : count + room] = x[:room].cpu().numpy()
        count += room
        advance(room)

    with bar("a sample for k-means", frames, shown=progress) as advance:
        for places in scattered(len(manifest), seed):
            embedder.each(manifest.select(places), see, **settings)
            if count >= frames:
                break
    if kept is None:
        raise ValueError(f"{manifest.path}: none of its clips can be read, so there is nothing to cluster")
    return kept[:count]


def scattered(count: int, seed: int) -> Iterator[np.ndarray]:
    """Each of `count` places once, some at a time, jumping so that any first few lie evenly over all of them."""
    step = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, count) > 1:
        step += 1
    start = int(np.random.default_rng(seed).integers(count))
    for first in range(0, count, _AHEAD):
        yield (start + step * np.arange(first, min(first + _AHEAD, count))) % count


def _shards(manifest: Manifest, folder: Path) -> list[tuple[Path, Manifest]]:
    """Each shard's file and rows."""
    return [
        (
            folder / f"{manifest.path.stem}.{number:05d}.safetensors",
            manifest.select(np.arange(first, min(first + SHARD, len(manifest)))),
        )
        for number, first in enumerate(range(0, len(manifest), SHARD))
    ]


def _write_shards(
    embedder: Embedder,
    manifest: Manifest,
    folder: Path,
    nearest: Callable[[Tensor], np.ndarray],
    stamp: str,
    part: tuple[int, int],
    settings: dict[str, Any],
    progress: bool,
) -> dict[str, str]:
    """Write the shards of a part that are not there yet, and say which clips could not be read."""
    bad: dict[str, str] = {}
    shards = _shards(manifest, folder)[part[0] - 1 :: part[1]]
    with bar(manifest.path.name, sum(len(rows) for _, rows in shards), shown=progress) as advance:
        for path, rows in shards:
            of = _stamp(rows, stamp)
            if _is_of(path, of):
                advance(len(rows))
                continue
            units: dict[int, np.ndarray] = {}
            rates: set[float | None] = set()

            def see(place: int, x: Tensor, tokens: Tokens) -> None:
                units[place] = nearest(x)  # noqa: B023 (called before the next shard begins)
                along_time = tokens.step_ms is not None and tokens.axes == ("t",)
                rates.add(1000 / tokens.step_ms if along_time else None)  # type: ignore[operator]  # noqa: B023
                advance(1)

            left_out = embedder.each(rows, see, **settings)
            advance(len(left_out))
            bad |= left_out
            lengths = np.array([len(units[place]) if place in units else -1 for place in range(len(rows))])
            joined = [units[place] for place in sorted(units)] or [np.empty((0, 1), np.uint16)]
            write_shard(path, np.concatenate(joined), rate=next(iter(rates), None), lengths=lengths, of=of)
    return bad


def _finish(manifest: Manifest, folder: Path, key: str, stamp: str, bad: dict[str, str]) -> Written:
    """Write the rows with their units once all shards are there."""
    from safetensors import safe_open

    shards = _shards(manifest, folder)
    used, clips = np.zeros(LARGEST, np.int64), 0
    complete = all(_is_of(path, _stamp(rows, stamp)) for path, rows in shards)
    for path, _ in shards if complete else []:
        clips += int((read_lengths(path) >= 0).sum())
        with safe_open(path, "np") as shard:
            used += np.bincount(shard.get_tensor("units")[:, 0], minlength=LARGEST)
    if not complete:
        return Written(None, 0, 0, 0.0, bad)

    def rows() -> Iterator[dict[str, Any]]:
        for path, part in shards:
            lengths = read_lengths(path)
            firsts = np.cumsum(lengths.clip(0)) - lengths.clip(0)
            for row, first, count in zip(part, firsts.tolist(), lengths.tolist(), strict=True):
                if count >= 0:
                    yield {**row, key: {"path": str(path), "first": first, "count": count}}

    target = folder / f"{manifest.path.stem}.jsonl"
    write_manifest(target, rows())
    share = used[used > 0] / used.sum()
    return Written(target, clips, int(used.sum()), float(np.exp(-(share * np.log(share)).sum())), bad)


def _stamp(rows: Manifest, codebook: str) -> str:
    """What a shard is of: these clips and this codebook."""
    digest = blake2b(codebook.encode(), digest_size=8)
    for identity in rows.identities():
        digest.update(identity.encode() + b"\n")
    return digest.hexdigest()


def _is_of(path: Path, stamp: str) -> bool:
    """Whether a shard is there, and of what it should be."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return False
    try:
        with safe_open(path, "np") as shard:
            return (shard.metadata() or {}).get("of") == stamp
    except SafetensorError:
        return False  # torn; written again


def _write_json(path: Path, values: dict[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
