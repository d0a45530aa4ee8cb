"""Whitening: particles are multiplied by their CTF and divided by the power of the noise.

With x a particle, H its CTF and N the noise's power spectrum, the log-likelihood of a class image
y is <H x / N, y> - sum H^2 |y|^2 / (2 N), up to a constant. The first term needs H x / N, the
second only the means of H^2 / N on rings. Particles whose phases were flipped are multiplied by
|H|, and those that were multiplied by H before are only divided by N (`ctf.matched_filter`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from cryoalign.runtime.threads import available_memory, map_in_order, workers_for

NOISE_SAMPLE = 1000  # particles for the noise spectrum, at least 10,000 values on a shell
CHUNK = 256  # particles that are worked on at a time; limits the memory
CUDA_CHUNK = 2048  # the same on a GPU, which needs more
LEAST = 32  # particles that are computed together
KEPT_SHARE = 0.25  # largest share of the free memory for particles on rings
EDGE = 4.0  # width of the soft edge of masks, px

Read = Callable[[Tensor], Tensor]
"""Reads the images (b, size, size) of rows (b,)."""


@dataclass(frozen=True, eq=False)
class Observations:
    """n whitened particles on Fourier rings: the first ones in memory, as many as there is room
    for; the others are made again from their images whenever they are needed.

    Attributes:
        polar: (n', r, a // 2) complex half circles of H x / N, of the first n' particles.
        weight: (n', r) means of H^2 / N on each ring.
        rings: the r rings; fewer of them can be used.
        others: makes half circles and weights of particles n' … n - 1 from their indices (b,).
        count: number n of particles; None is n'.
    """

    polar: Tensor
    weight: Tensor
    rings: FourierRings
    others: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    count: int | None = None

    def __len__(self) -> int:
        return len(self.polar) if self.count is None else self.count

    @property
    def device(self) -> torch.device:
        """Device of the particles."""
        return self.polar.device

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Half circles (b, r, a // 2) and weights (b, r) of the particles with indices ``index``
        (b,), on the CPU."""
        kept = index < len(self.polar)
        if self.others is None or bool(kept.all()):
            here = index.to(self.device)
            return self.polar[here], self.weight[here]
        made = self.others(index[~kept])
        if not bool(kept.any()):
            return made
        place = torch.cat([kept.nonzero(), (~kept).nonzero()]).squeeze(1).argsort().to(self.device)
        here = index[kept].to(self.device)
        polar, weight = (
            torch.cat([of[here], new])[place]
            for of, new in zip((self.polar, self.weight), made, strict=True)
        )
        return polar, weight


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


@dataclass(frozen=True, eq=False)
class Observer:
    """Whitens particles.

    Attributes:
        read: reads images with a background of zero; called by several threads.
        optics: CTFs of all particles; None is a CTF of 1.
        noise: (size, size // 2 + 1) power of the noise, float32, on the device of the images.
        mask: (box, box) soft disc in which the particle is, on cropped images.
        rings: the rings.
    """

    read: Read
    optics: Optics | None
    noise: Tensor
    mask: Tensor
    rings: FourierRings

    def __call__(self, rows: Tensor) -> Observations:
        """Observations of the particles with rows (b,); there may be none."""
        device, rings = self.noise.device, self.rings
        shape = rings.last, rings.n_angles // 2
        room = KEPT_SHARE * available_memory(device) / (8 * shape[0] * (shape[1] + 1))
        kept = min(len(rows), int(room))
        polar = torch.empty(kept, *shape, dtype=torch.complex64, device=device)
        weight = torch.empty(kept, shape[0], device=device)
        place = 0
        for made in self._in_chunks(rows[:kept]):
            part = slice(place, place + len(made[0]))
            polar[part], weight[part] = made
            place = part.stop
        if kept == len(rows):
            return Observations(polar, weight, rings)

        def others(index: Tensor) -> tuple[Tensor, Tensor]:
            parts = [self.whiten(rows[part]) for part in index.split(self.chunk)]
            halves, weights = (torch.cat(of) for of in zip(*parts, strict=True))
            return halves, weights

        return Observations(polar, weight, rings, others, len(rows))

    @property
    def chunk(self) -> int:
        """Particles that are worked on at a time."""
        return CUDA_CHUNK if self.noise.is_cuda else CHUNK

    def _in_chunks(self, rows: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        if not len(rows):
            return ()
        return map_in_order(self.whiten, rows.split(self.chunk), workers_for(self.noise.device))

    def whiten(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Half circles (b, r, a // 2) and weights (b, r) of the particles with rows (b,)."""
        if 0 < len(rows) < LEAST:  # products of few rows have other rounding errors
            made = self.whiten(torch.cat([rows, rows[:1].expand(LEAST - len(rows))]))
            return made[0][: len(rows)], made[1][: len(rows)]
        size, last, device = self.rings.size, self.rings.last, self.noise.device
        box, shell = len(self.mask), shell_index(size, device)
        factor = power = torch.ones_like(self.noise)[None]
        if self.optics is not None:
            factor, power = matched_filter(self.optics[rows].to(device), size)
        spectra = torch.fft.rfft2(torch.fft.ifftshift(self.read(rows), dim=(-2, -1)))
        factor = factor / self.noise
        cropped = spectra * factor if box == size else crop_spectrum(spectra, box, factor)
        small = torch.fft.irfft2(cropped, s=(box, box))
        small = torch.fft.fftshift(small, dim=(-2, -1)) * (box / size) ** 2
        # Shell 0, the mean, and shells beyond the last ring are not used.
        count, weight = (
            shell_sums(x, shell, last + 2)[..., 1:-1]
            for x in (torch.ones_like(self.noise), power / self.noise)
        )
        return half_circle(small * self.mask, self.rings), (weight / count).expand(len(rows), -1)


def observer(
    read: Read, n: int, size: int, optics: Optics | None, last_ring: int, radius: float,
    max_shift: float, read_sample: Read | None = None,
) -> Observer:  # fmt: skip
    """Measure the noise of particles, by which they are whitened.

    Args:
        read: reads images with a background of zero; called by several threads.
        n: number of particles; the noise is measured on a sample of all of them.
        size: side of the box, pixels.
        optics: CTFs of the n particles; None is a CTF of 1.
        last_ring: resolution limit, 1/box.
        radius: radius of the particle, pixels.
        max_shift: largest distance of a particle from the centre of its box, pixels.
        read_sample: reads the images on which the noise is measured; None is ``read``.
    """
    few = torch.arange(0, n, max(1, n // NOISE_SAMPLE))
    sample = (read_sample or read)(few)
    device = sample.device
    room = size / 2 - 2  # then at least the corners are background
    shell = shell_index(size, device)
    outside = min(radius + EDGE, room)
    noise = noise_spectrum(sample, outside)
    if optics is not None and optics.premultiplied.any():
        noise = noise / _gain(optics[few], size, outside).to(device)
    noise = noise[shell]
    reach = min(radius + max_shift, size / 2 - EDGE)
    box = min(size - size % 2, 2 * last_ring + 8)  # even, with room beyond the last ring
    mask = soft_mask(box, reach * box / size, EDGE * box / size, device)
    return Observer(read, optics, noise, mask, FourierRings(size, last_ring, reach))


def observe(
    read: Read, n: int, size: int, optics: Optics | None, last_ring: int, radius: float,
    max_shift: float,
) -> Observations:  # fmt: skip
    """Whiten all of n particles, see `observer`."""
    return observer(read, n, size, optics, last_ring, radius, max_shift)(torch.arange(n))


def _gain(optics: Optics, size: int, radius: float) -> Tensor:
    """(shells,) by how much `noise_spectrum` finds more noise than there was before particles were
    multiplied by their CTF. It is measured on white noise, because the shape of the background
    mixes neighbouring shells."""
    white = torch.randn(len(optics), size, size, generator=torch.Generator().manual_seed(0))
    multiplied = torch.fft.irfft2(torch.fft.rfft2(white) * ctf_2d(optics, size), s=(size, size))
    images = torch.where(optics.premultiplied[:, None, None], multiplied, white)
    return noise_spectrum(images, radius) / noise_spectrum(white, radius)
