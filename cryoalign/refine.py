"""Refinement of poses below the search's grid: Gauss-Newton on angle and shift."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cryoalign.filters import frequency_grid
from cryoalign.geometry import pixel_grid, sample
from cryoalign.polar import Rings
from cryoalign.pose import Pose, wrap_degrees

# A step from a grid of 1 px and 1.4 degrees; longer ones leave the peak that was found.
MAX_TURN = 2.0  # degrees
MAX_MOVE = 0.7  # pixels
# Pixels of a chunk of particles: their arrays stay in a core's cache.
CHUNK = 2**16


class _Fit(NamedTuple):
    """The references seen through the poses, on the particles' pixels."""

    angle: Tensor  # (n,) degrees
    shift: Tensor  # (n, 2)
    score: Tensor  # (n,)
    moments: Tensor  # (n, 6, 6) see `_evaluate`


class _Window(NamedTuple):
    """The pixels of each particle that its disc can cover, about a pixel near its centre."""

    centre: Tensor  # (n, 2) that pixel, about the image's centre
    x: Tensor  # (p,)
    y: Tensor  # (p,)
    square: Tensor  # (n, p) squared distance from it; infinite outside of the image
    place: Tensor  # (n, p) complex: x + iy, or x - iy for mirrored particles


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
    return refine_on(images, templates_of(references), label, pose, rings, steps)


def refine_on(
    images: Tensor, templates: Tensor, label: Tensor, pose: Pose, rings: Rings, steps: int = 3
) -> tuple[Pose, Tensor]:
    """`refine` with `templates_of` the references at hand."""
    few = max(1, math.ceil(CHUNK / (math.pi * rings.last_ring**2)))
    poses, scores = [], []
    for start in range(0, len(images), few):
        part = slice(start, start + few)
        found, score = _refine_chunk(
            images[part], templates.index_select(0, label[part]), pose[part], rings, steps
        )
        poses.append(found)
        scores.append(score)
    return Pose.cat(poses), torch.cat(scores)


def _refine_chunk(
    images: Tensor, templates: Tensor, pose: Pose, rings: Rings, steps: int
) -> tuple[Pose, Tensor]:
    near, window = _window(images, pose, rings.last_ring + 1 + steps * MAX_MOVE)
    pixels = images.flatten(1).gather(1, near)  # (n, p)
    particles = torch.stack([torch.ones_like(pixels), pixels], 1)  # (n, 2, p)

    def fit(angle: Tensor, shift: Tensor) -> _Fit:
        return _evaluate(particles, templates, window, Pose(angle, shift, pose.mirror), rings)

    now = fit(pose.angle.to(images.dtype), pose.shift.to(images.dtype))
    for _ in range(steps):
        turn, move = _step(now, pose.mirror)
        trial = fit(now.angle + turn, now.shift + move)
        better = trial.score > now.score
        now = _Fit(
            *(
                torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(trial, now, strict=True)
            )
        )
    return Pose(wrap_degrees(now.angle), now.shift, pose.mirror), now.score


def _window(images: Tensor, pose: Pose, radius: float) -> tuple[Tensor, _Window]:
    """The pixels within ``radius`` of each particle's own centre, to the nearest pixel.

    Their number does not depend on the particles, so that neither does any rounding.

    Returns:
        (n, p) where they are in the flattened images, and the window.
    """
    height, width = images.shape[-2:]
    reach = math.ceil(radius)
    grid = pixel_grid((2 * reach + 1, 2 * reach + 1), images).flatten(0, 1)
    disc = grid[grid.square().sum(-1) <= (radius + 0.71) ** 2]  # (p, 2)
    disc = F.pad(disc, (0, 0, 0, -len(disc) % 16), value=math.inf)  # whole vectors
    centre = -pose.shift.detach().nan_to_num().round()  # (n, 2)
    x, y = disc.nan_to_num(0, 0).unbind(-1)
    column = x + (centre[:, :1] + width // 2)  # (n, p)
    row = y + (centre[:, 1:] + height // 2)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    near = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    # What is not there is infinitely far out, where the disc has no weight.
    square = torch.where(inside, disc.square().sum(-1), math.inf)
    place = torch.complex(x, y)
    hand = torch.where(pose.mirror.unsqueeze(1), place.conj().resolve_conj(), place)
    return near.long(), _Window(centre, x, y, square, hand)


def templates_of(references: Tensor) -> Tensor:
    """(k, 4, h, w) what is sampled: references (k, h, w), their derivatives by place x and y and
    by a turn about the centre, which brings a place v' along (-y', x')."""
    along_x, along_y = _gradient(references)
    x, y = pixel_grid((references.shape[-2], references.shape[-1]), references).unbind(-1)
    return torch.stack([references, along_x, along_y, x * along_y - y * along_x], 1)


def _evaluate(
    particles: Tensor, templates: Tensor, window: _Window, pose: Pose, rings: Rings
) -> _Fit:
    """Score and moments at poses of particles (n, 2, p): a row of ones, a row of pixels.

    The moments are the sums over pixels of products of 1, particle, reference and the reference's
    three derivatives, weighted by the disc: all that score and step need, from one product.
    """
    matrix = torch.view_as_complex(pose.linear().mT.contiguous())  # (n, 2): where x and y go
    shift = pose.shift + window.centre  # (n, 2)
    centre = (matrix * shift).sum(1, keepdim=True)  # (n, 1)
    # Places x + iy. Mirrored, y goes to -i times where x goes, else to i times: so `_Window.place`.
    places = torch.addcmul(centre, window.place, matrix[:, :1])  # (n, p) on the reference
    values = sample(templates, torch.view_as_real(places))  # (n, 4, p)
    # A turn keeps distances: |v + shift| is that on the reference.
    square = window.square + shift.square().sum(1, keepdim=True)
    square = torch.addcmul(square, window.x, 2 * shift[:, :1])
    square = torch.addcmul(square, window.y, 2 * shift[:, 1:])
    weight = _annulus(square.clamp(min=1e-6).sqrt(), rings).unsqueeze(1)  # (n, 1, p)
    own = weight * particles
    across = own @ values.mT  # (n, 2, 4)
    moments = torch.cat(
        [
            torch.cat([own @ particles.mT, across], 2),
            torch.cat([across.mT, (weight * values) @ values.mT], 2),
        ],
        1,
    )  # (n, 6, 6)
    central = _without(moments, 0)
    xx, xy, yy = central[:, 1, 1], central[:, 1, 2], central[:, 2, 2]
    score = xy / (xx * yy).clamp(min=torch.finfo(xy.dtype).tiny).sqrt()
    return _Fit(pose.angle, pose.shift, score, central)


def _without(moments: Tensor, index: int) -> Tensor:
    """Moments (n, c, c) of what is left of the columns when column ``index`` is projected out."""
    row = moments[:, index]  # (n, c)
    power = row[:, index].clamp(min=torch.finfo(row.dtype).tiny)
    return moments - row.unsqueeze(-1) * (row / power.unsqueeze(-1)).unsqueeze(-2)


def _step(fit: _Fit, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) degrees and (n, 2) pixels: the Gauss-Newton step, amplitude and constant projected out."""
    moments = fit.moments
    xy, yy = moments[:, 1, 2], moments[:, 2, 2]
    # Least squares wants the amplitude positive; where it is not there is nothing to follow.
    amplitude = (xy / yy.clamp(min=torch.finfo(xy.dtype).tiny)).clamp(min=1e-3)
    rest = _without(moments, 2)
    normal, right = rest[:, 3:, 3:], rest[:, 3:, 1] / amplitude.unsqueeze(-1)
    # A trace of a ridge: a round reference has no angle, an empty one nothing at all.
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-4 * diagonal + 1e-4 * diagonal.amax(-1, keepdim=True) * 1e-2 + 1e-12
    step = torch.linalg.solve(normal + torch.diag_embed(ridge), right)  # x', y', turn
    # From the reference's frame to the particle's: mirrored, a turn goes backwards.
    turn = torch.rad2deg(step[:, 2]) * torch.where(mirror, -1.0, 1.0).to(step.dtype)
    linear = Pose(fit.angle, fit.shift, mirror).linear()
    move = (linear.mT @ step[:, :2].unsqueeze(-1)).squeeze(-1)
    return turn.clamp(-MAX_TURN, MAX_TURN), move.clamp(-MAX_MOVE, MAX_MOVE)


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
