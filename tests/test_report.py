"""The page of a run: whole or broken off, self-contained, and safe whatever a file is called."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmssl.build import build_encoder, build_objective
from mmssl.cli import app
from mmssl.data.manifest import write_manifest
from mmssl.report import _confusion, _layerwise, _neighbors, _plot, _spread, read_log, write_report
from mmssl.training.checkpoint import export_encoder
from mmssl.training.log import RunLog
from mmssl.training.pictures import write_sheet

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{clips}}&amp;"
VOID = {"meta", "img"}
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
        write_sheet(folder / "pictures" / f"update_{step}.png", rows)
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
    labels = ["a", "b"] * 10
    told = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(10, 1)
    drawn = _layerwise({-1: told, 0: torch.ones(20, 2), 1: told}, labels)
    assert drawn is not None
    assert "norm, 1.000." in drawn
    # where all are alike, equal votes go to the first class: half of them right
    assert "accuracy layer 0: 0.5<" in drawn
    assert "accuracy layer 1: 1<" in drawn
    assert _layerwise({0: told}, ["a"] * 20) is None
    assert _layerwise({0: told}, [None, *labels[1:]]) is None


def test_a_row_of_the_confusion_is_what_a_clip_is() -> None:
    drawn = _confusion(["a", "a", "b"], ["a", "b", "b"])
    assert "2 of 3 right" in drawn
    assert re.findall(r"<td[^>]*>(\d*)</td>", drawn) == ["1", "1", "", "1"]


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


def test_sound_has_names_alone_and_clips_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    config = CONFIG | {
        "modality": "speech",
        "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4]], "rate": 8000},
        "objective": None,
        "classes": None,
    }
    export_encoder(tmp_path / "run", build_encoder(config), config)
    rows = []
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).standard_normal(2_000) / 10, 8000)
        rows.append({"id": f"clip {i}", "audio": str(tmp_path / f"{i}.wav")})
    (tmp_path / "3.wav").write_bytes(b"no sound")
    write_manifest(tmp_path / "all.jsonl", [*rows, {"id": "broken", "audio": str(tmp_path / "3.wav")}])
    page = Page(write_report(tmp_path / "run", data=tmp_path / "all.jsonl", device="cpu"))
    assert [(clip["name"], clip["label"], clip["picture"]) for clip in page.clips] == [
        (f"clip {i}", None, None) for i in range(3)
    ]
    assert "1 clips" in page.text
    assert "broken" in page.text
    assert "Layers" not in page.text


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


def test_a_browser_shows_a_clip_on_hover_and_its_neighbors_on_click(tuned: Path, clips: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine, and a page is clicked in a real browser only")
    path = write_report(tuned, tmp_path / "page.html", data=clips, device="cpu")
    acts = """
    <script>
    const dot = document.querySelector('.map circle[data-clip="3"]');
    dot.dispatchEvent(new MouseEvent("mousemove", {clientX: 5, clientY: 5}));
    const shown = document.createElement("p");
    shown.id = "shown";
    shown.textContent = JSON.stringify([tip.hidden, tip.textContent]);
    dot.dispatchEvent(new MouseEvent("mouseleave"));
    dot.dispatchEvent(new MouseEvent("click"));
    document.body.append(shown);
    </script>
    </body>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", acts), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    seen = tmp_path / "seen.html"
    seen.write_text(done.stdout, encoding="utf-8")
    page = Page(seen)
    assert json.dumps([False, f"{HOSTILE} · blue"], ensure_ascii=False, separators=(",", ":")) in page.text
    chosen = page.text.partition("click for its nearest neighbors.")[2].partition("Labels")[0]
    assert chosen.startswith(f"{HOSTILE} · blueNearest")
    assert len(re.findall(r"clip \d+ · blue · 0\.\d{3}|clip \d+ · blue · 1\.000", chosen)) == 5
    # in the hint that is hidden again; the clip itself and five neighbors on the side; six to each row of the gallery
    cards = [attributes for tag, attributes in page.tags if attributes.get("class") == "clip"]
    assert len(cards) == 1 + 6 + 12 * 6
    assert sum(attributes.get("class") == "chosen" for tag, attributes in page.tags if tag == "circle") == 1
