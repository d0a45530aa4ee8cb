"""What each assignment strategy makes of multi-reference alignment from nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch

from bench.agreement import agreement
from bench.data import particle_of, truth_of
from bench.result import Result, Row, with_means
from cryoalign.io.stack import read_particles
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.prepare import prepare
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import Stack, TensorStack
from cryoalign.search.settings import SearchSettings

STRATEGIES = {
    "best": Assignment(),
    "equal": Assignment("equal"),
    "equal, slack 0.3": Assignment("equal", slack=0.3),
    "stochastic": Assignment("stochastic"),
    "robust": Assignment("robust"),
    "robust, correntropy": Assignment("robust", similarity="correntropy"),
    "soft": Assignment("soft"),
    "best, from 2": Assignment(start_classes=2),
    "robust, from 2": Assignment("robust", start_classes=2),
}


def run(
    data: Annotated[
        tuple[Path, ...], "PREFIXes of .star, .mrcs and _truth.npz; else one simulated set"
    ] = (),
    strategies: Annotated[tuple[str, ...], "which; see STRATEGIES"] = tuple(STRATEGIES),
    k: Annotated[int | None, "classes; else as many as there are true views"] = None,
    seeds: Annotated[tuple[int, ...], "one run each"] = (0, 1, 2),
    iterations: Annotated[int, "at most"] = 30,
    last_ring: Annotated[int | None, "outermost ring, px; else the largest that fits"] = None,
    mirror: Annotated[bool, "try mirrored particles"] = True,
    mode: Annotated[str | None, "search.mode"] = None,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Multi-reference alignment from random particles by every strategy, scored as entry blind.

    Particles with a CTF are phase-flipped. Smallest and largest: class sizes. Seconds are of the
    whole job.
    """
    rows: list[Row] = []
    for prefix in data or (None,):
        if prefix is None:
            made = simulate(400, 8, size=48, snr=0.1, seed=0)
            stack: Stack = TensorStack(made.images, made.pixel_size)
            name, view, pose = "simulated SNR 0.1", made.class_number - 1, made.pose
        else:
            stack, (view, pose) = read_particles(f"{prefix}.star"), truth_of(prefix)
            name = prefix.name
        classes = k or int(view.max()) + 1
        seen = view >= 0
        for strategy in strategies:
            for seed in seeds:
                wall, cpu = time.perf_counter(), time.process_time()
                found = align_multi_reference(
                    prepare(stack, device=device).phase_flipped(),
                    n_classes=classes,
                    iterations=iterations,
                    assign=STRATEGIES[strategy],
                    particle=particle_of(last_ring, mirror=mirror),
                    search=SearchSettings(mode=mode),
                    seed=seed,
                )
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                label = found.class_number - 1
                score = agreement(label[seen], found.pose[seen], view[seen], pose[seen], classes)
                sizes = torch.bincount(label, minlength=classes)
                rows.append(
                    {
                        "set": name,
                        "strategy": strategy,
                        "seed": seed,
                        "ARI": score.rand_index,
                        "found": score.views_found,
                        "right": score.right,
                        "angle °": score.angle,
                        "shift px": score.shift,
                        "smallest": int(sizes.min()),
                        "largest": int(sizes.max()),
                        "iterations": len(found.history),
                        "seconds": wall,
                        "CPU seconds": cpu,
                    }
                )
    return Result(with_means(rows, ("set", "strategy")))
