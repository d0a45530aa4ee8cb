"""The operator that sums particles, moved by their poses, by group."""

from __future__ import annotations

import torch
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.operators import kernels
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.pose import Pose


@torch.library.custom_op("cryoalign::sum_aligned", mutates_args=())
def sum_aligned(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, group: Tensor, n_groups: int
) -> Tensor:
    """Sum images, moved by their poses, by group; zero where a group has no member.

    Args:
        images: (n, h, w).
        angle: (n,) degrees; shift: (n, 2) pixels; mirror: (n,) bool. See `geometry.transform`.
        group: (n,) int64, 0 … n_groups - 1.
        n_groups: how many.

    Returns:
        (n_groups, h, w) float64, the same whatever order threads run in.
    """
    return _sum_in_torch(images, angle, shift, mirror, group, n_groups)


@sum_aligned.register_kernel("cuda")
def _(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, group: Tensor, n_groups: int
) -> Tensor:
    serves = kernels.usable(images.device) and images.dtype == torch.float32
    voice = kernel_images.sum_aligned if serves else _sum_in_torch
    return voice(images, angle, shift, mirror, group, n_groups)


@sum_aligned.register_fake
def _(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, group: Tensor, n_groups: int
) -> Tensor:
    return images.new_empty(n_groups, *images.shape[1:], dtype=torch.float64)


def _sum_in_torch(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, group: Tensor, n_groups: int
) -> Tensor:
    aligned = transform(images, Pose(angle, shift, mirror)).double()
    select = torch.nn.functional.one_hot(group, n_groups).double()
    return (select.T @ aligned.flatten(1)).unflatten(1, images.shape[1:])
