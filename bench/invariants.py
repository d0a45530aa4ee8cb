"""What rotation-invariant features tell before anything is aligned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
from sklearn.metrics import adjusted_rand_score

from bench.data import truth_of
from bench.result import Result, Row
from cryoalign.io.stack import read_particles
from cryoalign.methods.classify.invariants import communities, invariants, neighbours
from cryoalign.methods.classify.whitening import observe
from cryoalign.particles.prepare import prepare
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import Stack, TensorStack


def run(
    data: Annotated[
        tuple[Path, ...], "PREFIXes of .star, .mrcs and _truth.npz; else one simulated set"
    ] = (),
    mirror: Annotated[bool, "mirrored particles are alike"] = True,
    radius: Annotated[float, "of the particle, px"] = 36.0,
    rings: Annotated[int, "outermost ring, 1/box"] = 14,
    max_shift: Annotated[int, "of the centring, px"] = 3,
    seeds: Annotated[tuple[int, ...], "one grouping each"] = (0, 1, 2),
) -> Result:
    """Neighbours and groups of particles by their invariants, against the true views.

    Same view: share of the true view among a particle's 1, 10 and 50 nearest neighbours. ARI: of as
    many groups as there are views, the mean of the seeds. Seconds of CPU: reading and the rings;
    centring, features and neighbours; one grouping.
    """
    rows: list[Row] = []
    axis = torch.arange(-max_shift, max_shift + 1.0)
    for prefix in data or (None,):
        clock = [time.process_time()]
        if prefix is None:
            made = simulate(1000, 10, size=90, snr=0.1, seed=0)
            stack: Stack = TensorStack(made.images, made.pixel_size)
            name, view = "simulated SNR 0.1", made.class_number - 1
        else:
            stack, (view, _) = read_particles(f"{prefix}.star"), truth_of(prefix)
            name = prefix.name
        prepared = prepare(stack, device="cpu")
        seen = observe(
            prepared.read, len(prepared), prepared.size, prepared.optics, rings, radius, max_shift
        )
        clock.append(time.process_time())
        features = invariants(seen, seen.rings, torch.cartesian_prod(axis, axis))
        cosines, near = neighbours(features, 50, mirror)
        clock.append(time.process_time())
        view = view[prepared.rows]
        there = view >= 0
        k = int(view.max()) + 1
        groups = [communities(cosines[:, :10], near[:, :10], k, seed) for seed in seeds]
        clock.append(time.process_time())
        same = (view[near] == view[:, None])[there].double()
        rand = [adjusted_rand_score(view[there], group[there]) for group in groups]
        rows.append(
            {
                "set": name,
                "K": k,
                "same view, 1": float(same[:, 0].mean()),
                "10": float(same[:, :10].mean()),
                "50": float(same.mean()),
                "ARI": sum(rand) / len(rand),
                "CPU s rings": clock[1] - clock[0],
                "CPU s features": clock[2] - clock[1],
                "CPU s groups": (clock[3] - clock[2]) / len(seeds),
            }
        )
    return Result(rows)
