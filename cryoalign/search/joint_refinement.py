"""Angle, shift, magnification and defocus refined together, by likelihood, with their covariance.

A particle x is, in Fourier space, a reference enlarged by ``magnification`` m, taken to the
particle's pose, and seen through the CTF of its defocus plus ``defocus_offset`` d:

    X(k) = a CTF(k; d) exp(2 pi i k . shift) FT[ reference(L v / m) ](k) + noise(k),

L the pose's linear part (`Pose`). `refine` is the fast way to angle and shift alone; it knows no
CTF. docs/refinement.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cryoalign.images.ctf import Optics
from cryoalign.images.templates import check_labels
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.runtime.arrays import Array, as_tensor
from cryoalign.search.forward_model import COLUMNS, Frame, Observed, frame_of, model, observed
from cryoalign.search.least_squares import Point, gauss_newton, lbfgs

Parameter = Literal["angle", "shift", "magnification", "defocus"]
Solver = Literal["gauss-newton", "lbfgs"]
OF: dict[str, tuple[int, ...]] = {
    "angle": (0,), "shift": (1, 2), "magnification": (3,), "defocus": (4,)
}  # fmt: skip
LONGEST = (2.0, 0.7, 0.7, 0.02, 500.0)  # of one step: longer ones leave the peak that was found
SOLVERS = {"gauss-newton": gauss_newton, "lbfgs": lbfgs}
LEAST_AMPLITUDE = 1e-3  # of the one that explains all of the particle
# An eigenvalue of the information, scaled to a unit diagonal, below which a parameter is unknown.
LEAST_TOLD = 1e-4
# Pixels of the particles of a chunk: they stay in a core's cache, or spare a GPU's memory.
CPU_CHUNK = 2**17
CUDA_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Refined:
    """What `refine_jointly` found of n particles.

    Attributes:
        pose: (n,), particle onto reference.
        magnification: (n,) of the particle's picture of its reference; 1 where not refined.
        defocus_offset: (n,) Å to be added to the optics' defocus_u and defocus_v; or 0.
        amplitude: (n,) a, of the reference as given.
        score: (n,) correlation coefficient of particle and model, both weighted by the noise.
        covariance: (n, p, p) of the ``columns``; infinite on the diagonal, zero elsewhere, where
            the particle leaves part of them open.
        columns: (p,) those of `COLUMNS` that were refined.
    """

    pose: Pose
    magnification: Tensor
    defocus_offset: Tensor
    amplitude: Tensor
    score: Tensor
    covariance: Tensor
    columns: tuple[str, ...]


class _Task(NamedTuple):
    """What is asked of every particle.

    Attributes:
        frame: what they share.
        refined: (p,) the columns that are unknown.
        white: the noise is white, its power each particle's own.
        precision: (5,) of the prior, about ``centre`` (5,).
    """

    frame: Frame
    refined: list[int]
    white: bool
    precision: Tensor
    centre: Tensor


@torch.no_grad()
def refine_jointly(
    particles: Array,
    references: Array,
    label: Array,
    pose: Pose,
    *,
    parameters: Sequence[Parameter] = ("angle", "shift"),
    optics: Optics | None = None,
    noise: Tensor | None = None,
    magnification_sd: float | None = None,
    defocus_sd: float | None = None,
    solver: Solver = "gauss-newton",
    steps: int = 20,
) -> Refined:
    """The most probable pose, magnification and defocus of every particle, near where it starts.

    Least squares over all frequencies below Nyquist but zero, the amplitude projected out (Golub &
    Pereyra 1973); each particle steps, accepts and stops by itself. Priors are normal, about a
    magnification of 1 and an offset of 0 Å, where their deviation is given: at low SNR a single
    particle says little of its defocus. Parameters not named stay at the start, 1 and 0. No
    gradient flows through the result.

    There is no mask: noise outside the molecule does not touch a model that is zero there. What
    else lies in the box (neighbours) counts as noise; mask references, and where needed particles.

    Args:
        particles: (n, size, size) float32 or float64, background zero, *not* phase-flipped.
        references: (k, size, size) without CTF, of the particles' dtype, background zero.
        label: (n,) int64, which reference is each particle's.
        pose: (n,) start, within a grid step of the optimum.
        parameters: which to refine: "angle", "shift", "magnification", "defocus".
        optics: of the n particles; None is a CTF of 1.
        noise: (shells,) its power at 0, 1, 2 … 1/box up to the transform's corner, as
            `observations.noise_spectrum` measures it, 1 for white noise of variance 1; infinite
            leaves a shell out. None is white noise, its variance each particle's own.
        magnification_sd: of the prior; None for none.
        defocus_sd: of the prior, Å; None for none.
        solver: "gauss-newton" (Levenberg-Marquardt) or "lbfgs"; they end at one optimum.
        steps: evaluations of a particle at most.

    Returns:
        The optima, and the inverse of the Fisher information there (with the prior's precision).

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit.
    """
    particles, references, label = (as_tensor(each) for each in (particles, references, label))
    _check(particles, references, label, pose, optics)
    refined = _columns(parameters, optics, magnification_sd, defocus_sd)
    if solver not in SOLVERS or steps < 0:
        raise ValueError(
            f"solver={solver!r}, steps={steps}: use one of {', '.join(SOLVERS)}, and steps >= 0"
        )
    priors = [None, None, None, magnification_sd, defocus_sd]
    precision = [0.0 if sd is None else sd**-2 for sd in priors]
    task = _Task(
        frame_of(references, noise),
        refined,
        noise is None,
        torch.tensor(precision, dtype=torch.float64, device=references.device),
        torch.tensor([0, 0, 0, 1, 0], dtype=torch.float64, device=references.device),
    )
    pixels = CPU_CHUNK if particles.device.type == "cpu" else CUDA_CHUNK
    chunk = max(1, pixels // particles.shape[-1] ** 2)
    p = len(refined)
    found = [tuple(task.centre.new_empty(0, *shape) for shape in ((5,), (), (), (p, p)))]
    for start in range(0, len(particles), chunk):
        rows = slice(start, start + chunk)
        own = None if optics is None else optics[rows]
        data = observed(particles[rows], label[rows], pose.mirror[rows], own, task.frame)
        found.append(_refine_chunk(data, pose[rows], task, solver, steps))
    unknowns, amplitude, score, covariance = (
        torch.cat(of).to(particles.dtype) for of in zip(*found, strict=True)
    )
    return Refined(
        Pose(unknowns[:, 0], unknowns[:, 1:3], pose.mirror),
        unknowns[:, 3],
        unknowns[:, 4],
        amplitude,
        score,
        covariance,
        tuple(COLUMNS[column] for column in refined),
    )


def _refine_chunk(
    data: Observed, pose: Pose, task: _Task, solver: Solver, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unknowns (n, 5), amplitude (n,), score (n,) and covariance (n, p, p) of a chunk."""
    start = task.centre.repeat(len(pose), 1)
    start[:, 0], start[:, 1:3] = pose.angle, pose.shift
    held = data

    def whole(unknowns: Tensor, rows: Tensor | slice) -> Tensor:
        filled = start[rows].clone()
        filled[:, task.refined] = unknowns
        return filled

    def evaluate(unknowns: Tensor, rows: Tensor) -> Point:
        nonlocal held  # the rows still at work only get fewer
        if len(rows) < len(held.mirror):
            held = data.take(rows)
        return _point(whole(unknowns, rows), held, task)

    longest = start.new_tensor(LONGEST)[task.refined]
    best = SOLVERS[solver](evaluate, start[:, task.refined], longest, steps)
    unknowns = whole(best.unknowns, slice(None))
    unknowns[:, 0] = wrap_degrees(unknowns[:, 0])
    amplitude, score = best.notes.unbind(1)
    return unknowns, amplitude, score, _covariance(best.curvature, amplitude > 0)


def _point(unknowns: Tensor, data: Observed, task: _Task) -> Point:
    """How well unknowns (n, 5) explain the particles, and which way is better."""
    value, *derivatives = model(unknowns, data, task.frame)
    rows = [data.spectra, value, *(derivatives[column] for column in task.refined)]
    real = torch.view_as_real(torch.stack(rows, 1)).flatten(2)  # (n, 2 + p, 2 h f)
    moments = (real @ real.mT).double()
    tiny = torch.finfo(real.dtype).tiny
    xx, xm, mm = moments[:, 0, 0], moments[:, 0, 1], moments[:, 1, 1].clamp(min=tiny)
    # The amplitude's part is taken out of particle and derivatives.
    share = moments[:, 1] / mm[:, None]
    rest = moments - share[:, :, None] * moments[:, 1, None]
    score = xm / (xx * mm).clamp(min=tiny).sqrt()
    # Signed: an amplitude below zero is worse than none, so that there is a way up.
    explained = score.clamp(-1, 1) * score.abs().clamp(max=1)
    free = task.frame.numbers - 1 - len(task.refined)
    eps = torch.finfo(data.spectra.dtype).eps
    left = xx * (1 - explained).clamp(min=eps)
    if task.white:
        variance = left / free
        loss = free / 2 * (1 - explained).clamp(min=eps).log()
    else:
        variance = torch.ones_like(xx)
        loss = -xx * explained / 2
    amplitude = xm / mm
    # Where it is not positive, the derivatives still say how the correlation grows.
    scale = torch.maximum(amplitude, LEAST_AMPLITUDE * (xx / mm).sqrt())
    scale = torch.where(moments[:, 1, 1] > tiny, scale, 0.0)  # an empty model tells nothing
    variance = variance.clamp(min=tiny)
    precision = task.precision[task.refined]
    away = unknowns[:, task.refined] - task.centre[task.refined]
    slope = -(scale / variance)[:, None] * rest[:, 0, 2:]
    curvature = (scale.square() / variance)[:, None, None] * rest[:, 2:, 2:]
    return Point(
        unknowns[:, task.refined],
        loss + (precision * away.square()).sum(1) / 2,
        slope + precision * away,
        curvature + torch.diag(precision),
        torch.stack([amplitude, score], 1),
    )


def _covariance(information: Tensor, known: Tensor) -> Tensor:
    """(n, p, p) the inverse, where it is ``known`` (n,) and there is one; else infinite."""
    diagonal = information.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    unit = scale[:, :, None] * information * scale[:, None, :]
    known = known & (diagonal > 0).all(1) & unit.isfinite().all(2).all(1)
    one = torch.eye(unit.shape[1]).to(unit)
    safe = torch.where(known[:, None, None], unit, one)
    known = known & (torch.linalg.eigvalsh(safe)[:, 0] > LEAST_TOLD)
    safe = torch.where(known[:, None, None], unit, one)
    inverse = scale[:, :, None] * torch.linalg.inv(safe) * scale[:, None, :]
    unknown = torch.diag(torch.full((unit.shape[1],), math.inf)).to(unit)
    return torch.where(known[:, None, None], inverse, unknown)


def _columns(
    parameters: Sequence[Parameter],
    optics: Optics | None,
    magnification_sd: float | None,
    defocus_sd: float | None,
) -> list[int]:
    """The columns that are refined, in order."""
    unknown = [name for name in parameters if name not in OF]
    if unknown or not parameters or isinstance(parameters, str):
        raise ValueError(
            f"parameters={parameters!r}: give some of {', '.join(map(repr, OF))}, in a tuple"
        )
    if "defocus" in parameters and optics is None:
        raise ValueError("defocus cannot be refined without optics: give optics=, one a particle")
    for name, sd in (("magnification", magnification_sd), ("defocus", defocus_sd)):
        if sd is not None and not sd > 0:
            raise ValueError(f"{name}_sd={sd}: a prior's deviation is above 0; None is no prior")
    return sorted(column for name in set(parameters) for column in OF[name])


def _check(
    particles: Tensor, references: Tensor, label: Tensor, pose: Pose, optics: Optics | None
) -> None:
    box = particles.shape[1:]
    if particles.ndim != 3 or references.ndim != 3 or not box == references.shape[1:]:
        raise ValueError(
            "refine_jointly takes particles (n, size, size) and references (k, size, size) of one "
            f"box; got {tuple(particles.shape)} and {tuple(references.shape)}"
        )
    if box[0] != box[1]:
        raise ValueError(f"refine_jointly takes square boxes, got {tuple(box)}: crop or pad them")
    if particles.dtype != references.dtype or particles.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"particles are {particles.dtype}, references {references.dtype}: use .float() on both"
        )
    counts = [len(particles), len(label), len(pose)] + ([] if optics is None else [len(optics)])
    if len(set(counts)) > 1:
        raise ValueError(
            f"counts of particles, labels, poses{', optics' * (optics is not None)} are {counts}: "
            "give one each"
        )
    if len({each.device for each in (particles, references, label, pose.angle)}) > 1:
        raise ValueError(
            f"particles are on {particles.device}, references on {references.device}, labels on "
            f"{label.device}, poses on {pose.angle.device}: move them to one"
        )
    check_labels(label, len(references))
