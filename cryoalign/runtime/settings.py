"""How sections of settings are declared."""

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Section = TypeVar("Section")
FORBID = ConfigDict(extra="forbid", strict=False)


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(section: type[Section]) -> type[Section]:
    """Decorator: a frozen dataclass whose values pydantic checks.

    Every field is declared with its default, its limits and a description; the description is
    what ``--help`` shows, and it is added to the docstring here.
    """
    made = dataclass(frozen=True, config=FORBID)(section)
    lines = [
        f"        {name}: {field.description}"
        for name, field in made.__pydantic_fields__.items()
        if name in section.__annotations__
    ]
    heading = f"{(section.__doc__ or '').rstrip()}\n\n    Attributes:\n"
    made.__doc__ = heading + "\n".join(lines) + "\n"
    return made  # type: ignore[return-value]
