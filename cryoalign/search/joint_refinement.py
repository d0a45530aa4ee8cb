"""Angle, shift, magnification and defocus refined together, by likelihood, with their covariance.

A particle x is, in Fourier space, a reference enlarged by ``magnification`` m, moved to the
particle's pose and multiplied by the CTF of its defocus plus ``defocus_offset`` d:

    X(k) = a CTF(k; d) exp(2 pi i k . shift) FT[ reference(L v / m) ](k) + noise(k),

with L the linear part of the pose (`Pose`). `refine` is faster, for angle and shift alone and
without the CTF. docs/refinement.md compares their errors.
"""

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
from cryoalign.search.forward_model import (
    COLUMNS,
    ParticleData,
    SharedData,
    model,
    particle_data,
    shared_data,
)
from cryoalign.search.least_squares import Point, gauss_newton

Parameter = Literal["angle", "shift", "magnification", "defocus"]
# Columns of each parameter.
OF: dict[str, tuple[int, ...]] = {
    "angle": (0,), "shift": (1, 2), "magnification": (3,), "defocus": (4,)
}  # fmt: skip
# Largest change of each column in one step; a longer step could leave the peak of the score.
LONGEST = (2.0, 0.7, 0.7, 0.02, 500.0)
# Least amplitude in the slope, as a share of the one that explains all of the particle: it gives a
# particle that does not correlate with its reference a way to improve.
LEAST_AMPLITUDE = 1e-3
# Least eigenvalue of the information, scaled to a unit diagonal: below, rounding prevails, and the
# covariance is infinite.
LEAST_INFORMATION = 1e-4
# Pixels of the particles of a chunk: few enough for a core's cache, or for a GPU's memory.
CHUNK = {"cpu": 2**17, "cuda": 2**22}


@dataclass(frozen=True, eq=False)
class Refined:
    """The result of `refine_jointly` for n particles.

    Attributes:
        pose: (n,), particle onto reference.
        magnification: (n,) of the particle relative to its reference; 1 if not refined.
        defocus_offset: (n,) Å to add to the optics' defocus_u and defocus_v; 0 if not refined.
        amplitude: (n,) factor a of the reference.
        score: (n,) correlation coefficient of particle and model, both weighted by the noise.
        covariance: (n, p, p) of the ``columns``; infinite on the diagonal and zero elsewhere if
            the particle does not determine all of them.
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
    """What is the same for all particles.

    Attributes:
        shared: the references and the noise.
        refined: (p,) the columns that are unknown.
        white: the noise is white, and its power is estimated for each particle.
        precision: (5,) of the prior; 0 is no prior.
        centre: (5,) mean of the prior, and start of all but the pose.
    """

    shared: SharedData
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
    steps: int = 20,
) -> Refined:
    """The most probable pose, magnification and defocus of every particle, near its start.

    Least squares over all frequencies below Nyquist except zero, by Levenberg-Marquardt with the
    amplitude projected out (Golub & Pereyra 1973), for each particle by itself. No gradient flows
    through the result. There is no mask: the model is zero outside the molecule, where noise then
    has no influence. Mask references, and particles that have neighbours in the box.

    Args:
        particles: (n, size, size) float32 or float64, background zero, *not* phase-flipped.
        references: (k, size, size) without CTF, of the particles' dtype, background zero.
        label: (n,) int64 index of the reference of each particle.
        pose: (n,) start, within a grid step of the optimum.
        parameters: which to refine, of "angle", "shift", "magnification" and "defocus". The others
            stay at the start, at a magnification of 1 and an offset of 0 Å.
        optics: of the n particles; None is a CTF of 1.
        noise: (shells,) power at 0, 1, 2 … 1/box up to the transform's corner, 1 for white noise
            of variance 1, as `whitening.noise_spectrum` measures it; an infinite power leaves a
            shell out. None is white noise whose variance is estimated for each particle.
        magnification_sd: standard deviation of a normal prior about 1; None is no prior.
        defocus_sd: standard deviation of a normal prior about 0, Å; None is no prior. At low SNR a
            particle by itself hardly determines its defocus.
        steps: largest number of steps of a particle.

    Returns:
        The optima, and the inverse of the Fisher information there (with the prior's precision).

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit.
    """
    particles, references, label = (as_tensor(each) for each in (particles, references, label))
    _check(particles, references, label, pose, optics)
    refined = _columns(parameters, optics, magnification_sd, defocus_sd)
    if steps < 0:
        raise ValueError(f"steps={steps}: use steps >= 0")
    priors = [None, None, None, magnification_sd, defocus_sd]
    task = _Task(
        shared_data(references, noise),
        refined,
        noise is None,
        references.new_tensor([0 if sd is None else sd**-2 for sd in priors], dtype=torch.float64),
        references.new_tensor([0, 0, 0, 1, 0], dtype=torch.float64),
    )
    return _refine(particles, label, pose, optics, task, steps)


def _refine(
    particles: Tensor, label: Tensor, pose: Pose, optics: Optics | None, task: _Task, steps: int
) -> Refined:
    chunk = max(1, CHUNK[particles.device.type] // particles.shape[-1] ** 2)
    p = len(task.refined)
    found = [tuple(task.centre.new_empty(0, *shape) for shape in ((5,), (), (), (p, p)))]
    for start in range(0, len(particles), chunk):
        rows = slice(start, start + chunk)
        own = None if optics is None else optics[rows]
        data = particle_data(particles[rows], label[rows], pose.mirror[rows], own, task.shared)
        found.append(_refine_chunk(data, pose[rows], task, steps))
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
        tuple(COLUMNS[column] for column in task.refined),
    )


def _refine_chunk(
    data: ParticleData, pose: Pose, task: _Task, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unknowns (n, 5), amplitude (n,), score (n,) and covariance (n, p, p) of a chunk."""
    start = task.centre.repeat(len(pose), 1)
    start[:, 0], start[:, 1:3] = pose.angle, pose.shift
    current = data

    def whole(unknowns: Tensor, rows: Tensor | slice) -> Tensor:
        filled = start[rows].clone()
        filled[:, task.refined] = unknowns
        return filled

    def evaluate(unknowns: Tensor, rows: Tensor) -> Point:
        nonlocal current  # the particles that have not stopped only get fewer
        if len(rows) < len(current.mirror):
            current = data.take(rows)
        return _point(whole(unknowns, rows), current, task)

    longest = start.new_tensor(LONGEST)[task.refined]
    best = gauss_newton(evaluate, start[:, task.refined], longest, steps)
    unknowns = whole(best.unknowns, slice(None))
    unknowns[:, 0] = wrap_degrees(unknowns[:, 0])
    amplitude, score = best.notes.unbind(1)
    return unknowns, amplitude, score, _covariance(best.curvature, amplitude > 0)


def _point(unknowns: Tensor, data: ParticleData, task: _Task) -> Point:
    """Loss, slope and curvature at unknowns (n, 5); the notes are amplitude and score."""
    value, *derivatives = model(unknowns, data, task.shared)
    rows = [data.spectra, value, *(derivatives[column] for column in task.refined)]
    real = torch.view_as_real(torch.stack(rows, 1)).flatten(2)  # (n, 2 + p, 2 h f)
    moments = (real @ real.mT).double()
    tiny = torch.finfo(real.dtype).tiny
    xx, xm, mm = moments[:, 0, 0], moments[:, 0, 1], moments[:, 1, 1].clamp(min=tiny)
    # Particle and derivatives without what a change of the amplitude explains.
    share = moments[:, 1] / mm[:, None]
    rest = moments - share[:, :, None] * moments[:, 1, None]
    score = xm / (xx * mm).clamp(min=tiny).sqrt()
    # Signed, so that a negative amplitude is worse than none.
    explained = score.clamp(-1, 1) * score.abs().clamp(max=1)
    free = task.shared.numbers - 1 - len(task.refined)
    eps = torch.finfo(data.spectra.dtype).eps
    left = xx * (1 - explained).clamp(min=eps)
    if task.white:
        variance = left / free
        loss = free / 2 * (1 - explained).clamp(min=eps).log()
    else:
        variance = torch.ones_like(xx)
        loss = -xx * explained / 2
    amplitude = xm / mm
    # Where it is not positive, the slope still points to a higher correlation.
    scale = torch.maximum(amplitude, LEAST_AMPLITUDE * (xx / mm).sqrt())
    scale = torch.where(
        moments[:, 1, 1] > tiny, scale, 0.0
    )  # of a model that is zero nothing is known
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
    """(n, p, p) the inverse, where ``known`` (n,) is true and there is one; else infinite."""
    diagonal = information.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    unit = scale[:, :, None] * information * scale[:, None, :]
    known = known & (diagonal > 0).all(1) & unit.isfinite().all(2).all(1)
    one = torch.eye(unit.shape[1]).to(unit)
    safe = torch.where(known[:, None, None], unit, one)
    known = known & (torch.linalg.eigvalsh(safe)[:, 0] > LEAST_INFORMATION)
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
        raise ValueError(
            "defocus cannot be refined without optics: give optics= for every particle"
        )
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
