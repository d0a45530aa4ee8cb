"""Read any settings class from a YAML file and the command line, and list its keys.

A setting has the same name as YAML key, as field of its dataclass and as argument. An error lists
all problems of the settings, with the names that the user wrote.
"""

import difflib
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cryoalign.app import yaml12

Settings = TypeVar("Settings")
Value = Any  # a YAML scalar, list or mapping


def load_settings(
    schema: type[Settings],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    help_words: str = "--help",
) -> Settings:
    """Read a settings class from a YAML file and from words like ``search.shift_step=2``.

    Args:
        schema: the settings class.
        path: the YAML file; None takes the defaults.
        overrides: ``key=value`` words, which replace values of the file: a dotted key, and a value
            as in YAML (text needs no quotes). If a key occurs more than once, the last one counts.
        help_words: what a user types to see the list of keys, for error messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not YAML; or keys are unknown, or have values of a wrong type or
            range, or do not go together: all of these in one message, each with its place.
    """
    fields = dict(known_keys(schema))
    moved: dict[str, str] = getattr(schema, "MOVED", {})

    def suggest(key: str) -> str:
        if key in moved:
            return f"it is now called {moved[key]}"
        return _suggestion(key, fields, help_words)

    problems: list[str] = []
    values: dict[str, Value] = {}
    places: dict[str, str] = {}
    words = [_read_word(word, fields, problems) for word in overrides]
    file = {} if path is None else _read_file(Path(path))
    for place, given in ((str(path), file), *(("command line", w) for w in words)):
        for key, value in _flatten(given, fields, place, problems, suggest):
            values[key], places[key] = value, place
    settings: Settings | None = None
    try:
        settings = TypeAdapter(schema).validate_json(json.dumps(nest(values)), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A key with a problem found above is absent here, so it must not be reported as missing.
        found = " ".join(problems)
        problems += [
            _in_words(detail, values, places)
            for detail in details
            if not (detail["type"] == "missing" and f"{_key(detail)}:" in found)
        ]
    if problems or settings is None:
        if len(problems) > 1:
            problems.insert(0, f"{len(problems)} problems in the settings:")
        raise ValueError("\n  ".join(problems))
    return settings


def settings_from_words(
    schema: type[Settings], default: Path, words: Sequence[str], doc: str | None
) -> Settings:
    """The settings of a script that takes the arguments ``[SETTINGS.yaml] [key=value ...]``.

    Args:
        schema: the settings class.
        default: the YAML file that is read if the first argument is not a file.
        words: arguments of the command line, without the script's name.
        doc: what the script does; ``-h`` or ``--help`` prints it and all keys.

    Raises:
        SystemExit: after printing the help (code 0) or the problems of the settings (code 2).
    """
    if {"-h", "--help"} & set(words):
        print(f"{(doc or '').strip()}\n\nkeys (name, type, default, meaning):\n{describe(schema)}")
        raise SystemExit(0)
    given = bool(words) and "=" not in words[0]
    try:
        return load_settings(schema, words[0] if given else default, words[given:])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


def describe(schema: type) -> str:
    """A table with a line for every key: key, type and limits, default, description."""
    rows = []
    for key, field in known_keys(schema):
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        rows.append((key, _type_words(field), default.strip('"'), field.description or ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def known_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted keys of a settings class, each with pydantic's description of the field."""
    fields: dict[str, FieldInfo] = schema.__pydantic_fields__  # type: ignore[attr-defined]
    for name, field in fields.items():
        if isinstance(field.annotation, type) and is_dataclass(field.annotation):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _read_file(path: Path) -> dict[str, Value]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file; check the path")
    try:
        document = yaml12.load(path.read_text(encoding="utf-8"))
    except (yaml12.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError(f"{path}: should have lines like `key: value`, not {_got(document)}")
    return document


def _read_word(word: str, fields: dict[str, FieldInfo], problems: list[str]) -> dict[str, Value]:
    """Read ``key=value``. Text is taken as it is, because the shell has removed its quotes."""
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(f"command line: {word!r} should be key=value, e.g. n_classes=10")
        return {}
    if key in fields and set(_kinds(fields[key])) & {str, Path} and text not in ("", "null", "~"):
        return {key: text}
    try:
        return {key: yaml12.load(text)}
    except yaml12.Error:
        problems.append(f"command line: {key}: {text!r} is not a YAML value")
        return {}


def _flatten(
    given: dict[str, Value], fields: dict[str, FieldInfo], place: str, problems: list[str],
    suggest: Callable[[str], str],
) -> Iterator[tuple[str, Value]]:  # fmt: skip
    """Known dotted keys and their values; unknown keys are added to ``problems``."""
    sections = {key.partition(".")[0] for key in fields if "." in key}
    for name, value in given.items():
        key = str(name)
        if key in sections and isinstance(value, dict):
            inner = {f"{key}.{leaf}": v for leaf, v in value.items()}
            yield from _flatten(inner, fields, place, problems, suggest)
        elif key in sections:
            if value is not None:  # a section is None if all its lines are comments
                problems.append(f"{place}: {key}: should be a section, got {_got(value)}")
        elif key not in fields:
            problems.append(f"{place}: unknown key {key}; {suggest(key)}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{place}: {key}: should be a finite number, got {value}")
        else:
            yield key, value


def _suggestion(key: str, fields: dict[str, FieldInfo], help_words: str) -> str:
    by_leaf: dict[str, list[str]] = {}
    for name in fields:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, 1)
    close = by_leaf[leaf[0]] if leaf else difflib.get_close_matches(key, fields, 1, 0.8)
    return f"did you mean {' or '.join(close)}?" if close else f"{help_words} lists the keys"


def nest(values: dict[str, Value]) -> dict[str, Value]:
    """Values of dotted keys as a mapping of sections, like the YAML file."""
    nested: dict[str, Value] = {}
    for key, value in values.items():
        section, _, leaf = key.partition(".")
        if leaf:
            nested.setdefault(section, {})[leaf] = value
        else:
            nested[section] = value
    return nested


_WANTED = {
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be text (quote it)",
    "path_type": "should be a path (quote it)",
    "tuple_type": "should be a list like [1, 2]",
    "too_short": "should have more values",
}


def _key(detail: ErrorDetails) -> str:
    """The dotted key of an error; for an entry of a list, the key of the list."""
    return ".".join(part for part in detail["loc"] if isinstance(part, str))


def _in_words(detail: ErrorDetails, values: dict[str, Value], places: dict[str, str]) -> str:
    key = _key(detail)
    if not key or (detail["type"] == "value_error" and key not in values):  # error of a section
        return detail["msg"].removeprefix("Value error, ")
    if values.get(key) is None:  # absent, or null although a value is needed
        return f"{key} is missing; add {key}=... or put it into the file"
    wanted = _WANTED.get(detail["type"]) or detail["msg"].removeprefix("Input ").removeprefix(
        "Value error, "
    )
    return f"{places[key]}: {key}: {wanted}, got {_got(values[key])}"


def _got(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {value[:60] + (' …' if len(value) > 60 else '')!r}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a section"
    return str(value)


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The types that a field accepts: int | None gives (int, NoneType)."""
    kind = field.annotation
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds)


def _type_words(field: FieldInfo) -> str:
    names = {int: "whole", float: "number", bool: "true/false", str: "text", Path: "path"}
    names |= {tuple[float, ...]: "numbers", tuple[int, ...]: "whole numbers"}
    words: list[str] = []
    for kind in _kinds(field):
        if get_origin(kind) is Literal:
            words += map(str, get_args(kind))
        elif kind is not type(None):
            words.append(names.get(kind, str(kind)))
    if type(None) in _kinds(field):
        words.append("null")
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return " ".join(["|".join(words), ", ".join(limits)]).strip()
