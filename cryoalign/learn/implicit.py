"""Differentiable poses: the maximum of a smooth score, by the implicit function theorem.

`correlation.correlation_at` shifts images by bilinear sampling, so it is not smooth at its maximum
and has no useful second derivatives there. `smooth_score` shifts an image by the phases of its
Fourier transform and samples fixed rings, so it is smooth in angle and shift. At its maximum p over
all poses, d score / d p = 0, and the implicit function theorem gives

    d p / d images = - H^-1  d^2 score / (d p d images),   H = d^2 score / d p^2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.geometry import gather_sample
from cryoalign.images.polar import Rings, normalised_spectra, ring_points
from cryoalign.operators.correlation import turned_correlation
from cryoalign.pose import Pose, wrap_degrees

STEPS = 6
"""Newton steps from a pose of the search grid."""
REFINED_STEPS = 3
"""Newton steps from a refined pose; they reach the rounding error of float64."""
MAX_TURN, MAX_MOVE = 2.0, 0.7
"""Largest change of the pose in one Newton step, in degrees and pixels."""
ENDED = 1e-2
"""Newton's method has converged if the next step is shorter than this part of the largest one."""


def fourier_shift(images: Tensor, shift: Tensor) -> Tensor:
    """Shift images (n, h, w) by (n, 2) px, x then y; the images are periodic at their edges.

    It is exact for frequencies below Nyquist. (torch-fourier-shift computes phases in float32,
    which is too coarse for derivatives in float64.)
    """
    return _shifted(torch.fft.rfft2(images), shift, images.shape[-1])


def _shifted(spectra: Tensor, shift: Tensor, width: int) -> Tensor:
    """`fourier_shift` of spectra (n, h, w // 2 + 1)."""
    height = spectra.shape[-2]
    shift = shift.to(spectra.real.dtype)[:, :, None, None]  # (n, 2, 1, 1)
    x = torch.fft.rfftfreq(width, dtype=shift.dtype, device=shift.device)
    y = torch.fft.fftfreq(height, dtype=shift.dtype, device=shift.device)
    phase = (-2 * math.pi) * (shift[:, 0] * x + shift[:, 1] * y[:, None])
    moved = spectra * torch.complex(phase.cos(), phase.sin())
    return torch.fft.irfft2(moved, s=(height, width))


class _Pair(NamedTuple):
    """Particles and references, prepared for scores at any pose.

    Attributes:
        spectra: (n, h, w // 2 + 1) Fourier transforms of the particles.
        width: width w of the particles in px.
        rings: (n or 1, r, m) ring spectra of the references.
    """

    spectra: Tensor
    width: int
    rings: Tensor


def smooth_score(images: Tensor, references: Tensor, pose: Pose, rings: Rings) -> Tensor:
    """Score of particle i against reference i at pose i, twice differentiable in all of them.

    Args:
        images: (n, h, w) particles.
        references: (n, h, w), or (1, h, w) for all particles.
        pose: (n,) poses that move the particles onto the references.
        rings: the rings on which the images are compared, about the centre of the moved particle.

    Returns:
        (n,) correlation coefficients. They differ from those of `correlation.correlation_at` only
        in how shifts are interpolated.
    """
    return _score(_pair(images, references, rings), pose, rings)


def _pair(images: Tensor, references: Tensor, rings: Rings) -> _Pair:
    sampled = gather_sample(references, ring_points(rings, references)[None])
    return _Pair(torch.fft.rfft2(images), images.shape[-1], normalised_spectra(sampled, rings))


def _score(pair: _Pair, pose: Pose, rings: Rings) -> Tensor:
    moved = _shifted(pair.spectra, pose.shift, pair.width)
    x = normalised_spectra(gather_sample(moved, ring_points(rings, moved)[None]), rings)
    return turned_correlation(x, pair.rings, pose.angle, pose.mirror)


@torch.compiler.disable  # it does not support second derivatives
def implicit_pose(
    images: Tensor, references: Tensor, start: Pose, rings: Rings, steps: int = STEPS
) -> Pose:
    """The poses that maximise `smooth_score`, differentiable in images and references.

    Newton's method goes from the start to the maximum without a gradient. One further step is
    computed but not taken; its gradient is that of the implicit function theorem. A pose is a
    constant if there is no maximum nearby: the Hessian is not negative definite, or Newton's method
    has not converged. Only first derivatives are right; in second ones the Hessian is a constant.

    Args:
        images: (n, h, w) particles.
        references: (n, h, w), or (1, h, w) for all particles.
        start: (n,) poses within one grid step of the maximum.
        rings: the rings on which the images are compared.
        steps: number of Newton steps.
    """
    where = torch.cat([start.angle[:, None], start.shift], 1).detach().to(images.dtype)  # (n, 3)
    bound = where.new_tensor([MAX_TURN, MAX_MOVE, MAX_MOVE])
    tracked = torch.is_grad_enabled() and (images.requires_grad or references.requires_grad)
    with torch.no_grad():
        fixed = _pair(images, references, rings)
    with torch.enable_grad():
        for _ in range(steps):
            slope, hessian = _derivatives(fixed, where, start.mirror, rings)
            step = _newton(slope, hessian)
            where = where + step.clamp(-bound, bound)
        if tracked:
            _, hessian = _derivatives(fixed, where, start.mirror, rings)
            slope = _slope(_pair(images, references, rings), where, start.mirror, rings)[1]
            step = _newton(slope, hessian)
            # The theorem holds only where Newton's method has converged.
            ended = (step.detach().abs() < ENDED * bound).all(1, keepdim=True)
            where = where + torch.where(ended, step - step.detach(), 0.0)
    return Pose(wrap_degrees(where[:, 0]), where[:, 1:], start.mirror)


def _slope(pair: _Pair, where: Tensor, mirror: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """Poses (n, 3) as a leaf, and the differentiable gradient (n, 3) of the score in them."""
    where = where.detach().requires_grad_()
    score = _score(pair, Pose(where[:, 0], where[:, 1:], mirror), rings)
    return where, torch.autograd.grad(score.sum(), where, create_graph=True)[0]


def _derivatives(pair: _Pair, where: Tensor, mirror: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """Gradient (n, 3) and Hessian (n, 3, 3) of the score in angle and shift."""
    where, slope = _slope(pair, where, mirror, rings)
    rows = [torch.autograd.grad(part.sum(), where, retain_graph=True)[0] for part in slope.T]
    return slope.detach(), torch.stack(rows, 1)


def _newton(slope: Tensor, hessian: Tensor) -> Tensor:
    """(n, 3) Newton steps to the maximum; zero if there is no maximum."""
    scale = hessian.diagonal(dim1=1, dim2=2).abs().clamp(min=1e-12).rsqrt()  # (n, 3)
    scaled = scale[:, :, None] * hessian * scale[:, None, :]
    downhill = -torch.eye(3).to(scaled)
    # A particle with NaN has no maximum and must not stop the decomposition of the others.
    finite = scaled.isfinite().all(2).all(1) & slope.isfinite().all(1)
    safe = torch.where(finite[:, None, None], scaled, downhill)
    peak = finite & (torch.linalg.eigvalsh(safe).amax(1) < 0)
    safe = torch.where(peak[:, None, None], scaled, downhill)
    step = -scale * torch.linalg.solve(safe, (scale * slope)[..., None])[..., 0]
    return torch.where(peak[:, None], step, 0.0)
