"""The Cramér-Rao bound: how well a pose, a magnification and a defocus can be known at all.

A particle is amplitude * view(pose) through its CTF + white noise of standard deviation 1 over the
whole box. For Gaussian noise the Fisher information of the parameters is J'J, J the derivatives of
the image (Kay 1993, *Estimation Theory*, ch. 3), and no unbiased estimate has a smaller covariance
than its inverse. The sums over pixels do not depend on the pose, up to the axes of shift and
astigmatism, so they are taken on the view itself.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, complex_ctf, defocus_phase
from cryoalign.images.fourier import frequency_grid
from cryoalign.images.geometry import pixel_grid
from cryoalign.pose import Pose


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
    return torch.linalg.inv(_information(_derivatives(views)[:, [0, 1, 2, 4]]))[:, :3, :3]


def joint_covariance(
    views: Tensor, view: Tensor, pose: Pose, optics: Optics | None, columns: tuple[int, ...]
) -> Tensor:
    """(n, p, p) bound of every particle, at a magnification of 1; the amplitude is unknown.

    Args:
        views: (k, size, size) noise-free, without CTF, noise having a standard deviation of 1.
        view: (n,) which one a particle shows.
        pose: (n,) particle onto view.
        optics: (n,) the true ones; None is a CTF of 1.
        columns: (p,) what is unknown, of 0 angle (degrees), 1 shift x, 2 shift y (pixels),
            3 magnification, 4 defocus (Å).
    """
    spectra = _derivatives(views)  # (k, 5, h, f)
    if optics is None:
        information = _information(spectra)[view]
        chosen = [*columns, 4]
    else:
        information = torch.cat(
            [
                _seen_information(spectra[view[rows]], pose[rows], optics[rows], views.shape[-1])
                for rows in torch.arange(len(view)).split(64)
            ]
        )
        chosen = [*columns, 5]
        information = information[:, [0, 1, 2, 3, 5, 4]][:, :, [0, 1, 2, 3, 5, 4]]
    # From the view's frame (radians, x', y') to the pose's: a mirrored turn goes backwards.
    onto = torch.eye(information.shape[1], dtype=torch.float64).repeat(len(view), 1, 1)
    onto[:, 0, 0] = torch.where(pose.mirror, -math.pi, math.pi) / 180
    onto[:, 1:3, 1:3] = pose.linear().double()
    information = (onto.mT @ information @ onto)[:, chosen][:, :, chosen]
    return torch.linalg.inv(information)[:, :-1, :-1]


def _derivatives(views: Tensor) -> Tensor:
    """(k, 5, h, f) spectra of views' derivatives by turn, x, y and growth, and of the views; the
    real part of a product's sum is that of the images' pixels."""
    views = views.double()
    size = views.shape[-1]
    spectrum = torch.fft.rfft2(views)
    by_x, by_y = (
        torch.fft.irfft2(spectrum * (2j * math.pi * k.double()), s=(size, size))
        for k in frequency_grid(size)
    )
    x, y = pixel_grid((size, size), views).unbind(-1)
    stack = [by_y * x - by_x * y, by_x, by_y, -(by_x * x + by_y * y), views]
    weight = torch.full((size // 2 + 1,), 2.0, dtype=torch.float64)
    weight[0] = 1
    if size % 2 == 0:
        weight[-1] = 1
    return torch.fft.rfft2(torch.stack(stack, 1), norm="ortho") * weight.sqrt()


def _information(spectra: Tensor) -> Tensor:
    """(n, p, p) of derivatives' spectra (n, p, h, f)."""
    real = torch.view_as_real(spectra).flatten(2)
    return real @ real.mT


def _seen_information(spectra: Tensor, pose: Pose, optics: Optics, size: int) -> Tensor:
    """(n, 6, 6) of spectra (n, 5, h, f) seen through CTFs turned as particles are; defocus last."""
    turned = optics.defocus_angle + pose.angle
    turned = torch.where(pose.mirror, 180 - turned, turned).float()
    own = replace(optics, defocus_angle=turned)
    wave = complex_ctf(own, size).to(torch.complex128)
    by_defocus = spectra[:, 4] * wave.real * defocus_phase(own, size)
    return _information(torch.cat([spectra * wave.imag.unsqueeze(1), by_defocus.unsqueeze(1)], 1))


def expected_medians(views: Tensor, view: Tensor, draws: int = 200_000, seed: int = 0) -> Medians:
    """Median errors of an estimate that meets the bound, over particles showing ``view`` (n,)."""
    root = torch.linalg.cholesky(pose_covariance(views))
    generator = torch.Generator().manual_seed(seed)
    shown = view[torch.randint(len(view), (draws,), generator=generator)]
    normal = torch.randn(draws, 3, 1, dtype=torch.float64, generator=generator)
    error = (root[shown] @ normal).squeeze(-1)
    angle = torch.rad2deg(error[:, 0].abs()).median()
    return Medians(float(angle), float(error[:, 1:].norm(dim=1).median()))


def draws(covariance: Tensor, each: int = 200, seed: int = 0) -> Tensor:
    """(n * each, p) errors as estimates with covariances (n, p, p) make them."""
    generator = torch.Generator().manual_seed(seed)
    n, p = covariance.shape[:2]
    normal = torch.randn(n, each, p, dtype=torch.float64, generator=generator)
    return (normal @ torch.linalg.cholesky(covariance).mT).flatten(0, 1)
