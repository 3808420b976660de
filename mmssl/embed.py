"""From a run folder to vectors: load an encoder, and embed or classify what you have."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.build import build_encoders, build_objective
from mmssl.clips import Clips, Input, Item, find_clips, spread_out, whole
from mmssl.convert.folder import open_encoder
from mmssl.data.text import CharVocabulary
from mmssl.encoder import Encoder, Encoders
from mmssl.evaluation.speech import best_path, prefix_beam
from mmssl.evaluation.word_beam import WordBeam
from mmssl.gather import Gathered, check_grouping, over_clips, over_windows, overflowed
from mmssl.nn.linear import Linear
from mmssl.nn.pooling import NAMES, Pool
from mmssl.nn.positions import Convolutional
from mmssl.recipe import members
from mmssl.recordings import Windows, by_steps, encode_long, time_axis
from mmssl.types import BadClip, Batch, Embeddings, Encoded, Raw, Tokens

log = logging.getLogger(__name__)

NOT_FINITE = "its vector is not finite"

Precision = Literal["float32", "bfloat16"]
Weighting = tuple[tuple[int, float], ...]  # layers with their weights, ascending
Layer = int | Weighting
# a layer, what was encoded, and the tokens that it is of -> (B, E)
Pooling = Callable[[Tensor, Encoded, Tokens], Tensor]


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
        encoder = build_encoders(source.config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source.folder / 'config.json'}: no encoder can be built from this: {error!r}") from error
    _check(encoder.state_dict(), source.encoder, source.folder)
    encoder.load_state_dict(source.encoder)
    # a name of the hub says more than the folder that it was put in
    name = str(source.folder if Path(path).exists() else path)
    given: dict[str, Any] = {"device": device, "precision": precision, "name": name}
    return Embedder(encoder, source.config, head=source.objective, left_out=source.left_out, **given)


def read_weighting(path: str | Path) -> dict[int, float]:
    """The weight of each layer, as `mmssl evaluate --task superb --out` writes it; or a file of {"0": 0.2, "1": 0.8}.

    Raises:
        ValueError: the file holds no weights.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        for score in found.values():
            if isinstance(score, dict) and "weights" in score["details"]:
                found = score["details"]["weights"]
                break
        return {int(layer): float(weight) for layer, weight in found.items()}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"layer={path}: holds no weights of layers; give a file that --task superb has written with --out"
        ) from None


def _numbers(layers: Sequence[Layer]) -> list[int]:
    """All layers that are read."""
    return [i for asked in layers for i in ([asked] if isinstance(asked, int) else [layer for layer, _ in asked])]


def _only(raw: Raw, row: int) -> Raw:
    """One clip of a batch, without padding."""
    length = int(raw.lengths[row])
    one = raw.part(slice(row, row + 1))
    return replace(one, data=one.data.narrow(time_axis(raw), 0, length))


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

    One that was trained on pairs has several encoders and a space that they share; `of` gives one of them.

    Args:
        encoder: or anything else with its `tokens`, `forward`, `frontend`, `dim` and `depth`; or several encoders.
        config: what config.json holds.
        device, precision: see `load`.
        head: the objective's own weights, for `predict` and for the space of several encoders; empty or None where they
            were not exported.
        name: what protocols call it.
        joint: of one of several encoders, what it encodes -> (B, J), its clips in the space of all.
        left_out: the head that it was fine-tuned with and comes without, and why, see `Exported`.
    """

    def __init__(
        self,
        encoder: Encoder | Encoders,
        config: Mapping[str, Any],
        *,
        device: str = "auto",
        precision: Precision = "float32",
        head: Mapping[str, Tensor] | None = None,
        name: str = "encoder",
        joint: Callable[[Encoded], Tensor] | None = None,
        left_out: str = "",
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={precision!r}: choose float32 or bfloat16")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            self.encoder: Any = encoder.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r}: torch cannot use it here: {str(error).splitlines()[0]}") from None
        products = [module for module in self.encoder.modules() if isinstance(module, nn.Linear)]
        if precision == "bfloat16" and any(module.weight.dtype != torch.bfloat16 for module in products):
            # autocast would bring every weight to bfloat16 at every call, and keeps none of those that need no gradient
            self.encoder = copy.deepcopy(self.encoder)
            for module in self.encoder.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.encoder.eval().requires_grad_(False)
        for module in self.encoder.modules():
            if isinstance(module, Linear | Convolutional):
                module.pack()
        self.config = dict(config)
        self.precision = precision
        self.name = name
        self._head = head
        self._joint = joint
        self._left_out = left_out
        self._objective: nn.Module | None = None
        self._said_part = False

    @property
    def dim(self) -> int:
        """The width of a token."""
        return int(self.of().encoder.dim)

    @property
    def depth(self) -> int:
        """The number of blocks, and of the last layer."""
        return int(self.of().encoder.depth)

    @property
    def modality(self) -> str:
        return str(self.of().config["modality"])

    @property
    def modalities(self) -> list[str]:
        return list(members(self.config))

    @property
    def shares_space(self) -> bool:
        """Whether several modalities share a space: some objectives have none, nor has a run without their weights."""
        return len(self.modalities) > 1 and bool(self._head) and hasattr(self.objective, "joint")

    def of(self, modality: str | None = None) -> Embedder:
        """The encoder of one modality, which may be left out where there is one only.

        Raises:
            ValueError: there is none, or several and it is not said which.
        """
        own = members(self.config)
        if modality is None and len(own) > 1:
            raise ValueError(f"{self.name}: has encoders of {' and '.join(own)}; say which, by modality (--modality)")
        if modality is not None and modality not in own:
            raise ValueError(f"modality={modality!r}: {self.name} has an encoder of {' and '.join(own)}")
        if len(own) == 1:
            return self
        assert modality is not None
        config = {**own[modality], "objective": None, "classes": None, "vocabulary": None}
        joint = partial(self.objective.joint, modality) if self.shares_space else None
        device = str(self.device)
        return Embedder(
            self.encoder[modality], config, device=device, precision=self.precision, name=self.name, joint=joint
        )

    def of_whole_clips(self) -> Embedder:
        """The same of one modality, without the steps of evaluation that change how long a clip is."""
        config, device = whole(self.config), str(self.device)
        return Embedder(self.encoder, config, device=device, precision=self.precision, name=self.name)

    def clips(
        self, inputs: Input | Sequence[Input], *, rate: float | None = None, window: float | None = None
    ) -> Clips:
        """The clips of inputs, none of them read yet, of an encoder of one modality.

        Args:
            inputs, rate, window: see `embed`; with windows clips are read whole.
        """
        return find_clips(inputs, self.config if window is None else whole(self.config), self.encoder, rate=rate)

    @overload
    def embed(
        self,
        inputs: Input | Sequence[Input] | Clips,
        *,
        modality: str | None = ...,
        layer: int | Mapping[int, float] = ...,
        pool: str | None = ...,
        rate: float | None = ...,
        tokens: bool | Literal["steps"] = ...,
        window: float | None = ...,
        overlap: float | None = ...,
        batch_size: int = ...,
        batch_seconds: float = ...,
        on_bad_clip: Literal["raise", "skip"] = ...,
        progress: bool = ...,
    ) -> Embeddings: ...

    @overload
    def embed(
        self,
        inputs: Input | Sequence[Input] | Clips,
        *,
        modality: str | None = ...,
        layer: Sequence[Layer] | Literal["all"],
        pool: str | None = ...,
        rate: float | None = ...,
        tokens: bool | Literal["steps"] = ...,
        window: float | None = ...,
        overlap: float | None = ...,
        batch_size: int = ...,
        batch_seconds: float = ...,
        on_bad_clip: Literal["raise", "skip"] = ...,
        progress: bool = ...,
    ) -> list[Embeddings]: ...

    def embed(
        self,
        inputs: Input | Sequence[Input] | Clips,
        *,
        modality: str | None = None,
        layer: int | Mapping[int, float] | Sequence[Layer] | Literal["all"] = -1,
        pool: str | None = None,
        rate: float | None = None,
        tokens: bool | Literal["steps"] = True,
        window: float | None = None,
        overlap: float | None = None,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Embeddings | list[Embeddings]:
        """Embed clips, in their order. Neither that order nor the batch size changes a clip's vectors.

        Args:
            inputs: one of these or a sequence of them: a path; a glob pattern; a folder (all files of the modality
                below it, those in linked folders and uncompressed tars too, and none whose name starts with a dot);
                such a tar; a manifest (.jsonl); an open binary file; an array or tensor: (L,) samples, (C, H, W) pixels
                in [0, 1], or (C, T, H, W) of frames, or with one axis more several such clips. For an encoder of text a
                string is a caption, unless it names a manifest or a .txt file with a caption in each line. Or what
                `clips` makes of them.
            modality: what the inputs are, for an encoder of several.
            layer: -1 the encoder's output, after its final norm where it has one; 0 the input of the first block; i the
                output of block i, without the final norm; several of them, or "all" (0 to `depth`), in one pass. A
                mapping {layer: weight} is one layer, the sum of those by their weights: a learned weighting, see
                `read_weighting`.
            pool: how tokens become the scene, see `Pool.named`; "joint" for vectors of length 1 in the space of several
                modalities, and "attention" as a run of `classify` learned it (`objective.pooling: attention`), before
                its head: both of the output alone. By default "joint" where there is such a space, and else "mean".
            rate: samples or frames per second of arrays, where it is not the encoder's own.
            tokens: keep every token, not only the scenes; "steps" keeps one for each step of time, the mean over the
                bands or patches of that step. Their times are in `Embeddings.time_ms`.
            window: seconds: sound and video that are longer are cut into windows of that length, so that what is
                computed at a time does not grow with them. One that a window covers is embedded as without it. With
                windows clips are read from beginning to end, also where this run's `augment.eval` reads but a part of
                each. The recording itself, and what is kept of it, must have room in memory.
            overlap: seconds that two windows share, by default a quarter of one and at most 1; each gives the half
                nearer to its middle, see `encode_long`.
            batch_size: most clips computed at a time.
            batch_seconds: most seconds of sound computed at a time; a longer clip goes alone.
            on_bad_clip: "raise" stops at the first clip that cannot be read; "skip" goes on, and gives it a row of NaN
                and an entry in `Embeddings.bad`.
            progress: show a bar.

        Returns:
            Embeddings, or a list of them, one for each layer, where several are asked for, and not as one by a
            weighting. On the CPU, float32.

        Raises:
            BadClip: a clip cannot be read, or is shorter than one token.
            ValueError: a layer or pool that this encoder does not have, or nothing to embed.
        """
        one = self.of(modality)
        if one is not self:
            same: dict[str, Any] = {"rate": rate, "tokens": tokens, "batch_size": batch_size, "progress": progress}
            same |= {"batch_seconds": batch_seconds, "on_bad_clip": on_bad_clip, "window": window, "overlap": overlap}
            return one.embed(inputs, layer=layer, pool=pool, **same)
        layers = self._layers(layer)
        pooled, cut = self._pool(pool, layers), self._cut(window, overlap, batch_size, batch_seconds)
        check_grouping(batch_size, batch_seconds, on_bad_clip)
        clips = inputs if isinstance(inputs, Clips) else self.clips(inputs, rate=rate, window=window)
        gathered = [Gathered(len(clips), keep=bool(tokens)) for _ in layers]

        def compute(batch: Batch, places: list[int]) -> None:
            self._embed(batch, layers, pooled, tokens, cut, places, gathered)

        names, bad = over_clips(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
        for name in overflowed(names, bad, gathered):
            if on_bad_clip == "raise":
                raise BadClip(name, f"{NOT_FINITE}; on_bad_clip=skip (--on-bad-clip skip) leaves such clips out")
            bad[name] = NOT_FINITE
        found = [into.result(names, bad) for into in gathered]
        return found[0] if isinstance(layer, int | Mapping) else found

    def stream(
        self,
        inputs: Input | Sequence[Input] | Clips,
        *,
        layers: Sequence[Layer] = (-1,),
        pool: str | None = None,
        tokens: bool | Literal["steps"] = False,
        window: float | None = None,
        overlap: float | None = None,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        places: range | None = None,
        progress: bool = False,
    ) -> Iterator[list[Embeddings]]:
        """Embed clips in their order, a few hundred at a time: for more clips than memory has room for.

        Args:
            inputs, pool, tokens, window, overlap, batch_size, batch_seconds, on_bad_clip, progress: see `embed`.
            layers: see `layer` of `embed`.
            places: of the clips to embed; all by default.

        Yields:
            One `Embeddings` a layer, of the clips that come next. Scenes have no width where none of them can be read.
        """
        asked = self._layers(layers)
        pooled, cut = self._pool(pool, asked), self._cut(window, overlap, batch_size, batch_seconds)
        clips = inputs if isinstance(inputs, Clips) else self.clips(inputs, window=window)
        gathered: list[Gathered] = []
        first = 0

        def compute(batch: Batch, places: list[int]) -> None:
            self._embed(batch, asked, pooled, tokens, cut, [place - first for place in places], gathered)

        def begin(ahead: list[Item]) -> None:
            nonlocal first
            first = ahead[0].place
            gathered[:] = [Gathered(len(ahead), keep=bool(tokens)) for _ in asked]

        read = over_windows(clips, compute, batch_size, batch_seconds, on_bad_clip, progress, places, begin)
        for ahead in read:
            names = [item.name for item in ahead]
            bad = {item.name: item.error.reason for item in ahead if item.error is not None}
            del ahead  # and with it the clips themselves, before whoever asked goes on
            yield [into.result(names, bad) for into in gathered]

    def check(
        self,
        *,
        layers: Sequence[Layer],
        pool: str | None,
        window: float | None,
        overlap: float | None,
        batch_size: int,
        batch_seconds: float,
        on_bad_clip: str,
    ) -> None:
        """See that clips can be embedded with these settings of `stream`, as far as no clip is needed to tell.

        Raises:
            ValueError: they cannot.
        """
        self._pool(pool, self._layers(layers))
        self._cut(window, overlap, batch_size, batch_seconds)
        check_grouping(batch_size, batch_seconds, on_bad_clip)

    def _cut(
        self, window: float | None, overlap: float | None, batch_size: int, batch_seconds: float
    ) -> Windows | None:
        if window is None:
            return None
        rate = self.encoder.frontend.reader_settings.get("rate")
        return Windows.of_seconds(window, overlap, rate=rate, batch_size=batch_size, batch_seconds=batch_seconds)

    def _embed(
        self,
        batch: Batch,
        layers: Sequence[Layer],
        pool: Pooling,
        tokens: bool | Literal["steps"],
        cut: Windows | None,
        places: list[int],
        gathered: Sequence[Gathered],
    ) -> None:
        """Compute a batch, and put each layer of it where it belongs."""
        raw = batch.raw
        self._say_part(raw)
        if cut is not None and int(raw.lengths.max()) > cut.length:
            # such clips seldom share a batch: each alone
            each = [(place, _only(raw, row)) for row, place in enumerate(places)]
            done = [([place], one, self._encode_one(one, layers, cut)) for place, one in each]
        else:
            done = [(places, raw, self._encode(raw, layers))]
        for rows, part, (given, encoded, found) in done:
            lengths, times = given.lengths, self._times(given, part.starts) if tokens else None
            for x, into in zip(found, gathered, strict=True):
                kept, scene = x[:, encoded.n_prefix :], pool(x, encoded, given)
                if tokens == "steps":
                    if times is None:
                        raise ValueError("tokens='steps': pictures have no steps of time; take tokens=True")
                    kept, size, at = by_steps(kept, lengths, times, math.prod(given.grid[1:]))
                    into.add(rows, scene, kept, size, at)
                else:
                    into.add(rows, scene, kept, lengths, times)

    def _encode(self, raw: Raw, layers: Sequence[Layer]) -> tuple[Tokens, Encoded, list[Tensor]]:
        """What the frontend and the encoder make of a batch, and its layers in the order asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            given = self.encoder.tokens(raw.to(self.device))
            encoded = self.encoder(given, layers=sorted({i for i in _numbers(layers) if i >= 0}))

        def one(layer: int) -> Tensor:
            return encoded.x if layer < 0 else encoded.layers[layer]

        def several(weighting: Weighting) -> Tensor:
            return torch.stack([weight * one(layer).float() for layer, weight in weighting]).sum(0)

        return given, encoded, [one(asked) if isinstance(asked, int) else several(asked) for asked in layers]

    def _encode_one(self, raw: Raw, layers: Sequence[Layer], cut: Windows) -> tuple[Tokens, Encoded, list[Tensor]]:
        """One clip, in windows where it is longer than one."""
        if int(raw.lengths[0]) <= cut.length:
            return self._encode(raw, layers)
        least = self.encoder.frontend.min_length
        shortest = replace(
            raw, data=raw.data.narrow(time_axis(raw), 0, least).to(self.device), lengths=torch.tensor([least])
        )
        step_ms = self.encoder.tokens(shortest).step_ms
        assert step_ms is not None
        assert raw.rate is not None
        step = round(step_ms * raw.rate / 1000)
        return encode_long(raw, lambda part: self._encode(part, layers), cut, step=step)

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

        def show(places: list[int], raw: Raw, given: Tokens, encoded: Encoded, found: list[Tensor]) -> None:
            x = found[0][:, encoded.n_prefix :]
            for row, (place, length) in enumerate(zip(places, given.lengths.tolist(), strict=True)):
                see(place, x[row, :length].float(), given)

        same: dict[str, Any] = {"batch_size": batch_size, "batch_seconds": batch_seconds, "on_bad_clip": on_bad_clip}
        return self.each_batch(inputs, show, layers=[layer], **same)

    def each_batch(
        self,
        inputs: Input | Sequence[Input],
        see: Callable[[list[int], Raw, Tokens, Encoded, list[Tensor]], None],
        *,
        layers: Sequence[Layer],
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> dict[str, str]:
        """Show one batch after the other as it was read and as it is encoded, and keep none.

        Args:
            inputs, batch_size, batch_seconds, on_bad_clip, progress: see `embed`.
            see: gets the places of a batch's clips among the inputs, what was read of them, what the frontend and the
                encoder made of it, and the layers, (B, prefix + N, D) each, on the encoder's device. Clips do not come
                in their order.
            layers: see `layer` of `embed`.

        Returns:
            name -> reason of the clips that could not be read, which `see` never gets.
        """
        asked = self.of()._layers(layers)
        clips = self.clips(inputs)

        def compute(batch: Batch, places: list[int]) -> None:
            raw = batch.raw.to(self.device)
            see(places, raw, *self._encode(raw, asked))

        return over_clips(clips, compute, batch_size, batch_seconds, on_bad_clip, progress, all_may_be_bad=True)[1]

    def predict(
        self,
        inputs: Input | Sequence[Input],
        *,
        beam: int | None = None,
        lm: str | Path | None = None,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
        threshold: float | None = None,
        rate: float | None = None,
        batch_size: int = 16,
        batch_seconds: float = 60.0,
        on_bad_clip: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> list[str | list[str] | None]:
        """What a fine-tuned encoder says of each clip: its likeliest class, or its transcript.

        Where clips have several classes (`objective.multi_label`) it is a list of those that are likely enough, the
        likeliest first; it may be empty. `probabilities` gives the numbers that it goes by.

        Args:
            beam: of the search for the likeliest transcript; None takes the best path, or with `lm` its own default.
                For transcripts only.
            lm: n-gram language model, an ARPA file, whose words are then written: see `WordBeam`.
            lm_weight, word_score: see `WordBeam`; to be chosen on validation clips.
            threshold: a class is one of a clip's where its probability is above this, None for .5. For several classes
                a clip only, and to be chosen on validation clips.
            inputs, rate, batch_size, batch_seconds, on_bad_clip, progress: see `embed`; None for a clip that was
                skipped.

        Raises:
            ValueError: this encoder was not fine-tuned, or a setting that is not for what it says.
        """
        objective, config = self._fine_tuned(), self.config
        vocabulary = None if config["vocabulary"] is None else CharVocabulary(config["vocabulary"])
        if (beam is not None or lm is not None) and vocabulary is None:
            raise ValueError(f"beam={beam}, lm={lm}: {self.name} tells classes, and only transcripts are searched for")
        several = vocabulary is None and objective.multi_label
        if threshold is not None and not several:
            says = "tells one class of each clip" if vocabulary is None else "writes transcripts"
            raise ValueError(f"threshold={threshold:g}: {self.name} {says}; leave threshold out")
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold:g}: must be a probability, from 0 to below 1")
        least = 0.5 if threshold is None else threshold
        words = None
        if lm is not None and vocabulary is not None:
            width = {} if beam is None else {"beam": beam}
            words = WordBeam(lm, vocabulary.symbols, lm_weight=lm_weight, word_score=word_score, **width)
        clips = self.clips(inputs, rate=rate)
        said: list[str | list[str] | None] = [None] * len(clips)

        def compute(batch: Batch, places: list[int]) -> None:
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                texts: Sequence[str | list[str]]
                if several:
                    texts = [_above(row, config["classes"], least) for row in objective.predict(batch).sigmoid().cpu()]
                elif vocabulary is None:
                    texts = [config["classes"][i] for i in objective.predict(batch).argmax(1).tolist()]
                elif words is not None:
                    texts = words(*objective.log_probs(batch.raw))
                else:
                    log_probs, lengths = objective.log_probs(batch.raw)
                    ids = best_path(log_probs, lengths) if beam is None else prefix_beam(log_probs, lengths, beam=beam)
                    texts = [vocabulary.decode(row) for row in ids]
            for place, text in zip(places, texts, strict=True):
                said[place] = text

        over_clips(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
        return said

    def probabilities(
        self,
        inputs: Input | Sequence[Input],
        *,
        spans: int = 1,
        crops: int = 1,
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
            crops: of pictures and video: mean over so many crops, evenly from one end of the longer side to the other,
                each as large as the middle one that is taken otherwise; with several spans, so many of each. VideoMAE's
                views of Kinetics-400 are 5 spans x 3 crops (Tong et al. 2022, arXiv:2203.12602). A clip is
                read once for each view.
            inputs, rate, batch_size, batch_seconds, on_bad_clip, progress: see `embed`; NaN for a clip that was
                skipped.

        Raises:
            ValueError: this encoder was not fine-tuned, or tells no classes, or reads clips whole where there are to be
                several spans or crops.
        """
        objective = self._fine_tuned()
        if self.config["classes"] is None:
            raise ValueError(f"{self.name} writes transcripts and tells no classes; use predict")
        parts = []
        for config in spread_out(self.config, spans=spans, crops=crops):
            clips = find_clips(inputs, config, self.encoder, rate=rate)
            found = torch.full((len(clips), len(self.config["classes"])), torch.nan)

            def compute(batch: Batch, places: list[int], found: Tensor = found) -> None:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    logits = objective.predict(batch.to(self.device)).cpu()
                found[places] = logits.sigmoid() if objective.multi_label else logits.softmax(1)

            over_clips(clips, compute, batch_size, batch_seconds, on_bad_clip, progress)
            parts.append(found)
        # in float64, so that the mean of the same is the same
        return torch.stack(parts).double().mean(0).float()

    def reconstruct(
        self,
        inputs: Input | Sequence[Input],
        *,
        masked: Tensor | np.ndarray | Sequence[Tensor | np.ndarray] | None = None,
        rate: float | None = None,
        on_bad_clip: Literal["raise", "skip"] = "raise",
    ) -> list[dict[str, Any] | None]:
        """What a run that reconstructs makes of each clip of which it sees a part, or which is spoiled.

        Args:
            masked: of `mae` and `cae`: bool, True = hidden from it, for each token of a clip in the shape of its grid
                or row by row, time outermost: one array for all clips, or a list of one for each. By default as many
                are drawn as in training, other ones in each clip and the same in each call.
            inputs, rate, on_bad_clip: see `embed`.

        Returns:
            Of each clip "input", "masked" and "reconstruction", in which visible tokens show their own values; with
            `denoise` "noisy" and with `tera` "altered" in the place of "masked", and all of the clip is predicted.
            (C, H, W), or (C, T, H, W) with "rate", frames a second; of sound spectrograms, low frequencies at the
            bottom, and "sounds", the same names -> (samples,), with "rate", samples a second, where they can be heard;
            and "note", what there is to say. None for a clip that was skipped.

        Raises:
            ValueError: this encoder was not trained so, or `masked` does not fit a clip.
        """
        objective, clips = self.objective, self.clips(inputs, rate=rate)
        if not hasattr(objective, "reconstruct"):
            raise ValueError(
                f"{self.name}: was trained to reconstruct nothing that can be shown; take a run of mae, or use embed"
            )
        masks = masked if isinstance(masked, list | tuple) else [masked] * len(clips)
        if len(masks) != len(clips):
            raise ValueError(
                f"masked: {len(masks)} masks for {len(clips)} clips; give one for each, or one array for all"
            )
        found: list[dict[str, Any] | None] = [None] * len(clips)

        def compute(batch: Batch, places: list[int]) -> None:
            (place,) = places
            own = masks[place]
            hidden = None if own is None else torch.as_tensor(own).reshape(1, -1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                shown = objective.reconstruct(batch.to(self.device), masked=hidden)
            found[place] = _first(shown)

        over_clips(clips, compute, 1, math.inf, on_bad_clip, progress=False)
        return found

    def pool_name(self, pool: str | None, layers: Sequence[Layer]) -> str:
        """What `pool` of `embed` stands for."""
        if pool is not None:
            return pool
        return "mean" if self._joint is None or list(layers) != [-1] else "joint"

    def digest(self) -> str:
        """What tells one encoder from another: its config and its weights, with those of the objective."""
        found = blake2b(json.dumps(self.config, sort_keys=True, default=str).encode(), digest_size=16)
        for part in (self.encoder.state_dict(), self._head or {}):
            for name, tensor in sorted(part.items()):
                found.update(name.encode())
                found.update(tensor.detach().float().cpu().contiguous().numpy())
        return found.hexdigest()

    def _pool(self, pool: str | None, layers: Sequence[Layer]) -> Pooling:
        pool = self.pool_name(pool, layers)
        if pool == "attention":
            return self._attention(layers)
        if pool != "joint":
            return Pool.named(pool)
        joint = self._joint
        if joint is None:
            raise ValueError(f"pool='joint': {self.name} shares no space with another modality; choose {NAMES}")
        if list(layers) != [-1]:
            raise ValueError("pool='joint': only the output (layer -1) is brought into the space of all modalities")
        return lambda x, encoded, tokens: joint(encoded)

    def _attention(self, layers: Sequence[Layer]) -> Pooling:
        """The pooling that a classifier learned."""
        settings = self.config.get("objective") or {}
        if not self._head or settings.get("name") != "classify" or settings.get("pooling") != "attention":
            raise ValueError(
                f"pool='attention': {self.name} learned none; `mmssl finetune` it with objective.pooling=attention, or "
                f"choose {NAMES}"
            )
        if settings.get("weighted_layers"):
            raise ValueError(
                f"pool='attention': {self.name} learned it on all layers by their weights (objective.weighted_layers), "
                f"and embed pools a layer as it is; choose {NAMES}"
            )
        if list(layers) != [-1]:
            raise ValueError("pool='attention': was learned on the output alone; take layer=-1")
        learned = self.objective.pool
        return lambda x, encoded, tokens: learned(x.float(), encoded.lengths, encoded.n_prefix)

    def _layers(self, layer: int | Mapping[int, float] | Sequence[Layer] | Literal["all"]) -> list[Layer]:
        if layer != "all" and (isinstance(layer, str) or not isinstance(layer, int | Iterable)):
            raise ValueError(f"layer={layer!r}: give a number, several, 'all', or a weight for each of some")
        asked: list[Layer]
        if isinstance(layer, Mapping):
            asked = [tuple(sorted((int(i), float(weight)) for i, weight in layer.items()))]
        elif isinstance(layer, int):
            asked = [layer]
        else:
            asked = list(range(self.depth + 1)) if isinstance(layer, str) else list(layer)
        for i in _numbers(asked):
            if not -1 <= i <= self.depth:
                raise ValueError(
                    f"layer={i}: {self.name} has layers 0 to {self.depth}, and -1 is its output after the final norm"
                )
        if not _numbers(asked):
            raise ValueError("layer=[]: name at least one")
        return asked

    def _fine_tuned(self) -> Any:
        if self._left_out:
            raise ValueError(
                f"{self.name}: its head was left out when it was read ({self._left_out}), so there is nothing to "
                "predict with; `mmssl finetune` it with labels, or use embed"
            )
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
                    f"{self.name}: holds an encoder without the objective that trained it; those of fine-tuned runs, "
                    "of mae, cae, denoise, tera and vq_wav2vec and of pairs are exported, and none of omni"
                )
            objective = build_objective(self.config, self.encoder)
            # all but the encoder, which is loaded already
            own = {name: tensor for name, tensor in objective.state_dict().items() if not name.startswith("encoder.")}
            _check(own, self._head, self.name)
            objective.load_state_dict(self._head, strict=False)
            self._objective = objective.eval().requires_grad_(False).to(self.device)
        return self._objective

    def _times(self, tokens: Tokens, starts: Tensor | None) -> Tensor | None:
        """(B, N): the middle of what each token sees, in milliseconds of its clip; for `starts` see `Raw`."""
        if tokens.step_ms is None or tokens.span_ms is None:
            return None
        times = tokens.coords[..., tokens.axes.index("t")].cpu() * tokens.step_ms + tokens.span_ms / 2
        return times if starts is None else (times + 1000 * starts[:, None]).float()

    def _say_part(self, raw: Raw) -> None:
        """Say once that clips are not read whole."""
        if self._said_part or raw.starts is None or raw.rate is None:
            return
        self._said_part = True
        # a clip of which a part was read is as long as that part may be
        row = int(raw.lengths.argmax())
        log.warning(
            "%s: only the %.3g s from %.5g s on are read, as this run's augment.eval says (said once for all such "
            "clips); window= (--window) reads and embeds all of a clip",
            raw.ids[row],
            int(raw.lengths[row]) / raw.rate,
            float(raw.starts[row]),
        )


def _first(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `MAE.reconstruct` gives that of the first clip, on the CPU."""
    found: dict[str, Any] = {}
    for name, value in shown.items():
        found[name] = _first(value) if isinstance(value, Mapping) else value
        if isinstance(value, Tensor):
            found[name] = value[0].float().cpu()
    return found


def _above(probabilities: Tensor, classes: Sequence[str], threshold: float) -> list[str]:
    """The classes whose probability is above a threshold, the likeliest first."""
    order = probabilities.argsort(descending=True, stable=True).tolist()
    return [classes[i] for i in order if float(probabilities[i]) > threshold]
