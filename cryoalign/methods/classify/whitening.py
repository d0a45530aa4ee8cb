"""Whitening: particles are multiplied by their CTF and divided by the power of the noise.

With x a particle, H its CTF and N the noise's power spectrum, the log-likelihood of a class image
y is <H x / N, y> - sum H^2 |y|^2 / (2 N), up to a constant. The first term needs H x / N, the
second only the means of H^2 / N on rings. Particles whose phases were flipped are multiplied by
|H|, and those that were multiplied by H before are only divided by N (`ctf.matched_filter`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, ctf_2d, matched_filter
from cryoalign.images.fourier import (
    crop_spectrum,
    rfft_weights,
    shell_count,
    shell_index,
    shell_sums,
)
from cryoalign.images.masks import background, soft_mask
from cryoalign.methods.classify.fourier_rings import FourierRings, half_circle
from cryoalign.runtime.threads import map_in_order, workers_for

NOISE_SAMPLE = 1000  # particles for the noise spectrum, at least 10,000 values on a shell
CHUNK = 256  # particles that are worked on at a time; limits the memory
EDGE = 4.0  # width of the soft edge of masks, px

Read = Callable[[Tensor], Tensor]
"""Reads the images (b, size, size) of rows (b,)."""


@dataclass(frozen=True, eq=False)
class Observations:
    """n whitened particles on Fourier rings.

    Attributes:
        polar: (n, r, a // 2) complex half circles of H x / N.
        weight: (n, r) means of H^2 / N on each ring.
        rings: the r rings; fewer of them can be used.
    """

    polar: Tensor
    weight: Tensor
    rings: FourierRings

    def __len__(self) -> int:
        return len(self.polar)


def noise_spectrum(images: Tensor, radius: float) -> Tensor:
    """(shells,) power of the noise on every shell, measured on the background of the images.

    Args:
        images: (n, size, size).
        radius: pixels; the background is what lies beyond it.

    Returns:
        Mean of |transform|^2 / pixels over the components of each shell, 1 for white noise of
        variance 1. Shells 0 and 1, which the shape of the background blurs most, have the value
        of shell 2.

    Raises:
        ValueError: fewer than 16 pixels lie beyond ``radius``.
    """
    size = images.shape[-1]
    background(size, radius, images.device)
    hole = 1 - soft_mask(size, radius, EDGE, images.device)
    mean = (images * hole).sum((1, 2)) / hole.sum()
    beyond = (images - mean[:, None, None]) * hole
    power = torch.fft.rfft2(beyond, norm="ortho").abs().square().mean(0) / hole.square().mean()
    shell = shell_index(size, images.device)
    twice = rfft_weights(size, power).expand_as(power)
    sums, count = (shell_sums(x, shell, shell_count(size)) for x in (power * twice, twice))
    shells = sums / count
    shells[:2] = shells[2]
    # The lower bound keeps the likelihood finite if the background has no noise.
    return shells.clamp(min=1e-6 * float(images.var()) + 1e-12)


def observe(
    read: Read, n: int, size: int, optics: Optics | None, last_ring: int, radius: float,
    max_shift: float, rows: slice = slice(None),
) -> Observations:  # fmt: skip
    """Read particles and whiten them.

    Args:
        read: reads images with a background of zero; called by several threads.
        n: number of particles; the noise is measured on a sample of all of them.
        size: side of the box, pixels.
        optics: CTFs of the n particles; None is a CTF of 1.
        last_ring: resolution limit, 1/box.
        radius: radius of the particle, pixels.
        max_shift: largest distance of a particle from the centre of its box, pixels.
        rows: the particles that are whitened.
    """
    few = torch.arange(0, n, max(1, n // NOISE_SAMPLE))
    sample = read(few)
    device = sample.device
    room = size / 2 - 2  # then at least the corners are background
    shell = shell_index(size, device)
    outside = min(radius + EDGE, room)
    noise = noise_spectrum(sample, outside)
    if optics is not None and optics.premultiplied.any():
        noise = noise / _gain(optics[few], size, outside).to(device)
    noise = noise[shell]
    reach = min(radius + max_shift, size / 2 - EDGE)
    rings = FourierRings(size, last_ring, reach)
    box = min(size - size % 2, 2 * last_ring + 8)  # even, with room beyond the last ring
    mask = soft_mask(box, reach * box / size, EDGE * box / size, device)
    # Shell 0, the mean, and shells beyond the last ring are not used.
    count = shell_sums(torch.ones_like(noise), shell, last_ring + 2)[1:-1]

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        factor = power = torch.ones_like(noise)[None]
        if optics is not None:
            factor, power = (x.to(device) for x in matched_filter(optics[rows], size))
        spectra = torch.fft.rfft2(torch.fft.ifftshift(read(rows), dim=(-2, -1)))
        factor = factor / noise
        cropped = spectra * factor if box == size else crop_spectrum(spectra, box, factor)
        small = torch.fft.irfft2(cropped, s=(box, box))
        small = torch.fft.fftshift(small, dim=(-2, -1)) * (box / size) ** 2
        weight = shell_sums(power / noise, shell, last_ring + 2)[:, 1:-1]
        return half_circle(small * mask, rings), (weight / count).expand(len(rows), -1)

    parts = list(map_in_order(part, torch.arange(n)[rows].split(CHUNK), workers_for(device)))
    polar, weight = (torch.cat(of) for of in zip(*parts, strict=True))
    return Observations(polar, weight, rings)


def _gain(optics: Optics, size: int, radius: float) -> Tensor:
    """(shells,) by how much `noise_spectrum` finds more noise than there was before particles were
    multiplied by their CTF. It is measured on white noise, because the shape of the background
    mixes neighbouring shells."""
    white = torch.randn(len(optics), size, size, generator=torch.Generator().manual_seed(0))
    multiplied = torch.fft.irfft2(torch.fft.rfft2(white) * ctf_2d(optics, size), s=(size, size))
    images = torch.where(optics.premultiplied[:, None, None], multiplied, white)
    return noise_spectrum(images, radius) / noise_spectrum(white, radius)
