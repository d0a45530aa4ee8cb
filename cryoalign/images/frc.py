"""Fourier ring correlation, the resolution read from it, and the best linear filter."""

import functools

import torch
from torch import Tensor

from cryoalign.images.fourier import frequency_grid, rfft_weights


def ring_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(n, size // 2 + 1) Fourier ring correlation of image pairs (n, size, size).

    Shell i is the spatial frequency i / size (1/px). A component between two shells counts in
    both, by linear weights. Shell 0 is always 1; with an empty image (all zero) the others are 0.
    Sums are taken in float64 by one matrix product: on a GPU a loop over shells would take as long
    as the search of an alignment.
    """
    f, g = (torch.fft.rfft2(image.double()).flatten(1) for image in (a, b))
    rings = _ring_weights(a.shape[-1], a.device)  # (components, shells)
    cross = (f * g.conj()).real @ rings
    power = (f.abs().square() @ rings) * (g.abs().square() @ rings)
    curve = torch.where(power > 0, cross / power.clamp(min=1e-300).sqrt(), 0.0)
    return torch.cat([torch.ones_like(curve[:, :1]), curve[:, 1:]], 1).to(a.dtype)


@functools.lru_cache(maxsize=8)
def _ring_weights(size: int, device: torch.device) -> Tensor:
    """(size (size // 2 + 1), shells) float64: how much each component of rfft2 counts in each
    shell: a linear weight of its distance, times `rfft_weights`."""
    kx, ky = frequency_grid(size, device)
    radius = torch.hypot(kx.double(), ky.double()) * size
    shell = torch.arange(size // 2 + 1, device=device)
    share = (1 - (radius.unsqueeze(-1) - shell).abs()).clamp(min=0)
    return (share * rfft_weights(size, share)[:, None]).flatten(0, 1)


def resolution(frc: Tensor, size: int, pixel_size: float = 1.0, threshold: float = 0.143) -> Tensor:
    """The resolution at which FRC curves first fall below a threshold.

    Args:
        frc: (n, shells).
        size: box in pixels.
        pixel_size: Å per pixel; 1 gives the result in pixels.
        threshold: 0.143 between half-sets; 0.5 against a known truth.

    Returns:
        (n,) resolution in Å (a period), linear between shells; the Nyquist limit where the curve
        never falls, and infinity where it is below the threshold from the first shell on.
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
    """(n, shells) `wiener_factors` of FRC curves from shell 0 on, cut off where the signal ends.

    The filter is zero from the first two neighbouring shells whose factor is zero: beyond them the
    FRC only follows noise. A single zero may be one of the particle's own transform. Shell 0
    passes unchanged.
    """
    factors = wiener_factors(frc)
    zero = factors <= 0
    ended = zero & torch.cat([zero[:, 1:], zero[:, -1:]], 1)
    curve = factors * torch.cumprod((~ended).to(factors.dtype), 1)
    return torch.cat([torch.ones_like(curve[:, :1]), curve[:, 1:]], 1)


def wiener_factors(frc: Tensor, most: float = 1.0) -> Tensor:
    """(n, shells) the linear filter of least squared error for the average of two half-sets.

    The average of both halves has the signal-to-noise ratio SNR = 2 FRC / (1 - FRC), and the
    filter is SNR / (1 + SNR) = 2 FRC / (1 + FRC) (Rosenthal & Henderson 2003). The FRC is first
    smoothed over three shells and clamped to [0, most].
    """
    padded = torch.nn.functional.pad(frc.unsqueeze(1), (1, 1), mode="replicate")
    smooth = torch.nn.functional.avg_pool1d(padded, 3, stride=1).squeeze(1).clamp(0, most)
    return 2 * smooth / (1 + smooth)
