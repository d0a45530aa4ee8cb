"""The formulas of the design in slow float64 loops: they judge every faster implementation."""

from __future__ import annotations

import math

import numpy as np
import torch

from cryoalign.images.ctf import Optics
from cryoalign.images.frc import ring_correlation
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked, normalise
from cryoalign.pose import Pose
from cryoalign.results.alignment import Alignment


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """Value at (x, y) px about the centre; pixels outside are zero."""
    h, w = image.shape
    column, row = x + w // 2, y + h // 2
    c0, r0 = math.floor(column), math.floor(row)
    value = 0.0
    for r, c in ((r0, c0), (r0, c0 + 1), (r0 + 1, c0), (r0 + 1, c0 + 1)):
        if 0 <= r < h and 0 <= c < w:
            value += (1 - abs(row - r)) * (1 - abs(column - c)) * float(image[r, c])
    return value


def ring_samples(image: np.ndarray, radii: list[int], angles: int, shift=(0.0, 0.0)) -> np.ndarray:
    """(r, a) samples about centre - shift, minus their area-weighted mean, over the deviation."""
    out = np.empty((len(radii), angles))
    for i, radius in enumerate(radii):
        for j in range(angles):
            theta = 2 * math.pi * j / angles
            x, y = radius * math.cos(theta) - shift[0], radius * math.sin(theta) - shift[1]
            out[i, j] = bilinear(image, x, y)
    weight = np.array(radii, float)[:, None] / (sum(radii) * angles) * np.ones_like(out)
    mean = (weight * out).sum()
    deviation = math.sqrt((weight * (out - mean) ** 2).sum())
    return (out - mean) / deviation


def correlation(
    particle: np.ndarray,
    reference: np.ndarray,
    radii: list[int],
    angles: int,
    shift=(0.0, 0.0),
    mirror: bool = False,
) -> np.ndarray:
    """(a,) correlation coefficients of the particle turned by each angle, then mirrored, with
    the reference: sums over ring points, no Fourier transform."""
    x = ring_samples(particle, radii, angles, shift)
    y = ring_samples(reference, radii, angles)
    area = sum(radii) * angles
    out = np.empty(angles)
    for turn in range(angles):
        total = 0.0
        for i, radius in enumerate(radii):
            for j in range(angles):
                # aligned(theta) = x(theta - turn); mirroring x -> -x reads it at pi - theta.
                at = (angles // 2 - j - turn) if mirror else (j - turn)
                total += radius * x[i, at % angles] * y[i, j]
        out[turn] = total / area
    return out


def some_optics(n: int = 5, pixel_size: float = 3.6, seed: int = 0) -> Optics:
    """Random CTFs with astigmatism, at 300 kV."""
    rng = np.random.default_rng(seed)
    u = torch.from_numpy(rng.uniform(1e4, 3e4, n)).float()
    v = u - torch.from_numpy(rng.uniform(0, 2000, n)).float()
    angle = torch.from_numpy(rng.uniform(0, 180, n)).float()
    full = torch.full((n,), 300.0)
    return Optics(u, v, angle, full, full * 0.009, full / 3000, full * 0, full * 0 + pixel_size)


def ctf(optics: Optics, size: int) -> torch.Tensor:
    """sin(chi + asin(amplitude)), chi in RELION's convention, in float64."""
    volts = optics.voltage.double()[:, None, None] * 1e3
    wavelength = 12.2643247 / (volts * (1 + volts * 0.978466e-6)).sqrt()
    apix = float(optics.pixel_size[0])
    ky = torch.fft.fftfreq(size, apix, dtype=torch.float64)[:, None]
    kx = torch.fft.rfftfreq(size, apix, dtype=torch.float64)[None]
    k2, theta = kx**2 + ky**2, torch.atan2(ky, kx.expand(size, -1))
    u, v, angle, cs, amplitude = (
        value.double()[:, None, None]
        for value in (
            optics.defocus_u, optics.defocus_v, optics.defocus_angle,
            optics.spherical_aberration, optics.amplitude_contrast,
        )
    )  # fmt: skip
    defocus = (u + v) / 2 + (u - v) / 2 * torch.cos(2 * (theta - torch.deg2rad(angle)))
    chi = torch.pi * wavelength * defocus * k2 - torch.pi / 2 * cs * 1e7 * wavelength**3 * k2**2
    return torch.sin(chi + torch.asin(amplitude))


def ctf_average(images: torch.Tensor, optics: Optics, pose: Pose) -> torch.Tensor:
    """(size, size) sum of CTF * particle over sum of CTF^2, of images as they were recorded, in
    float64; the sum of CTF^2 is the mean over a circle of all angles, plus 0.1 % of the members."""
    n, size = len(images), images.shape[-1]
    transfer = ctf(optics, size)
    prepared = torch.fft.rfft2(normalise(images.double(), size / 2)) * transfer
    moved = transform(torch.fft.irfft2(prepared, s=(size, size)).float(), pose).double()
    radius = size * np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    square = transfer.square().sum(0).numpy()
    rings = [square[radius.round() == ring].mean() for ring in range(size // 2 + 1)]
    below = np.interp(radius, np.arange(size // 2 + 1), 1 / (np.array(rings) + 0.001 * n))
    return torch.fft.irfft2(torch.fft.rfft2(moved.sum(0)) * torch.from_numpy(below), s=(size, size))


def curves_by_row(images: torch.Tensor, found: Alignment, mask: torch.Tensor) -> torch.Tensor:
    """(k, shells) FRC of a result's classes, made again from its table: even against odd rows."""
    halves = []
    for half in (0, 1):
        means = []
        for number in range(1, len(found.averages) + 1):
            own = (found.class_number == number).nonzero().squeeze(1)
            own = own[own % 2 == half]
            prepared = normalise(images[own], images.shape[-1] / 2)
            means.append(transform(prepared, found.pose[own]).mean(0))
        halves.append(masked(torch.stack(means), mask))
    return ring_correlation(*halves)


def reference_number(found: Alignment) -> torch.Tensor:
    """(n,) number of the given reference, from 1, that each particle's class started from; 0 for
    none. Classes themselves are numbered by their sizes."""
    started = torch.tensor([0, *found.class_quality["reference"]])
    return started[found.class_number]
