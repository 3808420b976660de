"""The table of what goes with what; that it agrees with what is trained is a contract test."""

from pathlib import Path

import pytest

from mmssl import build, matrix
from mmssl.cli import app
from mmssl.modalities import MODALITIES
from mmssl.objectives import OBJECTIVES, SEVERAL

README = (Path(__file__).parents[1] / "recipes" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_recipes_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    app(["recipes", "--matrix"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert README.partition("<!-- matrix -->\n")[2].partition("<!-- end of the matrix -->")[0] == printed


def test_every_objective_is_a_row_and_every_frontend_a_column() -> None:
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in matrix.table().split("\n\n")[0].splitlines()
    ]
    assert [row[0] for row in rows] == [name for name in OBJECTIVES if name not in SEVERAL]
    assert header[1:] == [f"{name}/{frontend}" for name in MODALITIES for frontend in MODALITIES[name].frontends]
    assert all(len(row) == len(header) for row in rows)


def test_a_cell_has_the_sizes_of_its_recipes_or_the_number_of_a_sentence() -> None:
    rows, _, notes = matrix.table().partition("\n\n")
    wav2vec2, ctc = (
        next(line for line in rows.splitlines() if line.startswith(f"| {name} ")) for name in ("wav2vec2", "ctc")
    )
    assert [cell.strip() for cell in wav2vec2.split("|")[2:5]] == ["yes: base", "yes: small", "yes"]
    pictures = matrix.SOURCES.index("image/patches")
    number = ctc.split("|")[2 + pictures].strip().removeprefix("no (").removesuffix(")")
    assert f"{number}. CTC spells along time, but the tokens of Patches" in notes


def test_the_sentence_is_that_of_who_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("objective.codes=3: odd")

    monkeypatch.setitem(build.OBJECTIVES, "best_rq", refuse)
    assert matrix.refusal("best_rq", "speech/logmel") == "objective.codes=3: odd"
