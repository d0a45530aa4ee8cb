"""Masks, normalisation, rescaling and radial filters of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch_fourier_rescale import fourier_rescale_rfft_2d

from cryoalign.images.geometry import radius_grid


def soft_mask(
    size: int, radius: float, edge: float = 4.0, device: torch.device | str | None = None
) -> Tensor:
    """(size, size) one inside ``radius`` pixels, zero beyond ``radius + edge``, a raised cosine
    between."""
    beyond = radius_grid(size, device) - radius
    if edge == 0:
        return (beyond <= 0).float()
    return 0.5 + 0.5 * torch.cos(math.pi * (beyond / edge).clamp(0, 1))


def background(size: int, radius: float, device: torch.device | str | None = None) -> Tensor:
    """(size, size) bool: the pixels beyond ``radius`` of the centre.

    Raises:
        ValueError: they are fewer than 16.
    """
    outside = radius_grid(size, device) > radius
    if int(outside.sum()) < 16:
        raise ValueError(
            f"a background radius of {radius:g} px leaves no background in a box of {size} px; "
            f"choose one up to {size / 2:g}"
        )
    return outside


def normalise(images: Tensor, radius: float) -> Tensor:
    """Images whose background (beyond ``radius`` pixels) has mean 0 and deviation 1.

    Without noise in the background, the whole image has deviation 1; a constant one is zero.

    Args:
        images: (n, size, size).
        radius: of the particle, pixels; the corners beyond it are background.

    Raises:
        ValueError: fewer than 16 pixels are left outside, or images are not square.
    """
    outside = background(_square(images), radius, images.device)  # (size, size)
    beyond = images[:, outside]  # (n, p)
    mean = beyond.mean(1)[:, None, None]
    # A background without noise (simulated, masked) has nothing to be scaled to.
    deviation = beyond.std(1)[:, None, None]
    overall = images.flatten(1).std(1)[:, None, None]
    scale = torch.where(deviation > 1e-3 * overall, deviation, overall)
    return (images - mean) / torch.where(scale > 0, scale, torch.ones_like(scale))


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
