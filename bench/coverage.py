"""Whether the covariance that every pose gets is the one that its errors have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from bench.data import KnownSet, known_sets
from bench.result import Result, Row
from cryoalign.images.masks import masked, normalise, soft_mask
from cryoalign.images.polar import Rings
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.results.averages import Averaging, filtered_averages, sum_parts
from cryoalign.results.pose_errors import pose_covariance
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search

ROUNDS = 4
"""Averaging and refinement in turn, until poses and averages agree."""


def run(
    data: Annotated[Path | None, "PREFIX of .mrcs, _views.mrcs, _truth.npz; else simulate"] = None,
    snr: Annotated[tuple[float, ...], "of the simulated sets"] = (0.1, 0.05, 0.02),
    n: Annotated[int, "simulated particles"] = 2000,
    views: Annotated[int, "simulated views"] = 20,
    size: Annotated[int, "simulated box, px"] = 90,
    seed: Annotated[int, "of the simulation"] = 0,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
) -> Result:
    """How often 95 % intervals (1.96 deviations) of angle and shift hold the truth.

    With the true views as references, and with class averages of the particles themselves: the
    true classes, poses about 1 degree and 0.4 px off at first. What is common to a class's
    members (its average stands where it stands) is taken out before errors are judged. Only
    particles of right class and hand count.
    """
    rows: list[Row] = []
    for known in known_sets(data, snr, n, views, size, seed):
        images = known.particles.read(torch.arange(len(known.view)))
        images = normalise(images, images.shape[-1] / 2)
        search = Search(last_ring=last_ring)
        rings = search.rings(images.shape[-1])
        label, pose, _ = best_poses(images, prepare_target(known.views, search))
        covariance = pose_covariance(images, known.views, label, pose, rings)
        right = (label == known.view) & (pose.mirror == known.pose.mirror)
        error = _errors(pose, known.pose)
        rows.append(_row(f"{known.name}, true views", error[right], covariance[right]))
        pose, covariance = _by_averages(images, known, rings, seed)
        error = _without_gauge(_errors(pose, known.pose), covariance, pose, known.view)
        rows.append(_row(f"{known.name}, averages", error, covariance))
    return Result(rows, ["covered: share of errors within 1.96 deviations, %; 95 is right"])


def _by_averages(images: Tensor, known: KnownSet, rings: Rings, seed: int) -> tuple[Pose, Tensor]:
    """Poses (n,) on averages of all particles, and their covariance, true classes given."""
    size, k, every = images.shape[-1], len(known.views), torch.arange(len(images))
    generator = torch.Generator().manual_seed(seed)
    truth, mask = known.pose.to(torch.float32), soft_mask(size, rings.last_ring)
    turned = truth.angle + torch.randn(len(every), generator=generator)
    moved = truth.shift + 0.4 * torch.randn(len(every), 2, generator=generator)
    pose = Pose(turned, moved, truth.mirror)
    for _ in range(ROUNDS):
        sums = sum_parts(
            every.split(512), images.__getitem__, pose, known.view, every % 2, k, size,
            images.device,
        )  # fmt: skip
        references = masked(filtered_averages(sums, Averaging(), mask), mask)
        pose, _ = refine(images, references, known.view, pose, rings)
    return pose, pose_covariance(images, references, known.view, pose, rings)


def _errors(pose: Pose, truth: Pose) -> Tensor:
    """(n, 3) degrees, x, y."""
    turn = wrap_degrees(pose.angle.double() - truth.angle.double())
    return torch.cat([turn.unsqueeze(1), pose.shift.double() - truth.shift.double()], 1)


def _without_gauge(error: Tensor, covariance: Tensor, pose: Pose, label: Tensor) -> Tensor:
    """Errors (n, 3) less what a turn and a shift of each class's reference explain: a mean on the
    reference, where members agree, weighted by the covariances."""
    onto = torch.zeros_like(covariance, dtype=torch.float64)  # from error to the reference's frame
    onto[:, 0, 0] = torch.where(pose.mirror, -1.0, 1.0)
    onto[:, 1:, 1:] = pose.linear().double()
    precision = onto @ torch.linalg.inv(covariance.double()) @ onto.mT
    pulled = precision @ onto @ error.unsqueeze(2)
    k = int(label.max()) + 1
    total = precision.new_zeros(k, 3, 3).index_add_(0, label, precision)
    gauge = torch.linalg.solve(
        total, pulled.new_zeros(k, 3, 1).index_add_(0, label, pulled)
    )  # (k, 3, 1)
    return error - (onto.mT @ gauge[label]).squeeze(2)


def _row(name: str, error: Tensor, covariance: Tensor) -> Row:
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt().double()
    covered = 100 * (error.abs() < 1.96 * deviation).double().mean(0)
    ratio = (error / deviation).square().mean(0).sqrt()
    median = deviation.median(0).values
    return {
        "set": name,
        "n": len(error),
        "angle covered": float(covered[0]),
        "x covered": float(covered[1]),
        "y covered": float(covered[2]),
        "angle sd °": float(median[0]),
        "shift sd px": float(median[1]),
        "rms error / sd, angle": float(ratio[0]),
        "rms error / sd, shift": float(ratio[1:].square().mean().sqrt()),
    }
