"""What classification finds when nothing is known, on sets whose truth is known."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from bench.agreement import agreement
from bench.data import particle_of, truth_of
from bench.result import Result, Row, with_means
from cryoalign.io.stack import read_particles
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.settings import Likelihood
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import Stack, TensorStack, optics_of
from cryoalign.pose import Pose


def run(
    data: Annotated[
        tuple[Path, ...], "PREFIXes of .star, .mrcs and _truth.npz; else one simulated set"
    ] = (),
    k: Annotated[int | None, "classes; else as many as there are true views"] = None,
    seeds: Annotated[tuple[int, ...], "one run each"] = (0, 1, 2),
    mask_radius: Annotated[float | None, "of the particle, px; else 0.4 of the box"] = None,
    mirror: Annotated[bool, "try mirrored particles"] = True,
    start: Annotated[str, "singles, stochastic or invariants, see likelihood.start"] = "singles",
    starts: Annotated[int, "independent starts, of which the likeliest goes on"] = 1,
    jobs: Annotated[int, "runs at a time, a process each"] = 1,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Classification from nothing, scored against the truth.

    Columns as those of the entry blind. Particles without a view (junk) are given to the program
    like the others and left out of the scores. Largest: share of the particles in the largest
    class. Seconds are of the whole job, from the files to the result, by the clock and of all
    cores.
    """
    settings = particle_of(mask_radius, mirror=mirror), Likelihood(start=start, starts=starts)
    runs = [(prefix, k, seed, *settings, device) for prefix in data or (None,) for seed in seeds]
    if jobs == 1:
        return Result(with_means([_one(*each) for each in runs], ("set",)))
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        rows = [future.result() for future in [pool.submit(_one, *r) for r in runs]]
    return Result(with_means(rows, ("set",)))


def _one(
    prefix: Path | None,
    k: int | None,
    seed: int,
    particle: Particle,
    likelihood: Likelihood,
    device: str,
) -> Row:
    """A run, and its row."""
    wall, cpu = time.perf_counter(), time.process_time()
    if prefix is None:
        made = simulate(1000, 10, size=64, snr=0.1, seed=0)
        stack: Stack = TensorStack(made.images, made.pixel_size)
        name, view, pose = "simulated SNR 0.1", made.class_number - 1, made.pose
    else:
        stack, (view, pose) = read_particles(f"{prefix}.star"), truth_of(prefix)
        name = prefix.name
    classes = k or int(view.max()) + 1
    found = classify(
        stack, classes, particle=particle, likelihood=likelihood, seed=seed, device=device
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row: Row = {
        "set": name,
        "K": classes,
        "CTF": "yes" if optics_of(stack) is not None else "no",
        "start": likelihood.start,
        "seed": seed,
    }
    score = scores(found.class_number - 1, found.pose, view, pose, classes)
    return {**row, **score, "seconds": wall, "CPU seconds": cpu}


def scores(label: Tensor, pose: Pose, view: Tensor, truth: Pose, classes: int) -> Row:
    """Columns that compare labels (-1: set aside) and poses (n,) with the truth."""
    seen = view >= 0
    score = agreement(label[seen], pose[seen], view[seen], truth[seen], classes)
    sizes = torch.bincount(label.clamp(min=0), minlength=classes)
    return {
        "ARI": score.rand_index,
        "empty": score.empty,
        "found": score.views_found,
        "views": int(view.max()) + 1,
        "right": score.right,
        "angle °": score.angle,
        "shift px": score.shift,
        "largest": float(sizes.max()) / len(label),
    }
