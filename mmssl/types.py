"""What flows from a file to a loss, and what each stage promises about it.

Shape letters, used bare everywhere: B clips, N tokens, D width, C feature channels, P values of a patch, T samples or
frames, F mel bins, H W pixels, K kept tokens, R masked copies (B x clones), V views, A axes.

Three promises that every stage keeps:

* Masks are bool and named for what is True: `valid` is real, `masked` is hidden.
* Token order is row-major with time outermost, and padding sits at the end of the time axis only, so a clip's real
  tokens are always the first `lengths[b]` of its row. `lengths` lives on the CPU: no stage waits for a device to learn
  how long its input is.
* Tokens past a clip's length are zero, and nothing that they hold ever reaches a real token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

Hide = Literal["none", "drop", "replace", "unseen"]
# where a layer is read: after the whole block, or what its MLP gives, before the residual
Point = Literal["block", "mlp"]


def valid_mask(lengths: Tensor, size: int, device: torch.device | str = "cpu") -> Tensor:
    """(B,) lengths -> (B, size) bool, True where a position is real."""
    return torch.arange(size, device=device) < lengths.to(device, non_blocking=True)[:, None]


@dataclass(frozen=True)
class Raw:
    """What a reader gives: one modality of a batch.

    data: (B, L) waveform | (B, C, H, W) | (B, C, T, H, W), float32, pictures in [0, 1] | (B, G, T) int64 codes, of G
        codebooks at each step | (B, L) int64 ids.
    lengths: (B,) int64 on the CPU, real units along time (samples, frames, ids); 1 for pictures.
    ids: a key for each clip.
    rate: units along time per second, where there is a time.
    seeds: (B,) int64 on the CPU, from which a frontend draws what it does to clips in training; None where it is to do
        nothing to them.
    starts: (B,) float64 on the CPU, the second of each clip at which what was read of it begins; None where all of them
        were read whole.
    """

    data: Tensor
    lengths: Tensor
    ids: list[str]
    rate: float | None = None
    seeds: Tensor | None = None
    starts: Tensor | None = None

    def to(self, device: torch.device | str) -> Raw:
        """The same batch with its data on `device`; lengths stay on the CPU."""
        return replace(self, data=self.data.to(device, non_blocking=True))

    def part(self, rows: slice) -> Raw:
        """Some of the clips."""
        seeds = None if self.seeds is None else self.seeds[rows]
        starts = None if self.starts is None else self.starts[rows]
        return Raw(self.data[rows], self.lengths[rows], self.ids[rows], self.rate, seeds, starts)

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Units:
    """Discrete labels along the clips of a batch, one label set: k-means units, the codes of a codec, a topic.

    values: (B, S, G) int64, G labels (codebooks) at each step; zero past each length.
    lengths: (B,) int64 on the CPU, steps.
    rate: steps per second; None for one step a token in their order, or one step for all of the clip.
    starts: (B,) float64 on the CPU, seconds from the beginning of the first step to that of the clip: where a part of
        a recording is read, it may begin within a step.
    """

    values: Tensor
    lengths: Tensor
    rate: float | None
    starts: Tensor

    def to(self, device: torch.device | str) -> Units:
        return replace(self, values=self.values.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """What an objective gets: the inputs by modality, and what is known about each clip.

    inputs: modality name -> Raw, with the same B but for those in `rows`.
    seeds: (B,) int64 on the CPU, a function of run seed, clip id and epoch: every mask is drawn from it, so resuming
        or another number of ranks changes no mask.
    labels: (B,) int64 classes | (B, S) int64 characters, or several classes, padded with 0 | None.
    label_lengths: (B,) int64 on the CPU, for (B, S) labels.
    units: key of a row -> the label set that it names, for objectives that ask for some.
    rows: modality -> (M,) int64 on the CPU, ascending: the clips that have it, where not all of them do; `inputs` has
        these alone. A modality that no clip has is in neither.
    """

    inputs: Mapping[str, Raw]
    seeds: Tensor
    labels: Tensor | None = None
    label_lengths: Tensor | None = None
    units: Mapping[str, Units] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def raw(self) -> Raw:
        """The only input of a batch of one modality, with the batch's seeds."""
        if len(self.inputs) != 1:
            raise ValueError(f"batch: expected one modality, got {sorted(self.inputs)}")
        return replace(next(iter(self.inputs.values())), seeds=self.seeds)

    def of(self, modality: str) -> Raw:
        """The input of one modality, with the seeds of its clips."""
        rows = self.rows.get(modality)
        return replace(self.inputs[modality], seeds=self.seeds if rows is None else self.seeds[rows])

    @property
    def ids(self) -> list[str]:
        found: dict[int, str] = {}
        for name, raw in self.inputs.items():
            found |= zip(self.rows[name].tolist() if name in self.rows else range(len(raw)), raw.ids, strict=True)
        return [found[row] for row in range(len(self))]

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            inputs={name: raw.to(device) for name, raw in self.inputs.items()},
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
            units={key: units.to(device) for key, units in self.units.items()},
        )

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class Tokens:
    """What a frontend gives: content with coordinates, no position added yet.

    x: (B, N, D), zero past each length.
    lengths: (B,) int64 on the CPU, real tokens.
    coords: (B, N, A) int64, the place of each token on each axis, in token steps; often an expanded view.
    axes: names of the A axes, time outermost: ("t",), ("t", "f"), ("h", "w"), ("t", "h", "w").
    grid: tokens along each axis with padding, prod(grid) == N.
    feat: (B, N, C) features before the projection: the patch itself, or normalized convolution outputs.
    pre_norm: (B, N, C) learned features before their last norm, for a penalty on their size; None where fixed.
    step_ms: milliseconds from one step on the time axis to the next.
    span_ms: milliseconds that one token sees.
    project: None, or what `x` has yet to go through: it is `feat` then, so that the encoder projects only the tokens
        that it keeps.
    """

    x: Tensor
    lengths: Tensor
    coords: Tensor
    axes: tuple[str, ...]
    grid: tuple[int, ...]
    feat: Tensor | None = None
    pre_norm: Tensor | None = None
    step_ms: float | None = None
    span_ms: float | None = None
    project: nn.Module | None = None

    @property
    def valid(self) -> Tensor:
        """(B, N) bool on the tokens' device."""
        return valid_mask(self.lengths, self.x.shape[1], self.x.device)


@dataclass(frozen=True)
class MaskPlan:
    """Which tokens are hidden in which masked copy of which clip. All tensors on the CPU until `to` moves them.

    rows: (R,) the clip that each copy shows; R = B x clones.
    masked: (R, N) bool, True = hidden; only real tokens are ever hidden.
    keep: (R, K) int64, ascending indices of the visible tokens, then padding with 0.
    keep_lengths: (R,) int64 on the CPU, visible tokens of each copy.
    """

    rows: Tensor
    masked: Tensor
    keep: Tensor
    keep_lengths: Tensor

    @property
    def keep_valid(self) -> Tensor:
        """(R, K) bool, True where `keep` names a token."""
        return valid_mask(self.keep_lengths, self.keep.shape[1], self.keep.device)

    @property
    def is_identity(self) -> bool:
        """Whether the copies are the clips themselves, one each."""
        return len(self.rows) == 0 or bool((self.rows.cpu() == torch.arange(len(self.rows))).all())

    def to(self, device: torch.device | str) -> MaskPlan:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(self, rows=move(self.rows), masked=move(self.masked), keep=move(self.keep))


@dataclass(frozen=True)
class Encoded:
    """What the encoder gives.

    x: (R, prefix + N or K, D), after the final norm where the Transformer has one; zero past each length.
    lengths: (R,) int64 on the CPU, real positions including the prefix.
    layers: the layers asked for: 0 is the Transformer's input, i the output of block i, without the final norm; or of
        its MLP, see `Point`.
    n_prefix: class token and registers at the front of each row.
    """

    x: Tensor
    lengths: Tensor
    layers: dict[int, Tensor]
    n_prefix: int

    @property
    def valid(self) -> Tensor:
        """(R, prefix + N or K) bool."""
        return valid_mask(self.lengths, self.x.shape[1], self.x.device)

    @property
    def tokens(self) -> Tensor:
        """x without the prefix."""
        return self.x[:, self.n_prefix :]


@dataclass(frozen=True, repr=False)
class Embeddings:
    """What a user gets.

    scene: (B, E), one vector a clip; NaN for a clip that could not be read.
    tokens: (B, N, D), zero past each length; N is 0 where they were not kept.
    valid: (B, N) bool.
    time_ms: (B, N) the middle of each token in milliseconds from the beginning of its clip, zero past each length; None
        where there is no time.
    ids: what each clip is called: its path, its manifest row's id, or "input" and its place.
    bad: id -> reason, of the clips that could not be read.
    """

    scene: Tensor
    tokens: Tensor
    valid: Tensor
    time_ms: Tensor | None = None
    ids: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Shapes, and no numbers: they would fill pages."""
        return f"Embeddings(scene={tuple(self.scene.shape)}, tokens={tuple(self.tokens.shape)}, bad={len(self.bad)})"


@dataclass
class Loss:
    """A sum, and what to divide it by.

    total: scalar with gradient, a *sum* over `count` items. The loop divides once, by the count over all ranks and
        micro-batches, so that neither changes the gradient.
    count: the items of the sum: masked tokens, clips.
    metrics: name -> (sum, count) to be averaged in the same way for the log.
    answers: (B, classes) scores, and bool, which of the classes each clip has: for what all clips together tell, the
        mean average precision. Only while evaluating, where a clip has any number of classes.
    nothing: why `count` is 0, where it is, for the sentence that names the clips of a skipped update.
    left_out: id -> why, of clips that the sum leaves out.
    """

    total: Tensor
    count: float
    metrics: dict[str, tuple[float | Tensor, float]] = field(default_factory=dict)
    answers: tuple[Tensor, Tensor] | None = None
    nothing: str = ""
    left_out: dict[str, str] = field(default_factory=dict)


class BadClip(ValueError):
    """A file that cannot be read as what it should be: `path` and `reason`, one sentence together."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadClip], tuple[str, str]]:
        # an exception with its own arguments does not survive the way back from a loader's worker otherwise
        return BadClip, (self.path, self.reason)


class Frontend(nn.Module, ABC):
    """The protocol of a modality's frontend: raw input to tokens.

    A frontend adds no position, draws no mask and knows no objective.

    axes: see Tokens.
    learned: whether `feat` is learned. Reconstructing learned features collapses, so MAE refuses them.
    dim, feature_dim: widths of `x` and of `feat`.
    project: `feat` to `x`, without dropout: for objectives that alter the features before they become tokens.
    late: whether `forward` takes `late=True`, and then leaves `project` to whoever keeps the tokens, see `Tokens`.
    codes: of each codebook how many codes it has, where what a token measures is discrete: one token a step of the raw
        codes; empty elsewhere.
    bands: frequency bands of a frame, where the features of a token are whole frames of a spectrogram, end to end; 0
        elsewhere.
    reader_settings: keyword arguments for the modality's reader: the rate or the channels that this frontend reads.
    grad_mult: factor on the gradient that reaches learned features, 0 to train them no more; where learned only.
    min_length: raw units along time, the least that a clip may have; 1 where there is no time.
    """

    axes: ClassVar[tuple[str, ...]]
    learned: ClassVar[bool]
    late: ClassVar[bool] = False
    dim: int
    feature_dim: int
    project: nn.Module
    bands: int = 0
    codes: tuple[int, ...] = ()
    reader_settings: dict[str, Any]
    grad_mult: float
    min_length: int

    @abstractmethod
    def lengths(self, raw: Raw) -> Tensor:
        """(B,) int64 on the CPU: tokens of each clip; equals `Tokens.valid.sum(1)`.

        Raises:
            ValueError: a clip is shorter than one token.
        """

    @abstractmethod
    def forward(self, raw: Raw) -> Tokens:
        """(B, ...) raw input to (B, N, D) tokens."""

    def measured(self, raw: Raw) -> Tensor:
        """(M, C): the values that the frontend brings to mean 0 by constants of the training data, in C channels.

        Raises:
            ValueError: it has no such constants.
        """
        raise ValueError(
            f"{type(self).__name__} normalizes by no constants of the data; choose a recipe with spectrogram, patches "
            "or tubes"
        )


class Objective(Protocol):
    """A loss and the parts it owns. Two methods, one file, one paper."""

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch, in float32."""

    def after_step(self, step: int) -> None:
        """Called once after optimizer update number `step` (1, 2, ...): the only place where a teacher moves."""
