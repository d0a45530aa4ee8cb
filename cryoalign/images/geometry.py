"""Positions of pixels, and images sampled between them. Only this module calls ``grid_sample``.

Points are (x, y) in pixels from the centre (w // 2, h // 2); y is the row. Outside the image
samples are zero, so images should have a background of zero.
"""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cryoalign.pose import Pose
from cryoalign.runtime.arrays import Array, as_tensor

Interpolation = Literal["bilinear", "bicubic"]


def pixel_grid(shape: tuple[int, int], like: Tensor) -> Tensor:
    """(h, w, 2) xy position of every pixel from the centre; dtype and device are those of like."""
    height, width = shape
    y = torch.arange(height, device=like.device, dtype=like.dtype) - height // 2
    x = torch.arange(width, device=like.device, dtype=like.dtype) - width // 2
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def radius_grid(size: int, device: torch.device | str | None = None) -> Tensor:
    """(size, size) distance of every pixel from the centre, in pixels."""
    return pixel_grid((size, size), torch.empty(0, device=device)).norm(dim=-1)


def sample(images: Tensor, points: Tensor, interpolation: Interpolation = "bilinear") -> Tensor:
    """Values of images at points; zero outside. Differentiable in both.

    Args:
        images: (n, *c, h, w); the channels of an image share its points.
        points: (n, *p, 2), for each image its own, or (1, *p, 2) shared by all; xy pixels from
            the centre.
        interpolation: ``bilinear`` or ``bicubic`` (Keys' kernel, a = -0.75).

    Returns:
        (n, *c, *p).

    Raises:
        ValueError: the number of images and of sets of points differ.
    """
    n = len(images)
    if len(points) not in (1, n):
        raise ValueError(
            f"points of {len(points)} images do not fit {n}: give each its own, or all (1, ..., 2)"
        )
    if torch.are_deterministic_algorithms_enabled():
        return gather_sample(images, points, interpolation)
    height, width = images.shape[-2:]
    return sample_at(images, sampling_places(points, height, width), interpolation)


def gather_sample(
    images: Tensor, points: Tensor, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """`sample` by ``gather``: slower, with second derivatives and a deterministic gradient.

    ``grid_sample`` has no second derivative, and on CUDA the order of the sums in its gradient
    changes from call to call. `sample` calls this function in PyTorch's deterministic mode.
    """
    n, *channels, height, width = images.shape
    flat = images.reshape(n, -1, height * width)  # (n, C, h w)
    places = points.flatten(1, -2) + points.new_tensor([width // 2, height // 2])  # (n or 1, P, 2)
    corner = places.detach().floor()
    column, row = (corner.long() + (0 if interpolation == "bilinear" else -1)).unbind(-1)
    across, down = (_taps(part, interpolation) for part in (places - corner).unbind(-1))
    total = flat.new_zeros(())
    for (i, x), (j, y) in itertools.product(enumerate(across), enumerate(down)):
        at_x, at_y = column + i, row + j
        inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
        index = at_y.clamp(0, height - 1) * width + at_x.clamp(0, width - 1)
        index = index.unsqueeze(1).expand(n, flat.shape[1], -1)
        weight = torch.where(inside, x * y, 0.0).unsqueeze(1)  # (n or 1, 1, P)
        total = total + flat.gather(2, index) * weight
    return total.reshape(n, *channels, *points.shape[1:-1])


def _taps(part: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """Weights of the pixels next to a point that lies ``part`` (0 to 1) of a pixel past one."""
    if interpolation == "bilinear":
        return [1 - part, part]
    a = -0.75
    near = [((a + 2) * t - (a + 3)) * t * t + 1 for t in (part, 1 - part)]
    far = [((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (1 + part, 2 - part)]
    return [far[0], near[0], near[1], far[1]]


def sampling_places(points: Tensor, height: int, width: int) -> Tensor:
    """Points (n or 1, *p, 2), xy pixels from the centre, in the units that `sample_at` takes."""
    scale: Tensor | float = 2.0 / width
    offset: Tensor | float = (2 * (width // 2) + 1) / width - 1.0
    if width != height:  # for square images numbers suffice: ten times faster than tensors
        scale = points.new_tensor([scale, 2.0 / height])
        offset = points.new_tensor([offset, (2 * (height // 2) + 1) / height - 1.0])
    return points * scale + offset


def sample_at(images: Tensor, places: Tensor, interpolation: Interpolation = "bilinear") -> Tensor:
    """`sample` at points that `sampling_places` has converted, once for many calls."""
    n, *channels, height, width = images.shape
    grid = places.flatten(1, -2).unsqueeze(2)  # (n or 1, P, 1, 2)
    # With shared points all images become channels of one, so that weights are computed once.
    stack = images.reshape(len(places), -1, height, width)
    values = F.grid_sample(stack, grid, mode=interpolation, align_corners=False)
    return values.reshape(n, *channels, *places.shape[1:-1])


def transform(images: Array, pose: Pose, interpolation: Interpolation = "bicubic") -> Tensor:
    """Images moved by their poses: out(v') = image(v) with v' = F^mirror R(angle) (v + shift).

    Each image is interpolated once. Differentiable in images, angle and shift.

    Args:
        images: (n, h, w), a tensor or another array (`runtime.arrays.Array`).
        pose: (n,).
        interpolation: see `sample`; ``python -m bench interpolation`` measures the loss of each.

    Returns:
        (n, h, w).

    Raises:
        ValueError: images are of an integer type.
    """
    images = as_tensor(images)
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: use .float()")
    target = pixel_grid((images.shape[-2], images.shape[-1]), images)  # (h, w, 2)
    # v = L^-1 v' - shift. L is orthogonal: a row vector times L is L^-1 times the column vector.
    linear = pose.linear().to(images.dtype)  # (n, 2, 2)
    source = target.flatten(0, 1) @ linear - pose.shift.to(images.dtype).unsqueeze(1)
    return sample(images, source.reshape(len(images), *target.shape), interpolation)


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Images moved by whole pixels, without interpolation: out(v) = image(v - shift).

    Args:
        images: (n, h, w).
        shift: (n, 2) whole pixels, x and y.

    Returns:
        (n, h, w), zero from outside.
    """
    height, width = images.shape[-2:]
    dx, dy = shift.round().long().to(images.device).unbind(-1)
    x = torch.arange(width, device=images.device) - dx[:, None]  # (n, w)
    y = torch.arange(height, device=images.device) - dy[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    index = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None]
    moved = images.flatten(1).gather(1, index.flatten(1)).view_as(images)
    return moved * inside
