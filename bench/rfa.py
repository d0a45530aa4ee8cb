"""Reference-free alignment of one view, scored against the truth."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from bench.agreement import agreement
from bench.data import particle_of, truth_of
from bench.result import Result, Row, with_means
from cryoalign.io.stack import read_particles
from cryoalign.methods.rfa import align_reference_free
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import Stack, TensorStack
from cryoalign.search.settings import Schedule


def run(
    data: Annotated[
        tuple[Path, ...], "PREFIXes of .mrcs and _truth.npz; else a simulated set per seed"
    ] = (),
    seeds: Annotated[tuple[int, ...], "of the starts, and of what is simulated"] = (0, 1, 2),
    starts: Annotated[int, "first steps, of which the best goes on"] = 2,
    kicks: Annotated[int, "iterations that try a few angles only"] = 0,
    last_ring: Annotated[int | None, "outermost ring, px; else the largest that fits"] = None,
    mirror: Annotated[bool, "try mirrored particles"] = True,
    n: Annotated[int, "simulated particles"] = 500,
    size: Annotated[int, "simulated box, px"] = 64,
    snr: Annotated[float, "of the simulated sets"] = 0.05,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Reference-free alignment from the particles' own average.

    Right: share of all particles with the right hand, within 10 degrees and 2 px, after the
    average's own turn and place are removed; errors are medians of those of the right hand.
    Without further starts the seed changes nothing but what is simulated. Seconds are of the whole
    job.
    """
    rows: list[Row] = []
    for prefix in data or (None,):
        for seed in seeds:
            wall, cpu = time.perf_counter(), time.process_time()
            if prefix is None:
                made = simulate(n, 1, size=size, snr=snr, seed=seed)
                stack: Stack = TensorStack(made.images, made.pixel_size)
                name, view, pose = f"simulated SNR {snr:g}", made.class_number - 1, made.pose
            else:
                stack, (view, pose) = read_particles(f"{prefix}.mrcs"), truth_of(prefix)
                name = prefix.name
            found = align_reference_free(
                stack,
                schedule=Schedule(starts=starts, kicks=kicks),
                particle=particle_of(last_ring, mirror=mirror),
                seed=seed,
                device=device,
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            score = agreement(found.class_number - 1, found.pose, view, pose, 1)
            rows.append(
                {
                    "set": name,
                    "seed": seed,
                    "right": score.right,
                    "angle °": score.angle,
                    "shift px": score.shift,
                    "iterations": len(found.history),
                    "seconds": wall,
                    "CPU seconds": cpu,
                }
            )
    return Result(with_means(rows, ("set",)))
