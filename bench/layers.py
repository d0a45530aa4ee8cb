"""What gradients cost: layers forward, and forward and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from bench import plain
from bench.data import particles
from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.polar import reference_spectra
from cryoalign.learn.layers import AlignLayer, PoseMarginal, RingSpectra
from cryoalign.runtime.processes import choose_device
from cryoalign.search.settings import Search

Score = Callable[[Tensor, Tensor], Tensor]  # particles (n, h, w), references (k, h, w) to (n,)


def run(
    k: Annotated[int, "references"] = 10,
    n: Annotated[int | None, "particles; 64 on a CPU, 2048 on a GPU"] = None,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    repeats: Annotated[int, "of which the median counts"] = 3,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Particles per second of scores with gradients by particles and references.

    The baseline is the gradient of the plain formulation's maximum (bench/plain.py), which keeps
    its whole table for the way back; particles go in the chunks that suit it.
    """
    where = choose_device(device)
    n = n or (64 if where.type == "cpu" else 2048)
    images, views = particles(n, k, size, 0.1, where)
    search = Search(max_shift=max_shift, last_ring=last_ring)
    rings, shifts = search.rings(size), search.shifts(where)
    shape = (rings.first_ring, rings.last_ring, rings.n_angles)
    grid = plain.points(*shape, shifts, size)
    here = plain.points(*shape, shifts.new_zeros(1, 2), size)

    def plainly(some: Tensor, references: Tensor) -> Tensor:
        y = plain.weigh(plain.features(references, here)[:, 0], rings.first_ring)
        return plain.peaks(plain.features(some, grid), y)[0].amax(1)

    spectra, marginal = RingSpectra(rings), PoseMarginal(0.01)

    def softly(some: Tensor, references: Tensor) -> Tensor:
        return marginal(spectra(some, shifts), reference_spectra(references, rings)).logsumexp(1)

    def aligned(layer: AlignLayer) -> Score:
        return lambda some, references: layer(some, references).score

    table, most = plain.PLAIN_CPU if where.type == "cpu" else plain.PLAIN_CUDA
    chunk = max(1, min(most, table // (k * len(shifts) * 2 * rings.n_angles)))
    ways: dict[str, tuple[Score, int]] = {"plain": (plainly, chunk)}
    for gradient in ("score", "implicit", "soft"):
        ways[f"AlignLayer {gradient}"] = (aligned(AlignLayer(search, gradient)), n)  # type: ignore[arg-type]
    ways["PoseMarginal"] = (softly, 8 if where.type == "cpu" else 512)

    stages: dict[str, Callable[[], object]] = {}
    for name, (score, some) in ways.items():
        stages[f"{name} forward"] = _forward(score, images, views, some)
        stages[f"{name} back"] = _back(score, images, views, some)
        if name != "plain":
            stages[f"{name} repeatable"] = _repeatable(_back(score, images, views, some))
    times = measure(stages, where, repeats)
    base = times["plain back"].wall
    rows: list[Row] = []
    for name in ways:
        back = times[f"{name} back"].wall
        same = times.get(f"{name} repeatable")
        rows.append(
            {
                "what": name,
                "n": n,
                "forward, particles/s": n / times[f"{name} forward"].wall,
                "particles/s": n / back,
                "x plain": base / back,
                "deterministic, particles/s": same and n / same.wall,
            }
        )
    notes = [
        f"{size} px, {k} references, {len(shifts)} shifts, last ring {last_ring} px; {where.type}",
        "particles/s and x plain: forward and back; deterministic: the same in PyTorch's "
        "deterministic mode",
    ]
    return Result(rows, notes)


def _forward(score: Score, images: Tensor, views: Tensor, chunk: int) -> Callable[[], None]:
    @torch.no_grad()
    def forward() -> None:
        for some in images.split(chunk):
            score(some, views)

    return forward


def _back(score: Score, images: Tensor, views: Tensor, chunk: int) -> Callable[[], None]:
    def back() -> None:
        references = views.clone().requires_grad_()
        for some in images.split(chunk):
            score(some.clone().requires_grad_(), references).sum().backward()

    return back


def _repeatable(stage: Callable[[], None]) -> Callable[[], None]:
    def repeatable() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            stage()
        finally:
            torch.use_deterministic_algorithms(False)

    return repeatable
