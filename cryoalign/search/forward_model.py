"""The image of a reference as a particle, in Fourier space, and its derivatives.

    M(k) = CTF(k; d) exp(2 pi i k . shift) FT[ reference(L v / m) ](k)

with L the linear part of the pose (`Pose`), m the magnification and d Å of additional defocus.
Shift and CTF are exact; the rotated and magnified reference is sampled bilinearly from a finer
grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, complex_ctf, defocus_phase
from cryoalign.images.fourier import (
    fourier_resize,
    frequency_grid,
    rfft_weights,
    shell_count,
    shell_index,
)
from cryoalign.images.geometry import pixel_grid, sample
from cryoalign.images.templates import templates_of, with_turn
from cryoalign.pose import Pose

COLUMNS = ("angle", "shift_x", "shift_y", "magnification", "defocus_offset")
"""The unknowns of a particle: degrees, px, px, a factor and Å."""
OVERSAMPLING = 2  # of references, which makes bilinear sampling accurate


class SharedData(NamedTuple):
    """What `model` needs that is the same for all particles.

    Attributes:
        templates: (k, 3, H, W) references on the finer grid, and their derivatives by rotation
            and by magnification.
        axis: (h,) positions of a particle's pixels along one axis, in pixels of the templates.
        kx, ky: (1, f), (h, 1) frequencies, cycles per pixel.
        root: (h, f) square root of each component's weight in the likelihood.
        numbers: how many real numbers of a spectrum have a weight.
    """

    templates: Tensor
    axis: Tensor
    kx: Tensor
    ky: Tensor
    root: Tensor
    numbers: int


class ParticleData(NamedTuple):
    """What `model` needs that belongs to each of n particles."""

    spectra: Tensor  # (n, h, f) times ``root``
    templates: Tensor  # (n, 3, H, W)
    mirror: Tensor  # (n,)
    transfer: Tensor | None  # (n, h, f) complex CTF at the optics' defocus
    rate: Tensor | None  # (n, h, f) its radians per Å of defocus

    def take(self, rows: Tensor) -> ParticleData:
        """The data of some particles, rows (m,)."""
        transfer = None if self.transfer is None else self.transfer[rows]
        rate = None if self.rate is None else self.rate[rows]
        return ParticleData(
            self.spectra[rows], self.templates[rows], self.mirror[rows], transfer, rate
        )


def shared_data(references: Tensor, noise: Tensor | None) -> SharedData:
    """The data of references (k, size, size) and the noise's power (shells,); None is 1.

    Raises:
        ValueError: the noise has too few shells, or powers that are not above 0.
    """
    size, device = references.shape[-1], references.device
    kx, ky = (k.to(references.dtype) for k in frequency_grid(size, device))
    if noise is None:
        power = torch.ones_like(kx + ky)
    elif noise.ndim != 1 or len(noise) < shell_count(size) or not bool((noise > 0).all()):
        raise ValueError(
            f"noise must be {shell_count(size)} powers above 0, one per shell; got "
            f"{tuple(noise.shape)}: see whitening.noise_spectrum"
        )
    else:
        power = noise.to(references)[shell_index(size, device)]
    weight = rfft_weights(size, references).expand_as(power)
    # Frequencies beyond Nyquist's circle can leave the box by a rotation; 0 is the background.
    square = kx.square() + ky.square()
    used = (square < 0.25) & (square > 0) & power.isfinite()
    return SharedData(
        _templates(references),
        pixel_grid((size, 1), references)[:, 0, 1] * OVERSAMPLING,
        kx,
        ky,
        torch.where(used, weight / power, 0.0).sqrt(),
        int(weight[used].sum()),
    )


def _templates(references: Tensor) -> Tensor:
    """(k, 3, H, W) references on a finer grid, and their derivatives by a rotation about the
    centre (1/radian) and by a growth of positions; amplified where bilinear sampling damps."""
    fine = fourier_resize(references, OVERSAMPLING * references.shape[-1])
    value, by_x, by_y, by_turn = with_turn(templates_of(fine)).unbind(1)
    size = fine.shape[-1]
    x, y = pixel_grid((size, size), fine).unbind(-1)
    stack = torch.stack([value, by_turn, x * by_x + y * by_y], 1)
    kx, ky = frequency_grid(size, fine.device)
    damped = (torch.sinc(kx) * torch.sinc(ky)).square()
    return torch.fft.irfft2(torch.fft.rfft2(stack) / damped, s=(size, size)).to(references.dtype)


def particle_data(
    particles: Tensor, label: Tensor, mirror: Tensor, optics: Optics | None, shared: SharedData
) -> ParticleData:
    """The data of particles (n, size, size), each with its reference, hand and optics."""
    size = particles.shape[-1]
    transfer = rate = None
    if optics is not None:
        transfer, rate = (of(optics, size) for of in (complex_ctf, defocus_phase))
        rate = rate.to(particles)
        transfer = transfer.to(device=rate.device, dtype=torch.complex(rate[:0], rate[:0]).dtype)
    return ParticleData(
        torch.fft.rfft2(particles, norm="ortho") * shared.root,
        shared.templates[label],
        mirror,
        transfer,
        rate,
    )


def model(unknowns: Tensor, data: ParticleData, shared: SharedData) -> list[Tensor]:
    """(n, h, f) spectra times ``root``: the model of amplitude 1, and its derivatives by `COLUMNS`.

    Args:
        unknowns: (n, 5) as `COLUMNS`.
        data: of the n particles.
        shared: of all particles.
    """
    unknowns = unknowns.to(shared.root)
    angle, shift, growth, offset = unknowns.split([1, 2, 1, 1], 1)
    linear = Pose(angle[:, 0], shift, data.mirror).linear() / growth[:, :, None]
    x, y = linear[:, :, :1] * shared.axis, linear[:, :, 1:] * shared.axis  # (n, 2, w), (n, 2, h)
    places = torch.stack([x[:, i, None] + y[:, i, :, None] for i in (0, 1)], -1)  # (n, h, w, 2)
    values = sample(data.templates, places)  # (n, 3, h, w)
    phase_x, phase_y = (2 * math.pi * shift).split(1, 1)
    along = _unit(phase_x[..., None] * shared.kx)  # (n, 1, f)
    down = _unit(phase_y[..., None] * shared.ky)  # (n, h, 1)
    spectra = torch.fft.rfft2(values, norm="ortho") * (along * down * shared.root).unsqueeze(1)
    by_offset = spectra[:, 0]
    if data.transfer is not None and data.rate is not None:
        wave = data.transfer * _unit(data.rate * offset[..., None])
        by_offset = by_offset * (wave.real * data.rate)
        spectra = spectra * wave.imag.unsqueeze(1)
    value, by_turn, by_growth = spectra.unbind(1)
    # A rotation of a mirrored particle has the opposite sense.
    sign = torch.where(data.mirror, -1.0, 1.0).to(shared.root) * (math.pi / 180)
    along_k = 2j * math.pi * value
    return [
        value,
        by_turn * sign[:, None, None],
        along_k * shared.kx,
        along_k * shared.ky,
        -by_growth / growth[..., None],
        by_offset,
    ]


def _unit(phase: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(phase), phase)
