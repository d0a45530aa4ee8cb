"""STAR files: each line is checked here, pandas parses the tables, ``starfile`` writes them.

Parsers without these checks accept damaged files and return wrong tables, with missing rows or
blocks or with shifted cells. Here such a file is refused, with the number of the line.
"""

import re
import shlex
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import starfile

from cryoalign.io.problems import LISTED, Problem, input_error
from cryoalign.runtime.files import replacing

Block = pd.DataFrame | dict[str, Any]

# Control characters and unusual spaces, which programs interpret differently.
_ODD = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
)
_VALUE = re.compile(r"""(?:"([^"]*)"|'([^']*)')(?=\s|$)|(\S+)""")
_RESTORE = "restore the file, or edit that line"


@dataclass(frozen=True, eq=False)
class StarTables:
    """The blocks of a STAR file that lists particles or classes.

    Attributes:
        blocks: all blocks in their order; tables as DataFrames, lists of pairs as dicts of text.
        particles_name: name of the block that lists the particles.
        version: the number in the ``# version`` comment; None without one.
    """

    blocks: dict[str, Block]
    particles_name: str
    version: int | None = None

    @property
    def particles(self) -> pd.DataFrame:
        """One row per particle."""
        return pd.DataFrame(self.blocks[self.particles_name])

    @property
    def optics(self) -> pd.DataFrame | None:
        """One row per optics group; None in the layout of RELION 3.0."""
        return pd.DataFrame(self.blocks["optics"]) if "optics" in self.blocks else None


@dataclass
class _Outline:
    """One block of the text: its labels, with the lines of its table or the values of its pairs."""

    name: str
    looped: bool = False
    labels_open: bool = False
    labels: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)


def read_star(path: Path) -> StarTables:
    """Read a particle STAR file of RELION 3.0 (one block), 3.1 or 5 (optics and particles).

    A column becomes numbers if all its cells are numbers. Columns of names, and columns with any
    other cell, keep their text unchanged (also "None" and "nan").

    Raises InputError (a ValueError) with the file and the damaged lines.
    """
    text = _text(path)
    outlines, problems = _scan(path, text)
    if problems:
        raise input_error(problems)
    try:
        blocks = {outline.name: _block(outline) for outline in outlines}
    except ValueError as error:
        raise input_error([Problem(path, None, str(error), "restore the file")]) from error
    version = re.search(r"^# version (\d{1,9})", text, re.MULTILINE)
    number = None if version is None else int(version[1])
    return StarTables(blocks, _find_particles(path, blocks), number)


def write_star(path: Path, tables: StarTables, comments: tuple[str, ...] = ()) -> None:
    """Write the blocks in their order; numbers have six decimals if that is exact."""
    head = [f"# version {tables.version}"] if tables.version is not None else []
    head += [f"# {comment}" for comment in comments]
    blocks = {
        name: block.apply(_as_text) if isinstance(block, pd.DataFrame) else block
        for name, block in tables.blocks.items()
    }
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*head, starfile.to_string(blocks)]), encoding="utf-8")


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not a text file: byte {error.start} is not UTF-8"
        raise input_error([Problem(path, None, what, "give a STAR file")]) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if odd := _ODD.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        what = f"line {line} contains the character {odd[0]!r}, which is not allowed in a STAR file"
        raise input_error([Problem(path, None, what, _RESTORE)])
    return text


def _scan(path: Path, text: str) -> tuple[list[_Outline], list[Problem]]:
    """The blocks of a STAR text, and the problems of its lines."""
    outlines: list[_Outline] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        rows = len(outlines[-1].lines) if outlines else 0
        what = _scan_line(line.strip(), outlines)
        if what is not None and len(problems) < LISTED:
            row = rows + 1 if outlines and len(outlines[-1].lines) > rows else None
            problems.append(Problem(path, row, f"line {number}: {what}", _RESTORE))
    if not outlines:
        problems.append(Problem(path, None, "has no data_ block", "give a STAR file"))
    return outlines, problems


def _scan_line(line: str, outlines: list[_Outline]) -> str | None:
    """Add one line to the blocks; return what is wrong with it, or None."""
    if line.startswith("data_"):
        known = {outline.name for outline in outlines}
        outlines.append(_Outline(line[5:]))
        if len(line.split()) > 1:
            return "more text after the name in a data_ line"
        return f"the block {line} appears twice" if line[5:] in known else None
    if not outlines:
        return None if not line or line.startswith("#") else "text before the first data_ line"
    block = outlines[-1]
    if not line or line.startswith("#"):
        block.labels_open = False
        return None
    if line.split()[0] == "loop_":
        again = block.looped or bool(block.labels)
        block.looped = block.labels_open = True
        return "a second loop_ in one block" if again else None
    if line.startswith("_") and not block.lines:
        return _scan_label(line, block)
    return _scan_row(line, block) if block.looped else "this line is not a label and not in a loop_"


def _scan_label(line: str, block: _Outline) -> str | None:
    label = line.split()[0][1:]
    known = label in block.labels
    block.labels.append(label)
    if not label or known:
        return f"the label _{label} appears twice" if known else "a label without a name"
    if block.looped:
        return None if block.labels_open else "a label after an empty line or a comment"
    try:
        values = shlex.split(line)[1:]
    except ValueError:
        values = []
    block.values += values[:1]
    return None if len(values) == 1 else f"_{label} should be followed by one value"


def _scan_row(line: str, block: _Outline) -> str | None:
    block.lines.append(line)
    values = line.split()
    if '"' in line or "'" in line or "#" in line:
        values = []
        for match in _VALUE.finditer(line):
            if match[3] is not None and match[3].startswith("#"):
                break  # a comment to the end of the line
            values.append(next(group for group in match.groups() if group is not None))
        if any('"' in value for value in values):
            return "a quote inside a value, which STAR readers interpret differently"
        block.lines[-1] = "\t".join(f'"{value}"' for value in values)
    if len(values) != len(block.labels):
        return f"{len(values)} values for {len(block.labels)} labels"
    return None


def _block(outline: _Outline) -> Block:
    if not outline.looped:
        return dict(zip(outline.labels, outline.values, strict=True))
    if not outline.lines:
        return pd.DataFrame(columns=outline.labels)
    table = pd.read_csv(
        StringIO("\n".join(outline.lines)),
        sep=r"\s+",
        header=None,
        dtype={i: str for i, label in enumerate(outline.labels) if label.endswith("Name")},
        na_filter=False,  # "None" and "nan" are text
        low_memory=False,  # a column is numbers as a whole or not at all
    )
    if table.shape != (len(outline.lines), len(outline.labels)):
        raise ValueError(f"the values of data_{outline.name} do not fit its labels")
    return table.set_axis(outline.labels, axis="columns")


def _as_text(column: pd.Series) -> pd.Series:
    if column.dtype.kind != "f":
        return column
    texts = [f"{v:.6f}" if float(f"{v:.6f}") == v else repr(v) for v in column.tolist()]
    return pd.Series(texts, index=column.index, dtype=object)


def _find_particles(path: Path, blocks: dict[str, Block]) -> str:
    tables = [name for name, block in blocks.items() if isinstance(block, pd.DataFrame)]
    named = [name for name in tables if "rlnImageName" in blocks[name]]
    if "particles" in named or len(named) == 1:
        return "particles" if "particles" in named else named[0]
    what = f"several particle tables {named}" if named else "no table with a column rlnImageName"
    remedy = "give a particle STAR file of RELION, its table named data_particles"
    raise input_error([Problem(path, None, what, remedy)])
