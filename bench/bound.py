"""The Cramér-Rao bound: how well a pose can be known at all.

A particle is amplitude * view(pose) + white noise of standard deviation 1 over the whole box. For
Gaussian noise the Fisher information of the parameters is J'J, J the derivatives of the image
(Kay 1993, *Estimation Theory*, ch. 3), and no unbiased estimate has a smaller covariance than its
inverse. The sums over pixels do not depend on the pose, up to the axes of the shift, so they are
taken on the view itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.filters import frequency_grid
from cryoalign.geometry import pixel_grid


class Medians(NamedTuple):
    """Median errors of a pose."""

    angle: float  # degrees
    shift: float  # pixels, length of the vector


def pose_covariance(views: Tensor) -> Tensor:
    """(k, 3, 3) bound on the covariance of (angle in radians, shift x, shift y in pixels).

    The amplitude is a fourth, unknown parameter.

    Args:
        views: (k, size, size) noise-free, noise having a standard deviation of 1.
    """
    views = views.double()
    size = views.shape[-1]
    spectrum = torch.fft.rfft2(views)
    by_x, by_y = (
        torch.fft.irfft2(spectrum * (2j * math.pi * k.double()), s=(size, size))
        for k in frequency_grid(size)
    )
    x, y = pixel_grid((size, size), views).unbind(-1)
    by_angle = by_y * x - by_x * y
    jacobian = torch.stack([by_angle, by_x, by_y, views], 1).flatten(2)  # (k, 4, p)
    return torch.linalg.inv(jacobian @ jacobian.mT)[:, :3, :3]


def expected_medians(views: Tensor, view: Tensor, draws: int = 200_000, seed: int = 0) -> Medians:
    """Median errors of an estimate that meets the bound, over particles showing ``view`` (n,)."""
    root = torch.linalg.cholesky(pose_covariance(views))
    generator = torch.Generator().manual_seed(seed)
    shown = view[torch.randint(len(view), (draws,), generator=generator)]
    normal = torch.randn(draws, 3, 1, dtype=torch.float64, generator=generator)
    error = (root[shown] @ normal).squeeze(-1)
    angle = torch.rad2deg(error[:, 0].abs()).median()
    return Medians(float(angle), float(error[:, 1:].norm(dim=1).median()))
