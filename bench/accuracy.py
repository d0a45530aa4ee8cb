"""How near poses come to the truth, and to the best that noise allows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from bench.bound import expected_medians
from bench.data import KnownSet, known_sets
from bench.result import Result, Row
from cryoalign.mra import align_multi_reference
from cryoalign.pose import wrap_degrees
from cryoalign.search import Search


def run(
    data: Annotated[Path | None, "PREFIX of .mrcs, _views.mrcs, _truth.npz; else simulate"] = None,
    snr: Annotated[tuple[float, ...], "of the simulated sets"] = (0.1, 0.05),
    n: Annotated[int, "simulated particles"] = 2000,
    views: Annotated[int, "simulated views"] = 20,
    size: Annotated[int, "simulated box, px"] = 90,
    seed: Annotated[int, "of the simulation"] = 0,
    last_ring: Annotated[int | None, "outermost ring, px; else the largest that fits"] = None,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Errors with the true views as references, against the Cramér-Rao bound.

    One iteration of align_multi_reference. Errors are plain differences from the true poses, no
    class's mean is removed; angle and shift errors are those of particles with the right class
    and hand. The bound is for white noise over the whole box with an unknown amplitude.
    """
    search = Search(max_shift=max_shift, last_ring=last_ring)
    rows = [_row(known, search, device) for known in known_sets(data, snr, n, views, size, seed)]
    notes = ["bound: the median error of an estimate that meets the Cramér-Rao bound"]
    return Result(rows, notes)


def _row(known: KnownSet, search: Search, device: str) -> Row:
    started = time.perf_counter()
    found = align_multi_reference(
        known.particles, known.views, iterations=1, search=search, device=device
    )
    seconds = time.perf_counter() - started
    right_class = found.class_number - 1 == known.view
    right = right_class & (found.pose.mirror == known.pose.mirror)
    angle = wrap_degrees(found.pose.angle - known.pose.angle).abs()[right].median()
    shift = (found.pose.shift - known.pose.shift).norm(dim=1)[right].median()
    bound = expected_medians(known.views, known.view)
    return {
        "set": known.name,
        "n": len(known.view),
        "class right %": 100 * float(right_class.double().mean()),
        "class and mirror right %": 100 * float(right.double().mean()),
        "mirror right %": 100 * float((found.pose.mirror == known.pose.mirror).double().mean()),
        "angle °": float(angle),
        "bound °": bound.angle,
        "angle / bound": float(angle) / bound.angle,
        "shift px": float(shift),
        "bound px": bound.shift,
        "shift / bound": float(shift) / bound.shift,
        "seconds": seconds,
    }
