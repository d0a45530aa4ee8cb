"""The contrast transfer function of particles, and its cheap correction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_ctf import calculate_ctf_2d, calculate_relativistic_electron_wavelength

ANGSTROM_PER_MICROMETRE = 1e4


@dataclass(frozen=True, eq=False)
class Optics:
    """How n particles were imaged: every field a tensor (n,), float32.

    Attributes:
        defocus_u, defocus_v: Å, underfocus positive; defocus_angle: degrees, of u from +x to +y.
        voltage: kV; spherical_aberration: mm; amplitude_contrast: share; phase_shift: degrees.
        pixel_size: Å.
    """

    defocus_u: Tensor
    defocus_v: Tensor
    defocus_angle: Tensor
    voltage: Tensor
    spherical_aberration: Tensor
    amplitude_contrast: Tensor
    phase_shift: Tensor
    pixel_size: Tensor

    def __len__(self) -> int:
        return len(self.defocus_u)

    def __getitem__(self, rows: Any) -> Optics:
        return Optics(**{name: value[rows] for name, value in vars(self).items()})

    def scaled(self, scale: float) -> Optics:
        """The same for images whose pixels are ``scale`` times as large."""
        return replace(self, pixel_size=self.pixel_size * scale)


# Our name and RELION's column. All must be there but the phase shift.
COLUMNS = {
    "defocus_u": "rlnDefocusU",
    "defocus_v": "rlnDefocusV",
    "defocus_angle": "rlnDefocusAngle",
    "voltage": "rlnVoltage",
    "spherical_aberration": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
    "phase_shift": "rlnPhaseShift",
}


def optics_from_relion(
    particles: Mapping[str, Any], optics: Mapping[str, Any] | None, pixel_size: float
) -> Optics | None:
    """The optics of particles from RELION's columns, or None where they say no defocus.

    Args:
        particles: columns of the particles' table.
        optics: columns of the optics table (RELION 3.1 and later), joined by ``rlnOpticsGroup``;
            None where the particles' table holds everything (3.0).
        pixel_size: Å of the images.

    Raises:
        ValueError: a column is missing though ``rlnDefocusU`` is there.
    """
    if "rlnDefocusU" not in particles:
        return None
    n = len(particles["rlnDefocusU"])
    row = _group_rows(particles, optics)
    values = {}
    for name, column in COLUMNS.items():
        if column in particles:
            value = np.asarray(particles[column], dtype=np.float32)
        elif optics is not None and row is not None and column in optics:
            value = np.asarray(optics[column], dtype=np.float32)[row]
        elif name == "phase_shift":
            value = np.zeros(n, dtype=np.float32)
        else:
            raise ValueError(
                f"particles have rlnDefocusU but no {column}: add it, or set likelihood.ctf=false "
                "(method=isac: isac.ctf=false)"
            )
        values[name] = torch.from_numpy(value.copy())
    return Optics(**values, pixel_size=torch.full((n,), pixel_size))


def _group_rows(
    particles: Mapping[str, Any], optics: Mapping[str, Any] | None
) -> np.ndarray | None:
    """(n,) the row of the optics table of every particle."""
    if optics is None or "rlnOpticsGroup" not in particles or "rlnOpticsGroup" not in optics:
        return None
    row_of = {int(group): row for row, group in enumerate(optics["rlnOpticsGroup"])}
    return np.array([row_of[int(group)] for group in particles["rlnOpticsGroup"]])


def ctf_2d(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) CTFs in rfft2's layout, positive at low frequency.

    That is the sign for bright particles (as stacks are after the usual inversion of contrast).

    Args:
        optics: of n particles; ``pixel_size`` that of the images of ``size`` pixels.
        size: box, pixels.
    """
    return _calculate(optics, size)


def complex_ctf(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) complex exp(i phase), whose imaginary part is `ctf_2d`.

    More defocus adds ``defocus_phase`` radians an Å to the phase.
    """
    return _calculate(optics, size, return_complex_ctf=True)


def defocus_phase(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) pi * wavelength * k^2: radians of `complex_ctf` per Å of defocus."""
    wavelength = calculate_relativistic_electron_wavelength(optics.voltage * 1e3) * 1e10  # Å
    kx, ky = (torch.fft.rfftfreq(size), torch.fft.fftfreq(size)[:, None])  # cycles/px
    square = (kx.square() + ky.square()).to(optics.voltage.device)
    return (math.pi * wavelength / optics.pixel_size.square())[:, None, None] * square


def _calculate(optics: Optics, size: int, return_complex_ctf: bool = False) -> Tensor:
    u, v = optics.defocus_u, optics.defocus_v
    # The library writes into its defocus argument: it gets a fresh tensor.
    return calculate_ctf_2d(
        defocus=(u + v) / 2 / ANGSTROM_PER_MICROMETRE,
        astigmatism=(u - v) / 2 / ANGSTROM_PER_MICROMETRE,
        astigmatism_angle=optics.defocus_angle,
        voltage=optics.voltage,
        spherical_aberration=optics.spherical_aberration,
        amplitude_contrast=optics.amplitude_contrast,
        phase_shift=optics.phase_shift,
        pixel_size=optics.pixel_size,
        image_shape=(size, size),
        rfft=True,
        fftshift=False,
        return_complex_ctf=return_complex_ctf,
    )


def phase_flip(images: Tensor, optics: Optics) -> Tensor:
    """(n, size, size) images with the sign of their CTF undone, amplitudes left as they are."""
    sign = torch.sign(ctf_2d(optics, images.shape[-1])).to(images.device)
    return torch.fft.irfft2(torch.fft.rfft2(images) * sign, s=images.shape[-2:])
