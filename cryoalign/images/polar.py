"""Rings: particles in polar coordinates about every trial shift, and their angular spectra.

The spectra of this module are *unit vectors*: mean and deviation over the rings are removed per
particle and shift, and the area weights and the FFT's length are folded in, half into each
side, so that a plain inner product over rings and angular frequencies is a correlation
coefficient (see `ring_spectra`).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.images.geometry import sample
from cryoalign.runtime.settings import FORBID


@dataclass(frozen=True, config=FORBID)
class Rings:
    """The rings on which images are compared.

    Attributes:
        first_ring: radius of the innermost ring, pixels.
        last_ring: radius of the outermost ring, pixels.
        ring_step: distance between rings, pixels.
        angles: samples on every ring, even; None chooses `angular_samples(last_ring)`.
    """

    first_ring: int = Field(default=1, ge=1)
    last_ring: int = Field(default=36, ge=1)
    ring_step: int = Field(default=1, ge=1)
    angles: int | None = Field(default=None, ge=8)

    def __post_init__(self) -> None:
        if self.last_ring < self.first_ring:
            raise ValueError(
                f"last_ring ({self.last_ring}) must not be smaller than first_ring "
                f"({self.first_ring})"
            )
        if self.angles is not None and self.angles % 2:
            raise ValueError(f"angles must be even, got {self.angles}")

    @property
    def n_angles(self) -> int:
        """Samples on every ring."""
        return self.angles or angular_samples(self.last_ring)

    def radii(self, device: torch.device | str | None = None) -> Tensor:
        """(r,) ring radii in pixels, float64."""
        return torch.arange(
            self.first_ring, self.last_ring + 1, self.ring_step, device=device, dtype=torch.float64
        )

    def weights(self, device: torch.device | str | None = None) -> Tensor:
        """(r,) share of the area that each ring stands for; they sum to 1. float64."""
        radii = self.radii(device)
        return radii / radii.sum()


def angular_samples(last_ring: int) -> int:
    """Angles that resolve a pixel at ``last_ring``: at least 2 pi last_ring, a fast FFT length.

    256 up to 40 px (as SPARX), then the next multiple of 64 without a prime factor above 5.
    """
    needed = max(256, math.ceil(2 * math.pi * last_ring))
    fast = (64 * 2**i * 3**j * 5**k for i in range(12) for j in range(4) for k in range(4))
    return min(n for n in fast if n >= needed)


def ring_points(rings: Rings, like: Tensor) -> Tensor:
    """(r, a, 2) the xy points of the rings about the centre; angle grows from +x towards +y."""
    angle = torch.arange(rings.n_angles, device=like.device, dtype=torch.float64)
    angle = angle * (2 * math.pi / rings.n_angles)
    unit = torch.stack([torch.cos(angle), torch.sin(angle)], -1)  # (a, 2)
    return (rings.radii(like.device)[:, None, None] * unit).to(like.dtype)


def to_polar(images: Tensor, rings: Rings, shifts: Tensor | None = None) -> Tensor:
    """Images on rings, about the centre that each trial shift would bring to the middle.

    Args:
        images: (n, h, w), background zero.
        rings: the rings.
        shifts: (s, 2) trial shifts of a `Pose`, shared by all images, or (n, s, 2); the rings
            of shift t are centred on the image's centre - t. None is one zero shift.

    Returns:
        (n, s, r, a) bilinear samples; zero outside the image.
    """
    if shifts is None:
        shifts = images.new_zeros(1, 2)
    return sample(images, shifted_rings(images, rings, shifts))


def shifted_rings(images: Tensor, rings: Rings, shifts: Tensor) -> Tensor:
    """(1 or n, s, r, a, 2) the points of `to_polar`."""
    if shifts.ndim == 2:
        shifts = shifts.unsqueeze(0)
    return ring_points(rings, images) - shifts.to(images.dtype)[:, :, None, None]


def ring_spectra(images: Tensor, rings: Rings, shifts: Tensor | None = None) -> Tensor:
    """Angular spectra of images on rings, normalised to unit vectors per image and shift.

    With x(r, theta) the polar samples, w_r the area weights (sum 1) and a the number of angles,
    the mean and variance are mu = sum_r w_r mean_theta x and sigma^2 = sum_r w_r mean_theta
    (x - mu)^2, and the result is sqrt(w_r / a) rfft_theta[(x - mu) / sigma]. So
    irfft(sum_r conj(X) Y) is the correlation coefficient of x turned by each of the a angles
    with y, in [-1, 1]. An image without variance on the rings has spectra of zero.

    Args:
        images, rings, shifts: as `to_polar`.

    Returns:
        (n, s, r, m) complex, m = a // 2 + 1.
    """
    return normalised_spectra(to_polar(images, rings, shifts), rings)


def normalised_spectra(polar: Tensor, rings: Rings) -> Tensor:
    """`ring_spectra` of polar samples (..., r, a): (..., r, m) complex."""
    a = polar.shape[-1]
    weights = rings.weights(polar.device).to(polar.dtype)  # (r,)
    spectra = torch.fft.rfft(polar)
    # Sums, not products with a vector: those round by how many rows there are.
    mean = (spectra[..., 0].real * weights).sum(-1) / a  # (...,)
    scale = inverse_deviation(polar, mean, weights)
    factor = (weights / a).sqrt() * scale.unsqueeze(-1)  # (..., r)
    # In place on our own fresh tensor: a pass less over the largest array there is.
    pairs = torch.view_as_real(spectra).mul_(factor[..., None, None])
    pairs[..., 0, 0] -= a * mean.unsqueeze(-1) * factor
    return spectra


def inverse_deviation(polar: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """(...,) 1 / sigma of polar samples (..., r, a) about their mean (...,), rings weighted (r,);
    0 where there is no variance."""
    power = (torch.linalg.vecdot(polar, polar) * weights).sum(-1) / polar.shape[-1]
    variance = power - mean.square()
    # Below this the deviation is rounding: such an image says nothing about its pose.
    flat = variance <= 16 * torch.finfo(polar.dtype).eps * power
    return torch.where(flat, 0.0, torch.where(flat, 1.0, variance).rsqrt())


def carried(rings: Rings, device: torch.device | str | None = None) -> Tensor:
    """(r, m) bool: the angular frequencies that a ring of an image sampled at 1 px can hold.

    Ring r meets 2 pi r pixels, hence m <= pi r; two more are left to the bilinear samples' tails.
    What a ring shows beyond is interpolation, not image.
    """
    frequency = torch.arange(rings.n_angles // 2 + 1, device=device)
    return frequency <= (math.pi * rings.radii(device)).floor().unsqueeze(1) + 2


def reference_spectra(references: Tensor, rings: Rings) -> Tensor:
    """`ring_spectra` of references, without what their rings cannot hold, as unit vectors again.

    So half of every ring product is zero, and `correlation_peaks` leaves it out.

    Args:
        references: (k, h, w).

    Returns:
        (k, r, m) complex.
    """
    spectra = ring_spectra(references, rings)[:, 0] * carried(rings, references.device)
    pairs = torch.view_as_real(spectra).square().sum(-1).sum(1)  # (k, m)
    # A real signal's frequencies count twice, but for the first and the last.
    power = (2 * pairs.sum(1) - pairs[:, 0] - pairs[:, -1]) / rings.n_angles
    scale = torch.where(power > 0, power, torch.ones_like(power)).rsqrt()
    return spectra * scale[:, None, None]
