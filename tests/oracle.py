"""The formulas of the design in slow float64 loops: the judge of every faster voice."""

from __future__ import annotations

import math

import numpy as np


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
