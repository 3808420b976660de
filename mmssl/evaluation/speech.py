"""Transcripts: from scores of characters to text, and how wrong it is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from mmssl.evaluation.score import Score, bootstrap_rate
from mmssl.nn.ctc import BLANK, best_path

__all__ = ["Edits", "best_path", "edits", "error_rates", "prefix_beam"]


def prefix_beam(log_probs: Tensor, lengths: Tensor, *, beam: int = 16, prune: float = 15.0) -> list[list[int]]:
    """The likeliest transcript of each clip among those that a beam keeps, without a language model.

    Source: Hannun et al. 2014 (arXiv:1408.2873), algorithm 1. All ways to spell a prefix are counted together, which
    `best_path` does not do.

    Args:
        log_probs: (B, N, V), blank first.
        lengths: (B,) real frames.
        beam: prefixes kept after each frame; 1 is still not the best path, because repeats are summed.
        prune: characters so much less likely than a frame's best, in nats, are not tried.

    Raises:
        ValueError: beam below 1.
    """
    if beam < 1:
        raise ValueError(f"beam={beam}: must keep at least 1 prefix")
    scores = log_probs.detach().double().cpu().numpy()
    return [list(_search(clip[:n], beam, prune)) for clip, n in zip(scores, lengths.tolist(), strict=True)]


def _search(log_probs: np.ndarray, beam: int, prune: float) -> tuple[int, ...]:
    """(N, V) -> the likeliest prefix.

    A prefix has two scores, for the paths that end in a blank and for those that end in its last character: only after
    a blank can the same character begin anew.
    """
    kept: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame in log_probs:
        tried = [(int(c), float(frame[c])) for c in np.flatnonzero(frame >= frame.max() - prune)]
        ends: defaultdict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (blank, character) in kept.items():
            either = _log_sum(blank, character)
            for c, score in tried:
                if c == BLANK:
                    ends[prefix][0] = _log_sum(ends[prefix][0], either + score)
                    continue
                if prefix[-1:] == (c,):
                    ends[prefix][1] = _log_sum(ends[prefix][1], character + score)
                longer = ends[(*prefix, c)]
                longer[1] = _log_sum(longer[1], (blank if prefix[-1:] == (c,) else either) + score)
        best = sorted(ends, key=lambda prefix: (-_log_sum(*ends[prefix]), prefix))[:beam]
        kept = {prefix: (ends[prefix][0], ends[prefix][1]) for prefix in best}
    return next(iter(kept))  # the best of the last frame comes first


def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = min(a, b), max(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


@dataclass(frozen=True)
class Edits:
    """What turns one reference into its hypothesis, in words or in characters.

    units: words or characters of the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    units: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def edits(references: Sequence[str], hypotheses: Sequence[str], unit: Literal["word", "character"]) -> list[Edits]:
    """The fewest edits of each clip.

    Text is compared as it is: case and punctuation count. Runs of spaces count as one, and a space is a character.

    Raises:
        ValueError: not one hypothesis for each reference.
    """
    import jiwer  # costs a start-up that no other command should pay

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, {len(hypotheses)} hypotheses: give one for each clip")
    if not references:
        return []
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    out = process([" ".join(text.split()) for text in references], [" ".join(text.split()) for text in hypotheses])
    found = []
    for reference, chunks in zip(out.references, out.alignments, strict=True):
        sizes: Counter[str] = Counter()
        for chunk in chunks:
            # an insertion has no width in the reference, a deletion none in the hypothesis
            width = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            sizes[chunk.type] += width
        found.append(Edits(sizes["substitute"], sizes["delete"], sizes["insert"], len(reference)))
    return found


def error_rates(references: Sequence[str], hypotheses: Sequence[str], *, decoding: str) -> dict[str, Score]:
    """Word and character error rates over all clips together: {"wer": Score, "cer": Score}.

    Errors are summed over clips before they are divided, so a long clip weighs more than a short one; above 1 where
    more was inserted than was said. See `edits` for what counts as an error.

    Args:
        decoding: how the hypotheses were made, for the protocol line: "best path, no language model".

    Raises:
        ValueError: no clip, or nothing said in any of them.
    """
    scores = {}
    units_of: dict[str, Literal["word", "character"]] = {"wer": "word", "cer": "character"}
    for name, unit in units_of.items():
        clips = edits(references, hypotheses, unit)
        units = sum(clip.units for clip in clips)
        if not units:
            raise ValueError(f"error rates need something said, got {len(clips)} references without a {unit}")
        low, high = bootstrap_rate([clip.errors for clip in clips], [clip.units for clip in clips])
        scores[name] = Score(
            task="ctc",
            metric=f"{unit} error rate",
            value=sum(clip.errors for clip in clips) / units,
            low=low,
            high=high,
            n=len(clips),
            protocol=f"{decoding}; interval over clips drawn anew",
            details={
                "substitutions": sum(clip.substitutions for clip in clips),
                "deletions": sum(clip.deletions for clip in clips),
                "insertions": sum(clip.insertions for clip in clips),
                f"{unit}s": units,
            },
        )
    return scores
