"""One page of YAML and a few overrides -> Recipe, in which every setting remembers where it was written.

A section's keys are the keyword arguments of the constructor that it becomes, so what may stand there is read from the
signature: `Recipe.settings` checks names, required keys and types, and fills in the defaults. Parsing needs no torch.

PyYAML follows YAML 1.1, in which `1e-3` is text, `on` and `yes` are booleans, `010` is 8, `1:30` is 90, and a key may
be given twice without a word. Recipes follow the core schema of YAML 1.2, and a key given twice is an error.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

Made = TypeVar("Made")

SECTIONS = (
    "modality",
    "backbone",
    "tokenizer",
    "frontend",
    "positions",
    "transformer",
    "encoder",
    "objective",
    "augment",
    "data",
    "optimizer",
    "schedule",
    "trainer",
    "init",
)


# sections that a recipe of several modalities has once for each of them, below `modality`
OWN = ("frontend", "positions", "transformer", "encoder", "augment")


def members(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Modality -> the sections that make its encoder, as if it stood alone: of a resolved recipe, or of a config."""
    chosen = values["modality"]
    if isinstance(chosen, str):
        return {chosen: values}
    shared = {key: values[key] for key in ("tokenizer", "transformer") if key in values}
    return {name: {**shared, **sections, "modality": name} for name, sections in chosen.items()}


def by_modality(value: Any, names: Iterable[str]) -> bool:
    """Whether a value of a recipe of several modalities is a mapping from modality to value."""
    return isinstance(value, Mapping) and bool(value) and value.keys() <= set(names)


def settings_of(section: Mapping[str, Any], name: str, names: Iterable[str]) -> dict[str, Any]:
    """The settings of a section for one modality: of those that are by modality its own, where it has one."""
    names = list(names)
    chosen = {key: value for key, value in section.items() if not by_modality(value, names) or name in value}
    return {key: value[name] if by_modality(value, names) else value for key, value in chosen.items()}


class RecipeError(ValueError):
    """A recipe that cannot be used: the place, the value, the rule and the way out in one sentence."""


@dataclass(frozen=True)
class Recipe:
    """Settings by section, plain values only, and where each of them was written.

    name: the short name or the file name without its suffix.
    source: how messages call the file.
    values: section -> settings, as in the file with the overrides applied.
    places: dotted key -> "file:line" or "command line 'key=value'".
    """

    name: str
    source: str
    values: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict, compare=False)

    def place(self, key: str) -> str:
        """Where a dotted key was written; that of the section around it for one that was left out."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.source)

    def error(self, key: str, message: str) -> RecipeError:
        return RecipeError(f"{self.place(key)}: {message}")

    def placed(self, make: Callable[[], Made]) -> Made:
        """What `make` gives; a complaint that begins with a setting is put behind the place where that was written."""
        try:
            return make()
        except ValueError as error:
            setting = re.match(r"\w+\.\w+", str(error))
            raise self.error(setting[0] if setting else "", str(error)) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, such as "trainer.steps" or "augment.train.0"."""
        value: Any = self.values
        for part in key.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                return default
        return value

    def choice(self, key: str, table: Mapping[str, Any]) -> Any:
        """What the name at a dotted key stands for in a literal table."""
        name = self.get(key)
        if name is None:
            raise RecipeError(f"{self.place(key)}: '{key}' is missing; one of: {', '.join(table) or 'none'}")
        if not isinstance(name, str) or name not in table:
            hint = _did_you_mean(str(name), table)
            raise self.error(key, f"unknown {key} '{name}'.{hint} Known: {', '.join(table)}.")
        return table[name]

    def settings(
        self,
        section: str,
        target: Callable[..., Any],
        *,
        given: Iterable[str] = (),
        named: Mapping[str, Mapping[str, Any]] | None = None,
        each: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments that a section gives to what it becomes, checked, with the defaults filled in.

        Args:
            section: dotted key of a mapping; its `name`, which chose `target`, is not passed on unless it is a setting.
            target: class or function whose signature says what may stand in the section.
            given: arguments that the program passes itself, so that a recipe may not.
            named: argument -> table, for those that a recipe gives by a name in a table; the name is what is returned,
                or None where the recipe gives none and the default is none.
            each: argument -> key -> table, for those that a recipe gives as a mapping of one name for every key, from
                the table of that key.

        Returns:
            name -> plain value (numbers, text, lists, mappings), for every setting of `target`.

        Raises:
            RecipeError: an unknown key, a missing one, or a value of the wrong type.
        """
        written = self.get(section)
        written = {} if written is None else written
        if not isinstance(written, Mapping):
            raise self.error(section, f"'{section}' should be a mapping of settings (got {written!r})")
        tables = {} if named is None else named
        parameters = _parameters(target, frozenset(given))
        for key in written:
            if key not in parameters and key != "name":
                raise self.unknown(f"{section}.{key}", parameters)
        settings: dict[str, Any] = {}
        for name, (annotation, default) in parameters.items():
            key = f"{section}.{name}"
            if name in tables and default is None and written.get(name) is None:
                settings[name] = None
            elif name in tables:
                if tables[name]:  # where there is nothing to choose from, what the section becomes knows why
                    self.choice(key, tables[name])
                settings[name] = written.get(name)
            elif each is not None and name in each:
                settings[name] = self._one_each(key, each[name])
            elif name in written:
                settings[name] = self._checked(key, written[name], annotation)
            elif default is inspect.Parameter.empty:
                raise self.error(section, f"'{key}' is missing; write it here, or on the command line as {key}=VALUE")
            else:
                settings[name] = _plain(default)
        return settings

    def _one_each(self, key: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        written = self.get(key)
        if not isinstance(written, Mapping) or set(written) != set(tables):
            raise self.error(key, f"'{key}' should name one for each of {', '.join(tables)} (got {written!r})")
        for name, table in tables.items():
            self.choice(f"{key}.{name}", table)
        return dict(written)

    def unknown(self, key: str, known: Iterable[str]) -> RecipeError:
        """The error for a key that nothing reads, with the one that was probably meant."""
        section, _, name = key.rpartition(".")
        known = list(known)
        prefix = section + "." if section else ""
        hint = _did_you_mean(name, known, prefix)
        return self.error(key, f"unknown key '{key}'.{hint} Keys here: {', '.join(known) or 'none'}.")

    def _checked(self, key: str, value: Any, annotation: Any) -> Any:
        if annotation is inspect.Parameter.empty:
            return value
        try:
            adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a model or dataclass brings its own configuration
            adapter = TypeAdapter(annotation)
        try:
            # strict, so that text is no number and 1 no boolean; as JSON, so that a list may become a tuple
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise self.error(key, _sentence(key, value, annotation, error)) from None
        return value

    def dump(self) -> str:
        """The recipe as YAML that `load` reads back to the same values."""
        return yaml.dump(self.values, Dumper=_Dumper, sort_keys=False, width=110)


def apart(recipe: Recipe) -> dict[str, Recipe]:
    """Modality -> a resolved recipe as if it were for that one alone.

    Only where each batch is of one modality, as with `omni`; else the recipe as it is, by its name.
    """
    values = recipe.values
    if "of" not in values["objective"]:
        return {recipe.name: recipe}
    found, own = {}, members(values)
    for name, sections in own.items():
        alone = {**values, **sections, "objective": values["objective"]["of"][name]}
        alone["data"] = settings_of(values["data"], name, own)
        prefix = f"modality.{name}."
        places = {key.removeprefix(prefix): place for key, place in recipe.places.items() if key.startswith(prefix)}
        found[name] = replace(recipe, values=alone, places={**recipe.places, **places})
    return found


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by its short name, such as "speech/wav2vec2_base", or a YAML file, with `key=value` overrides.

    Raises:
        RecipeError: no such recipe, broken YAML, a key given twice, an unknown section, an override without "=".
    """
    path = find(source)
    shipped_name = isinstance(source, str) and source in shipped()
    recipe = parse(path.read_text(encoding="utf-8"), source=str(source) + ".yaml" if shipped_name else str(path))
    for override in overrides:
        recipe = _override(recipe, override)
    for section in recipe.values:
        if section not in SECTIONS:
            raise recipe.unknown(section, SECTIONS)
    return recipe


def parse(text: str, *, source: str) -> Recipe:
    """YAML text -> Recipe; `source` is what error messages call it."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: this is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is not YAML: {error}") from None
    places: dict[str, str] = {}
    values = {} if root is None else _value(root, "", source, places, ())
    if not isinstance(values, dict) or not values:
        raise RecipeError(f"{source}: a recipe is a mapping of sections; known sections: {', '.join(SECTIONS)}")
    return Recipe(Path(source).stem, source, values, places)


def find(source: str | Path) -> Path:
    """The file of a recipe: a path that exists, or the short name of a shipped one."""
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in shipped():
        return shipped()[str(source)]
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{source}: no such file; `mmssl recipes` lists the shipped recipes")
    inside = [name for name in shipped() if str(source) in name]
    hint = f" Did you mean '{inside[0]}'?" if inside else _did_you_mean(str(source), shipped())
    raise RecipeError(f"no recipe is called '{source}'.{hint} `mmssl recipes` lists the shipped ones.")


def shipped() -> dict[str, Path]:
    """Short name -> file of every recipe that comes with mmssl."""
    folder = Path(str(resources.files("mmssl.recipes")))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def header(text: str) -> dict[str, str]:
    """What the comment at the head of a recipe says: "title", and "run", "cost", "result" where they stand."""
    said: dict[str, str] = {}
    key = "title"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        line = line[1:].strip()
        match = re.match(r"(Run|Cost|Result):\s*(.*)", line)
        if match:
            key, line = match[1].lower(), match[2]
        said[key] = f"{said[key]} {line}" if key in said else line
    return said


def _override(recipe: Recipe, override: str) -> Recipe:
    """The recipe with one `dotted.key=value`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    place = f"command line '{override}'"
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"{place}: an override looks like trainer.steps=2000")
    places = {name: where for name, where in recipe.places.items() if name != key and not name.startswith(key + ".")}
    inner: dict[str, str] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{place}: the value is not YAML; quote text that holds a colon or a bracket") from None
    if node is not None and node.end_mark.index < len(text.rstrip()):
        raise RecipeError(f"{place}: what stands behind ' #' would be a comment; quote text that holds a #")
    value = None if node is None else _value(node, key, place, inner, ())
    places |= dict.fromkeys([key, *inner], place)
    values = copy.deepcopy(recipe.values)
    container: Any = values
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        if isinstance(container, list):
            container = container[_index(place, here, part, container)]
        else:
            if container.get(part) is None:
                container[part] = {}
                places[here] = place
            container = container[part]
        if not isinstance(container, dict | list):
            raise RecipeError(f"{place}: '{here}' is {container!r}, which has no settings inside")
    if isinstance(container, list):
        container[_index(place, key, last, container)] = value
    else:
        container[last] = value
    return Recipe(recipe.name, recipe.source, values, places)


def _index(place: str, key: str, part: str, container: list[Any]) -> int:
    if not part.isdigit() or int(part) >= len(container):
        raise RecipeError(f"{place}: '{key}': this is a list of {len(container)}, so a number below that is wanted")
    return int(part)


def _parameters(target: Callable[..., Any], given: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (annotation, default), from the signature of a class or function."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: (hints.get(name, inspect.Parameter.empty), parameter.default)
        for name, parameter in inspect.signature(target).parameters.items()
        if name not in given and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def _plain(value: Any) -> Any:
    """A default as YAML and JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{prefix}{close[0]}'?" if close else ""


def _sentence(key: str, value: Any, annotation: Any, error: ValidationError) -> str:
    """The first of pydantic's complaints, in the words of the recipe."""
    first, *more = error.errors(include_url=False)
    if more and get_origin(annotation) in (Union, UnionType):  # pydantic complains once a member, of parts of it too
        return f"{key}: should be {_expected(annotation)} (got {value!r})"
    where = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    got = value
    for part in first["loc"]:
        if isinstance(part, int) and isinstance(got, list) and part < len(got):
            got = got[part]
    rule = first["msg"][0].lower() + first["msg"][1:]
    if isinstance(got, str) and got.lower() in ("on", "off", "yes", "no") and "valid boolean" in rule:
        rule += ": write true or false"
    return f"{key}{where}: {rule} (got {got!r})"


def _expected(annotation: Any) -> str:
    """What an annotation allows, as a recipe writes it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_expected(member) for member in inner)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in inner)
    if origin is tuple and ... not in inner:
        return f"[{', '.join(_expected(member) for member in inner)}]"
    if origin is not None:
        return f"a list of {_expected(inner[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))


class _Loader(yaml.SafeLoader):
    """Scalars by the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever the loader would otherwise read as something else; short lists and mappings on one line."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    special = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
    return dumper.represent_scalar("tag:yaml.org,2002:float", special.get(text, text))


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    flow = all(not isinstance(item, dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(list, _represent_list)


def _value(node: yaml.Node, key: str, source: str, places: dict[str, str], inside: tuple[int, ...]) -> Any:
    """A node of the YAML graph as a plain value; notes the line of every key on the way."""

    def at(node: yaml.Node) -> str:
        # an override is one line, and its place is already the whole of it
        return source if source.startswith("command line") else f"{source}:{node.start_mark.line + 1}"

    if id(node) in inside:
        raise RecipeError(f"{at(node)}: this alias holds itself")
    inside = (*inside, id(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode) or name_node.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{at(name_node)}: a key is text (got {name!r})")
            line = name_node.start_mark.line + 1
            if name in mapping:
                raise RecipeError(f"{at(name_node)}: key '{name}' given twice (first at line {lines[name]})")
            lines[name] = line
            dotted = f"{key}.{name}" if key else name
            places[dotted] = at(name_node)
            mapping[name] = _value(value_node, dotted, source, places, inside)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for index, item in enumerate(node.value):
            places[f"{key}.{index}"] = at(item)
            items.append(_value(item, f"{key}.{index}", source, places, inside))
        return items
    return _scalar(node, at(node))


def _scalar(node: yaml.Node, place: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "str":
        return text
    raise RecipeError(f"{place}: the tag {node.tag} has no meaning in a recipe")


def leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping: what two recipes are compared by."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values
