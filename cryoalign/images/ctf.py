"""The contrast transfer function (CTF) of particles, and its correction by phase flipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_ctf import calculate_ctf_2d, calculate_relativistic_electron_wavelength

from cryoalign.images.fourier import frequency_grid

ANGSTROM_PER_MICROMETRE = 1e4


@dataclass(frozen=True, eq=False)
class Optics:
    """How n particles were imaged; every field is a float32 tensor (n,).

    Attributes:
        defocus_u, defocus_v: Å, underfocus is positive.
        defocus_angle: direction of defocus_u, degrees from +x towards +y.
        voltage: kV.
        spherical_aberration: mm.
        amplitude_contrast: from 0 to 1.
        phase_shift: of a phase plate, degrees.
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
        """The same optics for images whose pixels are ``scale`` times as large."""
        return replace(self, pixel_size=self.pixel_size * scale)


# RELION's column of each field. All are required, except the phase shift.
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
    """The optics of particles from RELION's columns; None if there is no defocus column.

    Args:
        particles: columns of the particles' table.
        optics: columns of the optics table (RELION 3.1 and later), joined by ``rlnOpticsGroup``;
            None if the particles' table holds everything (RELION 3.0).
        pixel_size: of the images, Å.

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
                f"particles have rlnDefocusU but no {column}: add it, or set particle.ctf=false"
            )
        values[name] = torch.from_numpy(value.copy())
    return Optics(**values, pixel_size=torch.full((n,), pixel_size))


def _group_rows(
    particles: Mapping[str, Any], optics: Mapping[str, Any] | None
) -> np.ndarray | None:
    """(n,) row of each particle in the optics table; None if nothing joins the tables."""
    if optics is None or "rlnOpticsGroup" not in particles or "rlnOpticsGroup" not in optics:
        return None
    row_of = {int(group): row for row, group in enumerate(optics["rlnOpticsGroup"])}
    return np.array([row_of[int(group)] for group in particles["rlnOpticsGroup"]])


def ctf_2d(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) CTFs in rfft2's layout, positive at low frequency.

    That is the sign for particles that are brighter than their background.

    Args:
        optics: of n particles, with the pixel size of these images.
        size: box, pixels.
    """
    return _calculate(optics, size)


def complex_ctf(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) complex exp(i phase), whose imaginary part is `ctf_2d`.

    Each Å of additional defocus adds `defocus_phase` radians to the phase.
    """
    return _calculate(optics, size, return_complex_ctf=True)


def defocus_phase(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) pi * wavelength * k^2: phase of `complex_ctf`, radians per Å of
    defocus."""
    wavelength = calculate_relativistic_electron_wavelength(optics.voltage * 1e3) * 1e10  # Å
    kx, ky = frequency_grid(size)
    square = (kx.square() + ky.square()).to(optics.voltage.device)  # (cycles/px)^2
    return (math.pi * wavelength / optics.pixel_size.square())[:, None, None] * square


def _calculate(optics: Optics, size: int, return_complex_ctf: bool = False) -> Tensor:
    u, v = optics.defocus_u, optics.defocus_v
    # The library writes into its defocus argument, so it gets a new tensor.
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
    """(n, size, size) images times the sign of their CTF in Fourier space; amplitudes stay."""
    sign = torch.sign(ctf_2d(optics, images.shape[-1])).to(images.device)
    return torch.fft.irfft2(torch.fft.rfft2(images) * sign, s=images.shape[-2:])
