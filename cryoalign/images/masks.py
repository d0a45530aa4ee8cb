"""Soft masks, the background beyond a particle, and normalisation by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryoalign.images.fourier import _square
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


def masked(images: Tensor, mask: Tensor) -> Tensor:
    """(k, size, size) images minus their mean under a mask (size, size), times the mask."""
    mean = (images * mask).flatten(1).sum(1) / mask.sum()
    return (images - mean[:, None, None]) * mask
