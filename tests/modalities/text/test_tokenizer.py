"""Tokenizers: what is learned depends on the captions alone, transformers reads it the same, and no caption is lost."""

import copy
import json
import pickle

import pytest

from mmssl.modalities.text.reader import read
from mmssl.modalities.text.tokenizer import Tokenizer, byte_bpe, pretrained
from mmssl.types import BadClip

CAPTIONS = ["a red heart", "a red square", "a blue heart", "two red hearts", "a heart on fire", "Ünïcode und 🎉"]


@pytest.fixture(scope="module")
def learned() -> str:
    return byte_bpe(CAPTIONS, entries=280)


def test_the_order_of_captions_changes_nothing(learned):
    assert byte_bpe(CAPTIONS[::-1], entries=280) == learned


def test_frequent_words_are_one_piece_and_every_byte_can_be_spelled(learned):
    tokenizer = Tokenizer(learned, 77)
    assert len(tokenizer) == 280
    assert len(tokenizer.encode("heart")) == 3  # between its two marks
    for text in ("a red heart", "日本語 \x00 ~", "🎉🎉"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_what_is_learned_to_the_same_ids(learned, tmp_path):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(learned, encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(learned, 77)
    for text in [*CAPTIONS, "Rotes HERZ\tmit Tab"]:
        assert tokenizer.encode(text) == theirs(text)["input_ids"]


def test_a_tokenizer_of_a_folder_keeps_its_own_marks_and_loses_its_padding(tmp_path):
    from tokenizers import Tokenizer as Made
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {word: id for id, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "heart"])}
    made = Made(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=12)
    made.enable_truncation(max_length=3)
    made.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer(pretrained([], source=str(source)), 6)
        assert tokenizer.encode("a red heart") == [1, 4, 5, 6, 2]
        assert tokenizer.encode("a green heart") == [1, 4, 3, 6, 2]
        assert len(tokenizer) == 7


def test_what_is_longer_than_the_context_is_cut_before_its_end_and_counted(learned):
    tokenizer = Tokenizer(learned, 5)
    whole = Tokenizer(learned, 77).encode("a red heart on fire")
    assert tokenizer.encode("a red heart on fire") == [*whole[:4], whole[-1]]
    assert tokenizer.encode("a red heart") == whole[:4] + whole[-1:]
    assert tokenizer.cut == 1
    assert tokenizer.count_cut(["a red heart on fire", "heart", 7, "a red heart"]) == (1, 3)
    assert tokenizer.count_cut(["a red heart on fire"] * 9, most=4) == (4, 4)


def test_a_caption_that_spells_a_mark_is_not_ended_by_it(learned):
    tokenizer = Tokenizer(learned, 77)
    end = tokenizer.encode("heart")[-1]
    assert tokenizer.encode("a <|endoftext|> heart").count(end) == 1


def test_captions_are_filled_up_where_there_is_an_id_for_it(learned):
    plain, filled = Tokenizer(learned, 9), Tokenizer(learned, 9, 7)
    for text in ("heart", "a red heart on fire"):
        ids = plain.encode(text)
        assert filled.encode(text) == ids + [7] * (9 - len(ids))
    assert pickle.loads(pickle.dumps(filled)).encode("heart") == filled.encode("heart")


def test_the_marks_around_a_caption_are_known_by_their_ids(learned):
    tokenizer = Tokenizer(learned, 9)
    ids = tokenizer.encode("heart")
    assert tokenizer.marks == [ids[0], ids[-1]]
    assert tokenizer.name_of(ids[-1]) == "<|endoftext|>"
    assert tokenizer.id_of("<|endoftext|>") == ids[-1]
    assert tokenizer.id_of("<none>") is None


def test_a_copy_encodes_as_the_first_does(learned):
    tokenizer = Tokenizer(learned, 9)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(CAPTIONS[4]) == tokenizer.encode(CAPTIONS[4])


@pytest.mark.parametrize("caption", ["", " \n\t", 7, None, ["a"]])
def test_an_empty_caption_and_one_that_is_no_text_are_bad_clips(learned, caption):
    with pytest.raises(BadClip, match="is empty|is no text; write it in quotes"):
        read(caption, tokenizer=Tokenizer(learned, 77))


def test_half_a_character_is_a_bad_clip_and_nothing_is_learned_from_it(learned):
    half = "cut \ud83d"
    tokenizer = Tokenizer(learned, 77)
    with pytest.raises(BadClip, match=r"the caption 'cut \\ud83d' holds half a character"):
        read(half, tokenizer=tokenizer)
    assert tokenizer.count_cut([half, "a"]) == (0, 1)
    assert byte_bpe([*CAPTIONS, half], entries=280) == learned
    assert read("whole \U0001f600", tokenizer=tokenizer).tolist() == tokenizer.encode("whole \U0001f600")


def test_what_cannot_be_used_is_one_sentence(learned, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for make, sentence in (
        (lambda: byte_bpe(CAPTIONS, entries=100), "tokenizer.entries=100: must be at least 258"),
        (lambda: byte_bpe([]), "there are no captions to learn it from"),
        (lambda: byte_bpe(["a", 7]), "the caption 7 is no text"),
        (lambda: Tokenizer(learned, 2), "frontend.context=2: the tokenizer puts 2 marks around each caption alone"),
        (lambda: Tokenizer(learned, 9, 280), "frontend.pad=280: the tokenizer has ids from 0 to 279"),
        (lambda: pretrained([], source=str(tmp_path)), "tokenizer.source=.*: no tokenizer can be read from it"),
        (lambda: pretrained([], source=str(tmp_path / "empty")), "no tokenizer can be read from it"),
        (lambda: pretrained([], source=str(tmp_path / "none.json")), "no tokenizer can be read from it"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
