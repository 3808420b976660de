from itertools import product

import pytest
import torch

from mmssl.evaluation.speech import Edits, best_path, edits, error_rates, prefix_beam


def merged(path: tuple[int, ...]) -> tuple[int, ...]:
    changes = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
    return tuple(c for c in changes if c)


def likeliest(log_probs: torch.Tensor) -> list[int]:
    """By adding up every path."""
    sums: dict[tuple[int, ...], float] = {}
    for path in product(range(log_probs.shape[1]), repeat=len(log_probs)):
        chance = float(sum(frame[c] for frame, c in zip(log_probs, path, strict=True)).exp())
        sums[merged(path)] = sums.get(merged(path), 0.0) + chance
    return list(max(sums, key=lambda prefix: sums[prefix]))


def test_the_beam_finds_what_the_best_path_misses() -> None:
    """Blank .6, a .4 in both frames: the path of two blanks has .36, but the three that spell "a" have .64."""
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert best_path(log_probs, torch.tensor([2])) == [[]]
    assert prefix_beam(log_probs, torch.tensor([2])) == [[1]]


def test_a_wide_beam_finds_the_likeliest_transcript_of_all() -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(12, 5, 3).mul(1.5).log_softmax(-1)
    lengths = torch.tensor([5] * 6 + [4] * 6)
    expected = [likeliest(clip[:n]) for clip, n in zip(log_probs.double(), lengths.tolist(), strict=True)]
    assert prefix_beam(log_probs, lengths, beam=500, prune=1e9) == expected
    assert expected != best_path(log_probs, lengths)


def test_a_narrow_beam_reads_clear_speech() -> None:
    frames = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0]]), 5).float()
    assert prefix_beam((frames * 8).log_softmax(-1), torch.tensor([8]), beam=2) == [[1, 1, 2]]


def test_a_beam_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="beam=0: must keep at least 1 prefix"):
        prefix_beam(torch.zeros(1, 1, 2), torch.tensor([1]), beam=0)


def test_edits_are_counted_by_kind() -> None:
    found = edits(["the cat sat", "on", ""], ["a cat sat down", "", "mat"], "word")
    assert found == [Edits(1, 0, 1, 3), Edits(0, 1, 0, 1), Edits(0, 0, 1, 0)]
    assert edits(["a  b "], ["ab"], "character") == [Edits(0, 1, 0, 3)]


def test_error_rates_weigh_clips_by_their_size() -> None:
    """2 of 4 words, none of 6, and one heard in silence: 3 errors in 10 words."""
    references = ["one two three four", *["five"] * 6, ""]
    scores = error_rates(references, ["one three tree", *["five"] * 6, "six"], decoding="best path")
    assert scores["wer"].value == pytest.approx(3 / 10)
    assert scores["wer"].details == {"substitutions": 1, "deletions": 1, "insertions": 1, "words": 10}
    assert scores["wer"].n == 8
    assert scores["wer"].low <= 0.3 <= scores["wer"].high
    assert scores["cer"].details["characters"] == len("one two three four") + 6 * len("five")
    assert "best path" in scores["wer"].protocol


def test_error_rates_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="1 references, 2 hypotheses"):
        error_rates(["a"], ["a", "b"], decoding="best path")
    with pytest.raises(ValueError, match="something said"):
        error_rates([""], ["a"], decoding="best path")
