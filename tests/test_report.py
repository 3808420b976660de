"""The page of a run: whole or broken off, self-contained, and safe whatever a file is called."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmssl import thumbnails
from mmssl.assemble import train
from mmssl.build import build_encoder, build_objective
from mmssl.cli import app
from mmssl.clips import Clips
from mmssl.data.manifest import write_manifest
from mmssl.evaluation.layers import over_layers, read_layers
from mmssl.evaluation.score import write_scores
from mmssl.modalities.video.frontend import Tubes
from mmssl.report import _confusion, _layerwise, _neighbors, _numbers, _plot, _spread, read_log, write_report
from mmssl.training.checkpoint import export_encoder
from mmssl.training.log import RunLog
from mmssl.training.pictures import sound_file, write_sheet, write_sounds

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{clips}}&amp;"
VOID = {"meta", "img", "br"}
CONFIG: dict[str, Any] = {
    "format": 1,
    "modality": "image",
    "frontend": {"name": "patches", "size": [4, 4], "channels": 3},
    "positions": {"name": "none"},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {},
    "augment_eval": [],
    "objective": {"name": "classify"},
    "classes": ["blue", "red"],
    "vocabulary": None,
}
PAIRS = """
modality:
  image: {frontend: {name: patches, size: [4, 4]}, positions: {name: sincos}}
  text: {frontend: {name: tokens, context: 12}, positions: {name: learned, grid: [12]}}
tokenizer: {name: byte_bpe, entries: 300}
transformer: {dim: 16, depth: 1, heads: 2}
objective: {name: clip, dim: 8, pool: {image: mean, text: last}}
data: {train: all.jsonl, batch_size: 4}
optimizer: {lr: 0.003}
schedule: {name: constant}
trainer: {steps: 1, device: cpu, threads: 1}
"""


class Page(HTMLParser):
    """Tags with their attributes, the text between them, and whether each that opens is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(one == tag for one, _ in self.tags)

    @property
    def clips(self) -> Any:
        return json.loads(self.scripts[0])


def logged(run: Path, steps: int = 600) -> Path:
    with RunLog(run, steps=1000) as log:
        for step in range(100, steps + 1, 100):
            line = {"step": step, "lr": 0.002, "loss": 100.0 / step, "metrics": {"accuracy": step / 1000}}
            more: dict[str, Any] = {"grad_norm": 2.5, "seconds": step / 10, "clips": step * 64}
            verdict = {"chance_plateau": "accuracy is that of guessing"} if step == 300 else {}
            log.line(line | more | ({"verdict": verdict} if verdict else {}), rate=1.0, left=1.0)
        log.evaluation({"step": steps, "evaluation": {"loss": 0.4321, "accuracy": 0.5}})
        log.note(steps, "the rate was halved")
    (run / "recipe.yaml").write_text("modality: image\ntrainer:\n  steps: 1000\n", encoding="utf-8")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = logged(tmp_path / "runs" / "mine")
    for step in (500, 600):
        rows = {name: torch.rand(2, 3, 8, 8) for name in ("input", "masked", "reconstruction")}
        write_sheet(folder / "pictures" / f"update_{step}", rows)
    bad = {"id": HOSTILE, "path": f"/clips/{HOSTILE}.wav", "reason": "no samples <b>", "epoch": 0, "manifest": "m"}
    (folder / "bad_clips.jsonl").write_text(json.dumps(bad) + "\n{torn", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights and a head that tells two classes."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    encoder = build_encoder(CONFIG)
    export_encoder(folder, encoder, CONFIG, objective=build_objective(CONFIG, encoder))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, red and blue ones in turn, one of them with a name that no page should believe."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        kind = ("red", "blue")[i % 2]
        picture = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        picture[:, :, 0 if kind == "red" else 2] += 180
        path = folder / f"{i}.png"
        Image.fromarray(picture).save(path)
        rows.append({"id": HOSTILE if i == 3 else f"clip {i}", "image": str(path), "label": kind})
    write_manifest(folder / "all.jsonl", rows)
    return folder / "all.jsonl"


def test_a_page_says_what_the_folder_holds(run: Path) -> None:
    page = Page(write_report(run))
    for value in (
        "mine",
        "Not finished: update 600 of 1,000.",
        "No verdict on the last lines",
        "chance_plateau: accuracy is that of guessing",
        "the rate was halved",
        "training 0.1667",
        "evaluation 0.4321",
        "training 0.002",
        "0:01:00",
        "38,400",
        "640.0",
        "after update 600",
        "the rows, from the top: input, masked, reconstruction",
        "1 left out",
        "no samples <b>",
        "steps: 1000",
    ):
        assert value in page.text, value
    # loss, accuracy, rate and gradient, and the two sheets
    assert (page.count("svg"), page.count("img")) == (4, 2)


def test_a_page_fetches_nothing(run: Path, tuned: Path, clips: Path) -> None:
    for path in (write_report(run), write_report(tuned, run / "data.html", data=clips, device="cpu")):
        page = Page(path)
        for tag, attributes in page.tags:
            for name in ("src", "href", "action", "data", "srcset", "poster"):
                assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
            assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", page.source)
        policy = next(a for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
        assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_what_a_file_is_called_stays_text(run: Path, tuned: Path, clips: Path) -> None:
    plain = Page(write_report(run))
    assert HOSTILE in plain.text
    page = Page(write_report(tuned, run / "data.html", data=clips, device="cpu"))
    assert [clip["name"] for clip in page.clips][3] == HOSTILE
    for one in (plain, page):
        assert one.count("script") == 2
        assert not [a for _, a in one.tags if any(name.startswith("on") for name in a)]


def test_a_run_that_broke_off_has_a_page(tmp_path: Path) -> None:
    folder = logged(tmp_path / "torn", steps=200)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 300, "loss": 0.3}\n[1]\n{"step": "x"}\n{"loss": 1}\n{"step": 400, "lo')
    rows, broken = read_log(folder / "log.jsonl")
    assert (rows[-1], broken) == ({"step": 300, "loss": 0.3}, 4)
    page = Page(write_report(folder))
    assert "4 lines of log.jsonl cannot be read." in page.text
    assert "Not finished: update 300 of 1,000." in page.text
    (folder / "recipe.yaml").write_text("{", encoding="utf-8")
    assert "Update 300 is the last in the log." in Page(write_report(folder)).text
    (folder / "log.jsonl").write_bytes(b"\xff\xfe")
    assert "No log." in Page(write_report(folder)).text
    (folder / "log.jsonl").unlink()
    assert "No log." in Page(write_report(folder)).text


def test_a_run_that_is_done_says_so(tmp_path: Path) -> None:
    folder = logged(tmp_path / "done", steps=1000)
    page = Page(write_report(folder, tmp_path / "new" / "page.html"))
    assert "Finished: 1,000 updates." in page.text
    assert not (folder / "report.html").exists()


def test_a_run_that_got_no_better_is_done(tmp_path: Path) -> None:
    folder = logged(tmp_path / "early", steps=600)
    with RunLog(folder, steps=1000, after=600) as log:
        log.write({"step": 600, "note": "the loss was best after update 400", "ended": True})
    page = Page(write_report(folder))
    assert "Finished: after update 600 of 1,000, as evaluations got no better." in page.text
    assert "the loss was best after update 400" in page.text


def test_what_is_no_run_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no log, no recipe and no pictures, so it is no run"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder; give the folder of a run"):
        write_report(tmp_path / "nowhere")


def test_a_verdict_on_the_last_line_stands_on_top(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", steps=1000) as log:
        said = {"dead_codebook": "only 1.2 codewords are in use"}
        log.line({"step": 5, "loss": math.nan, "metrics": {}, "grad_norm": 1.0, "verdict": said}, rate=1.0, left=1.0)
    page = Page(write_report(tmp_path / "run"))
    assert page.text.count("only 1.2 codewords are in use") == 2
    assert "No verdict" not in page.text
    assert "not finite: loss" in page.text
    assert "loss: no finite value" in page.text


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    drawn = _plot("loss", "update", {"training": [(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, 1.0)]})
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 4
    # from the middle of the left edge to the top, as 1 is the least and 2 the most
    assert 'points="62.0,194.0 163.5,16.0"' in drawn


def test_neighbors_are_the_nearest_by_angle_and_never_oneself() -> None:
    scenes = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 3.0], [-1.0, -0.1]])
    found = _neighbors(scenes)
    assert [[place for place, _ in row] for row in found] == [[1, 2, 3], [0, 2, 3], [1, 0, 3], [2, 0, 1]]
    assert found[0][0][1] == round(10 / math.sqrt(101), 4)


def test_a_map_is_turned_to_the_widest_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    # four corners of a rectangle of 6 x 2, turned by 45 degrees: variances 9 and 1
    corners = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
    places, how = _spread(torch.cat([corners @ turn, torch.ones(4, 1)], 1))
    assert torch.allclose(places.abs(), torch.tensor([3.0, 1.0]).double().expand(4, 2), atol=1e-5)
    assert how == "PCA: two axes with 100% of the variance"


def test_umap_makes_the_map_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(fit_transform=lambda scenes: scenes[:, :2] * 2)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda random_state: made))
    places, how = _spread(torch.ones(3, 4))
    assert (places.tolist(), how) == ([[2.0, 2.0]] * 3, "UMAP")


def test_the_plot_of_layers_is_of_folds_that_never_see_their_own_clips() -> None:
    numbers = torch.tensor([0, 1] * 10)
    told, alike = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(10, 1), torch.ones(20, 2)
    drawn = _layerwise({-1: told, 0: alike, 1: told}, {-1: alike, 0: alike, 1: told}, numbers)
    assert "norm, 1.000." in drawn
    # where all are alike, equal votes go to the first class: half of them right
    assert "accuracy layer 0: 0.5<" in drawn
    assert "accuracy layer 1: 1<" in drawn
    assert "random weights layer 0: 0.5<" in drawn
    assert "random weights layer 1: 1<" in drawn
    assert "with random weights (seed 0) has 0.500: what was learned changes that by +0.500" in drawn
    # ten clips of 20 are gained: a deviation of .5130 over the root of 20, times 1.96
    assert "interval over these clips +0.275 to +0.725" in drawn


def test_labels_are_numbered_where_there_are_some_to_tell() -> None:
    labels = ["a", "b"] * 10
    found = _numbers(labels)
    assert found is not None
    assert found.tolist() == [0, 1] * 10
    assert _numbers(["a"] * 20) is None
    assert _numbers([None, *labels[1:]]) is None
    assert _numbers(labels[:8]) is None


def test_labels_in_turn_are_told_by_others_of_the_same() -> None:
    numbers = torch.arange(40) % 10
    told = torch.eye(10)[numbers]
    assert "norm, 1.000." in _layerwise({-1: told, 0: told}, {-1: told, 0: told}, numbers)


def test_an_encoder_of_random_weights_is_no_better_than_itself(tuned: Path, clips: Path, tmp_path: Path) -> None:
    page = Page(write_report(tuned, tmp_path / "page.html", data=clips, device="cpu"))
    # `tuned` has the weights of seed 0 itself
    assert "what was learned changes that by +0.000 (95 % interval over these clips +0.000 to +0.000)" in page.text


def test_a_row_of_the_confusion_is_what_a_clip_is() -> None:
    drawn = _confusion(["a", "a", "b"], ["a", "b", "b"])
    assert "2 of 3 right" in drawn
    assert re.findall(r"<td[^>]*>(\d*)</td>", drawn) == ["1", "1", "", "1"]


def test_only_what_is_said_of_a_class_is_drawn_and_of_many_classes_the_commonest_confusions() -> None:
    assert _confusion(["a", "a", "b"], ["a", "b", "b"]).count("style=") == 3
    names = [f"class {i}" for i in range(1000)]
    drawn = _confusion([*names, "class 7", "class 7"], [*names[:7], "class 8", *names[8:], "class 8", "class 7"])
    assert "1000 of 1002 right. Of 1000 classes, the 1 most frequent confusions of 1." in drawn
    assert "<td>class 7</td><td>class 8</td><td>2 of 3</td>" in drawn
    assert len(drawn) < 1000


def test_a_page_has_the_layers_that_an_evaluation_has_kept_and_says_how_to_ask_for_them(run: Path) -> None:
    page = Page(write_report(run))
    assert f"mmssl evaluate {run} --task layers --test MANIFEST" in page.text
    assert page.text.count("Layer-wise analysis") == 1
    values = {0: (0.5, 0.25, 0.75), 1: (1.0, 1.0, 1.0), -1: (0.0, 0.0, 0.25)}
    score = over_layers("input", "CCA with <pixels>", values, 40, "told <by> hand", percent=False)
    write_scores(run / "layers_image.json", {"input": score})
    page = Page(write_report(run))
    assert "--task layers --test" not in page.text
    assert not re.search("https?://", page.source)
    assert re.search(r"CCA with <pixels>\s*1\.000\s*1\.000 to 1\.000\s*1\s*told <by> hand", page.text)
    # three columns of 580 / 3 from 44, the output last; 0 is at 316 and 1 at 34 from the top
    colored = [a for tag, a in page.tags if tag == "circle" and a["r"] == "3"]
    spots = [(a["cx"], a["cy"]) for a in colored]
    assert spots == [("140.7", "175.0"), ("334.0", "34.0"), ("527.3", "316.0")]
    lines = [a["points"] for tag, a in page.tags if tag == "polyline"]
    assert lines[-1] == "140.7,175.0 334.0,34.0"  # the output is no block's and not joined to them
    spans = [(a["x1"], a["y1"], a["y2"]) for tag, a in page.tags if tag == "line" and a["stroke"] != "#ddd"]
    assert spans == [("140.7", "245.5", "104.5"), ("334.0", "34.0", "34.0"), ("527.3", "316.0", "245.5")]


@pytest.mark.parametrize(
    "held", ["", "[]", "{}", '{"input": 3}', '{"input": {"task": "layers"}}', "torn", "text instead of a value"]
)
def test_a_file_of_layers_that_cannot_be_read_leaves_the_rest(run: Path, held: str) -> None:
    score = over_layers("input", "CCA", {0: (0.5, 0.25, 0.75)}, 40, "by hand", percent=False)
    write_scores(run / "layers_image.json", {"input": score})
    whole = (run / "layers_image.json").read_text()
    held = {"torn": whole[:-20], "text instead of a value": whole.replace('"low": 0.25', '"low": "0.25"')}.get(
        held, held
    )
    (run / "layers_image.json").write_text(held)
    page = Page(write_report(run))
    assert "layers_image.json: holds no scores of layers; let mmssl evaluate --task layers write it again" in page.text
    assert "evaluation 0.4321" in page.text


def test_each_encoder_of_a_run_on_pairs_has_layers_of_its_own(run: Path) -> None:
    (run / "recipe.yaml").write_text(PAIRS, encoding="utf-8")
    score = over_layers("labels", "CCA", {0: (0.5, 0.25, 0.75)}, 40, "of pictures", percent=False)
    write_scores(run / "layers_image.json", {"labels": score})
    page = Page(write_report(run))
    assert "of pictures" in page.text.partition("Layer-wise analysis (image)")[2].partition("Layer-wise")[0]
    assert f"mmssl evaluate {run} --task layers --modality text --test MANIFEST" in page.text


def test_a_command_keeps_what_layers_hold_in_a_run_and_of_a_baseline_nothing(
    tuned: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a run"
    shutil.copytree(tuned, folder)
    (folder / "recipe.yaml").write_text("modality: image\nobjective: {name: classify}\n", encoding="utf-8")

    def ask(*more: str) -> None:
        with pytest.raises(SystemExit) as ended:
            app(["evaluate", str(folder), "--task", "layers", "--test", str(clips), "--device", "cpu", *more])
        assert ended.value.code == 0

    ask("--out", str(tmp_path / "out.json"))
    assert (folder / "layers_image.json").read_text() == (tmp_path / "out.json").read_text()
    page = Page(write_report(folder))
    for measure in ("input", "labels", "information"):
        assert f"{measure}, layer 2: " in page.text
    # a path with a space, as a shell takes it
    assert f"mmssl report '{folder}' --data MANIFEST" in page.text
    assert "Of other weights" not in page.text
    weights = folder / "encoder.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # the run went on
    page = Page(write_report(folder))
    assert "Of other weights than the run holds now" in page.text
    assert f"mmssl evaluate '{folder}' --task layers --test MANIFEST measures those." in page.text
    assert "input, layer 2: " in page.text
    weights.write_bytes(before)
    os.utime(folder / "layers_image.json", (0, 0))  # copied in another order
    assert "Of other weights" not in Page(write_report(folder)).text
    (folder / "layers_image.json").unlink()
    scores = read_layers(tmp_path / "out.json")
    monkeypatch.setattr("mmssl.tasks.evaluate.evaluate", lambda *args, **settings: scores)
    ask("--baseline", "random")
    assert not (folder / "layers_image.json").exists()
    (folder / "layers_image.json").mkdir()
    capsys.readouterr()
    ask()
    assert capsys.readouterr().err == (
        f"mmssl: {folder / 'layers_image.json'}: Is a directory; the page of the run goes without it\n"
    )


def test_what_a_run_of_classes_confuses_takes_clips_with_labels(run: Path, tuned: Path, clips: Path) -> None:
    shutil.copytree(tuned, run, dirs_exist_ok=True)
    told = f"mmssl report {run} --data MANIFEST"
    for objective, said in (("{name: classify}", True), ("{name: classify, multi_label: true}", False), ("{}", False)):
        (run / "recipe.yaml").write_text(f"modality: image\nobjective: {objective}\n", encoding="utf-8")
        assert (told in Page(write_report(run)).text) == said
    (run / "recipe.yaml").write_text("objective: {name: classify}\n", encoding="utf-8")
    page = Page(write_report(run, data=clips, device="cpu"))
    assert told not in page.text
    assert page.text.count("Confusion") == 1


def test_clips_that_cannot_be_read_leave_the_rest_of_the_page(run: Path, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, run, dirs_exist_ok=True)
    (tmp_path / "0.png").write_bytes(b"no picture")
    write_manifest(tmp_path / "bad.jsonl", [{"id": "broken", "image": str(tmp_path / "0.png")}])
    page = Page(write_report(run, data=tmp_path / "bad.jsonl", device="cpu"))
    assert "evaluation 0.4321" in page.text
    assert "Embeddings" in page.text
    assert "the first is broken (not a picture that Pillow can read)" in page.text


def test_clips_have_a_map_neighbors_layers_and_confusion(tuned: Path, clips: Path, tmp_path: Path) -> None:
    page = Page(write_report(tuned, tmp_path / "page.html", data=clips, device="cpu"))
    for heading in ("Embedding map", "Nearest neighbors", "Layers", "Confusion"):
        assert heading in page.text
    dots = [attributes for tag, attributes in page.tags if tag == "circle" and "data-clip" in attributes]
    assert [dot["data-clip"] for dot in dots] == [str(i) for i in range(12)]
    assert len({dot["fill"] for dot in dots}) == 2
    for i, clip in enumerate(page.clips):
        assert clip["label"] == ("red", "blue")[i % 2]
        # colors are told apart without any training, so the five others of the same are the nearest
        assert {page.clips[j]["label"] for j, _ in clip["near"]} == {clip["label"]}
        assert clip["picture"].startswith("data:image/jpeg;base64,")
    assert re.search(r"\d+ of 12 right", page.text)


def sounds(folder: Path, seconds: float = 1.0) -> tuple[Path, Path]:
    """A run of speech with random weights, and a manifest of three tones and a file that is none."""
    config = CONFIG | {
        "modality": "speech",
        "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4]], "rate": 8000},
        "objective": None,
        "classes": None,
    }
    export_encoder(folder / "run", build_encoder(config), config)
    rows = []
    for i in range(3):
        tone = np.sin(2 * np.pi * 500 * (i + 1) * np.arange(round(8000 * seconds)) / 8000)
        soundfile.write(folder / f"{i}.wav", 0.5 * tone, 8000)
        rows.append({"id": f"clip {i}", "audio": str(folder / f"{i}.wav")})
    (folder / "3.wav").write_bytes(b"no sound")
    write_manifest(folder / "all.jsonl", [*rows, {"id": "broken", "audio": str(folder / "3.wav")}])
    return folder / "run", folder / "all.jsonl"


def content(url: str, kind: str) -> io.BytesIO:
    head, _, text = url.partition(",")
    assert head == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(text))


def test_sound_can_be_seen_and_heard_and_clips_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run, manifest = sounds(tmp_path, seconds=6.0)
    page = Page(write_report(run, data=manifest, device="cpu"))
    assert [(clip["name"], clip["label"], clip["text"]) for clip in page.clips] == [
        (f"clip {i}", None, None) for i in range(3)
    ]
    pitches = []
    for i, clip in enumerate(page.clips):
        wave, rate = soundfile.read(content(clip["sound"], "audio/mpeg"))
        assert 5.0 <= len(wave) / rate < 5.2  # of 6 s; MP3 goes on to the end of a block
        assert np.abs(np.fft.rfft(wave[8000:16000])).argmax() == 500 * (i + 1)
        with Image.open(content(clip["picture"], "image/jpeg")) as image:
            pitches.append(int(np.asarray(image.convert("L")).mean(1).argmax()))
            assert (image.width, image.height) == (64, 48)
    assert pitches == sorted(pitches, reverse=True)  # higher tones stand higher
    assert "Click to hear a clip, its first 5 s at most." in page.text
    assert "1 clips" in page.text
    assert "broken" in page.text
    assert "Layers" not in page.text


def test_sound_has_room_up_to_a_size_and_those_in_the_gallery_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, manifest = sounds(tmp_path)
    each = [len(sound_file(torch.from_numpy(soundfile.read(tmp_path / f"{i}.wav")[0]), 8000)) for i in range(3)]
    monkeypatch.setattr(thumbnails, "MOST_BYTES", each[0] + each[2])
    monkeypatch.setattr("mmssl.report.GALLERY", 2)  # the first and the last
    monkeypatch.setattr("mmssl.report.NEIGHBORS", 0)
    page = Page(write_report(run, data=manifest, device="cpu"))
    assert [clip["sound"] is not None for clip in page.clips] == [True, False, True]
    assert all(clip["picture"] for clip in page.clips)
    assert "2 of them can be heard: there is room for" in page.text


def test_clips_of_video_move(tmp_path: Path) -> None:
    frontend = Tubes(dim=4, size=(2, 4, 4), rate=8, channels=1, mean=[0.5], std=[0.5])
    clips = Clips("video", frontend, lambda path: (torch.empty(0), None))
    dark = torch.zeros(1, 4, 8, 8)
    dark[:, 2:] = 1
    clips.add(("one", lambda: (dark, None)))
    [one] = thumbnails.thumbnails(clips)
    assert one.picture is not None
    with Image.open(content(one.picture, "image/webp")) as image:
        frames = []
        for frame in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(frame)
            image.load()
            frames.append((int(np.asarray(image.convert("L")).mean()), image.info["duration"]))
    # as WebP has it, frames that are the same are one that lasts
    assert frames == [(0, 250), (255, 250)]


def test_a_run_on_pairs_has_a_map_of_each_or_of_the_one_asked_for(tmp_path: Path) -> None:
    captioned, paired = tmp_path / "all.jsonl", tmp_path / "run"
    rows = []
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"id": f"row {i}", "image": str(tmp_path / f"{i}.png"), "text": f"number {i}"})
    write_manifest(captioned, rows)
    (tmp_path / "toy.yaml").write_text(PAIRS, encoding="utf-8")
    train(tmp_path / "toy.yaml", paired, [f"data.train={captioned}"])
    page = Page(write_report(paired, tmp_path / "both.html", data=captioned, device="cpu"))
    assert "Embedding map (image)" in page.text
    assert "Embedding map (text)" in page.text
    assert len(page.clips) == 8
    for i, clip in enumerate(page.clips):
        # neighbors are of the same modality; a caption is read, and a picture seen
        assert all((j < 4) == (i < 4) for j, _ in clip["near"])
        assert (clip["picture"] is not None, clip["text"]) == ((True, None) if i < 4 else (False, f"number {i - 4}"))
    dots = [int(a["data-clip"] or "") for tag, a in page.tags if tag == "circle" and "data-clip" in a]
    assert sorted(dots) == list(range(8))
    # without pairs, each row is shown as what it has
    alone = [{key: row[key] for key in ("id", ("image", "text")[i % 2])} for i, row in enumerate(rows)]
    write_manifest(tmp_path / "alone.jsonl", alone)
    page = Page(write_report(paired, tmp_path / "alone.html", data=tmp_path / "alone.jsonl", device="cpu"))
    assert [clip["name"] for clip in page.clips] == ["row 0", "row 2", "row 1", "row 3"]
    write_manifest(tmp_path / "alone.jsonl", alone[::2])
    page = Page(write_report(paired, tmp_path / "alone.html", data=tmp_path / "alone.jsonl", device="cpu"))
    assert "Embedding map (image)" in page.text
    assert "Embedding map (text)" not in page.text
    page = Page(write_report(paired, tmp_path / "alone.html", data=tmp_path / "alone.jsonl", modality="text"))
    assert "has what text reads." in page.text
    one = Page(write_report(paired, tmp_path / "one.html", data=captioned, modality="text", device="cpu"))
    assert [clip["text"] for clip in one.clips] == [f"number {i}" for i in range(4)]
    with pytest.raises(ValueError, match="modality='sound': .* has an encoder of image and text"):
        write_report(paired, tmp_path / "none.html", data=captioned, modality="sound", device="cpu")


def test_the_last_sheet_can_be_heard_and_earlier_ones_have_room_up_to_a_size(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wave = torch.rand(1, 4000)
    for step in (500, 600):
        write_sounds(run / "pictures" / f"update_{step}", {"input": wave, "reconstruction": wave}, rate=8000)
    page = Page(write_report(run))
    assert (page.count("img"), page.count("audio")) == (2, 2)
    assert re.search(r"1\s*input\s*reconstruction", page.text)
    monkeypatch.setattr("mmssl.report.MOST_SHEET_BYTES", 1)
    assert Page(write_report(run)).count("img") == 1


def test_without_an_encoder_the_rest_is_shown(run: Path, clips: Path) -> None:
    page = Page(write_report(run, data=clips))
    assert "No encoder to embed with" in page.text
    assert "evaluation 0.4321" in page.text


def test_the_command_names_the_file_and_says_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["report", str(run)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    with pytest.raises(SystemExit) as ended:
        app(["report", str(run / "nowhere")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"mmssl: {run / 'nowhere'}: no such folder")


def in_a_browser(path: Path, acts: str) -> Any:
    """What a script at the end of a page says, after it has clicked on it: the JSON that it gives `tell`.

    Skips where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine, and a page is clicked in a real browser only")
    script = f"""
    <script>
    function tell(what) {{
      const told = document.createElement("p");
      told.id = "told";
      told.textContent = JSON.stringify(what);
      document.body.append(told);
    }}
    {acts}
    </script>
    </body>"""
    seen = path.with_name("clicked.html")
    seen.write_text(path.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    profile = path.with_name("profile")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run([browser, *options, seen.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(done.stdout.partition('<p id="told">')[2].partition("</p>")[0]))


def test_a_browser_shows_a_clip_on_hover_and_its_neighbors_on_click(tuned: Path, clips: Path, tmp_path: Path) -> None:
    path = write_report(tuned, tmp_path / "page.html", data=clips, device="cpu")
    found = in_a_browser(
        path,
        """
        const dot = document.querySelector('.map circle[data-clip="3"]');
        dot.dispatchEvent(new MouseEvent("mousemove", {clientX: 5, clientY: 5}));
        const hint = [tip.hidden, tip.textContent];
        dot.dispatchEvent(new MouseEvent("mouseleave"));
        dot.dispatchEvent(new MouseEvent("click"));
        tell({
          hint: hint,
          hidden: tip.hidden,
          chosen: document.querySelector(".shown").textContent,
          near: [...document.querySelectorAll(".near .clip")].map((box) => box.textContent),
          gallery: document.querySelectorAll(".gallery .clip").length,
          dots: [...document.querySelectorAll("circle.chosen")].map((one) => one.dataset.clip),
          seen: [...document.querySelectorAll(".clip img")].every((one) => one.src.startsWith("data:image/jpeg")),
        });
        """,
    )
    assert found["hint"] == [False, f"{HOSTILE} · blue"]
    assert found["hidden"]
    assert found["chosen"] == f"{HOSTILE} · blue"
    assert len(found["near"]) == 5
    assert all(re.fullmatch(r"clip \d+ · blue · (0\.\d{3}|1\.000)", words) for words in found["near"])
    assert (found["gallery"], found["dots"], found["seen"]) == (12 * 6, ["3"], True)


def test_a_browser_plays_a_clip_on_click_and_goes_on_from_its_neighbors(tmp_path: Path) -> None:
    run, manifest = sounds(tmp_path)
    path = write_report(run, data=manifest, device="cpu")
    found = in_a_browser(
        path,
        """
        let asked = 0;
        const play = player.play.bind(player);
        player.play = () => { asked += 1; return play(); };
        document.querySelector('.map circle[data-clip="0"]').dispatchEvent(new MouseEvent("click"));
        const first = [player.src === clips[0].sound, asked];
        document.querySelector(".near .clip").click();
        const next = clips[0].near[0][0];
        tell({
          first: first,
          then: [player.src === clips[next].sound, asked],
          chosen: document.querySelector(".shown").textContent === "\u25b6 " + clips[next].name,
          dots: [...document.querySelectorAll("circle.chosen")].map((one) => Number(one.dataset.clip) === next),
          known: new Audio().canPlayType("audio/mpeg") !== "",
        });
        """,
    )
    assert found == {"first": [True, 1], "then": [True, 2], "chosen": True, "dots": [True], "known": True}


def test_the_script_of_the_page_can_be_parsed(tuned: Path, clips: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine, which parses the script")
    page = Page(write_report(tuned, tmp_path / "page.html", data=clips, device="cpu"))
    (tmp_path / "page.js").write_text(page.scripts[1], encoding="utf-8")
    subprocess.run([node, "--check", tmp_path / "page.js"], check=True, timeout=60)
