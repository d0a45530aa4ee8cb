"""Masks, normalisation, rescaling and radial filters of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch_fourier_rescale import fourier_rescale_rfft_2d

from cryoalign.images.geometry import radius_grid


def fourier_resize(images: Tensor, size: int) -> Tensor:
    """Images cropped or padded in Fourier space to a new box: values keep their scale.

    The centre stays the centre (pixel size // 2), odd or even.

    Args:
        images: (..., h, w), square.
        size: new box in pixels.

    Returns:
        (..., size, size).
    """
    old = _square(images)
    if size == old:
        return images
    # The library's image-level call moves the centre of odd boxes; its transform-level one is
    # exact, so the shifts are made here.
    spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)), norm="forward")
    spectrum = fourier_rescale_rfft_2d(
        torch.fft.fftshift(spectrum, dim=-2), (old, old), (size, size)
    )
    spectrum = torch.fft.ifftshift(spectrum, dim=-2)
    resized = torch.fft.irfft2(spectrum, s=(size, size), norm="forward")
    return torch.fft.fftshift(resized, dim=(-2, -1))


def frequency_grid(size: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """kx (1, size // 2 + 1) and ky (size, 1) of rfft2's components, cycles per pixel."""
    kx = torch.fft.rfftfreq(size, device=device)
    ky = torch.fft.fftfreq(size, device=device)
    return kx[None, :], ky[:, None]


def filter_shells(images: Tensor, curves: Tensor) -> Tensor:
    """Images multiplied in Fourier space by radial curves.

    Args:
        images: (n, size, size).
        curves: (n, shells) or (shells,), the factor at 0, 1, 2 … 1/box, linear between and
            constant past the last.

    Returns:
        (n, size, size).
    """
    size = _square(images)
    last = curves.shape[-1] - 1
    kx, ky = frequency_grid(size, images.device)
    radius = (torch.hypot(kx, ky) * size).clamp(max=last)
    low = radius.floor().clamp(max=max(last - 1, 0)).long()
    part = radius - low
    factor = curves[..., low] * (1 - part) + curves[..., (low + 1).clamp(max=last)] * part
    return torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=(size, size))


def radial_mean(image: Tensor) -> Tensor:
    """(size // 2 + 1,) mean of an image (size, size) at whole distances from its centre."""
    size = _square(image)
    ring = radius_grid(size, image.device).round().long().flatten()
    inside = ring <= size // 2
    total = torch.bincount(ring[inside], image.flatten()[inside], size // 2 + 1)
    return (total / torch.bincount(ring[inside], minlength=size // 2 + 1).clamp(min=1)).to(image)


def low_pass_curve(size: int, cutoff: float, width: float = 2.0) -> Tensor:
    """(size // 2 + 1,) one below ``cutoff`` (1/px), a cosine fall of ``width`` shells, zero."""
    beyond = (torch.arange(size // 2 + 1) - cutoff * size) / width
    return 0.5 + 0.5 * torch.cos(math.pi * (beyond + 0.5).clamp(0, 1))


def _square(images: Tensor) -> int:
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"images must be square, got {tuple(images.shape[-2:])}: crop or pad them to a square"
        )
    return images.shape[-1]


def ring_index(size: int, device: torch.device | str | None = None) -> Tensor:
    """(size, size // 2 + 1) int64: the nearest ring, in 1/box, of rfft2's components."""
    kx, ky = frequency_grid(size, device)
    return (torch.hypot(kx, ky) * size).round().long()
