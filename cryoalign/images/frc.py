"""Fourier ring correlation and what it says: resolution, and the best linear filter."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cryoalign.images.fourier import frequency_grid


def ring_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(n, size // 2 + 1) Fourier ring correlation of image pairs (n, size, size).

    Shell i is the spatial frequency i / size (1/px), a component between two shells counting in
    both by linear weights; beyond the last shell it counts there while it is nearer than one.
    Shell 0 is always 1; with an empty image (all zero) the others are 0. Sums are taken in float64
    by one matrix product: on a GPU a loop over shells would cost as much as an alignment's search.
    """
    f, g = (torch.fft.rfft2(image.double()).flatten(1) for image in (a, b))
    rings = _ring_weights(a.shape[-1], a.device)  # (components, shells)
    cross = (f * g.conj()).real @ rings
    power = (f.abs().square() @ rings) * (g.abs().square() @ rings)
    curve = torch.where(power > 0, cross / power.clamp(min=1e-300).sqrt(), 0.0)
    return torch.cat([torch.ones_like(curve[:, :1]), curve[:, 1:]], 1).to(a.dtype)


@functools.lru_cache(maxsize=8)
def _ring_weights(size: int, device: torch.device) -> Tensor:
    """(size (size // 2 + 1), shells) share of each component of an rfft2 in each shell; components
    that stand for their mirror image too count twice."""
    kx, ky = frequency_grid(size, device)
    radius = torch.hypot(kx.double(), ky.double()) * size
    shell = torch.arange(size // 2 + 1, device=device)
    share = (1 - (radius.unsqueeze(-1) - shell).abs()).clamp(min=0)
    twice = torch.full((size // 2 + 1, 1), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1
    if size % 2 == 0:
        twice[-1] = 1
    return (share * twice).flatten(0, 1)


def resolution(frc: Tensor, size: int, pixel_size: float = 1.0, threshold: float = 0.143) -> Tensor:
    """Where FRC curves first fall below a threshold.

    Args:
        frc: (n, shells).
        size: box in pixels.
        pixel_size: Å per pixel (1: the answer is in pixels).
        threshold: 0.143 between half-sets; 0.5 against a known truth.

    Returns:
        (n,) resolution in Å (period), linear between shells; the Nyquist limit where the curve
        never falls, and infinite where it is below from the first shell on.
    """
    curve = frc[:, 1:]
    below = curve < threshold
    first = torch.where(below.any(1), below.to(torch.uint8).argmax(1), curve.shape[1] - 1)  # (n,)
    here = curve.gather(1, first[:, None]).squeeze(1)
    before = curve.gather(1, (first - 1).clamp(min=0)[:, None]).squeeze(1)
    part = ((before - threshold) / (before - here).clamp(min=1e-6)).clamp(0, 1)
    shell = torch.where(below.any(1), first + part, curve.shape[1] * torch.ones_like(part))
    # ``first`` counts from shell 1: at 0 even the lowest frequency is below.
    period = size * pixel_size / shell.clamp(min=1e-6)
    return torch.where(below[:, 0], torch.inf, period)


def wiener_curve(frc: Tensor) -> Tensor:
    """(n, shells) the linear filter of least squared error for the average of two half-sets.

    With the signal-to-noise ratio of the full average SNR = 2 FRC / (1 - FRC), it is
    SNR / (1 + SNR) = 2 FRC / (1 + FRC) (Rosenthal & Henderson 2003). The curve is smoothed over
    three shells and is zero from where two in a row are not positive: beyond, it only follows
    noise, while a single one may be a zero of the class's own transform.
    Shell 0 passes unchanged.
    """
    smooth = torch.nn.functional.avg_pool1d(
        torch.nn.functional.pad(frc.unsqueeze(1), (1, 1), mode="replicate"), 3, stride=1
    ).squeeze(1)
    smooth = smooth.clamp(0, 1)
    dead = smooth <= 0
    ended = dead & torch.cat([dead[:, 1:], dead[:, -1:]], 1)
    alive = torch.cumprod((~ended).to(smooth.dtype), 1)
    curve = 2 * smooth / (1 + smooth) * alive
    return torch.cat([torch.ones_like(curve[:, :1]), curve[:, 1:]], 1)
