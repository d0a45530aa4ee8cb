"""Refinement of poses below the search's grid: Gauss-Newton on angle and shift."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.filters import frequency_grid
from cryoalign.geometry import pixel_grid, sample
from cryoalign.polar import Rings
from cryoalign.pose import Pose, wrap_degrees

# A step from a grid of 1 px and 1.4 degrees; longer ones leave the peak that was found.
MAX_TURN = 2.0  # degrees
MAX_MOVE = 0.7  # pixels
CHUNK = 32


class _Fit(NamedTuple):
    """The references seen through the poses: values and derivatives on the particles' pixels."""

    angle: Tensor  # (n,) degrees
    shift: Tensor  # (n, 2)
    score: Tensor  # (n,)
    residual: Tensor  # (n, p) particle - amplitude * reference, over the amplitude
    reference: Tensor  # (n, p) mean removed
    jacobian: Tensor  # (n, p, 3) derivatives by angle (radian), shift x, shift y
    weight: Tensor  # (n, p)


def refine(
    images: Tensor,
    references: Tensor,
    label: Tensor,
    pose: Pose,
    rings: Rings,
    steps: int = 3,
) -> tuple[Pose, Tensor]:
    """Improve poses by least squares, particle = amplitude * reference moved + constant.

    The *reference* is interpolated, at the particle's own pixels, and the particle, whose noise
    interpolation would blur and correlate, is left alone: on clean references the errors then
    meet the Cramér-Rao bound (``python -m bench accuracy``). Gauss-Newton with the amplitude
    projected out (Golub & Pereyra 1973); a step that does not raise the score is not taken.

    Args:
        images: (n, size, size), background zero.
        references: (k, size, size).
        label: (n,) which reference is each particle's.
        pose: (n,) start, within a grid step of the optimum.
        rings: the disc (or annulus) compared, centred on the reference.
        steps: Gauss-Newton steps.

    Returns:
        The poses (n,) and their scores (n,): the correlation coefficient of particle and moved
        reference over the pixels of the disc.
    """
    templates = torch.stack([references, *_gradient(references)], 1)  # (k, 3, h, w)
    poses, scores = [], []
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        found, score = _refine_chunk(
            images[part], templates[label[part]], pose[part], rings, steps
        )
        poses.append(found)
        scores.append(score)
    return Pose.cat(poses), torch.cat(scores)


def _refine_chunk(
    images: Tensor, templates: Tensor, pose: Pose, rings: Rings, steps: int
) -> tuple[Pose, Tensor]:
    grid = pixel_grid((images.shape[-2], images.shape[-1]), images)
    # Every pixel that the disc can cover, wherever these poses and their steps bring it.
    reach = rings.last_ring + 1 + float(pose.shift.norm(dim=-1).max()) + steps * MAX_MOVE
    near = grid.norm(dim=-1) <= reach
    pixels, particles = grid[near], images[:, near]  # (p, 2), (n, p)

    def fit(angle: Tensor, shift: Tensor) -> _Fit:
        return _evaluate(particles, templates, pixels, Pose(angle, shift, pose.mirror), rings)

    now = fit(pose.angle.to(images.dtype), pose.shift.to(images.dtype))
    for _ in range(steps):
        turn, move = _step(now)
        trial = fit(now.angle + turn, now.shift + move)
        better = trial.score > now.score
        now = _Fit(
            *(
                torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(trial, now, strict=True)
            )
        )
    return Pose(wrap_degrees(now.angle), now.shift, pose.mirror), now.score


def _evaluate(particles: Tensor, templates: Tensor, pixels: Tensor, pose: Pose, rings: Rings) -> _Fit:
    linear = pose.linear()  # (n, 2, 2)
    places = (pixels + pose.shift.unsqueeze(1)) @ linear.mT  # (n, p, 2) on the reference
    values = sample(templates, places)  # (n, 3, p)
    radius = places.norm(dim=-1)
    weight = _annulus(radius, rings)
    total = weight.sum(1, keepdim=True)
    x = particles - (weight * particles).sum(1, keepdim=True) / total
    reference = values[:, 0]
    y = reference - (weight * reference).sum(1, keepdim=True) / total
    xy, xx, yy = ((weight * a * b).sum(1) for a, b in ((x, y), (x, x), (y, y)))
    tiny = torch.finfo(x.dtype).tiny
    score = xy / (xx * yy).clamp(min=tiny).sqrt()
    gradient = values[:, 1:].mT  # (n, p, 2)
    # Turning the particle moves a reference place v' along (-y', x'), backwards if mirrored.
    around = torch.stack([-places[..., 1], places[..., 0]], -1)
    hand = torch.where(pose.mirror, -1.0, 1.0).to(x.dtype)
    by_angle = (gradient * around).sum(-1) * hand[:, None]
    jacobian = torch.cat([by_angle.unsqueeze(-1), gradient @ linear], -1)  # (n, p, 3)
    # Least squares wants the amplitude positive; where it is not there is nothing to follow.
    amplitude = (xy / yy.clamp(min=tiny)).clamp(min=1e-3)
    residual = x / amplitude[:, None] - y
    return _Fit(pose.angle, pose.shift, score, residual, y, jacobian, weight)


def _step(fit: _Fit) -> tuple[Tensor, Tensor]:
    """(n,) degrees and (n, 2) pixels: the Gauss-Newton step, amplitude and constant projected out."""
    weight = fit.weight.unsqueeze(-1)
    jacobian = fit.jacobian - (weight * fit.jacobian).sum(1, keepdim=True) / weight.sum(
        1, keepdim=True
    )
    y = fit.reference.unsqueeze(-1)
    power = (weight * y.square()).sum(1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    jacobian = jacobian - y * (weight * jacobian * y).sum(1, keepdim=True) / power
    normal = (weight * jacobian).mT @ jacobian  # (n, 3, 3)
    right = ((weight * jacobian).mT @ fit.residual.unsqueeze(-1)).squeeze(-1)
    # A trace of a ridge: a round reference has no angle, an empty one nothing at all.
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-4 * diagonal + 1e-4 * diagonal.amax(-1, keepdim=True) * 1e-2 + 1e-12
    step = torch.linalg.solve(normal + torch.diag_embed(ridge), right)
    turn = torch.rad2deg(step[:, 0]).clamp(-MAX_TURN, MAX_TURN)
    return turn, step[:, 1:].clamp(-MAX_MOVE, MAX_MOVE)


def _annulus(radius: Tensor, rings: Rings) -> Tensor:
    """The rings' area as a weight of pixels, its rim one pixel soft so that scores are smooth."""
    weight = (rings.last_ring + 1.0 - radius).clamp(0, 1)
    if rings.first_ring > 1:
        weight = weight * (radius - (rings.first_ring - 1.0)).clamp(0, 1)
    return weight


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of images (k, size, size) along x and y, exact for band-limited images."""
    spectrum = torch.fft.rfft2(images)
    kx, ky = frequency_grid(images.shape[-1], images.device)
    size = (images.shape[-2], images.shape[-1])
    return (
        torch.fft.irfft2(spectrum * (2j * math.pi * kx), s=size),
        torch.fft.irfft2(spectrum * (2j * math.pi * ky), s=size),
    )
