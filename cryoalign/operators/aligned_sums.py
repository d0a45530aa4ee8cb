"""The operator that moves particles by their poses and sums them by group."""

from typing import Any

import torch
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.registration import operator
from cryoalign.pose import Pose


def _fake(images: Tensor, *others: Any) -> Tensor:
    return images.new_empty(others[-1], *images.shape[1:], dtype=torch.float64)


@operator(fake=_fake, cuda=kernel_images.sum_aligned)
def sum_aligned(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, group: Tensor, n_groups: int
) -> Tensor:
    """Move images by their poses and sum them by group; a group without members sums to zero.

    Args:
        images: (n, h, w) real.
        angle: (n,) rotation of each image, degrees. See `geometry.transform` for the convention.
        shift: (n, 2) translation of each image in x and y, pixels.
        mirror: (n,) bool, whether each image is mirrored.
        group: (n,) int64, the group of each image, from 0 to n_groups - 1.
        n_groups: number of groups.

    Returns:
        (n_groups, h, w) float64. The result does not depend on the order in which threads run.
    """
    aligned = transform(images, Pose(angle, shift, mirror)).double()
    select = torch.nn.functional.one_hot(group, n_groups).double()
    return (select.T @ aligned.flatten(1)).unflatten(1, images.shape[1:])
