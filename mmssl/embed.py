"""From a run folder to vectors: load an encoder, and embed or classify what you have."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.assemble import build_encoder, build_objective
from mmssl.clips import Clips, Input, find_clips, groups, spread_out, windows
from mmssl.convert.folder import open_encoder
from mmssl.data.batching import collate_samples
from mmssl.data.text import CharVocabulary
from mmssl.encoder import Encoder
from mmssl.evaluation.speech import best_path, prefix_beam
from mmssl.nn.pooling import Pool
from mmssl.types import BadClip, Batch, Embeddings, Tokens, valid_mask

Precision = Literal["float32", "bfloat16"]


def load(path: str | Path, *, device: str = "auto", precision: Precision = "float32") -> Embedder:
    """The encoder of a run or of a model of transformers, ready for use.

    Args:
        path: folder of a run or of an exported encoder: config.json and encoder.safetensors, and
            objective.safetensors where the run was fine-tuned or gives codes. Or a folder of transformers in one of
            the layouts of `mmssl.convert.LAYOUTS`, or the name of one on the Hugging Face hub: only then is the network
            touched.
        device: "auto" takes a GPU where there is one.
        precision: "bfloat16" computes products in half the bits; what comes out is float32 all the same.

    Raises:
        ValueError: there is no such folder, or what is in it is not an encoder, whole and of this version; or one with
            a setting or a tensor that ours cannot have.
    """
    source = open_encoder(path)
    try:
        encoder = build_encoder(source.config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source.folder / 'config.json'}: no encoder can be built from this: {error!r}") from error
    _check(encoder.state_dict(), source.encoder, source.folder)
    encoder.load_state_dict(source.encoder)
    # a name of the hub says more than the folder that it was put in
    name = str(source.folder if Path(path).exists() else path)
    return Embedder(encoder, source.config, device=device, precision=precision, head=source.objective, name=name)


def _check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], place: str | Path) -> None:
    """Compare the weights that a model has with those that a file holds.

    Raises:
        ValueError: one is missing, unknown or of another shape; the first of them is named.
    """
    for name in [*own, *tensors]:
        if name not in tensors:
            raise ValueError(f"{place}: '{name}' is missing; config.json and these weights are not of the same run")
        if name not in own:
            raise ValueError(f"{place}: '{name}' has no place; config.json and these weights are not of the same run")
        if own[name].shape != tensors[name].shape:
            raise ValueError(
                f"{place}: '{name}' is {tuple(tensors[name].shape)}, and config.json makes it "
                f"{tuple(own[name].shape)}; they are not of the same run"
            )


class Embedder:
    """An encoder with all that it takes to use it on files.

    Args:
        encoder: or anything else with its `tokens`, `forward`, `frontend`, `dim` and `depth`.
        config: what config.json holds.
        device, precision: see `load`.
        head: the objective's own weights, for `predict`; empty or None where they were not exported.
        name: what protocols call it.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: Mapping[str, Any],
        *,
        device: str = "auto",
        precision: Precision = "float32",
        head: Mapping[str, Tensor] | None = None,
        name: str = "encoder",
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={precision!r}: choose float32 or bfloat16")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            self.encoder = encoder.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r}: torch cannot use it here: {str(error).splitlines()[0]}") from None
        if precision == "bfloat16":
            # autocast would bring every weight to bfloat16 at every call, and keeps none of those that need no gradient
            self.encoder = copy.deepcopy(self.encoder)
            for module in self.encoder.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.encoder.eval().requires_grad_(False)
        self.config = dict(config)
        self.precision = precision
        self.name = name
        self._head = head
        self._objective: nn.Module | None = None

    @property
    def dim(self) -> int:
        """The width of a token."""
        return self.encoder.dim

    @property
    def depth(self) -> int:
        """The number of blocks, and of the last layer."""
        return self.encoder.depth

    @property
    def modality(self) -> str:
        return str(self.config["modality"])

    @overload
    def embed(
        self,
        inputs: Input | Sequence[Input],
        *,
        layer: int = ...,
        pool: str = ...,
        rate: float | None = ...,
        tokens: bool = ...,
        batch_size: int = ...,
        batch_seconds: float = ...,
        on_bad_clip: Literal["raise", "skip"] = ...,
        progress: bool = ...,
    ) -> Embeddings: ...

    @overload
    def embed(
        self,
        inputs: Input | Sequence[Input],
        *,
        layer: Sequence[int] | Literal["all"],
        pool: str = ...,
        rate: float | None = ...,
        tokens: bool = ...,
        batch_size: int = ...,
        batch_seconds: float = ...,
        on_bad_clip: Literal["raise", "skip"] = ...,
        progress: bool = ...,
    ) -> list[Embeddings]: ...

    def embed(
        self,
        inputs: Input | Sequence[Input],
        *,
        layer: int | Sequence[int] | Literal["all"] = -1,
        pool: str = "mean",
        rate: float | None = None,
        tokens: bool = True,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Embeddings | list[Embeddings]:
        """Embed clips, in their order. Neither that order nor the batch size changes a clip's vectors.

        Args:
            inputs: one of these or a sequence of them: a path; a glob pattern; a folder (all files of the modality
                below it); a manifest (.jsonl); an open binary file; an array or tensor: (L,) samples, (C, H, W)
                pixels in [0, 1], or (C, T, H, W) of frames, or with one axis more several such clips.
            layer: -1 the encoder's output, after its final norm where it has one; 0 the input of the first block; i the
                output of block i, without the final norm; several of them, or "all" (0 to `depth`), in one pass.
            pool: how tokens become the scene, see `Pool.named`.
            rate: samples per second of arrays, where it is not the encoder's own.
            tokens: keep every token, not only the scenes.
            batch_size: most clips computed at a time.
            batch_seconds: most seconds of sound computed at a time; a longer clip goes alone.
            on_bad_clip: "raise" stops at the first clip that cannot be read; "skip" goes on, and gives it a row of NaN
                and an entry in `Embeddings.bad`.
            progress: show a bar.

        Returns:
            Embeddings, or a list of them, one for each layer, where several are asked for. On the CPU, float32.

        Raises:
            BadClip: a clip cannot be read, or is shorter than one token.
            ValueError: a layer or pool that this encoder does not have, or nothing to embed.
        """
        layers = self._layers(layer)
        clips = find_clips(inputs, self.config, self.encoder, rate=rate)
        gathered = [_Gathered(len(clips), keep=tokens) for _ in layers]
        pooled = Pool.named(pool)

        def compute(batch: Batch, places: list[int]) -> None:
            raw = batch.raw.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                given = self.encoder.tokens(raw)
                encoded = self.encoder(given, layers=sorted({i for i in layers if i >= 0}))
            times = self._times(given) if tokens else None
            for i, into in zip(layers, gathered, strict=True):
                x = encoded.x if i < 0 else encoded.layers[i]
                into.add(places, pooled(x, encoded, given), x[:, encoded.n_prefix :], given.lengths, times)

        names, bad = self._run(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
        found = [into.result(names, bad) for into in gathered]
        return found[0] if isinstance(layer, int) else found

    def each(
        self,
        inputs: Input | Sequence[Input],
        see: Callable[[int, Tensor, Tokens], None],
        *,
        layer: int = -1,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
    ) -> dict[str, str]:
        """Show the tokens of one clip after the other and keep none: for more clips than memory has room for.

        Args:
            inputs, layer, batch_size, batch_seconds, on_bad_clip: see `embed`.
            see: gets a clip's place among the inputs, its (N, D) tokens on the encoder's device, and the tokens that
                the frontend made of its batch. Clips do not come in their order.

        Returns:
            name -> reason of the clips that could not be read, which `see` never gets.
        """
        [asked] = self._layers(layer)
        clips = find_clips(inputs, self.config, self.encoder, rate=None)

        def compute(batch: Batch, places: list[int]) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                given = self.encoder.tokens(batch.raw.to(self.device))
                encoded = self.encoder(given, layers=[asked] if asked >= 0 else [])
            x = (encoded.x if asked < 0 else encoded.layers[asked])[:, encoded.n_prefix :]
            for row, (place, length) in enumerate(zip(places, given.lengths.tolist(), strict=True)):
                see(place, x[row, :length].float(), given)

        return self._run(clips, compute, batch_size, batch_seconds, on_bad_clip, False, all_may_be_bad=True)[1]

    def predict(
        self,
        inputs: Input | Sequence[Input],
        *,
        beam: int | None = None,
        rate: float | None = None,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> list[str | None]:
        """What a fine-tuned encoder says of each clip: its likeliest class, or its transcript.

        Args:
            beam: of the search for the likeliest transcript; None takes the best path. For transcripts only.
            inputs, rate, batch_size, batch_seconds, on_bad_clip, progress: see `embed`; None for a clip that was
                skipped.

        Raises:
            ValueError: this encoder was not fine-tuned.
        """
        objective, config = self._fine_tuned(), self.config
        vocabulary = None if config["vocabulary"] is None else CharVocabulary(config["vocabulary"])
        if beam is not None and vocabulary is None:
            raise ValueError(f"beam={beam}: {self.name} tells classes, and only transcripts are searched for")
        clips = find_clips(inputs, self.config, self.encoder, rate=rate)
        said: list[str | None] = [None] * len(clips)

        def compute(batch: Batch, places: list[int]) -> None:
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                if vocabulary is None:
                    texts = [config["classes"][i] for i in objective.predict(batch).argmax(1).tolist()]
                else:
                    log_probs, lengths = objective.log_probs(batch.raw)
                    ids = best_path(log_probs, lengths) if beam is None else prefix_beam(log_probs, lengths, beam=beam)
                    texts = [vocabulary.decode(row) for row in ids]
            for place, text in zip(places, texts, strict=True):
                said[place] = text

        self._run(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
        return said

    def probabilities(
        self,
        inputs: Input | Sequence[Input],
        *,
        spans: int = 1,
        rate: float | None = None,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Tensor:
        """How likely a fine-tuned encoder holds each class of each clip: (B, classes), in the order of its config.

        They add up to 1, or are each for itself where clips have several classes (`multi_label`).

        Args:
            spans: of sound and video: mean over so many parts of each clip, evenly from its beginning to its end, each
                as long as the middle one that is read otherwise.
            inputs, rate, batch_size, batch_seconds, on_bad_clip, progress: see `embed`; NaN for a clip that was
                skipped.

        Raises:
            ValueError: this encoder was not fine-tuned, or tells no classes, or reads clips whole where there are to be
                several spans.
        """
        objective = self._fine_tuned()
        if self.config["classes"] is None:
            raise ValueError(f"{self.name} writes transcripts and tells no classes; use predict")
        parts = []
        for config in spread_out(self.config, spans):
            clips = find_clips(inputs, config, self.encoder, rate=rate)
            found = torch.full((len(clips), len(self.config["classes"])), torch.nan)

            def compute(batch: Batch, places: list[int], found: Tensor = found) -> None:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    logits = objective.predict(batch.to(self.device)).cpu()
                found[places] = logits.sigmoid() if objective.multi_label else logits.softmax(1)

            self._run(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
            parts.append(found)
        return torch.stack(parts).mean(0)

    def _layers(self, layer: int | Sequence[int] | Literal["all"]) -> list[int]:
        if layer != "all" and (isinstance(layer, str) or not isinstance(layer, int | Iterable)):
            raise ValueError(f"layer={layer!r}: give a number, several, or 'all'")
        asked = range(self.depth + 1) if layer == "all" else [layer] if isinstance(layer, int) else list(layer)
        for i in asked:
            if not -1 <= i <= self.depth:
                raise ValueError(
                    f"layer={i}: {self.name} has layers 0 to {self.depth}, and -1 is its output after the final norm"
                )
        if not asked:
            raise ValueError("layer=[]: name at least one")
        return list(asked)

    def _fine_tuned(self) -> Any:
        if not self._head or (self.config.get("classes") is None and self.config.get("vocabulary") is None):
            raise ValueError(
                f"{self.name}: was pretrained and not fine-tuned, so there is nothing to predict with; "
                "`mmssl finetune` it first, or use embed"
            )
        return self.objective

    @property
    def objective(self) -> Any:
        """What the encoder was trained with, as it ended.

        Raises:
            ValueError: its weights were not exported.
        """
        if self._objective is None:
            if not self._head:
                raise ValueError(
                    f"{self.name}: holds an encoder without the objective that trained it; those of fine-tuned runs "
                    "and of vq_wav2vec are exported"
                )
            objective = build_objective(self.config, self.encoder)
            # all but the encoder, which is loaded already
            own = {name: tensor for name, tensor in objective.state_dict().items() if not name.startswith("encoder.")}
            _check(own, self._head, self.name)
            objective.load_state_dict(self._head, strict=False)
            self._objective = objective.eval().requires_grad_(False).to(self.device)
        return self._objective

    def _times(self, tokens: Tokens) -> Tensor | None:
        """(B, N): the middle of what each token sees, in milliseconds."""
        if tokens.step_ms is None or tokens.span_ms is None:
            return None
        return tokens.coords[..., tokens.axes.index("t")] * tokens.step_ms + tokens.span_ms / 2

    @torch.no_grad()  # not inference mode: what is returned may be trained on
    def _run(
        self,
        clips: Clips,
        compute: Callable[[Batch, list[int]], None],
        batch_size: int,
        batch_seconds: float,
        on_bad_clip: str,
        progress: bool,
        *,
        all_may_be_bad: bool = False,
    ) -> tuple[list[str], dict[str, str]]:
        """Call `compute` on groups of clips that were read ahead; ids in order, and the reasons of bad clips."""
        if batch_size < 1 or batch_seconds <= 0:
            raise ValueError(f"batch_size={batch_size}, batch_seconds={batch_seconds}: both must be above 0")
        if on_bad_clip not in ("raise", "skip"):
            raise ValueError(f"on_bad_clip={on_bad_clip!r}: choose raise or skip")
        names, bad, left_out = [""] * len(clips), {}, 0
        with closing(windows(clips, batch_size)) as ahead, bar("embedding", len(clips), shown=progress) as advance:
            for window in ahead:
                good = []
                for item in window:
                    names[item.place] = item.name
                    if item.error is None:
                        good.append(item)
                    elif on_bad_clip == "raise":
                        line = clips.line(item.place)
                        raise BadClip(
                            item.error.path,
                            f"{item.error.reason}{f' (at {line})' if line else ''}; on_bad_clip=skip (--on-bad-clip "
                            "skip) goes on without such clips",
                        )
                    else:
                        bad[item.name] = item.error.reason
                        left_out += 1
                for group in groups(good, batch_size, batch_seconds):
                    samples = [item.sample for item in group if item.sample is not None]
                    compute(collate_samples(samples), [item.place for item in group])
                    advance(len(group))
                advance(len(window) - len(good))
        if left_out == len(clips) and not all_may_be_bad:
            first = next(iter(bad))
            raise ValueError(f"none of the {len(clips)} clips can be read; the first is {first} ({bad[first]})")
        return names, bad


def write_npz(
    path: str | Path, embeddings: Embeddings | Sequence[Embeddings], *, layers: Sequence[int] | None = None
) -> Path:
    """Write embeddings as a .npz file that numpy opens without unpickling, all or nothing.

    Holds `ids` and `scene`; where tokens were kept `tokens`, `valid` and, for sound, `time_ms`; where clips were bad
    `bad_ids` and `bad_reasons`. With several layers `scene` and `tokens` get an axis of layers in front, and `layers`
    names them.

    Raises:
        ValueError: layers without names, or not one for each.
    """
    several = not isinstance(embeddings, Embeddings)
    found = list(embeddings) if not isinstance(embeddings, Embeddings) else [embeddings]
    if several and (layers is None or len(layers) != len(found)):
        raise ValueError(f"{path}: {len(found)} layers of embeddings need as many names, got {layers}")
    first = found[0]
    arrays: dict[str, Any] = {
        "ids": np.array(first.ids, dtype=np.str_),
        "scene": np.stack([one.scene.numpy() for one in found]) if several else first.scene.numpy(),
    }
    if several:
        arrays["layers"] = np.array(layers, dtype=np.int64)
    if first.tokens.shape[1]:
        arrays["tokens"] = np.stack([one.tokens.numpy() for one in found]) if several else first.tokens.numpy()
        arrays["valid"] = first.valid.numpy()
        if first.time_ms is not None:
            arrays["time_ms"] = first.time_ms.numpy()
    if first.bad:
        arrays["bad_ids"] = np.array(list(first.bad), dtype=np.str_)
        arrays["bad_reasons"] = np.array(list(first.bad.values()), dtype=np.str_)
    path = Path(path)
    if path.suffix != ".npz":
        path = path.with_name(path.name + ".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return path


class _Gathered:
    """The embeddings of one layer, put together clip by clip."""

    def __init__(self, count: int, *, keep: bool) -> None:
        self.count = count
        self.keep = keep
        self.scene: Tensor | None = None
        self.tokens: dict[int, Tensor] = {}
        self.times: dict[int, Tensor] = {}

    def add(self, places: list[int], scene: Tensor, x: Tensor, lengths: Tensor, times: Tensor | None) -> None:
        """Scenes (B, E), tokens (B, N, D) and their times (B, N) of the clips at `places`."""
        if self.scene is None:
            self.scene = torch.full((self.count, scene.shape[1]), torch.nan)
        self.scene[places] = scene.float().cpu()
        if not self.keep:
            return
        x, times = x.float().cpu(), None if times is None else times.cpu()
        for row, (place, length) in enumerate(zip(places, lengths.tolist(), strict=True)):
            # a copy, so that no padding is kept
            self.tokens[place] = x[row, :length].clone()
            if times is not None:
                self.times[place] = times[row, :length].clone()

    def result(self, names: list[str], bad: dict[str, str]) -> Embeddings:
        assert self.scene is not None
        longest = max((len(x) for x in self.tokens.values()), default=0)
        width = next((x.shape[1] for x in self.tokens.values()), 0)
        tokens = torch.zeros(self.count if longest else len(names), longest, width)
        lengths = torch.zeros(self.count, dtype=torch.int64)
        times = torch.zeros(self.count, longest) if self.times else None
        for place in list(self.tokens):
            x = self.tokens.pop(place)
            tokens[place, : len(x)], lengths[place] = x, len(x)
            if times is not None:
                times[place, : len(x)] = self.times.pop(place)
        return Embeddings(self.scene, tokens, valid_mask(lengths, longest), times, names, bad)


@contextmanager
def bar(what: str, count: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, and how to move it."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    look = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=count)
        yield lambda done: progress.advance(task, done)
