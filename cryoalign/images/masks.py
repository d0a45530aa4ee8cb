"""Soft masks, the background around a particle, and normalisation by it."""

import math

import torch
from torch import Tensor

from cryoalign.images.fourier import _square
from cryoalign.images.geometry import radius_grid


def soft_mask(
    size: int, radius: float, edge: float = 4.0, device: torch.device | str | None = None
) -> Tensor:
    """(size, size) one within ``radius`` pixels of the centre, zero beyond ``radius + edge``, a
    raised cosine between."""
    beyond = radius_grid(size, device) - radius
    if edge == 0:
        return (beyond <= 0).float()
    return 0.5 + 0.5 * torch.cos(math.pi * (beyond / edge).clamp(0, 1))


def background(size: int, radius: float, device: torch.device | str | None = None) -> Tensor:
    """(size, size) bool: the pixels more than ``radius`` pixels from the centre.

    Raises:
        ValueError: there are fewer than 16 of them.
    """
    outside = radius_grid(size, device) > radius
    if int(outside.sum()) < 16:
        raise ValueError(
            f"a background radius of {radius:g} px leaves no background in a box of {size} px; "
            f"choose one up to {size / 2:g}"
        )
    return outside


def normalise(images: Tensor, radius: float) -> Tensor:
    """Images shifted and scaled so that their background has mean 0 and standard deviation 1.

    Where the background has no noise (simulated or masked images), the whole image gets standard
    deviation 1. A constant image becomes zero.

    Args:
        images: (n, size, size).
        radius: of the particle, pixels; all beyond it is background.

    Raises:
        ValueError: fewer than 16 pixels are background, or images are not square.
    """
    outside = background(_square(images), radius, images.device)  # (size, size)
    beyond = images[:, outside]  # (n, p)
    mean = beyond.mean(1)[:, None, None]
    deviation = beyond.std(1)[:, None, None]
    overall = images.flatten(1).std(1)[:, None, None]
    scale = torch.where(deviation > 1e-3 * overall, deviation, overall)
    return (images - mean) / torch.where(scale > 0, scale, torch.ones_like(scale))


def masked(images: Tensor, mask: Tensor) -> Tensor:
    """(k, size, size) images minus their mean under a mask (size, size), times the mask."""
    mean = (images * mask).flatten(1).sum(1) / mask.sum()
    return (images - mean[:, None, None]) * mask
