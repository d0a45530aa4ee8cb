"""STAR files: each line is checked here, and pyarrow parses the rows of the tables.

Cells stay the text that stands in the file, so that what is written again has the same digits.
Columns are converted to numbers when they are asked for.

Parsers without these checks accept damaged files and return wrong tables, with missing rows or
blocks or with shifted cells. Here such a file is refused, with the number of the line.
"""

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv

from cryoalign.io.problems import LISTED, Problem, input_error
from cryoalign.runtime.files import replacing
from cryoalign.runtime.threads import map_in_order

BLOCK = 2**20  # bytes of a file that are read at a time; their arrays fit a CPU's cache
WORKERS = 4  # threads that parse, at most; reading the file takes the time of one
BATCH = 2**16  # rows that are written at a time
FEW = 8  # a text that is repeated in this many rows, on average, is kept once for all of them

# Control characters and unusual spaces, which programs interpret differently.
_ODD = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
)
_VALUE = re.compile(r"""(?:"([^"]*)"|'([^']*)')(?=\s|$)|(\S+)""")
_VERSION = re.compile(r"# version (\d{1,9})")
_RESTORE = "restore the file, or edit that line"
# Cells that a STAR file must have in quotes; the second is for the first column.
_QUOTED, _QUOTED_FIRST = r"^$|\s|^[#']", r"^$|\s|^[#'_]|^(data|loop)_"


class StarTable:
    """A table (``loop_``) of a STAR file: a text for each cell.

    Columns of which many cells are equal keep each text once, so that a million rows of 30 columns
    need about half a gigabyte.
    """

    def __init__(self, texts: pa.Table) -> None:
        """``texts``: columns of strings, or of strings with a dictionary."""
        self.texts = texts

    @classmethod
    def of(cls, columns: Mapping[str, Any] | pd.DataFrame) -> "StarTable":
        """Make a table from columns (n,) of numbers or texts; numbers become text (`as_texts`)."""
        texts = {str(label): as_texts(values) for label, values in columns.items()}
        return cls(pa.table(texts))

    def __len__(self) -> int:
        return int(self.texts.num_rows)

    def __contains__(self, label: str) -> bool:
        return label in self.labels

    @property
    def labels(self) -> list[str]:
        """The columns, in their order."""
        return list(self.texts.column_names)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self.texts.nbytes)

    def text(self, label: str) -> pa.ChunkedArray:
        """(n,) strings of a column, as they stand in the file."""
        return self.texts.column(label).cast(pa.string())

    def cell(self, row: int, label: str) -> str:
        """One cell of a 0-based row."""
        return str(self.texts.column(label)[row].as_py())

    def numbers(self, label: str) -> np.ndarray:
        """(n,) float64 of a column; NaN for a cell that is not a number."""
        texts = self.text(label)
        try:
            return np.asarray(texts.cast(pa.float64()).to_numpy(), np.float64)
        except pa.ArrowInvalid:
            return pd.to_numeric(texts.to_pandas(), errors="coerce").to_numpy(np.float64)

    def frame(self, labels: list[str] | None = None) -> pd.DataFrame:
        """Some columns, or all of them, as a new DataFrame.

        A column becomes numbers if all its cells are numbers. Columns of names, and columns with
        any other cell, keep their text (also "None" and "nan").
        """
        labels = self.labels if labels is None else labels
        return pd.DataFrame({label: self._series(label) for label in labels}, columns=labels)

    def _series(self, label: str) -> pd.Series:
        texts = self.text(label)
        if not label.endswith("Name") and len(texts):
            try:
                numbers = texts.cast(pa.float64())
            except pa.ArrowInvalid:
                numbers = None
            if numbers is not None and not pc.any(pc.is_nan(numbers)).as_py():
                with contextlib.suppress(pa.ArrowInvalid):
                    # Only now, because Arrow takes 0x1F for a whole number.
                    numbers = texts.cast(pa.int64())
                return numbers.to_pandas()
        return texts.to_pandas()

    def rows(self, rows: np.ndarray) -> "StarTable":
        """The 0-based rows (m,), in this order."""
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        if len(rows) < 2 or (np.diff(rows) > 0).all():  # much faster than to take rows
            mask = np.zeros(len(self), bool)
            mask[rows] = True
            return StarTable(self.texts.filter(pa.array(mask)))
        return StarTable(self.texts.take(pa.array(rows)))

    def assign(self, **columns: Any) -> "StarTable":
        """With columns (n,) of numbers or texts replaced, or added at the end."""
        texts = self.texts
        for label, values in columns.items():
            column = as_texts(values)
            if label in texts.column_names:
                texts = texts.set_column(texts.column_names.index(label), label, column)
            else:
                texts = texts.append_column(label, column)
        return StarTable(texts)


Block = StarTable | dict[str, Any]


@dataclass(frozen=True, eq=False)
class StarTables:
    """The blocks of a STAR file that lists particles or classes.

    Attributes:
        blocks: all blocks in their order; lists of pairs are dicts of text.
        particles_name: name of the block that lists the particles.
        version: the number in the ``# version`` comment; None without one.
    """

    blocks: dict[str, Block]
    particles_name: str
    version: int | None = None

    @property
    def table(self) -> StarTable:
        """One row per particle."""
        return _table(self.blocks[self.particles_name])

    @property
    def particles(self) -> pd.DataFrame:
        """One row per particle, all columns; made anew at each call."""
        return self.table.frame()

    @property
    def optics(self) -> pd.DataFrame | None:
        """One row per optics group; None in the layout of RELION 3.0."""
        return None if self.optics_table is None else self.optics_table.frame()

    @property
    def optics_table(self) -> StarTable | None:
        """`optics` with the cells as they are written."""
        return _table(self.blocks["optics"]) if "optics" in self.blocks else None


def read_star(path: Path) -> StarTables:
    """Read a particle STAR file of RELION 3.0 (one block), 3.1 or 5 (optics and particles).

    Raises InputError (a ValueError) with the file and the damaged lines.
    """
    scanner = _Scanner(path)
    with path.open("rb") as file:
        workers = min(WORKERS, torch.get_num_threads())
        for lines, parsed in map_in_order(scanner.parse, _blocks_of_lines(file), workers):
            scanner.read(lines, parsed)
            if len(scanner.problems) >= LISTED:
                break
    if not scanner.outlines and not scanner.problems:
        scanner.problems.append(Problem(path, None, "has no data_ block", "give a STAR file"))
    if scanner.problems:
        raise input_error(scanner.problems)
    blocks = {name: outline.block() for name, outline in scanner.outlines.items()}
    return StarTables(blocks, _find_particles(path, blocks), scanner.version)


def write_star(path: Path, tables: StarTables, comments: tuple[str, ...] = ()) -> None:
    """Write the blocks in their order, completely or not at all; texts are written as they are."""
    head = [f"# version {tables.version}"] if tables.version is not None else []
    head += [f"# {comment}" for comment in comments]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(f"{line}\n".encode() for line in head)
        for name, block in tables.blocks.items():
            file.write(f"\ndata_{name}\n\n".encode())
            if isinstance(block, StarTable):
                _write_table(file, block)
            else:
                pairs = StarTable.of({label: [value] for label, value in block.items()})
                for label in pairs.labels:
                    (value,) = _in_quotes(pairs.text(label), _QUOTED).to_pylist()
                    file.write(f"_{label}\t\t\t{value}\n".encode())
            file.write(b"\n")


def as_texts(values: Any) -> pa.ChunkedArray:
    """(n,) strings of numbers or texts.

    Numbers that are not whole have six decimals if that is exact, and otherwise as many digits as
    are needed to read the same number again.
    """
    array = pa.array(values)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not pa.types.is_floating(array.type):
        return pa.chunked_array([array.cast(pa.string()).fill_null("<NA>")])
    numbers = np.asarray(array.to_numpy(zero_copy_only=False), np.float64)
    with np.errstate(invalid="ignore"):
        exact = (np.round(numbers, 6) == numbers) & (np.abs(numbers) < 1e12)
    decimals = pa.array(np.where(exact, numbers, 0.0)).cast(pa.decimal128(38, 6), safe=False)
    shortest = pa.array(numbers, from_pandas=False).cast(pa.string())
    return pa.chunked_array([pc.if_else(pa.array(exact), decimals.cast(pa.string()), shortest)])


def _write_table(file: BinaryIO, table: StarTable) -> None:
    file.write(b"loop_\n")
    file.writelines(f"_{label} #{i}\n".encode() for i, label in enumerate(table.labels, 1))
    for start in range(0, len(table), BATCH):
        part = table.texts.slice(start, BATCH)
        columns = [column.cast(pa.string()).combine_chunks() for column in part.columns]
        lines = _lines(columns)
        if _needs_quotes(lines):
            rules = [_QUOTED_FIRST] + [_QUOTED] * (len(columns) - 1)
            lines = _lines([_in_quotes(*each) for each in zip(columns, rules, strict=True)])
        file.write(lines.data)


def _lines(columns: list[pa.Array]) -> np.ndarray:
    """The rows of a table as the bytes (uint8) of lines, their cells separated by tabs."""
    *others, last = columns
    ended = pc.binary_join_element_wise(last, "", "\n")
    rows = pc.binary_join_element_wise(*others, ended, "\t")
    (_, offsets, texts), n = rows.buffers(), len(rows)
    bounds = np.frombuffer(offsets, np.int32)[rows.offset : rows.offset + n + 1]
    return np.frombuffer(texts, np.uint8)[bounds[0] : bounds[-1]]


def _needs_quotes(lines: np.ndarray) -> bool:
    """Whether a cell of `_lines` may need quotes: much faster than to look at every cell."""
    blank = lines <= 32  # spaces, tabs and line ends; two of them enclose an empty cell
    first = np.concatenate([lines[:1], lines[1:][lines[:-1] == 10]])
    return bool(
        (lines == 32).any()
        or blank[0]
        or (blank[1:] & blank[:-1]).any()
        or (lines == ord("#")).any()
        or (lines == ord("'")).any()
        or np.isin(first, np.frombuffer(b"_dl", np.uint8)).any()
    )


def _in_quotes(cells: pa.Array, rule: str) -> pa.Array:
    """The cells, with quotes about those that match ``rule``."""
    quoted = pc.binary_join_element_wise('"', cells, '"', "")
    return pc.if_else(pc.match_substring_regex(cells, rule), quoted, cells)


def _blocks_of_lines(file: BinaryIO) -> Iterator[bytes]:
    """The file in blocks of whole lines, which all end with a line feed."""
    file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)  # a byte order mark
    while lines := file.read(BLOCK) + file.readline():
        if b"\r" in lines:
            lines = lines.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield lines if lines.endswith(b"\n") else lines + b"\n"


@dataclass
class _Outline:
    """One block of the file: its labels, with the rows of its table or the values of its pairs."""

    name: str
    looped: bool = False
    labels: dict[str, None] = field(default_factory=dict)  # in order; found at once
    values: list[str] = field(default_factory=list)
    count: int = 0  # rows so far
    rows: list[list[str]] = field(default_factory=list)  # read line by line, not yet in parts
    parts: list[pa.Table] = field(default_factory=list)
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of the columns of the parts

    def add(self, part: pa.Table) -> None:
        """Add rows that were parsed at once."""
        self.flush()
        self.parts.append(part)
        self.count += len(part)

    def flush(self) -> None:
        """Turn rows that were read line by line into a part."""
        if self.rows:
            names = [str(i) for i in range(len(self.labels))]
            cells = [pa.array(column, pa.string()) for column in zip(*self.rows, strict=True)]
            self.parts.append(pa.table(cells, names=names))
            self.rows = []

    def is_open(self) -> bool:
        """Whether rows can follow; chooses the types of the columns when there are rows."""
        self.flush()
        if self.parts and not self.types:
            first = self.parts[0]
            often = {
                name: FEW * pc.count_distinct(first.column(name)).as_py() <= len(first)
                for name in first.column_names
            }
            repeated = pa.dictionary(pa.int32(), pa.string())
            self.types = {name: repeated if often[name] else pa.string() for name in often}
        return bool(self.parts)

    def block(self) -> Block:
        """The finished block; a list of pairs that describes a particle or optics is a table."""
        if not self.looped:
            pairs = dict(zip(self.labels, self.values, strict=True))
            listed = self.name == "optics" or "rlnImageName" in pairs
            return _table(pairs) if listed else pairs
        self.flush()
        if not self.parts:
            return StarTable(pa.table({label: pa.array([], pa.string()) for label in self.labels}))
        self.is_open()
        parts = [part.cast(pa.schema(list(self.types.items()))) for part in self.parts]
        return StarTable(pa.concat_tables(parts).rename_columns(list(self.labels)))


class _Parsed(NamedTuple):
    """Whole lines, parsed as rows of a block; no rows if they must be read one by one."""

    block: _Outline | None
    rows: pa.Table | None
    controls: bool  # control characters are among them
    lines: int


class _Codes:
    """Whole lines as arrays of a byte each: their codes, blanks and line ends."""

    def __init__(self, lines: bytes) -> None:
        self.bytes = np.frombuffer(lines, np.uint8)
        self.ends = self.bytes == 10
        self.blanks = self.bytes == 32
        if b"\t" in lines:
            self.blanks |= self.bytes == 9
        low = np.count_nonzero(self.bytes <= 32)
        self.controls = bool(low > np.count_nonzero(self.ends) + np.count_nonzero(self.blanks))

    def single_spaced(self) -> np.ndarray:
        """The lines with one space between values, and none at the start and end of a line."""
        keep = ~self.blanks
        # Of several blanks the first is kept, unless it begins or ends the line.
        keep[1:] |= self.bytes[:-1] > 32
        keep[:-1] &= ~(self.blanks[:-1] & self.ends[1:])
        plain = self.bytes[keep]
        plain[plain == 9] = 32
        return plain


class _Scanner:
    """Sorts the lines of a STAR file into blocks, and keeps the problems of the lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outlines: dict[str, _Outline] = {}
        self.problems: list[Problem] = []
        self.version: int | None = None
        self.line = 0  # lines so far
        self.offset = 0  # bytes so far
        self.last: _Outline | None = None
        self.open: _Outline | None = None  # the last block, if more rows may follow

    def parse(self, lines: bytes) -> tuple[bytes, "_Parsed"]:
        """Parse whole lines before it is their turn; called by several threads."""
        block, codes = self.open, _Codes(lines)
        part = None if block is None else _rows_at_once(lines, codes, block.types)
        return lines, _Parsed(block, part, codes.controls, int(np.count_nonzero(codes.ends)))

    def read(self, lines: bytes, parsed: "_Parsed") -> None:
        """Add whole lines, which `parse` has parsed."""
        if parsed.controls or not lines.isascii() or b"\x7f" in lines:
            self._refuse_odd(lines)
        block = self.open
        if block is not parsed.block:  # parsed while another block was open
            parsed = self.parse(lines)[1]
        if block is not None and parsed.rows is not None:
            block.add(parsed.rows)
            self.line += parsed.lines
        else:
            for line in lines.decode().split("\n")[:-1]:
                self._read_line(line.strip())
            self.open = self.last if self.last is not None and self.last.is_open() else None
            if self.problems:
                self.open = None
        self.offset += len(lines)

    def _refuse_odd(self, lines: bytes) -> None:
        """Raise InputError for bytes that are not text, and for odd characters."""
        try:
            text = lines.decode()
        except UnicodeDecodeError as error:
            what = f"not a text file: byte {self.offset + error.start} is not UTF-8"
            raise input_error([Problem(self.path, None, what, "give a STAR file")]) from error
        if odd := _ODD.search(text):
            line = self.line + text.count("\n", 0, odd.start()) + 1
            what = f"line {line} contains the character {odd[0]!r}"
            what += ", which is not allowed in a STAR file"
            raise input_error([Problem(self.path, None, what, _RESTORE)])

    def _read_line(self, line: str) -> None:
        self.line += 1
        before = self.last.count if self.last is not None else 0
        what = self._fault(line)
        if what is not None and len(self.problems) < LISTED:
            row = before + 1 if self.last is not None and self.last.count > before else None
            where = f"line {self.line}: {what}"
            self.problems.append(Problem(self.path, row, where, _RESTORE))

    def _fault(self, line: str) -> str | None:
        """Add one line to the blocks; return what is wrong with it, or None."""
        block = self.last
        if line.startswith("data_") and not (block is not None and _continues(line, block)):
            return self._begin(line)
        if not line or line.startswith("#"):
            if self.version is None and (version := _VERSION.match(line)):
                self.version = int(version[1])
            return None
        if block is None:
            return "text before the first data_ line"
        if line.split()[0] == "loop_":
            again = block.looped or bool(block.labels)
            block.looped = True
            return "a second loop_ in one block" if again else None
        if line.startswith("_") and not block.count and not _continues(line, block):
            return _add_label(line, block)
        if block.looped:
            return _add_row(line, block)
        return "this line is not a label and not in a loop_"

    def _begin(self, line: str) -> str | None:
        """Begin a block."""
        words = line.split()
        name = words[0][5:]
        known = name in self.outlines
        self.last = _Outline(name)
        if len(words) > 1 and not words[1].startswith("#"):
            return "more text after the name in a data_ line"
        if known:
            return f"the block data_{name} appears twice"
        self.outlines[name] = self.last
        return None


def _continues(line: str, block: _Outline) -> bool:
    """Whether a line that begins like a label or a block is a row: it has a row's values."""
    return block.looped and len(block.labels) > 2 and len(_values(line)) == len(block.labels)


def _add_label(line: str, block: _Outline) -> str | None:
    label = line.split()[0][1:]
    if not label or label in block.labels:
        return f"the label _{label} appears twice" if label else "a label without a name"
    block.labels[label] = None
    if block.looped:
        return None
    try:
        values = shlex.split(line)[1:]
    except ValueError:
        values = []
    block.values += values[:1]
    return None if len(values) == 1 else f"_{label} should be followed by one value"


def _add_row(line: str, block: _Outline) -> str | None:
    block.count += 1
    values = _values(line)
    if any('"' in value for value in values):
        return "a quote inside a value, which STAR readers interpret differently"
    if len(values) != len(block.labels):
        return f"{len(values)} values for {len(block.labels)} labels"
    block.rows.append(values)
    return None


def _values(line: str) -> list[str]:
    """The values of a line without their quotes, up to a comment."""
    if not ('"' in line or "'" in line or "#" in line):
        return line.split()
    values = []
    for match in _VALUE.finditer(line):
        if match[3] is not None and match[3].startswith("#"):
            break  # a comment to the end of the line
        values.append(next(group for group in match.groups() if group is not None))
    return values


def _rows_at_once(lines: bytes, codes: _Codes, types: dict[str, pa.DataType]) -> pa.Table | None:
    """Parse lines that are all rows of a table; None if they must be read one by one."""
    if any(mark in lines for mark in (b'"', b"'", b"#")):
        return None
    plain = codes.single_spaced()
    ends = np.flatnonzero(plain == 10)
    first = plain[np.append(0, ends[:-1] + 1)]
    if (plain[ends - 1] == 32).any() or (first == ord("d")).any() or (first == ord("l")).any():
        text = plain.tobytes().replace(b" \n", b"\n")
        if text.startswith((b"data_", b"loop_")) or b"\ndata_" in text or b"\nloop_" in text:
            return None
        plain = np.frombuffer(text, np.uint8)
    try:
        return csv.read_csv(
            pa.BufferReader(pa.py_buffer(plain)),
            csv.ReadOptions(column_names=list(types), use_threads=False, block_size=len(plain) + 1),
            csv.ParseOptions(delimiter=" ", quote_char=False),
            csv.ConvertOptions(column_types=types, check_utf8=False, strings_can_be_null=False),
            memory_pool=_memory_pool(),
        )
    except pa.ArrowInvalid:  # rows of another length; reading them one by one finds which
        return None


def _memory_pool() -> pa.MemoryPool:
    """Jemalloc where pyarrow has it: reading takes a fifth less time than with the default."""
    try:
        return pa.jemalloc_memory_pool()
    except NotImplementedError:
        return pa.default_memory_pool()


def _table(block: Block) -> StarTable:
    """A table, also of one row that is given as pairs."""
    if isinstance(block, StarTable):
        return block
    return StarTable.of({label: [value] for label, value in block.items()})


def _find_particles(path: Path, blocks: dict[str, Block]) -> str:
    tables = {name: block for name, block in blocks.items() if isinstance(block, StarTable)}
    named = [name for name, table in tables.items() if "rlnImageName" in table]
    if "particles" in named or len(named) == 1:
        return "particles" if "particles" in named else named[0]
    what = f"several particle tables {named}" if named else "no table with a column rlnImageName"
    remedy = "give a particle STAR file of RELION, its table named data_particles"
    raise input_error([Problem(path, None, what, remedy)])
