"""A whole iteration: search, refinement, averaging, references."""

from __future__ import annotations

import statistics
from typing import Annotated

import torch

from bench import plain
from bench.data import particle_of, particles
from bench.result import Result, Row
from bench.timing import measure
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.settings import Particle
from cryoalign.runtime.processes import choose_device
from cryoalign.search.settings import Search


def run(
    k: Annotated[tuple[int, ...], "references; 1 is reference-free alignment"] = (1, 10, 50),
    max_shift: Annotated[tuple[float, ...], "largest trial shifts, px"] = (3.0,),
    n: Annotated[int | None, "particles; 128 on a CPU, 65536 on a GPU"] = None,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    snr: Annotated[float, "of the simulated particles"] = 0.1,
    iterations: Annotated[int, "iterations, of which the median after the first counts"] = 4,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Particles per second of whole alignment iterations, particles in memory.

    With one reference it is an iteration of reference-free alignment. Particles are 256 or fewer
    simulated images, repeated with fresh noise. The baseline is the plain formulation of features
    and search alone (bench/plain.py), measured in the same run on a part of the particles.
    """
    where = choose_device(device)
    n = n or (128 if where.type == "cpu" else 65536)
    rows: list[Row] = []
    for reach in max_shift:
        for classes in k:
            images, views = particles(n, classes, size, snr, where)
            search = Search(max_shift=reach, last_ring=last_ring)
            seconds = _iteration(images, views, particle_of(last_ring, reach), iterations)
            base = _plain(images[: 64 if where.type == "cpu" else 4096], views, search, where)
            rows.append(
                {
                    "k": classes,
                    "shifts": len(search.shifts()),
                    "n": n,
                    "particles/s": n / seconds,
                    "ms/particle": 1e3 * seconds / n,
                    "plain search, particles/s": base,
                    "x plain search": n / seconds / base,
                }
            )
    return Result(rows, [f"{size} px, last ring {last_ring} px, both hands, refined; {where.type}"])


def _iteration(images: torch.Tensor, views: torch.Tensor, particle: Particle, count: int) -> float:
    """Median seconds of an iteration after the first."""
    found = align_multi_reference(
        images,
        views,
        iterations=count,
        particle=particle,
        device=str(images.device),
        settle=-1.0,  # never
    )
    return statistics.median(found.history["seconds"][1:])


def _plain(
    images: torch.Tensor, views: torch.Tensor, search: Search, device: torch.device
) -> float:
    """Particles per second of the plain formulation."""
    stages = plain.stages(images, views, search)
    return len(images) / measure({"both": stages["plain both"]}, device, 3)["both"].wall
