"""What stands on an encoder of transformers: heads that spell go both ways, others are left out and named.

Those that tell classes: see `test_classes`.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from theirs import LARGE, LAYOUTS_OF, PREPROCESSORS, SPEECH, TRUNK, clips_of, write_json

import mmssl
from mmssl.convert.folder import convert, open_encoder

transformers = pytest.importorskip("transformers")


def test_a_head_that_spells_goes_both_ways(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(**SPEECH, **LARGE, pad_token_id=3)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    model.lm_head.weight.data *= 20  # so that it spells more than one character
    model.save_pretrained(tmp_path / "theirs")
    vocabulary = {"<s>": 0, "b": 1, "|": 2, "<pad>": 3, "a": 4, "<unk>": 5}
    write_json(tmp_path / "theirs" / "vocab.json", vocabulary)
    write_json(tmp_path / "theirs" / "preprocessor_config.json", PREPROCESSORS["speech"])
    clips = clips_of("wav2vec2 large")
    embedder = mmssl.load(tmp_path / "theirs", device="cpu")
    # blank and boundary first, the others in their order; tokens of several characters as private ones
    order = [3, 2, 0, 1, 4, 5]
    assert embedder.config["vocabulary"] == ["<blank>", "|", "\ue000", "b", "a", "\ue002"]
    head = open_encoder(tmp_path / "theirs").objective
    assert torch.equal(head["head.weight"], model.lm_head.weight[order])
    said = embedder.predict(clips)
    convert(tmp_path / "theirs", tmp_path / "back")
    back = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "back").eval()
    names = {number: token for token, number in json.loads((tmp_path / "back" / "vocab.json").read_text()).items()}
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    for clip, text in zip(clips, said, strict=True):
        given = extract(clip, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            before, after = model(given).logits[0], back(given).logits[0]
        assert torch.allclose(after, before[:, order], atol=1e-5)
        assert [names[i] for i in range(6)] == ["<pad>", "|", "<s>", "b", "a", "<unk>"]
        best = torch.unique_consecutive(before.argmax(-1)).tolist()
        spelled = "".join({0: "\ue000", 1: "b", 2: " ", 3: "", 4: "a", 5: "\ue002"}[i] for i in best)
        assert text == " ".join(spelled.split())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["pad_token_id"] == 0


def test_a_head_on_weighted_layers_stays_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SPEECH)).save_pretrained(tmp_path / "theirs")
    write_json(tmp_path / "theirs" / "vocab.json", {"<pad>": 0, "|": 1, "<s>": 2, "</s>": 3, "<unk>": 4, "a": 5})
    convert(tmp_path / "theirs", tmp_path / "ours", to="mmssl")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["objective"]["weighted_layers"] = True
    write_json(tmp_path / "ours" / "config.json", config)
    with pytest.raises(ValueError, match="reads the encoder's output alone, and this one a sum of all layers"):
        convert(tmp_path / "ours", tmp_path / "back")


def spelling(folder: Path, rows: int = 6) -> Any:
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**{**SPEECH, "vocab_size": rows}))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("left", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_a_tokenizer_has_added_are_rows_of_the_head(left: str, tmp_path: Path) -> None:
    write_json(tmp_path / "letters.json", {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "c": 5})
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "letters.json"))
    tokenizer.save_pretrained(tmp_path / "both")
    write_json(tmp_path / "both" / "added_tokens.json", tokenizer.get_added_vocab())  # as older versions did
    for name in ("vocab.json", left):
        write_json(tmp_path / name, json.loads((tmp_path / "both" / name).read_text()))
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == 6
    model, found = spelling(tmp_path, rows=8), open_encoder(tmp_path)
    ours = {"<pad>": "<blank>", "<s>": "\ue000", "</s>": "\ue001", "<unk>": "\ue002"}
    rows = {ours.get(token, token): number for token, number in tokenizer.get_vocab().items()}
    assert sorted(found.config["vocabulary"]) == sorted(rows)
    order = [rows[symbol] for symbol in found.config["vocabulary"]]
    assert torch.equal(found.objective["head.weight"], model.lm_head.weight[order])
    # they are no rows of a head that was made before they were added
    spelling(tmp_path)
    assert set(open_encoder(tmp_path).config["vocabulary"]) == {"<blank>", "|", "a", "b", "c", "\ue002"}


def test_of_several_languages_the_head_spells_that_of_its_tokenizer(tmp_path: Path) -> None:
    spelling(tmp_path)
    first = {"<pad>": 0, "|": 1, "<s>": 2, "</s>": 3, "<unk>": 4}
    write_json(tmp_path / "vocab.json", {"deu": {**first, "z": 5}, "eng": {**first, "a": 5}})
    write_json(tmp_path / "tokenizer_config.json", {"target_lang": "eng"})
    assert open_encoder(tmp_path).config["vocabulary"] == ["<blank>", "|", "\ue000", "\ue001", "\ue002", "a"]


@pytest.mark.parametrize(
    ("vocabulary", "blank", "words"),
    [
        ({"<pad>": 0, "|": 1, "<s>": 2, "</s>": 3, "<unk>": 4, "ng": 5}, 0, "the token 'ng' is no single character"),
        ({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "n": 4, "aɪ": 5}, 0, "the token 'aɪ' is no single character"),
        ({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "n": 4, "a": 5}, 0, "no token is '|'"),
        ({"<pad>": 0, "|": 1}, 0, "name 2 tokens, and not one for each of the 6 rows of lm_head"),
        ({"<pad>": 0, "|": 1, "<s>": 2, "</s>": 3, "<unk>": 4, "a": 5}, None, "pad_token_id=None in config.json is no"),
        ({"eng": {"<pad>": 0, "|": 1}, "deu": {}}, 0, r"of several languages \(eng, deu\), and target_lang=None"),
        ({"<pad>": "zero"}, 0, "gives tokens no numbers"),
    ],
)
def test_a_head_that_cannot_be_spelled_is_left_out_and_it_is_said_why(
    vocabulary: dict[str, Any], blank: int | None, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spelling(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "pad_token_id": blank})
    write_json(tmp_path / "vocab.json", vocabulary)
    write_json(tmp_path / "preprocessor_config.json", PREPROCESSORS["speech"])
    embedder = mmssl.load(tmp_path, device="cpu")
    [said] = caplog.messages
    assert re.search(f"the encoder alone is read; 2 tensors beside it are left out: lm_head, for .*{words}", said)
    assert embedder.embed(clips_of("wav2vec2 base")).scene.shape == (2, 24)
    with pytest.raises(ValueError, match=f"its head was left out when it was read \\(lm_head, for .*{words}"):
        embedder.predict(clips_of("wav2vec2 base"))


UNREAD = ", for there is no tokenizer.json to read captions with"
HEADS = [
    ("wav2vec2 base", "Wav2Vec2ForCTC", "lm_head"),
    ("hubert large", "HubertForCTC", "lm_head"),
    ("data2vec audio", "Data2VecAudioForCTC", "lm_head"),
    ("vit_mae", "ViTMAEForPreTraining", "decoder"),
    ("dinov2", "Dinov2ForImageClassification", "classifier"),
    ("videomae", "VideoMAEForPreTraining", "decoder, encoder_to_decoder, mask_token"),
    ("clip", "CLIPModel", f"logit_scale, text_model, text_projection, visual_projection{UNREAD}"),
    ("siglip", "SiglipModel", f"logit_bias, logit_scale, text_model{UNREAD}"),
]


@pytest.mark.parametrize(("name", "kind", "beside"), HEADS, ids=[kind for _, kind, _ in HEADS])
def test_the_encoder_of_a_model_with_a_head_is_the_same(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str, beside: str
) -> None:
    body, folder = saved(name)
    theirs = getattr(transformers, kind)
    config = body.config
    if kind in ("CLIPModel", "SiglipModel"):
        text = {**TRUNK, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = theirs.config_class(vision_config=config.to_dict(), text_config=text, projection_dim=8)
    model = theirs(config)
    inner = model.vision_model if "vision_model" in dict(model.named_children()) else model.base_model
    assert not inner.load_state_dict(body.state_dict(), strict=False).missing_keys
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", PREPROCESSORS[LAYOUTS_OF[name].modality])
    with caplog.at_level(logging.WARNING):
        found = open_encoder(tmp_path)
    expected = open_encoder(folder)
    assert found.config == expected.config
    assert found.encoder.keys() == expected.encoder.keys()
    assert all(torch.equal(tensor, expected.encoder[key]) for key, tensor in found.encoder.items())
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("mmssl")][:1]
    assert f"left out: {beside}" in said
    head = next((part for part in beside.split(", ") if part in ("lm_head", "classifier")), None)
    told = "was pretrained and not" if head is None else f"its head was left out when it was read \\({head}[,)]"
    with pytest.raises(ValueError, match=told):
        mmssl.load(tmp_path, device="cpu").predict(clips_of(name))
