"""Recipes: what YAML means here, and what is said about every kind of mistake."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from mmssl.recipe import Recipe, RecipeError, header, leaves, load, parse


class Part:
    """Stands for a constructor: what may stand in its section is its signature."""

    def __init__(
        self,
        x: Any,
        *,
        dim: int,
        rate: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.95),
        flag: bool = False,
        norm: Literal["pre", "post"] = "pre",
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        pass


def part(text: str) -> dict[str, Any]:
    return parse(f"model: {text}", source="a.yaml").settings("model", Part, given=("x",))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-5E4", -50000.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("~", None),
        ("", None),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = parse(f"key: {text}", source="a.yaml").values["key"]
    assert read == value
    assert type(read) is type(value)


def test_what_is_dumped_reads_back_the_same() -> None:
    text = "{a: 1.0e-3, b: 'on', c: '1e-3', d: [[512, 10, 5], [512, 3, 2]], e: [{name: x, p: .5}], f: null, g: .inf}"
    recipe = parse(f"model: {text}", source="a.yaml")
    assert parse(recipe.dump(), source="b.yaml").values == recipe.values


def test_defaults_are_filled_in_as_plain_values() -> None:
    settings = part("{dim: 3, rate: 1}")
    assert settings == {"dim": 3, "rate": 1, "betas": [0.9, 0.95], "flag": False, "norm": "pre", "sizes": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{dmi: 3}",
            "a.yaml:1: unknown key 'model.dmi'. Did you mean 'model.dim'? "
            "Keys here: dim, rate, betas, flag, norm, sizes.",
        ),
        ("{dim: 3, x: 1}", "a.yaml:1: unknown key 'model.x'. Keys here: dim, rate, betas, flag, norm, sizes."),
        ("{rate: 0.1}", "a.yaml:1: 'model.dim' is missing; write it here, or on the command line as model.dim=VALUE"),
        ("{dim: '3'}", "a.yaml:1: model.dim: input should be a valid integer (got '3')"),
        ("{dim: true}", "a.yaml:1: model.dim: input should be a valid integer (got True)"),
        (
            "{dim: 3, flag: yes}",
            "a.yaml:1: model.flag: input should be a valid boolean: write true or false (got 'yes')",
        ),
        ("{dim: 3, norm: mid}", "a.yaml:1: model.norm: input should be 'pre' or 'post' (got 'mid')"),
        ("{dim: 3, sizes: [[1], [a]]}", "a.yaml:1: model.sizes[1][0]: input should be a valid integer (got 'a')"),
        ("{dim: 3, betas: [1]}", "a.yaml:1: model.betas[1]: field required (got [1])"),
        ("3", "a.yaml:1: 'model' should be a mapping of settings (got 3)"),
    ],
)
def test_a_wrong_setting_is_named_with_place_value_and_rule(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        part(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  lr: 1\n  c: 2\n  lr: 3", "a.yaml:5: key 'lr' given twice (first at line 3)"),
        ("a: [1, 2\nb: 3", "a.yaml:2: this is not YAML"),
        ("a: !!python/name:os.system x", "a.yaml:1: the tag"),
        ("1: x", "a.yaml:1: a key is text (got '1')"),
        ("a: &me [*me]", "a.yaml:1: this alias holds itself"),
        ("- a", "a.yaml: a recipe is a mapping of sections"),
        ("", "a.yaml: a recipe is a mapping of sections"),
        ("a: \x00", "a.yaml: this is not YAML"),
    ],
)
def test_broken_files_say_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, source="a.yaml")
    assert str(caught.value).startswith(message)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.yaml"
    path.write_text("# Title\ntransformer:\n  dim: 64\naugment: {train: [{name: flip, p: 0.5}]}\n")
    return path


def test_overrides_are_yaml_and_reach_into_lists_and_missing_sections(page: Path) -> None:
    recipe = load(page, ["transformer.dim=3", "augment.train.0.p=1e-1", "trainer.steps=2", "init=runs/a", "data="])
    assert recipe.get("transformer.dim") == 3
    assert recipe.get("augment.train.0.p") == 0.1
    assert recipe.get("trainer") == {"steps": 2}
    assert recipe.get("init") == "runs/a"
    assert recipe.get("data") is None
    assert load(page).get("transformer.dim") == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "transformer.dmi=3",
            "command line 'transformer.dmi=3': unknown key 'transformer.dmi'. Did you mean 'transformer.d",
        ),
        ("transformr.dim=3", "command line 'transformr.dim=3': unknown key 'transformr'. Did you mean 'transformer'?"),
        ("transformer.dim=x", "command line 'transformer.dim=x': transformer.dim: input should be a valid integer"),
        ("transformer.dim.x=1", "command line 'transformer.dim.x=1': 'transformer.dim' is 64, which has no settings"),
        ("augment.train.3.p=1", "command line 'augment.train.3.p=1': 'augment.train.3': this is a list of 1"),
        ("transformer.dim", "command line 'transformer.dim': an override looks like trainer.steps=2000"),
        ("data.train=my #1/a.jsonl", "command line 'data.train=my #1/a.jsonl': what stands behind ' #' would be a"),
        ("transformer.dim=[1", "command line 'transformer.dim=[1': the value is not YAML"),
    ],
)
def test_a_wrong_override_is_quoted(page: Path, override: str, message: str) -> None:
    def transformer(*, dim: int, depth: int = 2) -> None: ...

    with pytest.raises(RecipeError) as caught:
        load(page, [override]).settings("transformer", transformer)
    assert str(caught.value).startswith(message)


def test_places_follow_the_file_and_then_the_command_line(page: Path) -> None:
    recipe = load(page, ["augment.train.0.p=1"])
    assert recipe.place("transformer.dim") == f"{page}:3"
    assert recipe.place("transformer.heads") == f"{page}:2"
    assert recipe.place("augment.train.0.p") == "command line 'augment.train.0.p=1'"
    assert recipe.place("nowhere.at.all") == str(page)


def test_choices_come_from_a_literal_table() -> None:
    recipe = parse("objective: {name: mea}", source="a.yaml")
    with pytest.raises(RecipeError, match=r"a.yaml:1: unknown objective.name 'mea'. Did you mean 'mae'\? Known: mae"):
        recipe.choice("objective.name", {"mae": 1, "ctc": 2})
    with pytest.raises(RecipeError, match="'frontend.name' is missing; one of: mae"):
        recipe.choice("frontend.name", {"mae": 1})


def test_an_argument_may_be_a_name_in_a_table() -> None:
    tables = {"x": {"pixels": object(), "log_mel": object()}}
    settings = parse("model: {dim: 3, x: pixels}", source="a.yaml").settings("model", Part, named=tables)
    assert settings["x"] == "pixels"
    with pytest.raises(RecipeError, match="a.yaml:1: unknown model.x 'pixel'. Did you mean 'pixels'"):
        parse("model: {dim: 3, x: pixel}", source="a.yaml").settings("model", Part, named=tables)
    with pytest.raises(RecipeError, match="a.yaml:1: 'model.x' is missing; one of: pixels, log_mel"):
        parse("model: {dim: 3}", source="a.yaml").settings("model", Part, named=tables)


def test_a_name_that_an_objective_can_do_without_may_be_left_out_or_be_null() -> None:
    class Loose:
        def __init__(self, *, dim: int, x: Callable[[int], int] | None = None) -> None:
            self.dim, self.x = dim, x

    tables: dict[str, dict[str, object]] = {"x": {"pixels": 1, "log_mel": 2}}
    for text, chosen in (("{dim: 3}", None), ("{dim: 3, x: null}", None), ("{dim: 3, x: pixels}", "pixels")):
        settings = parse(f"model: {text}", source="a.yaml").settings("model", Loose, named=tables)
        assert settings == {"dim": 3, "x": chosen}
    with pytest.raises(RecipeError, match="a.yaml:1: unknown model.x 'pixel'"):
        parse("model: {dim: 3, x: pixel}", source="a.yaml").settings("model", Loose, named=tables)


def test_shipped_recipes_have_short_names() -> None:
    assert load("speech/wav2vec2_base").place("modality").startswith("speech/wav2vec2_base.yaml:")
    with pytest.raises(RecipeError, match=r"'wav2vec2_base'. Did you mean 'speech/wav2vec2_base'\?"):
        load("wav2vec2_base")
    with pytest.raises(RecipeError, match="nowhere.yaml: no such file"):
        load("nowhere.yaml")


def test_the_head_of_a_recipe_is_read() -> None:
    text = (
        "# Title, 2020\n# (source).\n# Run:     mmssl x\n#   more\n# Result:  not yet run\nmodality: image\n# Cost: 3\n"
    )
    assert header(text) == {"title": "Title, 2020 (source).", "run": "mmssl x more", "result": "not yet run"}


def test_leaves_are_what_recipes_are_compared_by() -> None:
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]})) == {"a.b": 1, "d": [1, {"e": 2}]}


def test_equal_settings_make_equal_recipes() -> None:
    one, two = (parse(text, source="a.yaml") for text in ("a: 1e-3\nb: 2", "b: 2\n\na: 0.001"))
    assert one == two == Recipe("a", "a.yaml", {"a": 0.001, "b": 2})


def test_parsing_needs_no_torch() -> None:
    code = "import sys, mmssl.recipe; mmssl.recipe.load('speech/wav2vec2_base'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("value", ["[0.5, 0.9]", "{from: 0.5}", "half"])
def test_a_setting_of_several_forms_is_refused_with_all_of_them(value: str) -> None:
    def build(*, ratio: float | tuple[float, float, int] | Literal["auto"] | None = 0.75) -> None: ...

    with pytest.raises(RecipeError) as caught:
        parse(f"model: {{ratio: {value}}}", source="a.yaml").settings("model", build)
    rule = "model.ratio: should be a number or [a number, a number, a whole number] or 'auto' or null (got "
    assert str(caught.value).startswith(f"a.yaml:1: {rule}")
