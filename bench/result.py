"""A bench entry's result: what was measured, on what, shown as a table and kept as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cryoalign.operators.kernels import cpu
from cryoalign.runtime.files import replacing

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Rows of one table, all with the first row's columns, and what a reader must know."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def with_means(rows: list[Row], by: tuple[str, ...], over: str = "seed") -> list[Row]:
    """Rows, and after them one of means for every group of several.

    Args:
        rows: with the same columns; only those that are alike in a group need not be numbers.
        by: columns whose values make a group.
        over: the column that counts through a group.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    means = []
    for group in groups.values():
        if len(group) > 1:
            columns = {key: [row[key] for row in group] for key in group[0] if key != over}
            mean = {
                key: values[0] if len(set(values)) == 1 else float(sum(values)) / len(values)
                for key, values in columns.items()
            }
            means.append({key: "mean" if key == over else mean[key] for key in group[0]})
    return rows + means


@dataclass(frozen=True)
class Record:
    """A result together with how it came about."""

    entry: str
    options: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    result: Result

    def file_name(self) -> str:
        """``<entry>.json``, with ``-joint`` and ``-cuda`` (on a GPU) where so measured."""
        joint = "-joint" * bool(self.options.get("joint"))
        return f"{self.entry}{joint}{'-cuda' * (self.options.get('device') == 'cuda')}.json"

    def show(self, console: Console) -> None:
        """Print everything."""
        for title in ("options", "machine", "versions"):
            items = getattr(self, title).items()
            console.print(f"[bold]{title}[/]  " + ", ".join(f"{k} {v}" for k, v in items))
        console.print(_table(self.entry, self.result.rows))
        for note in self.result.notes:
            console.print(f"- {note}", markup=False)

    def keep(self, folder: Path = RESULTS) -> Path:
        """Write `file_name`, with no folder of this machine in it; returns its path."""
        folder.mkdir(exist_ok=True)
        path = folder / self.file_name()
        with replacing(path) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1, default=_plain) + "\n")
        return path


def compare(now: Record, kept: dict[str, Any]) -> list[str]:
    """What has changed since a kept result: a line for each speed of each row that both have.

    Rows are matched by their figures that say what was measured (texts and whole numbers).
    """
    lines = []
    if kept["machine"].get("cpu") != now.machine.get("cpu") or kept["machine"].get(
        "gpu"
    ) != now.machine.get("gpu"):
        lines.append("kept on another machine: speeds do not compare")
    before = {_subject(row): row for row in kept["result"]["rows"]}
    for row in now.result.rows:
        old = before.get(_subject(row), {})
        for name in ("particles/s", "x plain", "x plain search"):
            if row.get(name) and old.get(name):
                lines.append(
                    f"{dict(_subject(row))}: {name} {row[name]:.4g}, kept {old[name]:.4g} "
                    f"of {kept['date']}, ratio {row[name] / old[name]:.2f}"
                )
    return lines


def _subject(row: Row) -> tuple[tuple[str, Any], ...]:
    return tuple((k, v) for k, v in row.items() if isinstance(v, str | int))


def record(entry: str, options: dict[str, Any], result: Result) -> Record:
    """Put a result together with this machine and these versions."""
    return Record(entry, options, machine(), versions(), datetime.date.today().isoformat(), result)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "CPU kernels": "in use" if cpu.usable() else "none",
        "load average": None if load is None else round(load, 2),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Python and the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("cryoalign", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found


def _table(title: str, rows: list[Row]) -> Table:
    """Rows as rows, or as columns where there are more figures than rows."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    if len(cells[0]) > len(rows):
        cells = [list(column) for column in zip(*cells, strict=True)]
    table = Table(*cells[0], title=title)
    for column in table.columns:
        column.justify = "right"
    for row in cells[1:]:
        table.add_row(*row)
    return table


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    # A path's folders are nobody's business; its name says which data it was.
    return value.name if isinstance(value, Path) else str(value)
