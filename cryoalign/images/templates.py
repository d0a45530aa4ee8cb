"""References with their derivatives, and the weight of the pixels that are compared."""

import math

import torch
from torch import Tensor

from cryoalign.images.fourier import frequency_grid
from cryoalign.images.geometry import pixel_grid
from cryoalign.images.polar import Rings


def templates_of(references: Tensor) -> Tensor:
    """(k, 3, h, w): references (k, h, w) and their derivatives along x and y."""
    return torch.stack([references, *_gradient(references)], 1)


def with_turn(templates: Tensor) -> Tensor:
    """Templates with one more derivative, by a rotation about the centre.

    Args:
        templates: (k, 3, h, w) of `templates_of`.

    Returns:
        (k, 4, h, w): value, derivatives along x and y (1/px) and by the rotation (1/radian), which
        moves the point (x, y) along (-y, x).
    """
    _, along_x, along_y = templates.unbind(1)
    x, y = pixel_grid((templates.shape[-2], templates.shape[-1]), templates).unbind(-1)
    return torch.cat([templates, (x * along_y - y * along_x).unsqueeze(1)], 1)


def annulus(radius: Tensor, rings: Rings) -> Tensor:
    """Weight of pixels, shape of ``radius``: 1 in the area of the rings, 0 outside.

    It falls over one pixel at each border, so that scores change smoothly with the pose.

    Args:
        radius: distance of the pixels from the centre, pixels.
        rings: first and last ring bound the area.
    """
    weight = (rings.last_ring + 1.0 - radius).clamp(0, 1)
    if rings.first_ring > 1:
        weight = weight * (radius - (rings.first_ring - 1.0)).clamp(0, 1)
    return weight


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of images (k, size, size) along x and y, from their Fourier transform."""
    spectrum, size = torch.fft.rfft2(images), images.shape[-2:]
    along_x, along_y = (
        torch.fft.irfft2(spectrum * (2j * math.pi * frequency), s=size)
        for frequency in frequency_grid(images.shape[-1], images.device)
    )
    return along_x, along_y


def check_labels(label: Tensor, k: int) -> None:
    """Raise ValueError unless labels (n,) are int64 from 0 to k - 1."""
    if label.dtype != torch.int64:
        raise ValueError(f"labels are {label.dtype}: use .long()")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < k:
        raise ValueError(f"labels from {int(label.min())} to {int(label.max())}, {k} references")
