"""Problems of an input, each with the file, the row, a description and a remedy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LISTED = 100  # problems of one kind that are listed by row; the rest are only counted
SHOWN = 5  # problems in the message of an exception, so that it fits a screen


@dataclass(frozen=True)
class Problem:
    """One problem of an input file.

    Attributes:
        file: the file with the problem.
        row: 1-based data row of the STAR file; None if it concerns the whole file.
        what: description of the problem.
        remedy: what to do.
    """

    file: Path
    row: int | None
    what: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.file}" if self.row is None else f"{self.file}, data row {self.row}"
        return f"{place}: {self.what}; {self.remedy}"


class InputError(ValueError):
    """An input that cannot be used: all ``problems``, the first few also in the message."""

    problems: tuple[Problem, ...] = ()


def input_error(problems: Sequence[Problem]) -> InputError:
    """An exception that reports these problems."""
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
    """One problem for each 0-based row; one more counts the rows after the first `LISTED`."""
    problems = [Problem(file, r + 1, what(r), remedy) for r in map(int, rows[:LISTED])]
    if len(rows) > LISTED:
        later = f"{len(rows) - LISTED - 1} later rows have the same problem"
        rest = f"{what(int(rows[LISTED]))}, and {later}"
        problems.append(Problem(file, int(rows[LISTED]) + 1, rest, remedy))
    return problems
