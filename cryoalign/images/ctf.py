"""The contrast transfer function (CTF) of particles, and its correction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_ctf import calculate_ctf_2d, calculate_relativistic_electron_wavelength

from cryoalign.images.fourier import frequency_grid

ANGSTROM_PER_MICROMETRE = 1e4


@dataclass(frozen=True, eq=False)
class Optics:
    """How n particles were imaged; every field is a tensor (n,), float32 or, the last two, bool.

    Attributes:
        defocus_u, defocus_v: Å, underfocus is positive.
        defocus_angle: direction of defocus_u, degrees from +x towards +y.
        voltage: kV.
        spherical_aberration: mm.
        amplitude_contrast: from 0 to 1.
        phase_shift: of a phase plate, degrees.
        pixel_size: Å.
        phase_flipped: whether the signs of the CTF are undone in the images.
        premultiplied: whether the images were multiplied by their CTF.
    """

    defocus_u: Tensor
    defocus_v: Tensor
    defocus_angle: Tensor
    voltage: Tensor
    spherical_aberration: Tensor
    amplitude_contrast: Tensor
    phase_shift: Tensor
    pixel_size: Tensor
    phase_flipped: Tensor = None  # type: ignore[assignment]  # False everywhere
    premultiplied: Tensor = None  # type: ignore[assignment]  # False everywhere

    def __post_init__(self) -> None:
        for name in FLAGS:
            if getattr(self, name) is None:
                off = torch.zeros_like(self.defocus_u, dtype=torch.bool)
                object.__setattr__(self, name, off)

    def __len__(self) -> int:
        return len(self.defocus_u)

    def __getitem__(self, rows: Any) -> Optics:
        return Optics(**{name: value[rows] for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> Optics:
        """The same optics on a device, where the CTFs are then computed."""
        return Optics(**{name: value.to(device) for name, value in vars(self).items()})

    def scaled(self, scale: float) -> Optics:
        """The same optics for images whose pixels are ``scale`` times as large."""
        return replace(self, pixel_size=self.pixel_size * scale)

    def flipped(self) -> Optics:
        """The optics of the same images after `phase_flip`."""
        return replace(self, phase_flipped=~self.premultiplied)


FLAGS = {
    "phase_flipped": "rlnCtfDataArePhaseFlipped",
    "premultiplied": "rlnCtfDataAreCtfPremultiplied",
}
"""RELION's columns, 0 or 1, that tell what was done to the images before."""
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


CTF_COLUMNS = frozenset({*COLUMNS.values(), *FLAGS.values(), "rlnOpticsGroup"})
"""Columns of the particles that `optics_from_relion` reads."""


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
        ImpossibleError: values that no CTF has.
    """
    if "rlnDefocusU" not in particles:
        return None
    n = len(particles["rlnDefocusU"])
    row = _group_rows(particles, optics)

    def column_of(name: str, column: str) -> np.ndarray:
        if column in particles:
            return np.array(particles[column], dtype=np.float32)
        if optics is not None and row is not None and column in optics:
            return np.array(optics[column], dtype=np.float32)[row]
        if name == "phase_shift" or name in FLAGS:
            return np.zeros(n, dtype=np.float32)
        raise ValueError(
            f"particles have rlnDefocusU but no {column}: add it, or set particle.ctf=none"
        )

    with np.errstate(over="ignore"):  # infinite, which is refused
        values = {name: torch.from_numpy(column_of(name, label)) for name, label in COLUMNS.items()}
    for name, label in FLAGS.items():
        value = torch.from_numpy(column_of(name, label))
        if not ((value == 0) | (value == 1)).all():
            wrong = int(((value != 0) & (value != 1)).nonzero()[0])
            raise ValueError(f"{label} = {value[wrong]:g} in row {wrong + 1}: write 0 or 1")
        values[name] = value == 1
    found = Optics(**values, pixel_size=torch.full((n,), pixel_size))
    refuse_impossible(found)
    return found


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

    Raises:
        ValueError: images that were flipped or multiplied, because this is not their transfer.
    """
    if (optics.phase_flipped | optics.premultiplied).any():
        raise ValueError(
            "the phases of some particles were flipped, or particles were multiplied by their CTF: "
            "joint refinement needs them as they were recorded"
        )
    return _calculate(optics, size, return_complex_ctf=True)


def defocus_phase(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) pi * wavelength * k^2: phase of `complex_ctf`, radians per Å of
    defocus."""
    wavelength = calculate_relativistic_electron_wavelength(optics.voltage * 1e3) * 1e10  # Å
    kx, ky = frequency_grid(size)
    square = (kx.square() + ky.square()).to(optics.voltage.device)  # (cycles/px)^2
    return (math.pi * wavelength / optics.pixel_size.square())[:, None, None] * square


def transfer_2d(optics: Optics, size: int) -> Tensor:
    """(n, size, size // 2 + 1) what these images' signal was multiplied by: their CTF, its amount
    where phases were flipped, its square where they were multiplied by the CTF."""
    ctf = ctf_2d(optics, size)
    flipped, multiplied = (x[:, None, None] for x in (optics.phase_flipped, optics.premultiplied))
    return torch.where(multiplied, ctf.square(), torch.where(flipped, ctf.abs(), ctf))


def matched_filter(optics: Optics, size: int) -> tuple[Tensor, Tensor]:
    """Factors (n, size, size // 2 + 1) that turn these images into the recorded ones times their
    CTF, and CTF^2 of the same shape.

    Recorded images times their CTF, summed and divided by the sum of CTF^2, are the average with
    the least noise, if the noise is white.
    """
    ctf = ctf_2d(optics, size)
    flipped, multiplied = (x[:, None, None] for x in (optics.phase_flipped, optics.premultiplied))
    factor = torch.where(flipped, ctf.abs(), ctf)
    return torch.where(multiplied, torch.ones_like(ctf), factor), ctf.square()


def _calculate(optics: Optics, size: int, return_complex_ctf: bool = False) -> Tensor:
    # The library needs U >= V; the other order means the same with the axes exchanged.
    u = torch.maximum(optics.defocus_u, optics.defocus_v)
    v = torch.minimum(optics.defocus_u, optics.defocus_v)
    angle = optics.defocus_angle + 90 * (optics.defocus_u < optics.defocus_v)
    # The library writes into its defocus argument, so it gets a new tensor.
    return calculate_ctf_2d(
        defocus=(u + v) / 2 / ANGSTROM_PER_MICROMETRE,
        astigmatism=(u - v) / 2 / ANGSTROM_PER_MICROMETRE,
        astigmatism_angle=angle,
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
    """(n, size, size) images times the sign of their transfer in Fourier space; amplitudes stay.

    Images whose phases were flipped before, or that were multiplied by their CTF, stay as they are.
    """
    sign = torch.sign(transfer_2d(optics.to(images.device), images.shape[-1]))
    return torch.fft.irfft2(torch.fft.rfft2(images) * sign, s=images.shape[-2:])


class Finding(NamedTuple):
    """Values that are wrong: RELION's column, the first 0-based row, and what to say of them."""

    column: str
    row: int
    what: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"row {self.row + 1}: {self.column} {self.what}; {self.remedy}, or set "
            "particle.ctf=none"
        )


class ImpossibleError(ValueError):
    """Values that no CTF has: all ``findings``, which are also in the message."""

    findings: tuple[Finding, ...] = ()


class _Range(NamedTuple):
    """Values of a column that are possible, and those that are usual."""

    possible: tuple[float, float]
    usual: tuple[float, float]
    unit: str
    hints: tuple[tuple[float, float, str], ...] = ()  # from, below, remedy


_DEFOCUS = _Range(
    (-1e6, 1e6),
    (3000, 1e5),
    "A",
    (
        (-math.inf, 0, "particles are underfocused in general, with positive values"),
        (1e-9, 30, "it looks like micrometres: multiply the column by 10000"),
        (30, 3000, "it looks like nanometres, unless it is that close to focus: multiply by 10"),
    ),
)
RANGES = {
    "defocus_u": _DEFOCUS,
    "defocus_v": _DEFOCUS,
    "defocus_angle": _Range((-1e5, 1e5), (-360, 360), "degrees"),
    "voltage": _Range(
        (1, 1e7),
        (60, 1300),
        "kV",
        ((2e4, math.inf, "it looks like volts: divide by 1000"),),
    ),
    "spherical_aberration": _Range(
        (-1e5, 1e5),
        (0, 10),
        "mm",
        ((10, math.inf, "it looks like micrometres: divide by 1000"),),
    ),
    "amplitude_contrast": _Range(
        (0, 1), (0, 0.5), "", ((1, 100.1, "it looks like per cent: divide by 100"),)
    ),
    "phase_shift": _Range((-1e5, 1e5), (-180, 360), "degrees"),
    "pixel_size": _Range((1e-3, 1e4), (0.1, 50), "A"),
}


def impossible(optics: Optics) -> list[Finding]:
    """Values that no CTF has, for example those that are not finite; at most one of each column."""
    return [
        _finding(name, each.possible, each, optics, "is impossible")
        for name, each in RANGES.items()
        if not _inside(getattr(optics, name), each.possible).all()
    ]


def implausible(optics: Optics) -> list[Finding]:
    """Values that are unusual, for example in another unit; at most one of each column."""
    return [
        _finding(name, each.usual, each, optics, "is unusual")
        for name, each in RANGES.items()
        if not _inside(getattr(optics, name), each.usual).all()
    ]


def refuse_impossible(optics: Optics) -> None:
    """Raise `ImpossibleError` if `impossible` finds something."""
    if found := impossible(optics):
        error = ImpossibleError("; ".join(str(each) for each in found))
        error.findings = tuple(found)
        raise error


def _inside(values: Tensor, limits: tuple[float, float]) -> Tensor:
    return (values >= limits[0]) & (values <= limits[1])  # NaN is in no range


def _finding(
    name: str, limits: tuple[float, float], column: _Range, optics: Optics, is_what: str
) -> Finding:
    """The first value outside of ``limits``, how many there are, and a remedy."""
    values = getattr(optics, name)
    rows = (~_inside(values, limits)).nonzero().flatten()
    row = int(rows[0])
    value = float(values[row])
    hints = [remedy for low, high, remedy in column.hints if low <= value < high]
    what = (
        f"= {value:.6g} {is_what} in {len(rows)} of {len(values)} rows: it should be from "
        f"{limits[0]:g} to {limits[1]:g}{column.unit and ' ' + column.unit}"
    )
    return Finding(
        COLUMNS.get(name, "rlnImagePixelSize"), row, what, hints[0] if hints else "correct it"
    )
