"""Particles sampled on rings about the centre of every trial shift, and their angular spectra.

The spectra of this module are *unit vectors*: the mean over the rings is subtracted, and the
spectra are divided by the standard deviation. Both factors of an inner product contain the square
root of the rings' area weights and of the FFT's length, so that the inner product over rings and
angular frequencies is a correlation coefficient (see `ring_spectra`).
"""

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
        angles: samples on every ring, an even number; None is `angular_samples(last_ring)`.
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
        """(r,) share of each ring in the area of all; they sum to 1. float64."""
        radii = self.radii(device)
        return radii / radii.sum()


def angular_samples(last_ring: int) -> int:
    """Number of angles at which samples on the last ring are at most 1.2 pixels apart.

    256 up to 48 px (SPARX: up to 40 px), then the next multiple of 64 without a prime factor above
    5, for a fast FFT. At 1.2 px, the frequencies that are lost lie above 0.42 cycles per pixel,
    where linear interpolation leaves hardly any signal.
    """
    needed = max(256, math.ceil(2 * math.pi * last_ring / 1.2))
    fast = (64 * 2**i * 3**j * 5**k for i in range(12) for j in range(4) for k in range(4))
    return min(n for n in fast if n >= needed)


def ring_points(rings: Rings, like: Tensor) -> Tensor:
    """(r, a, 2) xy points of the rings, pixels from the centre; angles grow from +x towards +y."""
    angle = torch.arange(rings.n_angles, device=like.device, dtype=torch.float64)
    angle = angle * (2 * math.pi / rings.n_angles)
    unit = torch.stack([torch.cos(angle), torch.sin(angle)], -1)  # (a, 2)
    return (rings.radii(like.device)[:, None, None] * unit).to(like.dtype)


def to_polar(images: Tensor, rings: Rings, shifts: Tensor | None = None) -> Tensor:
    """Images sampled on rings, once for every trial shift.

    Args:
        images: (n, h, w), background zero.
        rings: the rings.
        shifts: (s, 2) trial shifts of a `Pose`, pixels, shared by all images, or (n, s, 2). The
            rings of shift t are centred on the image's centre - t. None is one zero shift.

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
    """Angular spectra of images on rings, a unit vector for every image and shift.

    With x(r, theta) the polar samples, w_r the area weights (sum 1) and a the number of angles,
    the mean and variance are mu = sum_r w_r mean_theta x and sigma^2 = sum_r w_r mean_theta
    (x - mu)^2, and the result is sqrt(w_r / a) rfft_theta[(x - mu) / sigma]. Then
    irfft(sum_r conj(X) Y) is the correlation coefficient, in [-1, 1], of y with x rotated by each
    of the a angles. An image without variance on the rings has spectra of zero.

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
    # Not a matrix product: its rounding would depend on the number of rows.
    mean = (spectra[..., 0].real * weights).sum(-1) / a  # (...,)
    scale = inverse_deviation(polar, mean, weights)
    factor = (weights / a).sqrt() * scale.unsqueeze(-1)  # (..., r)
    # In place on a tensor made here: this saves a pass over the largest array of the search.
    pairs = torch.view_as_real(spectra).mul_(factor[..., None, None])
    pairs[..., 0, 0] -= a * mean.unsqueeze(-1) * factor
    return spectra


def inverse_deviation(polar: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """(...,) 1 / sigma of polar samples (..., r, a) with their mean (...,) and ring weights (r,);
    0 where there is no variance."""
    power = (torch.linalg.vecdot(polar, polar) * weights).sum(-1) / polar.shape[-1]
    variance = power - mean.square()
    # Below this the deviation is rounding error, and the pose cannot be determined.
    flat = variance <= 16 * torch.finfo(polar.dtype).eps * power
    return torch.where(flat, 0.0, torch.where(flat, 1.0, variance).rsqrt())


def resolved_frequencies(rings: Rings, device: torch.device | str | None = None) -> Tensor:
    """(r, m) bool: the angular frequencies that each ring of an image can have.

    Ring r crosses 2 pi r pixels, hence m <= pi r. Two more are kept because bilinear samples
    spread over neighbouring frequencies. Higher frequencies are an effect of interpolation.
    """
    frequency = torch.arange(rings.n_angles // 2 + 1, device=device)
    return frequency <= (math.pi * rings.radii(device)).floor().unsqueeze(1) + 2


def reference_spectra(references: Tensor, rings: Rings) -> Tensor:
    """`ring_spectra` of references, only at `resolved_frequencies`, as unit vectors again.

    About half of the spectra is then zero, and `correlation_peaks` skips that half.

    Args:
        references: (k, h, w).

    Returns:
        (k, r, m) complex.
    """
    spectra = ring_spectra(references, rings)[:, 0]
    spectra = spectra * resolved_frequencies(rings, references.device)
    pairs = torch.view_as_real(spectra).square().sum(-1).sum(1)  # (k, m)
    # Every frequency of a real signal counts twice, except the first and the last.
    power = (2 * pairs.sum(1) - pairs[:, 0] - pairs[:, -1]) / rings.n_angles
    scale = torch.where(power > 0, power, torch.ones_like(power)).rsqrt()
    return spectra * scale[:, None, None]
