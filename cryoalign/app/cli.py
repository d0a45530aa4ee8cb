"""The ``cryoalign`` command: run, check, simulate, doctor, build-kernels.

Each command imports PyTorch and the rest of the package itself, so that ``--help`` and
``--version`` do not wait for them.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryoalign.app.settings import RunConfig

LISTED = 15  # number of classes in the table at the end of a run; more fill the screen
NOISY = r"(torch|sklearn|numpy|pandas|mrcfile|starfile|matplotlib|joblib)(\.|$)"  # libraries
_KEYS = "settings as key=value, e.g. seed=4 (the keys are listed below)"
PARTICLES = (".star", ".mrcs", ".mrc", ".npy")  # suffixes of particle files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done; 1: `check` found problems; 2: an error that the user can correct, printed as one
    message; 130: interrupted. ``CRYOALIGN_DEBUG=1`` also prints the traceback.
    """
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        word = unknown[0].lstrip("-").partition("=")[0]
        _parser().error(f"unknown option {unknown[0]}; settings have no dashes: {word}=...")
    _set_up_warnings()
    try:
        command: Callable[[argparse.Namespace], int] = parsed.command
        return command(parsed)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        return _report_error(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's: a GPU's memory is full
            raise
        return _report_error(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cryoalign", description="Align and classify cryo-EM particles."
    )
    parser.add_argument("--version", action="version", version=f"cryoalign {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)

    runs = _add(commands, "run", _run, "align particles and average their classes", "RunConfig")
    runs.add_argument(
        "words",
        metavar="CONFIG|STACK|key=value",
        nargs="*",
        default=[],
        help=f"a YAML file of settings, the particles' file, and {_KEYS}; only the particles are "
        "required",
    )

    check = _add(commands, "check", _check, "list all problems of a stack", "RunConfig")
    check.add_argument("stack", metavar="STACK", help="STAR file, .mrcs, .mrc or .npy")
    check.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="the same as for run, so that box, rings and shifts are checked too",
    )

    make = _add(commands, "simulate", _simulate, "make a stack with known poses", "SimulateConfig")
    make.add_argument("folder", metavar="OUT", help="folder to write into")
    make.add_argument("settings", metavar="key=value", nargs="*", default=[], help=_KEYS)

    purpose = "show the hardware and kernels that are used, and what would make runs faster"
    commands.add_parser("doctor", help=purpose).set_defaults(command=_doctor)

    purpose = "compile the optional kernels for this machine's CPU and GPU"
    kernels = commands.add_parser("build-kernels", help=purpose)
    kernels.add_argument("-v", "--verbose", action="store_true", help="show compiler commands")
    kernels.set_defaults(command=_build_kernels)
    return parser


class _CommandParser(argparse.ArgumentParser):
    """Parser of one command. Its help ends with a table of the settings, if there are any."""

    settings = ""  # name of the settings class in `app.settings`

    def format_help(self) -> str:
        if self.settings:
            from cryoalign.app import settings
            from cryoalign.app.schema import describe

            keys = describe(getattr(settings, self.settings))
            self.epilog = f"keys (name, type, default, meaning):\n{keys}"
        return super().format_help()


def _add(
    commands: argparse._SubParsersAction[_CommandParser], name: str,
    command: Callable[[argparse.Namespace], int], purpose: str, settings: str,
) -> _CommandParser:  # fmt: skip
    parser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    parser.settings = settings
    return parser


def _version() -> str:
    try:
        return version("cryoalign")
    except PackageNotFoundError:
        return "(not installed)"


def _run(parsed: argparse.Namespace) -> int:
    from cryoalign.app.run import run
    from cryoalign.app.settings import load_config
    from cryoalign.runtime.processes import choose_device, process_group, rank

    config = load_config(*_sorted_words(parsed.words))
    # An error is handled before the process group ends, because its end makes the other processes
    # fail too, and they could print their errors first.
    with process_group(choose_device(config.device)):
        try:
            folder = run(config)
        except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
            if _first_to_fail():
                raise
            raise SystemExit(1) from error
        if rank() == 0:
            _show(folder, config)
    return 0


def _sorted_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Sort the arguments of ``run`` into the YAML file, None without one, and key=value settings.

    An argument without ``=`` is a file: of particles if it has one of their suffixes, otherwise
    of settings.
    """
    file, settings = None, []
    for word in words:
        if "=" in word and not Path(word).exists():
            settings.append(word)
        elif Path(word).suffix.lower() in PARTICLES:
            settings.append(f"particles={word}")
        elif file is None:
            file = word
        else:
            raise ValueError(f"two files of settings, {file} and {word}: give only one")
    return file, settings


def _check(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    from cryoalign.app.check import check_stack
    from cryoalign.app.settings import load_config

    # The same arguments as for `run`, so that a user can turn one command into the other.
    words = [f"particles={parsed.stack}", *parsed.settings]
    if not any(word.startswith(("n_classes=", "method=isac")) for word in words):
        words.append("n_classes=1")
    config = load_config(None, words)
    if not config.particles.exists():
        raise FileNotFoundError(f"{config.particles}: no such file; check the path")
    report = check_stack(
        config.particles, config.made(), config.images, root=config.root,
        allow_outside=config.allow_outside,
    )  # fmt: skip
    Console().print(report.render())
    return 1 if report.problems else 0


def _doctor(_: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cryoalign.app.doctor import examine

    table = Table(box=None, show_header=False)
    for finding in examine():
        table.add_row(finding.what, Text(finding.found, overflow="fold"))
        if finding.advice:
            table.add_row("", Text(f"faster: {finding.advice}", style="bold yellow"))
    Console().print(table)
    return 0


def _build_kernels(parsed: argparse.Namespace) -> int:
    from cryoalign.operators.kernels import build

    return build.main(parsed.verbose)


def _simulate(parsed: argparse.Namespace) -> int:
    from cryoalign.app.schema import load_settings
    from cryoalign.app.settings import SimulateConfig
    from cryoalign.particles.simulate import simulate, write_simulation

    settings = load_settings(SimulateConfig, None, parsed.settings)
    star = write_simulation(parsed.folder, simulate(**vars(settings)))
    print(
        f"{settings.n} particles of {settings.n_classes} views are in {star},\n"
        f"their true poses are in {star.parent / 'truth.csv'}. Next:\n"
        f"  cryoalign run particles={shlex.quote(str(star))} n_classes={settings.n_classes}"
    )
    return 0


def _show(folder: Path, config: RunConfig) -> None:
    """Print the largest classes, what the user should look at, and the paths of the results."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cryoalign.app.run_folder import box_of
    from cryoalign.report.page import flags
    from cryoalign.results.alignment import Alignment

    alignment = Alignment.load(folder / "alignment.npz")
    classes = alignment.class_frame().sort_values("size", ascending=False, kind="stable")
    unit = "Å" if alignment.pixel_size else "px"
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("class", "particles", f"resolution ({unit})", "mean score"):
        table.add_column(column, justify="right")
    shown = classes[["class_number", "size", "resolution", "mean_score"]].head(LISTED)
    for number, size, resolution, score in shown.to_numpy().tolist():
        resolution_text = f"{resolution:.1f}" if math.isfinite(resolution) else "–"
        score_text = f"{score:.3f}" if size else "–"
        table.add_row(f"{number:.0f}", f"{size:.0f}", resolution_text, score_text)
    Console().print(table)
    if len(classes) > LISTED:
        print(f"and {len(classes) - LISTED} smaller classes in {folder / 'classes.csv'}")
    if len(alignment.rejected):
        print(f"set aside {len(alignment.rejected)} particles: {folder / 'rejected.csv'}")
    method = config.made()
    limit = method.max_shift(box_of(alignment)) * alignment.scale
    for flag in flags(alignment, limit, method.shift_key):
        Console().print(Text(f"worth a look: {flag}", style="yellow"), soft_wrap=True)
    print(f"results   {folder}")
    print(f"report    {folder / 'report.html'}")
    for picture in sorted(folder.glob("*.png")):
        print(f"picture   {picture}")


def _first_to_fail() -> bool:
    """Whether this process failed before the others that ``torchrun`` started on this machine.

    When one process fails, the others fail as well because they lose contact with it. Only the
    first one prints its error.
    """
    from cryoalign.runtime.processes import rank, world_size

    # torchrun names a file for every process, <folder of this attempt>/<rank>/error.json.
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if world_size() == 1 or errors is None:
        return True
    try:
        (Path(errors).parent.parent / "cryoalign-failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return rank() == 0
    return True


def _report_error(error: BaseException) -> int:
    if os.environ.get("CRYOALIGN_DEBUG"):
        traceback.print_exception(error)
    interrupted = isinstance(error, KeyboardInterrupt)
    text = str(error) or "interrupted"
    if type(error).__name__ == "OutOfMemoryError":
        text = f"the GPU has too little memory: use a smaller batch_size or images.box ({text})"
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    print(f"cryoalign: {'' if interrupted else 'error: '}{text}", file=sys.stderr)
    return 130 if interrupted else 2


def _set_up_warnings() -> None:
    """Hide warnings that libraries make for developers; print all others in one line."""
    for category in (DeprecationWarning, FutureWarning, UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=NOISY)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"cryoalign: warning: {message}", file=sys.stderr)

    warnings.showwarning = show
