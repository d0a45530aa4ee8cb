"""Find all problems of an input from its table and headers, in seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cryoalign.app.run_folder import EMBEDDED
from cryoalign.images.ctf import Finding, ImpossibleError, implausible
from cryoalign.io.images import ImageFile
from cryoalign.io.problems import Problem
from cryoalign.io.stack import ParticleStack
from cryoalign.io.survey import Survey, survey
from cryoalign.methods.base import Method
from cryoalign.particles.cache import places_for
from cryoalign.particles.ctf_use import ctf_line
from cryoalign.particles.settings import Images
from cryoalign.particles.stack import optics_of

# Memory of a run, fitted to the peak memory of six runs (64 to 176 px, 500 to 5000 particles, 3 to
# 5 classes on 2 cores); the estimate was within 10 % of each.
_PROGRAM = 560 * 2**20  # bytes of Python, its libraries and the arrays of the search
_IMAGES = 1500  # batches, weights and derivatives, as a number of images
_COPIES = 4  # copies of each particle that the t-SNE maps show
_RESULT = 200  # bytes of pose, class and score per particle


@dataclass(frozen=True)
class CheckReport:
    """What ``check_stack`` found.

    Attributes:
        path: the input file.
        problems: all problems that must be corrected before a run.
        n_particles: number of rows of the STAR file or images of the stack; 0 if not known.
        shape: (h, w) in pixels of the images in the first stack; None if none can be read.
        pixel_size: Å; None if not known.
        stacks: headers of the stacks that can be read.
        warnings: what may be wrong with the input; a run can use it.
        ctf: one line that says what a run would do with the CTF; empty if that is not known.
        memory_bytes: estimated peak memory in bytes of a run with one process on a CPU.
    """

    path: Path
    problems: tuple[Problem, ...]
    n_particles: int
    shape: tuple[int, int] | None
    pixel_size: float | None
    stacks: tuple[ImageFile, ...]
    memory_bytes: int
    warnings: tuple[Problem, ...] = ()
    ctf: str = ""

    def render(self) -> RenderableType:
        """What ``rich.console.Console.print`` shows: sizes, warnings and problems."""
        pixel = "not known" if self.pixel_size is None else f"{self.pixel_size:.4g} Å"
        size = "not known" if self.shape is None else f"{self.shape[0]} x {self.shape[1]} px"
        stored = sum(stack.nbytes for stack in self.stacks)
        facts = Text(
            f"{self.path}\n  particles    {self.n_particles}\n  image size   {size}\n"
            f"  pixel size   {pixel}\n"
            f"  stacks       {len(self.stacks)} ({stored / 1e9:.3g} GB on disk)\n"
            f"  memory       about {self.memory_bytes / 1e9:.2g} GB for a run with one process\n"
        )
        if self.ctf:
            facts.append(f"  CTF          {self.ctf.removeprefix('CTF: ')}\n")
        parts: list[RenderableType] = [facts]
        if self.warnings:
            count = f"{len(self.warnings)} warning(s); rows count from 1"
            parts += [Text(count, style="bold yellow"), _table(self.warnings, "warning")]
        if not self.problems:
            return Group(*parts, Text("no problems found", style="bold green"))
        count = f"{len(self.problems)} problem(s); rows count from 1"
        return Group(*parts, Text(count, style="bold red"), _table(self.problems, "problem"))


def _table(problems: tuple[Problem, ...], kind: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", show_lines=True)
    for column in ("file", "row", kind, "remedy"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        row = "" if problem.row is None else str(problem.row)
        table.add_row(*map(Text, (str(problem.file), row, problem.what, problem.remedy)))
    return table


def check_stack(
    path: str | PathLike[str], method: Method | None = None, images: Images | None = None, *,
    root: str | PathLike[str] | None = None, allow_outside: bool = False,
) -> CheckReport:  # fmt: skip
    """List all problems that would stop a run on these particles.

    No pixels are read, and problems of the input are returned, not raised.

    Args:
        path: a STAR file, .mrcs, .mrc or .npy.
        method: its particle radius and shifts are compared with the box; None skips this.
        images: how particles will be prepared; None takes the defaults.
        root, allow_outside: folders in which stacks may be, as in ``read_particles``.
    """
    path, images = Path(path), images or Images()
    found = survey(path, root=None if root is None else Path(root), allow_outside=allow_outside)
    problems = [*found.problems, *_geometry_problems(found, images.box)]
    n = len(found.star.table) if found.star is not None else len(found.file_of)
    warnings, ctf = [*found.warnings], ""
    if method is not None:
        problems += _method_problems(found, method, images, n)
        if not found.problems:
            wrong, unusual, ctf = _examine_ctf(found, method)
            problems += wrong
            warnings += unusual
    return CheckReport(
        path=path,
        problems=tuple(problems),
        n_particles=n,
        shape=found.shape,
        pixel_size=found.pixel_size,
        stacks=found.files,
        memory_bytes=_memory(found, n, images),
        warnings=tuple(warnings),
        ctf=ctf,
    )


def _examine_ctf(found: Survey, method: Method) -> tuple[list[Problem], list[Problem], str]:
    """Impossible and unusual values of the CTF, and what the method does with it."""
    use, stack = method.ctf_use(method.particle.ctf), ParticleStack(found)
    if use == "none":
        return [], [], ctf_line(use, stack, None)
    try:
        optics = optics_of(stack)
    except ImpossibleError as error:
        return [_of_row(found, each) for each in error.findings], [], ""
    except ValueError as error:  # "what is wrong: what to do"
        what, _, remedy = str(error).partition(": ")
        return [Problem(found.path, None, what, remedy)], [], ""
    unusual = [] if optics is None else [_of_row(found, each) for each in implausible(optics)]
    return [], unusual, ctf_line(use, stack, optics)


def _of_row(found: Survey, finding: Finding) -> Problem:
    remedy = f"{finding.remedy}, or set particle.ctf=none"
    return Problem(found.path, finding.row + 1, f"{finding.column} {finding.what}", remedy)


def _geometry_problems(found: Survey, size: int | None) -> Iterator[Problem]:
    """Images that no method can use: not square, or smaller than ``images.box``."""
    if found.shape is None:
        return
    height, width = found.shape
    if height != width:
        what = f"images of {height} x {width} px are not square"
        yield Problem(found.path, None, what, "cut or pad them to a square box")
        return
    if size is not None and size > width:
        what = f"images of {width} px are smaller than images.box = {size}"
        yield Problem(found.path, None, what, f"use images.box <= {width}")


def _method_problems(found: Survey, method: Method, images: Images, n: int) -> Iterator[Problem]:
    """Settings of the method that do not fit the size or the number of the images."""
    if found.shape is None or found.shape[0] != found.shape[1]:
        return
    try:
        method.check(images.box_of(found.shape[1], found.pixel_size), n or None)
    except ValueError as error:  # messages of methods are "what is wrong: what to do"
        what, _, remedy = str(error).partition(": ")
        yield Problem(found.path, None, what, remedy or "change that setting")


def _memory(found: Survey, n: int, prepared: Images) -> int:
    """Peak memory of a run in bytes, without references and classes, which need little."""
    table = 0 if found.star is None else found.star.table.nbytes
    height, width = found.shape or (0, 0)
    images = _IMAGES + _COPIES * min(n, EMBEDDED)
    kept = 0
    if prepared.cache == "auto":
        room = sum(place.budget for place in places_for(torch.device("cpu")))
        kept = min(room, 4 * n * (prepared.box or width) ** 2)
    return _PROGRAM + 2 * table + _RESULT * n + images * height * width * 4 + kept
