"""Beam search for transcripts in the words of an n-gram language model, by Flashlight's decoder and KenLM."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

THRESHOLD = 50.0  # a hypothesis that much below the best is dropped, as in fairseq and torchaudio


class WordBeam:
    """The transcript of highest log p(characters | sound) + lm_weight * log10 p(words) + word_score * words.

    Only words that the language model lists, and that the vocabulary spells, are written; the sound's part is that of
    the best alignment, and the end of the sentence is one more word to the language model.

    Source: Collobert et al. 2016 (arXiv:1609.03193), section 2.4; wav2vec 2.0 (arXiv:2006.11477), section 4.4.
    Differs from them: a boundary after the last word is not asked of the sound, for transcripts have none here.

    Args:
        path: n-gram model in the ARPA format, which may be gzipped.
        symbols: of the vocabulary: the blank, the boundary between words, then single characters.
        beam: hypotheses kept after each frame.
        lm_weight: weight of the language model, to be chosen on validation: wav2vec 2.0 tries 0 to 5.
        word_score: added for each word, against short transcripts: wav2vec 2.0 tries -5 to 5.

    Raises:
        ValueError: there is no decoder, no such file, one that is no n-gram model of two words or more, or none of its
            words can be spelled.
    """

    def __init__(
        self,
        path: str | Path,
        symbols: Sequence[str],
        *,
        beam: int = 50,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ) -> None:
        try:
            from flashlight.lib.text import decoder
            from flashlight.lib.text.decoder.kenlm import KenLM
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError:
            raise ValueError(
                f"lm={path}: needs Flashlight: pip install mmssl[lm]; or leave lm out, for a beam of characters"
            ) from None
        if beam < 1:
            raise ValueError(f"beam={beam}: must keep at least 1 hypothesis")
        ids = {symbol: number for number, symbol in enumerate(symbols)}
        spelled = {word: [ids.get(c, -1) for c in word] for word in listed_words(path)}
        spellings = {word: spelling for word, spelling in spelled.items() if min(spelling) > 1}
        if not spellings:
            shown = ", ".join(list(spelled)[:3])
            raise ValueError(
                f"{path}: none of its {len(spelled)} words ({shown}) is spelled by the vocabulary "
                f"{''.join(symbols[2:])[:60]!r}; is the case another?"
            )
        self.words = ["<unk>", *spellings]
        numbers = Dictionary()
        for word in self.words:
            numbers.add_entry(word)
        try:
            self._lm = KenLM(str(path), numbers)
        except RuntimeError as error:
            raise ValueError(f"{path}: KenLM cannot read it: {str(error).splitlines()[-1]}") from None
        start = self._lm.start(False)
        trie = decoder.Trie(len(symbols), 1)
        for number, word in enumerate(self.words[1:], start=1):
            # a word is over at the boundary behind it, so that two words never run into each other
            trie.insert([*spellings[word], 1], number, self._lm.score(start, number)[1])
        trie.smear(decoder.SmearingMode.MAX)
        options = decoder.LexiconDecoderOptions(
            beam, len(symbols), THRESHOLD, lm_weight, word_score, -math.inf, 0.0, False, decoder.CriterionType.CTC
        )
        self._decoder: Any = decoder.LexiconDecoder(options, trie, self._lm, 1, 0, 0, [], False)

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """The transcript of each clip.

        Args:
            log_probs: (B, N, V), blank first, the boundary between words second.
            lengths: (B,) real frames.
        """
        scores = log_probs.detach().float().cpu()
        # one frame more, which is a boundary for certain: it ends the last word
        end = torch.full((1, scores.shape[2]), -math.inf)
        end[0, 1] = 0.0
        texts = []
        for clip, length in zip(scores, lengths.tolist(), strict=True):
            frames = np.ascontiguousarray(torch.cat([clip[:length], end]).numpy())
            found = self._decoder.decode(frames.ctypes.data, *frames.shape)
            texts.append(" ".join(self.words[number] for number in found[0].words if number > 0) if found else "")
        return texts


def listed_words(path: str | Path) -> list[str]:
    """The words of an ARPA file, without its marks <s>, </s> and <unk>.

    Raises:
        ValueError: no such file, a damaged one, or one that lists no words.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"lm={path}: no such file; give an n-gram model in the ARPA format")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
            words = [word for word in _unigrams(lines) if not (word.startswith("<") and word.endswith(">"))]
    except (EOFError, IndexError, gzip.BadGzipFile):
        raise ValueError(f"lm={path}: is damaged or no ARPA file; give an n-gram model in the ARPA format") from None
    if not words:
        raise ValueError(f"lm={path}: lists no 1-grams; give an n-gram model in the ARPA format")
    return words


def _unigrams(lines: Iterator[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        line = line.strip()
        if line.startswith("\\"):
            if inside:
                return
            inside = line == "\\1-grams:"
        elif inside and line:
            yield line.split()[1]
