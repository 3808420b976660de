import gzip
import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from mmssl.evaluation.speech import best_path
from mmssl.evaluation.word_beam import WordBeam, listed_words

SYMBOLS = ["<blank>", "|", "a", "b"]
UNIGRAMS = {"<unk>": (-1.0, 0.0), "<s>": (-99.0, -0.3), "</s>": (-1.0, 0.0), "ab": (-0.5, -0.2), "a": (-0.9, -0.4)}
BIGRAMS = {("<s>", "ab"): -0.1, ("ab", "a"): -0.2, ("ab", "</s>"): -0.4, ("a", "</s>"): -0.3}


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    lines = ["\\data\\", f"ngram 1={len(UNIGRAMS)}", f"ngram 2={len(BIGRAMS)}", "", "\\1-grams:"]
    lines += [f"{p}\t{word}\t{backoff}" for word, (p, backoff) in UNIGRAMS.items()]
    lines += ["", "\\2-grams:", *(f"{p}\t{a} {b}" for (a, b), p in BIGRAMS.items()), "", "\\end\\", ""]
    path = tmp_path / "lm.arpa"
    path.write_text("\n".join(lines))
    return path


def log10(words: list[str]) -> float:
    """Of a sentence, by Katz's backing off."""
    total = 0.0
    for before, word in zip(["<s>", *words], [*words, "</s>"], strict=True):
        total += BIGRAMS.get((before, word), UNIGRAMS[before][1] + UNIGRAMS[word][0])
    return total


def likeliest(log_probs: torch.Tensor, lm_weight: float, word_score: float) -> str:
    """Over every path there is."""
    best: dict[str, float] = {}
    for path in product(range(4), repeat=len(log_probs)):
        merged = [c for i, c in enumerate(path) if c and (i == 0 or c != path[i - 1])]
        words = "".join(SYMBOLS[c] for c in merged).replace("|", " ").split()
        if set(words) <= {"ab", "a"}:
            score = sum(float(frame[c]) for frame, c in zip(log_probs, path, strict=True))
            score += lm_weight * log10(words) + word_score * len(words)
            best[" ".join(words)] = max(best.get(" ".join(words), -math.inf), score)
    return max(best, key=lambda text: best[text])


@pytest.mark.parametrize(("lm_weight", "word_score"), [(0.0, 0.0), (1.0, 0.0), (2.5, -0.5), (1.0, 2.0)])
def test_a_wide_beam_finds_the_best_sentence_of_all(arpa: Path, lm_weight: float, word_score: float) -> None:
    pytest.importorskip("flashlight.lib.text")
    torch.manual_seed(0)
    log_probs = torch.randn(12, 6, 4).mul(1.5).log_softmax(-1)
    lengths = torch.tensor([6] * 8 + [5] * 4)
    search = WordBeam(arpa, SYMBOLS, beam=500, lm_weight=lm_weight, word_score=word_score)
    found = search(log_probs, lengths)
    assert found == [likeliest(clip[:n], lm_weight, word_score) for clip, n in zip(log_probs, lengths, strict=True)]
    assert len(set(found)) > 1


def test_the_language_model_decides_what_the_sound_leaves_open(arpa: Path) -> None:
    pytest.importorskip("flashlight.lib.text")
    # an "a", and then a blank or a "b", which are nearly alike
    frames = torch.tensor([[0.02, 0.02, 0.94, 0.02], [0.5, 0.02, 0.03, 0.45]]).log()[None]
    assert best_path(frames, torch.tensor([2])) == [[2]]
    # as a sentence "ab" has 10^-0.5 and "a" 10^-1.5, and ln(0.5 / 0.45) is 0.105: a weight of 0.2 outweighs that
    for weight, text in ((0.0, "a"), (0.1, "a"), (0.2, "ab")):
        assert WordBeam(arpa, SYMBOLS, lm_weight=weight)(frames, torch.tensor([2])) == [text]


def test_silence_has_no_words(arpa: Path) -> None:
    pytest.importorskip("flashlight.lib.text")
    frames = torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 4).log()[None]
    assert WordBeam(arpa, SYMBOLS)(frames, torch.tensor([4])) == [""]


def test_words_are_those_of_the_file_without_marks(arpa: Path, tmp_path: Path) -> None:
    assert listed_words(arpa) == ["ab", "a"]
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(arpa.read_bytes()))
    assert listed_words(tmp_path / "lm.arpa.gz") == ["ab", "a"]
    pytest.importorskip("flashlight.lib.text")
    assert WordBeam(tmp_path / "lm.arpa.gz", SYMBOLS).words == ["<unk>", "ab", "a"]


def test_what_is_no_language_model_is_refused(arpa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.arpa").write_text("words\n")
    with pytest.raises(ValueError, match=r"other\.arpa: lists no 1-grams; give an n-gram model in the ARPA format"):
        listed_words(tmp_path / "other.arpa")
    with pytest.raises(ValueError, match=r"missing\.arpa: no such file"):
        listed_words(tmp_path / "missing.arpa")
    (tmp_path / "half.arpa").write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\n")
    (tmp_path / "cut.arpa.gz").write_bytes(gzip.compress(arpa.read_bytes())[:40])
    (tmp_path / "none.arpa.gz").write_text("hello")
    for name in ("half.arpa", "cut.arpa.gz", "none.arpa.gz"):
        with pytest.raises(ValueError, match=f"lm=.*{name}: is damaged or no ARPA file"):
            listed_words(tmp_path / name)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "flashlight.lib.text", None)
        with pytest.raises(ValueError, match=r"pip install mmssl\[lm\]; or leave lm out"):
            WordBeam(arpa, SYMBOLS)
    pytest.importorskip("flashlight.lib.text")
    with pytest.raises(ValueError, match="none of its 2 words .ab, a. is spelled by the vocabulary 'AB'; is the case"):
        WordBeam(arpa, ["<blank>", "|", "A", "B"])
    (tmp_path / "one.arpa").write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\t<unk>\n-1\tab\n\n\\end\\\n")
    with pytest.raises(
        ValueError, match=r"one\.arpa: KenLM cannot read it: This ngram implementation assumes at least a"
    ):
        WordBeam(tmp_path / "one.arpa", SYMBOLS)
    with pytest.raises(ValueError, match="beam=0: must keep at least 1"):
        WordBeam(arpa, SYMBOLS, beam=0)
