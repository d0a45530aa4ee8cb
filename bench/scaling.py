"""How speed changes with each size of the problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from bench import plain
from bench.data import particles
from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.polar import reference_spectra
from cryoalign.runtime.processes import choose_device
from cryoalign.search.match import best_match
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search


@dataclass(frozen=True)
class Case:
    """One problem."""

    varied: str
    n: int
    k: int
    max_shift: float
    size: int
    last_ring: int


def run(
    n: Annotated[int | None, "particles; 48 on a CPU, 8192 on a GPU"] = None,
    k: Annotated[tuple[int, ...], "references"] = (1, 10, 50, 200),
    max_shift: Annotated[tuple[float, ...], "largest trial shifts, px"] = (1.0, 3.0, 5.0),
    size: Annotated[tuple[int, ...], "boxes, px"] = (90, 128, 256),
    last_ring: Annotated[tuple[int, ...], "outermost rings in the largest box"] = (36, 60, 100),
    repeats: Annotated[int, "timings of each, of which the median counts"] = 3,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Images in, refined poses out, as one size at a time leaves the reference problem.

    The reference problem is K = 10, max_shift 3, 90 px, last ring 36. The baseline is the plain
    formulation (bench/plain.py) of features and search, in the same run.
    """
    where = choose_device(device)
    base = Case("", n or (48 if where.type == "cpu" else 8192), 10, 3.0, 90, 36)
    rows: list[Row] = []
    for case in _cases(base, k, max_shift, size, last_ring):
        images, views = particles(case.n, case.k, case.size, 0.1, where)
        search = Search(max_shift=case.max_shift, last_ring=case.last_ring)
        rings = search.rings(case.size)
        spectra = reference_spectra(views, rings)

        def poses(images=images, views=views, spectra=spectra, search=search, rings=rings):  # type: ignore[no-untyped-def]
            label, pose, _ = best_match(images, spectra, search, rings)
            return refine(images, views, label, pose, rings)

        few = images[: max(8, len(images) // 8)]  # the plain table is large and slow
        both = plain.stages(few, views, search)["plain both"]
        times = measure({"ours": poses, "plain": both}, where, repeats)
        speed, slow = case.n / times["ours"].wall, len(few) / times["plain"].wall
        rows.append(
            {
                "varied": case.varied,
                "n": case.n,
                "k": case.k,
                "shifts": len(search.shifts()),
                "size": case.size,
                "last ring": case.last_ring,
                "angles": rings.n_angles,
                "particles/s": speed,
                "plain, particles/s": slow,
                "x plain": speed / slow,
            }
        )
    return Result(rows, [f"features, search and refinement on {where.type}; median of {repeats}"])


def _cases(
    base: Case,
    k: tuple[int, ...],
    max_shift: tuple[float, ...],
    size: tuple[int, ...],
    last_ring: tuple[int, ...],
) -> Iterator[Case]:
    for factor in (1, 2):
        yield replace(base, varied="n", n=factor * base.n)
    for value in k:
        yield replace(base, varied="k", k=value)
    for reach in max_shift:
        yield replace(base, varied="shifts", max_shift=reach)
    for box in size:
        yield replace(base, varied="box", size=box, last_ring=int(0.4 * box))
    for ring in last_ring:
        yield replace(base, varied="radius", size=max(size), last_ring=ring)
