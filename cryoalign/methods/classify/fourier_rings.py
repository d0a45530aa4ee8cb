"""Features of images on rings in Fourier space, where shifts are phases and the CTF is a factor.

The inner product of two images that are zero outside a disc is an integral over Fourier space.
Here it is a sum over rings of integer radius (in 1/box) and angular frequencies m:

    <x, y> = irfft_m( sum_r conj(X[r, m]) Y[r, m] )   at angle zero.

For other angles and mirrored particles, the formula of `correlation.correlation_table` holds for
the features X, Y. Unlike the spectra of `images.polar` they are not normalised, so that products
are in units of the log-likelihood.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoalign.images.fourier import rfft_weights


@dataclass(frozen=True)
class FourierRings:
    """Rings 1 … last of the Fourier transform of an image.

    Attributes:
        size: side of the box, pixels.
        last: outermost ring, 1/box; the resolution limit is size / last pixels.
        radius: pixels; images are zero beyond it, so that ring r has no angular frequency above
            2 pi r radius / size.
    """

    size: int
    last: int
    radius: float

    def __post_init__(self) -> None:
        if not 1 <= self.last <= self.size // 2:
            raise ValueError(
                f"rings to {self.last}/box do not fit a box of {self.size} px: use at most "
                f"{self.size // 2}/box"
            )

    @property
    def n_frequencies(self) -> int:
        """Number of angular frequencies that are used, m = 0 … n_frequencies - 1."""
        return math.ceil(2 * math.pi * self.last * self.radius / self.size) + 2

    @property
    def n_angles(self) -> int:
        """Number of angles on a full circle: a multiple of 16, and more than two per period of the
        highest angular frequency."""
        return 16 * math.ceil(2 * self.n_frequencies / 16)

    def frequency_weights(self, like: Tensor) -> Tensor:
        """(m,) `rfft_weights` of the angular frequencies; dtype and device as ``like``."""
        return rfft_weights(self.n_angles, like)[: self.n_frequencies]

    def first_ring(self, m: int) -> int:
        """The innermost ring that can have angular frequency m."""
        return max(1, math.ceil((m - 2) * self.size / (2 * math.pi * self.radius)))

    def to(self, last: int) -> FourierRings:
        """Rings 1 … ``last`` of the same images."""
        return FourierRings(self.size, last, self.radius)


def half_circle(images: Tensor, rings: FourierRings) -> Tensor:
    """The exact Fourier transform of images on half circles, without interpolation.

    Args:
        images: (n, box, box) real. The box is smaller than ``rings.size`` if images were cropped
            in Fourier space; their pixels are then larger.
        rings: radii and number of angles of the half circles.

    Returns:
        (n, r, a // 2) complex, sum over pixels v of x(v) exp(-2 pi i k v / size), with v in pixels
        of ``rings.size`` from the centre and k = r (cos theta, sin theta).
    """
    box = images.shape[-1]
    step = rings.size / box
    place = (torch.arange(box, device=images.device) - box // 2) * step
    angle = torch.arange(rings.n_angles // 2, device=images.device) * (2 * math.pi / rings.n_angles)
    ring = torch.arange(1, rings.last + 1, device=images.device)
    k = ring[:, None, None] * torch.stack([torch.cos(angle), torch.sin(angle)], -1)  # (r, a', 2)
    phase = (-2 * math.pi / rings.size) * k.reshape(-1, 2, 1) * place  # (r a', 2, v)
    wave = torch.polar(torch.ones_like(phase), phase)
    # First along x, one matrix product for all points, then along y, a sum for each point.
    along_x = images.to(wave.dtype) @ wave[:, 0].mT  # (n, y, r a')
    values = torch.einsum("nyp,py->np", along_x, wave[:, 1]) * step**2
    return values.reshape(len(images), rings.last, -1)


def ring_features(polar: Tensor, shifts: Tensor, rings: FourierRings) -> Tensor:
    """Features of particles moved by trial shifts.

    Args:
        polar: (n, r', a' // 2) of `half_circle`, with r' >= rings.last and a' >= rings.n_angles.
        shifts: (s, 2) or (n, s, 2) pixels by which the particle is moved.
        rings: rings of the features.

    Returns:
        (n, s, r, m) complex, scaled so that inner products are those of images.
    """
    polar = polar[:, : rings.last]
    moved = polar[:, None] * shift_phases(shifts, polar.shape[-1], rings)  # (n, s, r, a')
    return angular_spectrum(moved, rings)


def move_half_circles(polar: Tensor, shifts: Tensor, rings: FourierRings) -> Tensor:
    """(n, r, a // 2) half circles, on these rings only, of particles (n, r', a // 2) that are moved
    by shifts (n, 2), pixels."""
    return polar[:, : rings.last] * shift_phases(shifts, polar.shape[-1], rings)


def shift_phases(shifts: Tensor, half: int, rings: FourierRings) -> Tensor:
    """(..., r, a') complex factors of half circles with a' angles for shifts (..., 2), pixels."""
    angle = torch.arange(half, device=shifts.device) * (math.pi / half)
    ring = torch.arange(1, rings.last + 1, device=shifts.device)
    along = shifts @ torch.stack([torch.cos(angle), torch.sin(angle)])  # (..., a')
    phase = (-2 * math.pi / rings.size) * along[..., None, :] * ring[:, None]
    return torch.polar(torch.ones_like(phase), phase)


def angular_spectrum(moved: Tensor, rings: FourierRings) -> Tensor:
    """(..., r, m) features of half circles (..., r, a // 2).

    With c_m the angular Fourier coefficients over the full circle, where F(theta + pi) =
    conj F(theta), the features are i^m c_m times the square root of the ring's area. Mirrored
    images then have features (-1)^m conj(X), as in real space.
    """
    even, odd = even_and_odd(moved * ring_scales(rings, moved), rings)
    spectrum = moved.new_empty(*moved.shape[:-1], rings.n_frequencies)
    spectrum[..., ::2] = torch.view_as_complex(even)
    spectrum[..., 1::2] = torch.view_as_complex(odd)
    return spectrum * _used(rings, moved.device)


def even_and_odd(scaled: Tensor, rings: FourierRings) -> tuple[Tensor, Tensor]:
    """`angular_spectrum` at even and at odd frequencies, of half circles times `ring_scales`.

    Two tensors (..., r, m', 2), real and imaginary parts. They are not zero at frequencies that a
    ring cannot have (`used_frequencies`).
    """
    waves = _waves(rings, scaled.shape[-1], scaled.device)
    # Even m depend on the real part of the half circle, odd m on the imaginary part (times i).
    even, odd = (
        (each.reshape(-1, scaled.shape[-1]) @ wave).view(*scaled.shape[:-1], -1, 2)
        for each, wave in zip((scaled.real, scaled.imag), waves, strict=True)
    )
    return even, odd


def ring_scales(rings: FourierRings, half_circles: Tensor) -> Tensor:
    """(r, 1) factors of half circles (..., r, a // 2) that make inner products those of images:
    mean over the circle, area of the ring in Fourier pixels, and irfft's 1 / n_angles."""
    ring = torch.arange(1, rings.last + 1, device=half_circles.device)
    scale = (2 * math.pi * ring * rings.n_angles).sqrt()
    return (scale / (half_circles.shape[-1] * rings.size))[:, None]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _waves(rings: FourierRings, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(a // 2, 2 m') factors of the angular Fourier coefficients c_m times i^m, real and imaginary
    parts, at even and at odd m."""
    m = torch.arange(rings.n_frequencies, device=device)
    turn = torch.arange(half, device=device)[:, None] * m % (2 * half) * (math.pi / half)
    turn = turn - (m - m % 2) * (math.pi / 2)  # i^m, and another i for the odd ones
    sign = 1 - 2 * (m % 2)
    wave = torch.stack([turn.cos() * sign, -turn.sin() * sign], -1)  # (a', m, 2)
    return wave[:, ::2].flatten(1), wave[:, 1::2].flatten(1)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _used(rings: FourierRings, device: torch.device) -> Tensor:
    """(r, m) 1 for frequencies that a ring can have, else 0."""
    first = torch.tensor([rings.first_ring(m) for m in range(rings.n_frequencies)], device=device)
    return (torch.arange(1, rings.last + 1, device=device)[:, None] >= first).float()


def used_frequencies(rings: FourierRings, device: torch.device) -> tuple[Tensor, Tensor]:
    """(r, m') 1 for frequencies that a ring can have, else 0, at even and at odd frequencies."""
    used = _used(rings, device)
    return used[:, ::2], used[:, 1::2]


def half_circle_of(features: Tensor, rings: FourierRings) -> Tensor:
    """(..., r, a // 2) half circles whose `angular_spectrum` is features (..., r, m)."""
    m = torch.arange(rings.n_frequencies, device=features.device)
    angles = rings.n_angles
    ring = torch.arange(1, rings.last + 1, device=features.device)
    scale = (2 * math.pi * ring * angles).sqrt() * (2 / angles) / rings.size * (angles / 2)
    turn = torch.tensor([1, -1j, -1, 1j], device=features.device)[m % 4]
    coefficient = features * turn / scale[:, None] * rings.frequency_weights(scale)
    angle = torch.arange(angles // 2, device=features.device) * (2 * math.pi / angles)
    wave = torch.polar(torch.ones_like(m * angle[:, None]), m * angle[:, None])  # (a', m)
    even = (coefficient[..., ::2] @ wave[:, ::2].T).real
    odd = (coefficient[..., 1::2] @ wave[:, 1::2].T).imag
    return torch.complex(even, odd)


def move_features(
    features: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, rings: FourierRings
) -> Tensor:
    """Features of images that are shifted, rotated and mirrored, in this order as by a `Pose`.

    Args:
        features: (n, r, m).
        angle: (n,) radians.
        shift: (n, 2) pixels.
        mirror: (n,) bool.
        rings: rings of the features.
    """
    polar = half_circle_of(features, rings)
    moved = ring_features(polar, shift[:, None], rings)[:, 0]  # (n, r, m)
    m = torch.arange(moved.shape[-1], device=moved.device)
    phase = angle[:, None] * m
    turned = moved * torch.polar(torch.ones_like(phase), -phase)[:, None]
    sign = 1 - 2 * (m % 2)
    return torch.where(mirror[:, None, None], sign * turned.conj(), turned)
