"""What can be wrong with an input, in one shape: which file, which row, what, and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LISTED = 100  # problems of one kind told row by row; the rest are counted
SHOWN = 5  # problems spelled out in an exception's message


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input file.

    Attributes:
        file: the file at fault.
        row: 1-based data row of the STAR file that leads to it; None if it concerns the file.
        what: what is wrong.
        remedy: what to do about it.
    """

    file: Path
    row: int | None
    what: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.file}" if self.row is None else f"{self.file}, data row {self.row}"
        return f"{place}: {self.what}; {self.remedy}"


class InputError(ValueError):
    """Input that cannot be used; ``problems`` holds all of it, the message the first few."""

    problems: tuple[Problem, ...] = ()


def input_error(problems: Sequence[Problem]) -> InputError:
    """The exception that reports these problems."""
    lines = [str(problem) for problem in problems[:SHOWN]]
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems (rows count from 1):")
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more; `cryoalign check` lists all of them")
    error = InputError("\n  ".join(lines))
    error.problems = tuple(problems)
    return error


def row_problems(
    file: Path, rows: np.ndarray, what: Callable[[int], str], remedy: str
) -> list[Problem]:
    """One problem per 0-based row; past ``LISTED`` rows the rest are counted in one more."""
    problems = [Problem(file, r + 1, what(r), remedy) for r in map(int, rows[:LISTED])]
    if len(rows) > LISTED:
        rest = f"{what(int(rows[LISTED]))}, and {len(rows) - LISTED - 1} later rows likewise"
        problems.append(Problem(file, int(rows[LISTED]) + 1, rest, remedy))
    return problems
