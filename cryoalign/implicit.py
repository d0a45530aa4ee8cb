"""The pose as the maximum of a smooth score, and how it moves with the images.

`correlate.correlation_at` shifts by bilinear sampling: its maximum lies at a kink, where second
derivatives mean nothing. `smooth_score` moves the image by phases of its Fourier transform
instead and samples rings that stay where they are, so it is smooth in angle and shift. At its
maximum p over poses, d score / d p = 0, and the implicit function theorem gives

    d p / d images = - H^-1  d^2 score / (d p d images),   H = d^2 score / d p^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryoalign.correlate import turned_correlation
from cryoalign.geometry import gather_sample
from cryoalign.polar import Rings, normalised_spectra, ring_points
from cryoalign.pose import Pose, wrap_degrees

STEPS = 6  # of Newton's method; from a refined pose three reach float64's rounding
MAX_TURN, MAX_MOVE = 2.0, 0.7  # degrees and pixels of one step


def fourier_shift(images: Tensor, shift: Tensor) -> Tensor:
    """Images (n, h, w) moved by (n, 2) xy pixels, exactly below Nyquist; the edges wrap round.

    (torch-fourier-shift has its phases in float32: too coarse for a float64 derivative.)
    """
    height, width = images.shape[-2:]
    x = torch.fft.rfftfreq(width, dtype=images.dtype, device=images.device)
    y = torch.fft.fftfreq(height, dtype=images.dtype, device=images.device)
    shift = shift.to(images.dtype)[:, :, None, None]  # (n, 2, 1, 1)
    phase = (-2 * math.pi) * (shift[:, 0] * x + shift[:, 1] * y[:, None])
    spectra = torch.fft.rfft2(images) * torch.complex(phase.cos(), phase.sin())
    return torch.fft.irfft2(spectra, s=(height, width))


def smooth_score(images: Tensor, references: Tensor, pose: Pose, rings: Rings) -> Tensor:
    """The score of particle i against reference i at pose i: twice differentiable in all.

    Args:
        images: (n, h, w).
        references: (n, h, w), or (1, h, w) shared.
        pose: (n,), particle onto reference.
        rings: the rings, about the centre of the moved particle.

    Returns:
        (n,) correlation coefficients, those of `correlate.correlation_at` but for how shifts are
        interpolated.
    """
    points = ring_points(rings, images)[None]
    x = normalised_spectra(gather_sample(fourier_shift(images, pose.shift), points), rings)
    y = normalised_spectra(gather_sample(references, points), rings)
    return turned_correlation(x, y, pose.angle, pose.mirror)


def implicit_pose(images: Tensor, references: Tensor, start: Pose, rings: Rings) -> Pose:
    """The poses that maximise `smooth_score`, differentiable in images and references.

    Newton's method without a gradient from the start to the maximum; then one more step, which
    moves nothing and whose gradient is the theorem's. Where the Hessian is not negative
    definite there is no maximum to follow: that pose is a constant.

    Args:
        images: (n, h, w).
        references: (n, h, w), or (1, h, w) shared.
        start: (n,) within a grid step of the maximum.
        rings: the rings.
    """
    where = torch.cat([start.angle[:, None], start.shift], 1).detach().to(images.dtype)  # (n, 3)
    bound = where.new_tensor([MAX_TURN, MAX_MOVE, MAX_MOVE])
    tracked = torch.is_grad_enabled() and (images.requires_grad or references.requires_grad)
    with torch.enable_grad():
        fixed = images.detach(), references.detach()
        for _ in range(STEPS):
            slope, hessian = _derivatives(*fixed, where, start.mirror, rings)
            step = _newton(slope, hessian)
            where = where + step.clamp(-bound, bound)
        _, hessian = _derivatives(*fixed, where, start.mirror, rings)
        if tracked:
            slope, _ = _derivatives(images, references, where, start.mirror, rings, final=True)
            where = where + _newton(slope, hessian)
    return Pose(wrap_degrees(where[:, 0]), where[:, 1:], start.mirror)


def _derivatives(
    images: Tensor,
    references: Tensor,
    where: Tensor,
    mirror: Tensor,
    rings: Rings,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient (n, 3) and Hessian (n, 3, 3) of the score by angle and shift; if ``final``, the
    gradient alone, with a gradient by the images."""
    where = where.detach().requires_grad_()
    score = smooth_score(images, references, Pose(where[:, 0], where[:, 1:], mirror), rings)
    (slope,) = torch.autograd.grad(score.sum(), where, create_graph=True)
    if final:
        return slope, slope.new_zeros(0)
    rows = [torch.autograd.grad(part.sum(), where, retain_graph=True)[0] for part in slope.T]
    return slope.detach(), torch.stack(rows, 1)


def _newton(slope: Tensor, hessian: Tensor) -> Tensor:
    """(n, 3) steps to the maximum; along the slope's sign in bounded length where there is none."""
    scale = hessian.diagonal(dim1=1, dim2=2).abs().clamp(min=1e-12).rsqrt()  # (n, 3) units
    scaled = scale[:, :, None] * hessian * scale[:, None, :]
    peak = torch.linalg.eigvalsh(scaled).amax(1) < 0
    safe = torch.where(peak[:, None, None], scaled, -torch.eye(3).to(scaled))
    step = -scale * torch.linalg.solve(safe, (scale * slope)[..., None])[..., 0]
    return torch.where(peak[:, None], step, 0.0)
