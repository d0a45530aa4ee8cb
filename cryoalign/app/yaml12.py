"""Read and write YAML 1.2: ``yes`` is text, ``1e-3`` is a number, and a key may occur only once.

PyYAML's safe loader follows YAML 1.1, where ``no`` is false, ``1e-3`` is text and ``1:30`` is 90.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml import YAMLError as Error

__all__ = ["Error", "dump", "load"]

_SCALARS = {  # the core schema of YAML 1.2.2, section 10.3.2: tag, pattern, first characters
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """Makes only numbers, texts, lists and mappings, and refuses a key that occurs twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} occurs twice; remove one", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as another type."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(f"^(?:{_pattern})$"),
            [*_first, ""] if _tag == "null" else list(_first),
        )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # PyYAML reads 010 as eight, as in YAML 1.1


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load(text: str) -> Any:
    """Read a YAML document: a mapping, list, text, number, bool or None.

    Raises Error if the text is not YAML or a key occurs twice.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, RecursionError) as error:  # explicit tags, or deep nesting
        raise Error(f"a value cannot be read ({error})") from error


def dump(value: Any) -> str:
    """YAML text that `load` reads back, with keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
