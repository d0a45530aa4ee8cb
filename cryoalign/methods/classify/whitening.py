"""Particles as the likelihood wants them: multiplied by their CTF, divided by the noise's power.

With x a particle, H its CTF and N the noise spectrum, <H x / N, y> - sum H^2 |y|^2 / (2 N) is the
log-likelihood of a class image y up to a constant. The first term needs only H x / N, the second
only the ring means of H^2 / N where y is summed over rings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, ctf_2d
from cryoalign.images.fourier import ring_index
from cryoalign.images.masks import background, soft_mask
from cryoalign.methods.classify.fourier_rings import FourierRings, half_circle
from cryoalign.runtime.threads import map_in_order, workers_for

NOISE_SAMPLE = 1000  # particles that the noise spectrum is measured on
CHUNK = 256
EDGE = 4.0  # px, soft edge of masks

Read = Callable[[Tensor], Tensor]
"""Images (b, size, size) of members (b,)."""


@dataclass(frozen=True, eq=False)
class Observations:
    """n particles on Fourier rings, ready for any band up to ``rings.last``.

    Attributes:
        polar: (n, r, a // 2) complex half circles of H x / N.
        weight: (n, r) ring means of H^2 / N.
        rings: theirs.
    """

    polar: Tensor
    weight: Tensor
    rings: FourierRings

    def __len__(self) -> int:
        return len(self.polar)


def noise_spectrum(images: Tensor, radius: float) -> Tensor:
    """(shells,) power of the noise on every ring, from the images' background.

    Args:
        images: (n, size, size).
        radius: pixels beyond it are background.

    Returns:
        Mean of |transform|^2 / pixels per component, 1 for white noise of variance 1. The two
        innermost rings, which the background's shape blurs most, are the third's.

    Raises:
        ValueError: no background beyond ``radius``.
    """
    size = images.shape[-1]
    background(size, radius, images.device)
    hole = 1 - soft_mask(size, radius, EDGE, images.device)
    mean = (images * hole).sum((1, 2)) / hole.sum()
    beyond = (images - mean[:, None, None]) * hole
    power = torch.fft.rfft2(beyond, norm="ortho").abs().square().mean(0) / hole.square().mean()
    ring = ring_index(size, images.device).flatten()
    twice = torch.full_like(power, 2.0)
    twice[:, 0] = 1.0
    count = power.new_zeros(int(ring.max()) + 1).index_add(0, ring, twice.flatten())
    shells = torch.zeros_like(count).index_add(0, ring, (power * twice).flatten()) / count
    shells[:2] = shells[2]
    # A background without noise: its floor keeps the likelihood finite.
    return shells.clamp(min=1e-6 * float(images.var()) + 1e-12)


def observe(
    read: Read, n: int, size: int, optics: Optics | None, last_ring: int, radius: float,
    max_shift: float, rows: slice = slice(None),
) -> Observations:  # fmt: skip
    """Read particles once.

    Args:
        read: gives images, background zero, of rows (b,); several threads may ask it.
        n: how many there are; the noise is measured on some of all of them.
        size: their box, pixels.
        optics: of all of them; None is a CTF of 1.
        last_ring: resolution limit, 1/box.
        radius: of the particle, pixels.
        max_shift: how far off centre particles may be, pixels.
        rows: which of the n to observe.
    """
    sample = read(torch.arange(0, n, max(1, n // NOISE_SAMPLE)))
    device = sample.device
    room = size / 2 - 2  # background needs corners at least
    spectrum = noise_spectrum(sample, min(radius + EDGE, room))
    ring = ring_index(size, device)
    noise = spectrum[ring]
    reach = min(radius + max_shift, size / 2 - EDGE)
    rings = FourierRings(size, last_ring, reach)
    box = min(size - size % 2, 2 * last_ring + 8)  # even, with room beyond the last ring
    mask = soft_mask(box, reach * box / size, EDGE * box / size, device)
    inside = ring <= last_ring
    select = ring[inside] - 1  # -1, the mean, is dropped below
    count = torch.bincount(select.clamp(min=0), minlength=last_ring).to(noise)
    count[0] -= 1

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        transfer = torch.ones_like(noise)[None] if optics is None else ctf_2d(optics[rows], size)
        transfer = transfer.to(device)
        spectra = torch.fft.rfft2(torch.fft.ifftshift(read(rows), dim=(-2, -1)))
        small = torch.fft.irfft2(_crop(spectra * (transfer / noise), box), s=(box, box))
        small = torch.fft.fftshift(small, dim=(-2, -1)) * (box / size) ** 2
        power = (transfer.square() / noise)[:, inside].expand(len(rows), -1)
        keep = select >= 0
        mean = power.new_zeros(len(rows), last_ring).index_add(1, select[keep], power[:, keep])
        return half_circle(small * mask, rings), mean / count

    parts = list(map_in_order(part, torch.arange(n)[rows].split(CHUNK), workers_for(device)))
    polar, weight = (torch.cat(of) for of in zip(*parts, strict=True))
    return Observations(polar, weight, rings)


def _crop(spectra: Tensor, box: int) -> Tensor:
    """The low frequencies of rfft2's (n, size, size // 2 + 1) for an even box, Nyquist zero."""
    if spectra.shape[-2] == box:
        return spectra
    half = box // 2
    low = torch.cat([spectra[:, :half], spectra[:, -half:]], 1)[:, :, : half + 1].clone()
    low[:, half] = 0
    low[:, :, half] = 0
    return low
