"""Class averages in half-sets, what they resolve, and the references made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.fourier import filter_shells, low_pass_curve
from cryoalign.images.geometry import pixel_grid
from cryoalign.images.masks import masked
from cryoalign.operators.aligned_sums import sum_aligned
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Pose, compose
from cryoalign.runtime.processes import sum_over_ranks
from cryoalign.runtime.settings import settings
from cryoalign.runtime.threads import map_in_order, workers_for

Centre = Literal["members", "mass", "none"]
TRUSTED = 4  # members of each half from which a class's own FRC counts
LOW_PASS = 0.1  # 1/px: what a few noisy particles have to say


@settings
class Averaging:
    """How class averages become references."""

    mask_edge: float = Field(
        default=4.0, ge=0, description="width of the mask's soft edge beyond the radius, px"
    )
    filter: Literal["wiener", "none"] = Field(
        default="wiener", description="wiener: each class by its own half-set FRC; none"
    )
    centre: Centre = Field(
        default="members",
        description="members: by the mean shift of the members' boxes; mass: by the centre of "
        "mass; none; members' poses are moved along",
    )


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Sums of aligned particles by class and half-set.

    Attributes:
        total: (2, k, size, size) float64.
        count: (2, k) int64 members.
    """

    total: Tensor
    count: Tensor

    @property
    def sizes(self) -> Tensor:
        """(k,) members."""
        return self.count.sum(0)

    def ordered(self, order: Tensor) -> ClassSums:
        """The sums of the same classes in another order (k,)."""
        return ClassSums(self.total[:, order], self.count[:, order])

    def averages(self) -> Tensor:
        """(k, size, size) float32 means over both halves; zero where a class is empty."""
        return _mean(self.total.sum(0), self.sizes)

    def half_averages(self) -> Tensor:
        """(2, k, size, size) float32 means of each half."""
        return _mean(self.total, self.count)

    def frc(self, mask: Tensor | None = None) -> Tensor:
        """(k, shells) FRC of the half-averages, under a mask (size, size) if given.

        Their means under the mask are removed before: the mask itself must not correlate.
        """
        halves = self.half_averages()
        if mask is not None:
            halves = torch.stack([masked(half, mask) for half in halves])
        return frc.ring_correlation(halves[0], halves[1])


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return (total / count.clamp(min=1)[..., None, None]).float()


def class_sums(
    particles: PreparedParticles,
    pose: Pose,
    label: Tensor,
    n_classes: int,
    doing: str | None = None,
) -> ClassSums:
    """Sum prepared particles by class and half-set, over all processes.

    Args:
        particles: all of them; every process adds its share.
        pose: (n,); label: (n,) class index.
        n_classes: classes to sum.
        doing: reported as progress; None is silent.
    """
    return sum_parts(
        particles.parts(doing), particles.read, pose, label, particles.half, n_classes,
        particles.size, particles.device,
    )  # fmt: skip


def sum_parts(
    parts: Iterable[Tensor],
    read: Callable[[Tensor], Tensor],
    pose: Pose,
    label: Tensor,
    half: Tensor,
    n_classes: int,
    size: int,
    device: torch.device,
) -> ClassSums:
    """Sum aligned particles by class and half-set, over all processes.

    Images are moved by bicubic interpolation and added by a matrix product in a fixed order: the
    result does not depend on thread timing. Sums are float64, whose rounding is far below what
    the float32 averages keep: neither batch size nor the number of processes shows in them.

    Args:
        parts: rows (b,) into the following tensors, a batch at a time.
        read: makes images (b, size, size) of such rows; called by several threads.
        pose: (n,).
        label: (n,) class index.
        half: (n,) 0 or 1.
        n_classes, size, device: of the sums.

    Returns:
        The sums over every process's parts.
    """
    total = torch.zeros(2 * n_classes, size * size, dtype=torch.float64, device=device)
    count = torch.zeros(2 * n_classes, dtype=torch.int64, device=device)

    def sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = read(rows)
        moved = pose[rows].to(device)
        # Only the groups that are there: a small result whatever their number is.
        group = half[rows] * n_classes + label[rows]
        there, member, members = group.unique(return_inverse=True, return_counts=True)
        return (
            there,
            members,
            sum_aligned(
                images, moved.angle, moved.shift, moved.mirror, member.to(device), len(there)
            ),
        )

    for there, members, part in map_in_order(sums, parts, workers_for(device)):
        there = there.to(device)
        total.index_add_(0, there, part.flatten(1))
        count.index_add_(0, there, members.to(device))
    return ClassSums(
        sum_over_ranks(total).reshape(2, n_classes, size, size),
        sum_over_ranks(count).reshape(2, n_classes),
    )


def displacement(pose: Pose) -> Tensor:
    """(n, 2) where a pose puts the centre of the particle's box, on the reference."""
    return (pose.linear() @ pose.shift.unsqueeze(-1)).squeeze(-1)


def centring(averages: Tensor, pose: Pose, label: Tensor, centre: Centre, mask: Tensor) -> Tensor:
    """(k, 2) the shifts that centre class averages.

    Args:
        averages: (k, size, size).
        pose: (n,) of the members, label: (n,) their class.
        centre: see `Averaging`.
        mask: (size, size) where mass is looked for.

    Returns:
        xy pixels to move each average by; at most a quarter of the box for `mass`.
    """
    k, size = averages.shape[0], averages.shape[-1]
    if centre == "none":
        return averages.new_zeros(k, 2)
    if centre == "members":
        # On the CPU, where sums have one order; particles' poses are there anyway.
        moved, label = displacement(pose).cpu(), label.cpu()
        total = moved.new_zeros(k, 2).index_add(0, label, moved)
        count = torch.bincount(label, minlength=k)
        return (-total / count.clamp(min=1)[:, None]).to(averages)
    # Density above the background's spread, whichever way round the contrast is.
    weight = (averages * mask).abs()
    peak = weight.flatten(1).amax(1)[:, None, None]
    weight = (weight - 0.3 * peak).clamp(min=0)
    mass = weight.flatten(1).sum(1)
    grid = pixel_grid((size, size), averages)
    centroid = torch.einsum("khw,hwx->kx", weight, grid) / mass.clamp(min=1e-12)[:, None]
    return torch.where(mass[:, None] > 0, -centroid, 0.0).clamp(-size / 4, size / 4)


def move(pose: Pose, shift: Tensor) -> Pose:
    """Poses followed by a shift (n, 2) of the reference: what members of a moved average need."""
    zero = torch.zeros_like(pose.angle)
    return compose(pose, Pose(zero, shift.to(pose.shift), torch.zeros_like(pose.mirror)))


def filtered_averages(sums: ClassSums, averaging: Averaging, mask: Tensor) -> Tensor:
    """(k, size, size) class averages weighted by their FRC under a mask (size, size).

    The FRC of a class with fewer than `TRUSTED` members in either half says little (with none in
    one of them, nothing): it is filtered by the mean curve of the others, or, if there are none,
    by a low-pass at `LOW_PASS`.
    """
    averages = sums.averages()
    if averaging.filter == "none":
        return averages
    trusted = sums.count.amin(0) >= TRUSTED
    return filter_shells(averages, class_filters(sums.frc(mask), trusted))


def class_filters(curves: Tensor, trusted: Tensor) -> Tensor:
    """(k, shells) Wiener filters from the FRC curves (k, shells) of which some are trusted (k,)."""
    size = 2 * (curves.shape[1] - 1)
    if trusted.any():
        common = curves[trusted].mean(0, keepdim=True)
        return frc.wiener_curve(torch.where(trusted[:, None], curves, common))
    return low_pass_curve(size, LOW_PASS).to(curves).expand(len(curves), -1)
