"""The head that spells: `lm_head` and the tokens of a model of theirs for CTC, and our objective `ctc`.

Their tokenizer writes vocab.json, and tokens that were added to it, such as <s>, elsewhere: in added_tokens.json, and
in tokenizer_config.json under added_tokens_decoder.

Theirs has tokens of more than one character beside the blank, such as <s> and <unk>. They stand here as characters of
Unicode's private use, so that no row of the head is lost and every probability stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmssl.convert.layout import Config, defaults_of
from mmssl.objectives import OBJECTIVES

_HEAD = "lm_head"
_BLANK, _BOUNDARY = "<blank>", "|"
_SPECIAL = ("<s>", "</s>", "<unk>", "[UNK]", "[CLS]", "[SEP]", "<bos>", "<eos>")
_PRIVATE = {token: chr(0xE000 + i) for i, token in enumerate(_SPECIAL)}


def tokens_of(
    vocabulary: Mapping[str, Any], added: Mapping[str, Any], tokenizer: Mapping[str, Any], *, rows: int
) -> dict[int, str]:
    """The token of each row of a head.

    Args:
        vocabulary: vocab.json; with several languages that of the tokenizer's `target_lang`.
        added, tokenizer: added_tokens.json and tokenizer_config.json.
        rows: of the head; a tokenizer may have added tokens that the head does not know.

    Raises:
        ValueError: a row has no token or a token no row, or it is not said of which language they are.
    """
    if any(isinstance(value, Mapping) for value in vocabulary.values()):
        language = str(tokenizer.get("target_lang"))
        if not isinstance(vocabulary.get(language), Mapping):
            raise ValueError(
                f"vocab.json is of several languages ({', '.join(list(vocabulary)[:5])}), and target_lang={language} "
                "in tokenizer_config.json is none of them"
            )
        vocabulary = vocabulary[language]
    decoder = tokenizer.get("added_tokens_decoder") or {}
    try:
        by_id = {int(number): token for token, number in vocabulary.items()}
        more = {int(number): token for token, number in added.items()}
        more |= {int(number): str(token["content"]) for number, token in decoder.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError("vocab.json, or what its tokenizer adds, gives tokens no numbers") from None
    by_id |= {number: token for number, token in more.items() if number < rows and number not in by_id}
    if sorted(by_id) != list(range(rows)):
        raise ValueError(
            f"vocab.json and what its tokenizer adds name {len(by_id)} tokens, and not one for each of the {rows} rows "
            "of lm_head; take those of this very model"
        )
    return by_id


def read_head(
    config: Config, given: Mapping[str, Any], tokens: Mapping[int, str], beside: Mapping[str, Tensor]
) -> tuple[Config, dict[str, Tensor]]:
    """Our config with objective and vocabulary, and the tensors of the objective.

    Args:
        given: their config.json.
        tokens: of each row of the head.
        beside: what their weights hold beside the encoder.

    Raises:
        ValueError: there is no blank or no boundary between words, or a token is no character.
    """
    blank = given.get("pad_token_id", 0)
    if blank not in tokens:
        raise ValueError(f"pad_token_id={blank} in config.json is no row of lm_head, and the blank is that")
    others = {number: token for number, token in tokens.items() if number != blank}
    delimiter = next((number for number, token in others.items() if token == _BOUNDARY), None)
    symbols = {number: _PRIVATE.get(token, token) for number, token in others.items() if number != delimiter}
    wrong = next((symbol for symbol in symbols.values() if len(symbol) != 1 or symbol.isspace()), None)
    if wrong is not None:
        raise ValueError(f"the token {wrong!r} is no single character, and ctc spells with those")
    if delimiter is None:
        raise ValueError(f"no token is {_BOUNDARY!r}, which stands between words")
    order = [blank, delimiter, *symbols]
    settings = {**defaults_of(OBJECTIVES["ctc"]), "name": "ctc", "freeze_updates": 0}
    if not config["encoder"]["mask_token"]:
        settings["mask_prob"] = 0.0
    head = {f"head.{kind}": beside[f"{_HEAD}.{kind}"][order] for kind in ("weight", "bias")}
    head["updates"] = torch.zeros((), dtype=torch.int64)
    return {**config, "objective": settings, "vocabulary": [_BLANK, _BOUNDARY, *symbols.values()]}, head


def write_head(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, dict[str, int], dict[str, Tensor]]:
    """Further settings of their config.json, vocab.json, and the tensors of the head.

    Raises:
        ValueError: the head reads weighted layers.
    """
    if config["objective"].get("weighted_layers"):
        raise ValueError(
            "objective.weighted_layers=true: a head for CTC in transformers reads the encoder's output alone, and this "
            "one a sum of all layers; write it with --to mmssl"
        )
    private = {character: token for token, character in _PRIVATE.items()}
    tokens = ["<pad>", _BOUNDARY, *(private.get(symbol, symbol) for symbol in config["vocabulary"][2:])]
    head = {f"{_HEAD}.{kind}": tensors[f"head.{kind}"] for kind in ("weight", "bias")}
    settings = {"vocab_size": len(tokens), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return settings, {token: number for number, token in enumerate(tokens)}, head


TOKENIZER = {
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "word_delimiter_token": _BOUNDARY,
    "do_lower_case": False,
}
