"""Soft masks, the background around a particle, and normalisation by it."""

import math
from typing import Literal

import torch
from torch import Tensor

from cryoalign.images.fourier import _square
from cryoalign.images.geometry import radius_grid

Background = Literal["ramp", "constant", "none"]
"""What is subtracted as the background of an image, see `normalise`."""


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


def normalise(images: Tensor, radius: float, subtract: Background = "ramp") -> Tensor:
    """Images without their background, scaled so that its noise has standard deviation 1.

    Where the background has no noise (simulated or masked images), the whole image gets standard
    deviation 1. A constant image becomes zero, and so does a plane if planes are subtracted.

    Args:
        images: (n, size, size).
        radius: of the particle, pixels; all beyond it is background.
        subtract: ``ramp``: the plane that fits the background best, by least squares;
            ``constant``: the mean of the background; ``none``: nothing.

    Raises:
        ValueError: fewer than 16 pixels are background, or images are not square.
    """
    size = _square(images)
    outside = background(size, radius, images.device).flatten().nonzero().squeeze(1)  # (p,)
    before = _deviation(images.flatten(1))
    if subtract != "none":
        images = images - _of(images, outside).mean(1)[:, None, None]
    if subtract == "ramp":
        images = images - _planes(images, outside)
    deviation, overall = _deviation(_of(images, outside)), _deviation(images.flatten(1))
    scale = torch.where(deviation > 1e-3 * overall, deviation, overall)
    scale = torch.where(overall > 1e-5 * before, scale, before)  # else only rounding errors remain
    return images / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, None]


def _of(images: Tensor, pixels: Tensor) -> Tensor:
    """(n, p) values of images (n, size, size) in some pixels, given by their flat indices (p,)."""
    return images.flatten(1).index_select(1, pixels)


def _deviation(values: Tensor) -> Tensor:
    """(n,) standard deviation of values (n, p); faster than ``std`` on a CPU."""
    from_mean = values - values.mean(1, keepdim=True)
    return torch.linalg.vector_norm(from_mean, dim=1) / math.sqrt(values.shape[1] - 1)


def _planes(images: Tensor, outside: Tensor) -> Tensor:
    """(n, size, size) planes that fit images (n, size, size) best in the pixels ``outside`` (p,).

    The coefficients of a plane are weighted sums of these pixels; the weights, which are the same
    for all images, are the pseudoinverse of the planes 1, x and y.
    """
    size = images.shape[-1]
    axis = torch.arange(size, dtype=torch.float64, device=images.device) / size - 0.5
    x, y = axis[outside % size], axis[outside // size]
    planes = torch.stack([torch.ones_like(x), x, y])  # (3, p)
    weights = (torch.linalg.inv(planes @ planes.mT) @ planes).to(images)
    # Sums by image, not a matrix product: results do not depend on how many images there are.
    beyond = _of(images, outside)
    level, along_x, along_y = ((beyond * weight).sum(1)[:, None, None] for weight in weights)
    axis = axis.to(images)
    return level + along_x * axis + along_y * axis[:, None]


def masked(images: Tensor, mask: Tensor) -> Tensor:
    """(k, size, size) images minus their mean under a mask (size, size), times the mask."""
    mean = (images * mask).flatten(1).sum(1) / mask.sum()
    return (images - mean[:, None, None]) * mask
