"""The head that spells: `lm_head` and vocab.json of a model of theirs for CTC, and our objective `ctc`.

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


def read_head(
    config: Config, given: Mapping[str, Any], vocabulary: Mapping[str, int], beside: Mapping[str, Tensor]
) -> tuple[Config, dict[str, Tensor]]:
    """Our config with objective and vocabulary, and the tensors of the objective.

    Args:
        given: their config.json.
        vocabulary: vocab.json.
        beside: what their weights hold beside the encoder.

    Raises:
        ValueError: there is no blank or no boundary between words, or a token is no character.
    """
    blank, rows = given.get("pad_token_id", 0), beside[f"{_HEAD}.weight"].shape[0]
    by_id = {number: token for token, number in vocabulary.items()}
    delimiter = vocabulary.get(_BOUNDARY)
    if sorted(by_id) != list(range(rows)) or blank not in by_id or delimiter is None:
        raise ValueError(
            f"vocab.json: names {len(by_id)} tokens for the {rows} rows of lm_head, and '|' between words must be one "
            "of them; take the vocab.json of this very model"
        )
    order = [blank, delimiter, *(number for number in by_id if number not in (blank, delimiter))]
    symbols = [_BLANK, _BOUNDARY, *(_PRIVATE.get(by_id[number], by_id[number]) for number in order[2:])]
    wrong = next((symbol for symbol in symbols[1:] if len(symbol) != 1 or symbol.isspace()), None)
    if wrong is not None:
        raise ValueError(f"vocab.json: the token {wrong!r} is no single character, and ctc spells with those")
    settings = {**defaults_of(OBJECTIVES["ctc"]), "name": "ctc", "freeze_updates": 0}
    if not config["encoder"]["mask_token"]:
        settings["mask_prob"] = 0.0
    head = {f"head.{kind}": beside[f"{_HEAD}.{kind}"][order] for kind in ("weight", "bias")}
    return {**config, "objective": settings, "vocabulary": symbols}, head | {
        "updates": torch.zeros((), dtype=torch.int64)
    }


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
