"""Characters and class names to numbers and back."""

import pytest

from mmssl.data.text import CharVocabulary, Classes


def test_a_vocabulary_is_the_blank_the_boundary_and_every_character_sorted() -> None:
    vocabulary = CharVocabulary.from_texts(["go on", " no\tgo "])
    assert vocabulary.symbols == ["<blank>", "|", "g", "n", "o"]
    assert vocabulary.blank == 0
    assert len(vocabulary) == 5
    assert vocabulary.encode("go  no\n") == [2, 4, 1, 3, 4]
    assert vocabulary.encode("") == []


def test_decoding_gives_the_words_back_and_leaves_out_blanks() -> None:
    vocabulary = CharVocabulary.from_texts(["go on"])
    for text in ("go on", "noon", ""):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([0, 1, 2, 0, 4, 4, 1, 1]) == "goo"


def test_the_saved_symbols_make_the_same_vocabulary() -> None:
    vocabulary = CharVocabulary.from_texts(["žluťoučký kůň", "Ω"])
    assert CharVocabulary(vocabulary.symbols).encode("kůň Ω") == vocabulary.encode("kůň Ω")


def test_a_letter_is_one_character_however_it_was_typed() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    vocabulary = CharVocabulary.from_texts([decomposed])
    assert len(vocabulary) == 2 + 4
    assert vocabulary.encode(composed) == vocabulary.encode(decomposed)


def test_a_character_outside_of_the_vocabulary_is_named() -> None:
    vocabulary = CharVocabulary.from_texts(["go on"])
    with pytest.raises(ValueError, match=r"the character 'x' \(U\+0078\) of the text 'ox' is not in the vocabulary"):
        vocabulary.encode("ox")
    with pytest.raises(ValueError, match=r"character '\|'"):
        vocabulary.encode("go|on")


@pytest.mark.parametrize(
    "symbols", [[], ["a", "b"], ["<blank>", "|", "a", "a"], ["<blank>", "|", "ab"], ["<blank>", "|", " "]]
)
def test_what_is_no_vocabulary_is_refused(symbols: list[str]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        CharVocabulary(symbols)


def test_texts_without_characters_are_refused() -> None:
    with pytest.raises(ValueError, match="no character at all"):
        CharVocabulary.from_texts(["", " "])


def test_classes_are_numbered_in_order() -> None:
    assert Classes.from_labels(["dog", "cat", "dog"]).names == ["cat", "dog"]
    assert Classes.from_labels(["10", "9", 9, 1]).names == ["1", "9", "10"]
    assert Classes.from_labels(["10", "9", "b"]).names == ["10", "9", "b"]
    classes = Classes(["cat", "dog"])
    assert classes.encode("dog") == 1
    assert len(classes) == 2
    assert Classes.from_labels([0, 1]).encode("1") == 1


def test_a_label_that_is_no_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"the label 'cow' is not among the 2 classes \(cat, dog\)"):
        Classes(["cat", "dog"]).encode("cow")
    with pytest.raises(ValueError, match="each name once"):
        Classes(["cat", "cat"])
    with pytest.raises(ValueError, match="each name once"):
        Classes([])


@pytest.mark.parametrize("label", [None, ["cat"], {"name": "cat"}])
def test_a_label_that_is_neither_text_nor_number_is_refused(label: object) -> None:
    with pytest.raises(ValueError, match="is no class: it must be text or a number"):
        Classes.from_labels(["dog", label])


@pytest.mark.parametrize("text", [5, None])
def test_a_transcript_that_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no transcript: it must be text, in quotes"):
        CharVocabulary.from_texts(["a", text])  # type: ignore[list-item]
