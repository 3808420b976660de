"""Labels to numbers: characters for CTC, names for classification."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

BLANK = "<blank>"
BOUNDARY = "|"


class CharVocabulary:
    """The characters that a model may write, the CTC blank at 0 and the boundary between words at 1.

    Texts are brought to Unicode's composed form (NFC), so that one letter is one character however it was typed, and
    runs of white space become one boundary. Letter case is kept.

    Args:
        symbols: as saved with a model: the blank, the boundary, then single characters.
    """

    blank = 0

    def __init__(self, symbols: Sequence[str]) -> None:
        if list(symbols[:2]) != [BLANK, BOUNDARY] or len(set(symbols)) < len(symbols):
            raise ValueError(
                f"vocabulary: expected {BLANK!r}, {BOUNDARY!r} and then each character once, got {list(symbols)[:5]}..."
            )
        if not all(len(symbol) == 1 and not symbol.isspace() for symbol in symbols[1:]):
            raise ValueError("vocabulary: every symbol after the blank must be one character, and not white space")
        self.symbols = list(symbols)
        self._ids = {symbol: id for id, symbol in enumerate(self.symbols)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharVocabulary:
        """Every character of the texts.

        Raises:
            ValueError: there are none.
        """
        characters = {character for text in texts for word in _words(text) for character in word} - {BOUNDARY}
        if not characters:
            raise ValueError("vocabulary: the texts hold no character at all")
        return cls([BLANK, BOUNDARY, *sorted(characters)])

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none for an empty one.

        Raises:
            ValueError: a character outside of the vocabulary.
        """
        words = _words(text)
        for character in "".join(words):
            if character not in self._ids or character == BOUNDARY:
                raise ValueError(
                    f"the character {character!r} (U+{ord(character):04X}) of the text {text[:60]!r} is not in the "
                    f"vocabulary, which has {''.join(self.symbols[2:])[:80]!r}"
                )
        return [self._ids[character] for character in BOUNDARY.join(words)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without blanks; repeats stay (merging them is the business of CTC decoding)."""
        text = "".join(self.symbols[id] for id in ids if id != self.blank)
        return " ".join(text.replace(BOUNDARY, " ").split())

    def __len__(self) -> int:
        return len(self.symbols)


class Classes:
    """The names of classes, numbered in their order."""

    def __init__(self, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise ValueError(f"classes: expected each name once, got {list(names)[:10]}")
        self.names = list(names)
        self._ids = {name: id for id, name in enumerate(self.names)}

    @classmethod
    def from_labels(cls, labels: Iterable[object]) -> Classes:
        """The distinct labels, sorted: as numbers where all of them are whole numbers, else as text."""
        names = {class_name(label) for label in labels}
        numbers = all(name.isdecimal() for name in names)
        return cls(sorted(names, key=lambda name: (int(name), name) if numbers else name))

    def encode(self, label: object) -> int:
        """The number of a class.

        Raises:
            ValueError: there is no such class.
        """
        id = self._ids.get(class_name(label))
        if id is None:
            shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
            raise ValueError(f"the label {label!r} is not among the {len(self.names)} classes ({shown})")
        return id

    def encode_all(self, labels: object) -> list[int]:
        """The numbers of a list of classes, or of the only one.

        Raises:
            ValueError: there is no such class.
        """
        return [self.encode(label) for label in (labels if isinstance(labels, list) else [labels])]

    def __len__(self) -> int:
        return len(self.names)


def class_name(label: object) -> str:
    """What a label calls its class.

    Raises:
        ValueError: it is neither text nor a number.
    """
    if not isinstance(label, (str, int, float)):
        way = "; a list of them takes objective.multi_label=true" if isinstance(label, list) else ""
        raise ValueError(f"the label {label!r} is no class: it must be text or a number{way}")
    return str(label)


def _words(text: str) -> list[str]:
    if not isinstance(text, str):
        raise ValueError(f"the text {text!r} is no transcript: it must be text, in quotes")
    return unicodedata.normalize("NFC", text).split()
