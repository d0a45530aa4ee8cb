"""How the speed of the default search changes with each size of the problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch

from bench import plain
from bench.data import particles
from bench.gpu_search import copy_rate
from bench.result import Result, Row
from bench.timing import measure
from cryoalign.runtime.processes import choose_device
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.settings import Search

MOST_BYTES = 2**31  # of the images of a case on a GPU
PLAIN_BYTES = 2**31  # of the plain formulation's ring spectra


@dataclass(frozen=True)
class Case:
    """One problem; the last ring is the largest that fits the box, as by default."""

    varied: str
    k: int
    max_shift: float
    size: int


def run(
    n: Annotated[int | None, "particles; 48 on a CPU, on a GPU 2 GiB, at most 65536"] = None,
    k: Annotated[tuple[int, ...], "references"] = (1, 10, 50, 200),
    max_shift: Annotated[tuple[float, ...], "largest trial shifts, px"] = (1.0, 3.0, 5.0, 10.0),
    size: Annotated[tuple[int, ...], "boxes, px"] = (64, 90, 128, 180, 256, 360),
    snr: Annotated[float, "of the simulated particles"] = 0.1,
    repeats: Annotated[int, "timings of each, of which the median counts"] = 3,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Images in memory to refined poses with the default search, as one size at a time changes.

    The reference problem is 50 references, max_shift 3, 90 px. The baseline is the plain
    formulation (bench/plain.py) of features and exhaustive search, without refinement, on the same
    rings in the same run.
    """
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    copy = copy_rate(repeats) if on_gpu else None
    rows: list[Row] = []
    for case in _cases(Case("", 50, 3.0, 90), k, max_shift, size):
        count = n or (min(65536, MOST_BYTES // (4 * case.size**2)) if on_gpu else 48)
        images, views = particles(count, case.k, case.size, snr, where)
        search = Search(max_shift=case.max_shift)
        target = prepare_target(views, search)
        rings, coarse = target.rings, target.screen
        assert coarse is not None

        each = 8 * len(search.shifts()) * len(rings.radii()) * rings.n_angles // 2
        few = images[: max(8, min(count // 8, PLAIN_BYTES // each))]
        both = plain.stages(few, views, search)["plain both"]
        ours = lambda images=images, target=target: best_poses(images, target)  # noqa: E731
        times = measure({"ours": ours, "plain": both}, where, repeats)
        speed, slow = count / times["ours"].wall, len(few) / times["plain"].wall
        read = 4e-12 * speed * case.size**2  # TB/s
        rows.append(
            {
                "varied": case.varied,
                "n": count,
                "k": case.k,
                "max shift": case.max_shift,
                "box": case.size,
                "last ring": rings.last_ring,
                "searched": f"{coarse.size} px, {coarse.rings.last_ring} rings, "
                f"{len(coarse.shifts)} shifts",
                "particles/s": speed,
                "images read TB/s": read if copy else None,
                "of copy": 1e12 * read / copy if copy else None,
                "plain, particles/s": slow,
                "x plain": speed / slow,
            }
        )
        del images, few, both, ours
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    notes = [
        f"default search, refined, on {name}; median of {repeats}",
        "searched: images, rings and trial shifts of the first stage",
    ]
    if copy:
        notes.append(f"copy measured in this run, read and written: {copy / 1e12:.2f} TB/s")
    return Result(rows, notes)


def _cases(
    base: Case, k: tuple[int, ...], max_shift: tuple[float, ...], size: tuple[int, ...]
) -> Iterator[Case]:
    for box in size:
        yield replace(base, varied="box", size=box)
    for value in k:
        yield replace(base, varied="k", k=value)
    for reach in max_shift:
        yield replace(base, varied="shifts", max_shift=reach)
