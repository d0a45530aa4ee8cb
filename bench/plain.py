"""The plain formulation: what anyone would write first, and the baseline of ``search``.

``grid_sample`` at every trial shift, ``rfft`` over the angles, ``einsum`` over the rings,
``irfft``, ``max``, in chunks of particles. It does *not* normalise each particle and shift, as
cryoalign does: it is given that work for free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cryoalign.search.settings import Search

# The plain formulation's: entries of the table at a time, but no more than so many particles. On
# a CPU the best of 2**18 … 2**24 and 1 … 16.
PLAIN_CPU, PLAIN_CUDA = (2**20, 4), (2**28, 512)


def points(first_ring: int, last_ring: int, angles: int, shifts: Tensor, size: int) -> Tensor:
    """(s, r, a, 2) where ``grid_sample`` looks for the rings about every shifted centre."""
    theta = torch.arange(angles, device=shifts.device) * (2 * math.pi / angles)
    radius = torch.arange(first_ring, last_ring + 1, device=shifts.device)
    ring = radius[:, None, None] * torch.stack([theta.cos(), theta.sin()], -1)  # (r, a, 2)
    return (ring - shifts[:, None, None] + size // 2 + 0.5) * (2 / size) - 1


def features(images: Tensor, grid: Tensor) -> Tensor:
    """Spectra (n, s, r, m) of images (n, h, w)."""
    n, (s, r, a, _) = len(images), grid.shape
    shared = grid.reshape(1, s * r, a, 2).expand(n, -1, -1, -1)
    polar = F.grid_sample(images[:, None], shared, align_corners=False)
    return torch.fft.rfft(polar.reshape(n, s, r, a))


def peaks(particles: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Best score and its place (n, k) over shifts, hands and angles, by way of the table."""
    m = particles.shape[-1]
    sign = 1 - 2 * (torch.arange(m, device=particles.device) % 2)
    conjugate = particles.conj()
    same = torch.einsum("nsrm,krm->nksm", conjugate, references)
    mirrored = sign * torch.einsum("nsrm,krm->nksm", conjugate, references.conj())
    table = torch.fft.irfft(torch.stack([same, mirrored], -2), n=2 * (m - 1))
    score, place = table.flatten(2).max(-1)
    return score, place


def weigh(references: Tensor, first_ring: int) -> Tensor:
    """Reference spectra (k, r, m) times their rings' radii, the area that a ring stands for."""
    radius = first_ring + torch.arange(references.shape[1], device=references.device)
    return references * radius[:, None]


def stages(images: Tensor, views: Tensor, search: Search) -> dict[str, Callable[[], object]]:
    """What is timed of it, by name."""
    rings, shifts = search.rings(images.shape[-1]), search.shifts(images.device)
    shape = (rings.first_ring, rings.last_ring, rings.n_angles)
    grid = points(*shape, shifts, images.shape[-1])
    here = points(*shape, shifts.new_zeros(1, 2), images.shape[-1])
    references = weigh(features(views, here)[:, 0], rings.first_ring)
    table, most = PLAIN_CPU if images.device.type == "cpu" else PLAIN_CUDA
    some = max(1, min(most, table // (len(views) * len(shifts) * 2 * rings.n_angles)))

    def spectra_of_chunks() -> Iterator[Tensor]:
        for part in images.split(some):
            yield features(part, grid)

    spectra = list(spectra_of_chunks())

    def both() -> None:
        for part in spectra_of_chunks():
            peaks(part, references)

    return {
        "plain features": lambda: deque(spectra_of_chunks(), maxlen=0),
        "plain search": lambda: [peaks(part, references) for part in spectra],
        "plain both": both,
    }
