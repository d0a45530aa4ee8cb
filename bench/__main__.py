"""``python -m bench``: one command for every entry, its options from the entry's signature."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import (
    accuracy,
    adaptive,
    assignment,
    blind,
    classes,
    classify,
    cones,
    coverage,
    finish,
    gpu_search,
    gpu_stages,
    input,
    interpolation,
    invariants,
    iteration,
    layers,
    loader,
    memory,
    peers,
    processes,
    quality,
    relion,
    rfa,
    scaling,
    search,
    stream,
)
from bench.result import RESULTS, Result, compare, record

ENTRIES: dict[str, Callable[..., Result]] = {
    "search": search.run,
    "gpu_search": gpu_search.run,
    "gpu_stages": gpu_stages.run,
    "iteration": iteration.run,
    "scaling": scaling.run,
    "memory": memory.run,
    "accuracy": accuracy.run,
    "cones": cones.run,
    "coverage": coverage.run,
    "adaptive": adaptive.run,
    "adaptive-accuracy": adaptive.accuracy,
    "blind": blind.run,
    "classes": classes.run,
    "classify": classify.run,
    "relion": relion.run,
    "peers": peers.run,
    "rfa": rfa.run,
    "assignment": assignment.run,
    "quality": quality.run,
    "interpolation": interpolation.run,
    "finish": finish.run,
    "loader": loader.run,
    "stream": stream.run,
    "input": input.run,
    "input-memory": input.memory,
    "layers": layers.run,
    "invariants": invariants.run,
    "processes": processes.run,
}


def parser() -> argparse.ArgumentParser:
    """The command line: a sub-command per entry."""
    main_parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure cryoalign: what it costs, what it reaches."
    )
    commands = main_parser.add_subparsers(dest="entry", required=True, metavar="ENTRY")
    commands.add_parser("list", help="name the entries")
    for name, function in ENTRIES.items():
        text = inspect.getdoc(function) or ""
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0].replace("%", "%%"),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--keep",
            action="store_true",
            help=f"write bench/results/{name}.json (-cuda.json on a GPU)",
        )
        command.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
        for parameter, kind in typing.get_type_hints(function, include_extras=True).items():
            if parameter != "return":
                default = inspect.signature(function).parameters[parameter].default
                _add_option(command, parameter, kind, default)
    return main_parser


def _add_option(command: argparse.ArgumentParser, name: str, kind: Any, default: Any) -> None:
    """One option from ``name: Annotated[kind, help] = default``."""
    kind, explanation = typing.get_args(kind)
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        action = argparse.BooleanOptionalAction
        command.add_argument(flag, action=action, default=default, help=explanation)
        return
    several = typing.get_origin(kind) is tuple
    if several or isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]  # tuple[int, ...] and Path | None
    shown = " ".join(map(str, default)) if several else default
    if default is not None and default != ():
        explanation += f" (default {shown})"
    command.add_argument(
        flag, type=kind, nargs="+" if several else None, default=default, help=explanation
    )


def _console() -> Console:
    """Standard output; a file or a pipe gets lines as long as the tables need."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _without_folders(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_without_folders(each) for each in value)
    return value.name if isinstance(value, Path) else value


def main(arguments: list[str] | None = None) -> None:
    """Run one entry, show its table, keep it where asked."""
    given = vars(parser().parse_args(arguments))
    entry, console = given.pop("entry"), _console()
    if entry == "list":
        for name, function in ENTRIES.items():
            console.print(
                f"{name:19}{(inspect.getdoc(function) or '').partition(chr(10))[0]}",
                highlight=False,
            )
        return
    keep = given.pop("keep")
    torch.set_num_threads(given.pop("threads"))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    result = ENTRIES[entry](**options)
    shown = {k: _without_folders(v) for k, v in options.items()}
    made = record(entry, shown, result)
    made.show(console)
    kept = RESULTS / made.file_name()
    if kept.exists():
        for line in compare(made, json.loads(kept.read_text())):
            console.print(f"- {line}", highlight=False)
    if keep:
        console.print(f"kept in bench/results/{made.keep().name}")


if __name__ == "__main__":
    main()
