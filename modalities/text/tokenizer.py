"""Tokenizers, of the library `tokenizers`: learned from captions, or those of Hugging Face.

Each function here makes the JSON of one, which that library and transformers open (`tokenizer.json`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_bpe(texts: Iterable[str], *, entries: int = 49_408, lowercase: bool = True) -> str:
    """Byte-level byte pair encoding, learned from captions; the same captions in any order give the same.

    A caption is put between a start and an end. Nothing is unknown to it: what was not merged stays bytes.

    Source: Sennrich et al. 2016 (arXiv:1508.07909), section 3.2; over bytes as in Radford et al. 2019 (GPT-2), section
        2.2; number of entries, lower case, start and end as in CLIP (arXiv:2103.00020), section 2.4.
    Differs from CLIP's: a space is a part of the word after it, and no merge knows a word's end.

    Args:
        texts: captions.
        entries: most pieces, with the 256 bytes and the 2 marks.
        lowercase: whether "Red" and "red" are the same.

    Returns:
        JSON.

    Raises:
        ValueError: too few entries, no captions, or one that is no text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if entries < len(alphabet) + 2:
        raise ValueError(f"tokenizer.entries={entries}: must be at least {len(alphabet) + 2}, the bytes and two marks")
    tokenizer: Any = Tokenizer(models.BPE())
    composed = normalizers.NFC()
    tokenizer.normalizer = normalizers.Sequence([composed, normalizers.Lowercase()]) if lowercase else composed
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    captions = _Checked(texts)
    tokenizer.train_from_iterator(captions, trainer)
    if not captions.count:
        raise ValueError("tokenizer: there are no captions to learn it from")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (START, END)],
    )
    return str(tokenizer.to_str())


def is_whole(text: str) -> bool:
    """Whether a text holds no half of a character, such as JSON and a command line can have (a lone surrogate)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class _Checked:
    """Captions one after the other, counted; none is learned from that no reader takes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.count = 0

    def __iter__(self) -> Any:
        for text in self.texts:
            if not isinstance(text, str):
                raise ValueError(f"the caption {text!r} is no text; write it in quotes")
            if is_whole(text):
                self.count += 1
                yield text


def pretrained(texts: Iterable[str], *, source: str) -> str:
    """A tokenizer of Hugging Face, with the marks that it puts around a caption.

    Args:
        texts: captions; none is looked at.
        source: a tokenizer.json, a folder with one, or a name of the hub: only then is the network touched.

    Returns:
        JSON.

    Raises:
        ValueError: there is none.
    """
    from tokenizers import Tokenizer

    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file() or path.suffix == ".json" or Path(source).is_dir():
            return str(Tokenizer.from_file(str(path)).to_str())
        return str(Tokenizer.from_pretrained(source).to_str())
    except Exception as error:  # that library raises bare ones, of files, of JSON and of the network alike
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"tokenizer.source={source}: no tokenizer can be read from it ({reason}); give a tokenizer.json, a folder "
            "that holds one (transformers writes it for a fast tokenizer), or a name of the hub"
        ) from None


class Tokenizer:
    """Captions to ids.

    cut: captions that were longer than the context so far, and lost their end.

    Args:
        text: JSON of a tokenizer.
        context: most tokens of a caption, with the marks around it.
        pad: id that fills every caption up to the context; None where captions keep their lengths.

    Raises:
        ValueError: not even the marks fit the context, or the tokenizer has no such id.
    """

    def __init__(self, text: str, context: int, pad: int | None = None) -> None:
        self.text, self.context, self.pad = text, context, pad
        self.cut = 0
        marks = self._made.num_special_tokens_to_add(False)
        if context <= marks:
            raise ValueError(f"frontend.context={context}: the tokenizer puts {marks} marks around each caption alone")
        if pad is not None and not 0 <= pad < len(self):
            raise ValueError(f"frontend.pad={pad}: the tokenizer has ids from 0 to {len(self) - 1}; choose one of them")

    def __reduce__(self) -> tuple[Any, ...]:
        # as text: to copy what the library made of it takes longer, and a loader's worker counts for itself
        return Tokenizer, (self.text, self.context, self.pad)

    def __len__(self) -> int:
        """The ids that there are: 0 to this, not included."""
        return max(self._made.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a caption with its marks, `context` at most; none where nothing but marks would be left.

        Where there is a `pad`, they are followed by as many of it as the context has room for.
        """
        found = self._made.encode(text)
        if all(found.special_tokens_mask):
            return []
        self.cut += bool(found.overflowing)
        ids: list[int] = found.ids
        return ids if self.pad is None else ids + [self.pad] * (self.context - len(ids))

    @property
    def marks(self) -> list[int]:
        """The ids that stand around every caption."""
        alone = self._made.encode("")
        return [id for id, mark in zip(alone.ids, alone.special_tokens_mask, strict=True) if mark]

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        found: int | None = self._made.token_to_id(token)
        return found

    def name_of(self, id: int) -> str:
        """The name of the token that an id stands for."""
        return str(self._made.id_to_token(id))

    def decode(self, ids: list[int]) -> str:
        """The caption of ids, without marks."""
        return str(self._made.decode(ids)).strip()

    def count_cut(self, texts: Iterable[str], *, most: int = 100_000) -> tuple[int, int]:
        """(how many of the first `most` captions are cut, how many these are); what no reader takes is passed over."""
        rest = (text for text in islice(texts, most) if isinstance(text, str) and is_whole(text))
        cut = seen = 0
        while part := list(islice(rest, 1000)):
            cut += sum(bool(found.overflowing) for found in self._made.encode_batch(part))
            seen += len(part)
        return cut, seen

    @cached_property
    def _made(self) -> Any:
        from tokenizers import Tokenizer as Made

        made = Made.from_str(self.text)
        made.no_padding()
        made.enable_truncation(max_length=self.context)
        made.encode_special_tokens = True  # a caption that spells a mark is not ended by it
        return made
