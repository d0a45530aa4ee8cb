"""A whole iteration: search, refinement, averaging, references."""

from __future__ import annotations

import itertools
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
    n: Annotated[int | None, "particles; 128 on a CPU, 65536 or 4 GiB on a GPU"] = None,
    size: Annotated[tuple[int, ...], "boxes, px"] = (90,),
    last_ring: Annotated[int | None, "outermost ring, px; as by default if not given"] = None,
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
    on_gpu = where.type == "cuda"
    rows: list[Row] = []
    for box, reach, classes in itertools.product(size, max_shift, k):
        count = n or (min(65536, 2**32 // (4 * box**2)) if on_gpu else 128)
        images, views = particles(count, classes, box, snr, where)
        search = Search(max_shift=reach, last_ring=last_ring)
        seconds = _iteration(images, views, particle_of(last_ring, reach), iterations)
        few = images[: max(8, 2**25 // box**2) if on_gpu else 64]
        base = _plain(few, views, search, where)
        rows.append(
            {
                "box": box,
                "last ring": search.rings(box).last_ring,
                "k": classes,
                "shifts": len(search.shifts()),
                "n": count,
                "particles/s": count / seconds,
                "ms/particle": 1e3 * seconds / count,
                "plain search, particles/s": base,
                "x plain search": count / seconds / base,
            }
        )
        del images, few
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    return Result(rows, [f"both hands, refined, on {name}"])


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
