"""What alignment finds when nothing is known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from bench.agreement import agreement
from bench.data import known_sets, particle_of
from bench.result import Result, Row
from cryoalign.methods.mra import align_multi_reference


def run(
    data: Annotated[Path | None, "PREFIX of .mrcs, _views.mrcs, _truth.npz; else simulate"] = None,
    k: Annotated[int, "classes"] = 10,
    seeds: Annotated[tuple[int, ...], "one run each"] = (0, 1, 2),
    iterations: Annotated[int, "at most"] = 20,
    references: Annotated[str, "how first references are chosen"] = "random",
    n: Annotated[int, "simulated particles"] = 1000,
    views: Annotated[int, "simulated views"] = 10,
    size: Annotated[int, "simulated box, px"] = 90,
    snr: Annotated[float, "of the simulated set"] = 0.1,
    last_ring: Annotated[int | None, "outermost ring, px; else the largest that fits"] = None,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    mirror: Annotated[bool, "try mirrored particles"] = True,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Multi-reference alignment from nothing, scored against the truth.

    ARI: adjusted Rand index of classes with true views. Found: views that make up at least half of
    a class. Right: share of all particles with their class's view, the right hand, within 10
    degrees and 2 px. Errors are medians after a class's own turn and place are removed.
    """
    known = known_sets(data, (snr,), n, views, size, 0)[0]
    particle = particle_of(last_ring, max_shift, mirror)
    rows: list[Row] = []
    for seed in seeds:
        wall, cpu = time.perf_counter(), time.process_time()
        found = align_multi_reference(
            known.particles,
            references,
            n_classes=k,
            iterations=iterations,
            particle=particle,
            seed=seed,
            device=device,
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        score = agreement(found.class_number - 1, found.pose, known.view, known.pose, k)
        rows.append(
            {
                "set": known.name,
                "seed": seed,
                "ARI": score.rand_index,
                "empty": score.empty,
                "found": f"{score.views_found}/{len(known.views)}",
                "right": score.right,
                "angle °": score.angle,
                "shift px": score.shift,
                "iterations": len(found.history),
                "seconds": wall,
                "CPU seconds": cpu,
            }
        )
    return Result(rows)
