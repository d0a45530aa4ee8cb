"""Speed of the search, stage by stage."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from torch import Tensor

from bench import plain
from bench.adaptive import SPARX
from bench.data import particles
from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.polar import normalised_spectra, reference_spectra, to_polar
from cryoalign.operators.correlation import correlation_peaks
from cryoalign.operators.kernels import CRYOALIGN_NO_KERNELS, cpu
from cryoalign.results.averages import sum_parts
from cryoalign.runtime.processes import choose_device
from cryoalign.search.match import best_match, match_spectra
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search

# Particles sampled, and particles transformed, at a time: as `match_spectra` does it.
CPU_CHUNKS, CUDA_CHUNKS = (8, 2), (2048, 512)
IN_PYTORCH = ", in PyTorch"
BASELINE = {
    "features": "plain features",
    "operator": "plain search",
    "match": "plain both",
    "best match": "plain both",
    "match + refine": "plain both",
}
"""Which row of the plain formulation each stage is compared with."""


def run(
    k: Annotated[tuple[int, ...], "numbers of references"] = (10, 50),
    n: Annotated[int | None, "particles; 64 on a CPU, 8192 on a GPU"] = None,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    snr: Annotated[float, "of the simulated particles"] = 0.1,
    repeats: Annotated[int, "timings of each stage, of which the median counts"] = 5,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Particles per second of features, operator, whole match, refinement and averaging.

    Where a CPU has its compiled search, the stages that it serves come again, "in PyTorch".
    The baseline, in the same run, is the plain formulation (grid_sample, rfft, einsum, irfft, max;
    see bench/plain.py). Particles are simulated views of one phantom with noise; images and
    references are on the device beforehand, and poses stay there.
    """
    where = choose_device(device)
    on_cpu = where.type == "cpu"
    n = n or (64 if on_cpu else 8192)
    search = Search(max_shift=max_shift, last_ring=last_ring)
    rows: list[Row] = []
    for classes in k:
        images, views = particles(n, classes, size, snr, where)
        times = measure(_stages(images, views, search), where, repeats)
        paper = on_cpu and (size, last_ring) == (90, 36)
        for name, (wall, seconds) in times.items():
            stage = name.removesuffix(IN_PYTORCH)
            base = times[BASELINE[stage]] if stage in BASELINE else None
            ours = paper and stage == "match + refine"
            sparx = SPARX.get((classes, max_shift)) if ours else None
            rows.append(
                {
                    "k": classes,
                    "stage": name,
                    "particles/s": n / wall,
                    "wall ms/particle": 1e3 * wall / n,
                    "CPU ms/particle": 1e3 * seconds / n,
                    "x plain": None if base is None else base.wall / wall,
                    "x plain, CPU": None if base is None or not on_cpu else base.cpu / seconds,
                    "x SPARX": None if sparx is None else sparx / (1e3 * seconds / n),
                }
            )
    rings, shifts = search.rings(size), search.shifts()
    return Result(
        rows,
        [
            f"{n} particles of {size} px, {len(rings.radii())} rings to {last_ring} px, "
            f"{len(shifts)} shifts, 2 hands, {rings.n_angles} angles, "
            f"on {where.type}; median of {repeats}",
            "match: the exact score of every pair; best match: of the best reference, as alignment "
            "asks for it, and with refinement in match + refine",
            "x plain compares features and operator with plain features and plain search, matches "
            "with plain both; the plain formulation does not normalise and does not refine",
            "x SPARX: its CPU ms (bench adaptive) over those of match + refine; K = 1 is its "
            "reference-free alignment",
        ],
    )


def _stages(images: Tensor, views: Tensor, search: Search) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    rings, shifts = search.rings(images.shape[-1]), search.shifts(images.device)
    sampled, transformed = CPU_CHUNKS if images.device.type == "cpu" else CUDA_CHUNKS
    references = reference_spectra(views, rings)

    def features() -> Iterator[Tensor]:
        for part in images.split(sampled):
            for polar in to_polar(part, rings, shifts).split(transformed):
                yield normalised_spectra(polar, rings)

    spectra = list(features())
    if images.device.type == "cpu":  # enough at a time for the compiled search's lanes
        spectra = list(torch.cat(spectra).split(cpu.LANES))
    label, pose, _ = best_match(images, references, search, rings)

    def matched() -> None:
        match_spectra(images, references, search, rings)

    def refined() -> None:
        refine(images, views, label, pose, rings)

    rows = torch.arange(len(images), device=images.device)

    def averaged() -> None:
        sum_parts(
            rows.split(2048), images.__getitem__, pose, label, rows % 2, len(views),
            images.shape[-1], images.device,
        )  # fmt: skip

    def both() -> None:
        label, pose, _ = best_match(images, references, search, rings)
        refine(images, views, label, pose, rings)

    searches: dict[str, Callable[[], object]] = {
        "operator": lambda: [correlation_peaks(part, references) for part in spectra],
        "match": matched,
        "best match": lambda: best_match(images, references, search, rings),
        "match + refine": both,
    }
    compiled = images.device.type == "cpu" and cpu.usable()
    return {
        "features": lambda: deque(features(), maxlen=0),
        **searches,
        **({name + IN_PYTORCH: _in_pytorch(stage) for name, stage in searches.items() if compiled}),
        "refine": refined,
        "average": averaged,
        **plain.stages(images, views, search),
    }


def _in_pytorch(stage: Callable[[], object]) -> Callable[[], object]:
    """The stage without compiled kernels."""

    def run() -> None:
        os.environ[CRYOALIGN_NO_KERNELS] = "1"
        try:
            stage()
        finally:
            del os.environ[CRYOALIGN_NO_KERNELS]

    return run
