"""References with their derivatives, and the disc in which they are compared."""

from __future__ import annotations

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
    """(k, 4, h, w): references and their derivatives by place x and y (k, 3, h, w), and by a turn
    about the centre, which brings a place v' along (-y', x')."""
    _, along_x, along_y = templates.unbind(1)
    x, y = pixel_grid((templates.shape[-2], templates.shape[-1]), templates).unbind(-1)
    return torch.cat([templates, (x * along_y - y * along_x).unsqueeze(1)], 1)


def annulus(radius: Tensor, rings: Rings) -> Tensor:
    """The rings' area as a weight of pixels, its rim one pixel soft so that scores are smooth."""
    weight = (rings.last_ring + 1.0 - radius).clamp(0, 1)
    if rings.first_ring > 1:
        weight = weight * (radius - (rings.first_ring - 1.0)).clamp(0, 1)
    return weight


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of images (k, size, size) along x and y, exact for band-limited images."""
    spectrum = torch.fft.rfft2(images)
    kx, ky = frequency_grid(images.shape[-1], images.device)
    size = (images.shape[-2], images.shape[-1])
    return (
        torch.fft.irfft2(spectrum * (2j * math.pi * kx), s=size),
        torch.fft.irfft2(spectrum * (2j * math.pi * ky), s=size),
    )


def check_labels(label: Tensor, k: int) -> None:
    """Refuse labels (n,) that are not int64 from 0 to k - 1."""
    if label.dtype != torch.int64:
        raise ValueError(f"labels are {label.dtype}: use .long()")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < k:
        raise ValueError(f"labels from {int(label.min())} to {int(label.max())}, {k} references")
