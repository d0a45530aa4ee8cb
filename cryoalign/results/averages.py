"""Class averages with half-sets and FRC, and the references that are made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.ctf import matched_filter
from cryoalign.images.fourier import filter_shells, low_pass_curve, shell_index, shell_sums
from cryoalign.images.geometry import pixel_grid
from cryoalign.images.masks import masked
from cryoalign.operators.aligned_sums import sum_aligned
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Pose, compose
from cryoalign.runtime.processes import ExactSum, sum_over_ranks
from cryoalign.runtime.settings import settings
from cryoalign.runtime.threads import map_in_order, workers_for

Centre = Literal["members", "mass", "none"]
TRUSTED = 4  # members of each half-set that a class needs for its own FRC to be used
DAMPING = 0.001  # of the division by the mean CTF^2, which is 0.5 at most frequencies, 0.01 at 0
LOW_PASS = 0.1  # 1/px; averages of a few particles are mostly noise at higher frequencies


@settings
class Averaging:
    """How class averages become references."""

    mask_edge: float = Field(
        default=4.0, ge=0, description="width of the mask's soft edge beyond the radius, px"
    )
    filter: Literal["wiener", "none"] = Field(
        default="wiener",
        description="wiener: by the FRC of each average's half-sets; none: no filter",
    )
    centre: Centre = Field(
        default="members",
        description="how averages are centred: members: by the mean shift of the members; mass: by "
        "the centre of mass; none: not; the members' poses change with the average",
    )


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Sums of aligned particles by class and half-set.

    Attributes:
        total: (2, k, size, size) float64 sums.
        count: (2, k) int64 numbers of members.
        power: (2, k, shells) float64 sums of the members' CTF^2, if ``total`` is of particles times
            their CTF; None if it is of particles as they are.
    """

    total: Tensor
    count: Tensor
    power: Tensor | None = None

    @property
    def sizes(self) -> Tensor:
        """(k,) numbers of members."""
        return self.count.sum(0)

    def ordered(self, order: Tensor) -> ClassSums:
        """The same sums, with the classes in the order of the indices ``order`` (k,)."""
        power = None if self.power is None else self.power[:, order]
        return ClassSums(self.total[:, order], self.count[:, order], power)

    def averages(self) -> Tensor:
        """(k, size, size) float32 averages over both halves; zero if a class is empty.

        With ``power`` they are sum(CTF * particle) / sum(CTF^2), by `corrected`; else means.
        """
        power = None if self.power is None else self.power.sum(0)
        return corrected(self.total.sum(0), self.sizes, power)

    def half_averages(self) -> Tensor:
        """(2, k, size, size) float32 averages of each half, as `averages`."""
        return corrected(self.total, self.count, self.power)

    def frc(self, mask: Tensor | None = None) -> Tensor:
        """(k, shells) FRC of the half-averages, under a mask (size, size) if given.

        The means under the mask are subtracted first, because otherwise the shape of the mask
        would correlate.
        """
        halves = self.half_averages()
        if mask is not None:
            halves = torch.stack([masked(half, mask) for half in halves])
        return frc.ring_correlation(halves[0], halves[1])


def corrected(total: Tensor, count: Tensor, power: Tensor | None) -> Tensor:
    """(..., size, size) float32 averages from sums (...), corrected for the CTF if there is one.

    `DAMPING` is added to the mean CTF^2, for frequencies where it is close to zero in all members.
    This times the filter by FRC (`class_filters`) is the Wiener filter.

    Args:
        total: (..., size, size) sums of the members, or of the members times their CTF.
        count: (...) numbers of members.
        power: (..., shells) sums of CTF^2; None takes the mean.
    """
    mean = (total / count.clamp(min=1)[..., None, None]).float()
    if power is None:
        return mean
    share = power / count.clamp(min=1)[..., None]  # mean CTF^2
    curves = (1 / (share + DAMPING)).float()
    return filter_shells(mean.flatten(0, -3), curves.flatten(0, -2)).reshape(mean.shape)


def class_sums(
    particles: PreparedParticles, pose: Pose, label: Tensor, n_classes: int,
    doing: str | None = None,
) -> ClassSums:  # fmt: skip
    """Sum prepared particles by class and half-set, over all processes.

    Args:
        particles: all particles; every process adds its share.
        pose: (n,) pose on the class average.
        label: (n,) class index.
        n_classes: number of classes.
        doing: name of this work for the progress; None reports none.
    """
    return sum_parts(
        particles.parts(doing), particles.read, pose, label, particles.half, n_classes,
        particles.size, particles.device, particles.part_of,
    )  # fmt: skip


def ctf_weighted_sums(
    particles: PreparedParticles, pose: Pose, label: Tensor, n_classes: int
) -> ClassSums:
    """Sums of particles times their CTF, and of CTF^2, by class and half-set.

    CTF^2 is averaged over shells; members are turned by many angles, so that the astigmatism of
    their sum is small.

    Args:
        particles: all particles, which have `optics`; every process adds its share.
        pose: (n,) pose on the class average.
        label: (n,) class index.
        n_classes: number of classes.
    """
    optics, size, device = particles.optics, particles.size, particles.device
    if optics is None:
        raise ValueError("these particles have no CTF: use class_sums")
    shell, shells = shell_index(size, device), size // 2 + 1
    ones = torch.ones(size, shells, dtype=torch.float64, device=device)
    components = shell_sums(ones, shell, shells + 1)[:-1]
    power = ExactSum(2 * n_classes, shells, torch.device("cpu"))

    def read(rows: Tensor) -> Tensor:
        factor, _ = matched_filter(optics[rows].to(device), size)
        spectra = torch.fft.rfft2(particles.read(rows)) * factor
        return torch.fft.irfft2(spectra, s=(size, size))

    sums = sum_parts(
        particles.parts(), read, pose, label, particles.half, n_classes, size, device,
        particles.part_of,
    )  # fmt: skip
    # Not `particles.parts`, which reads the images ahead.
    for rows in torch.arange(len(particles))[particles.own].split(particles.batch_size):
        if not len(rows):
            continue
        _, square = matched_filter(optics[rows].to(device), size)
        curves = shell_sums(square.double(), shell, shells + 1)[:, :-1] / components
        group, number = (particles.half[rows] * n_classes + label[rows]).unique(return_inverse=True)
        of_batch = torch.zeros(len(group), shells, dtype=torch.float64)
        power.add(of_batch.index_add_(0, number, curves.cpu()), group)
    return replace(sums, power=power.total().to(device).reshape(2, n_classes, shells))


def sum_parts(
    parts: Iterable[Tensor], read: Callable[[Tensor], Tensor], pose: Pose, label: Tensor,
    half: Tensor, n_classes: int, size: int, device: torch.device,
    part_of: Callable[[Tensor], int] | None = None,
) -> ClassSums:  # fmt: skip
    """Sum aligned particles by class and half-set, over all processes.

    Images are moved by bicubic interpolation and added by a matrix product in a fixed order, so
    that the result does not depend on the timing of threads. The sums of each part of the particles
    are float64, those over parts exact: they do not depend on the number of processes.

    Args:
        parts: batches of indices (b,) into the n particles, those of this process.
        read: reads the images (b, size, size) of such indices; called by several threads.
        pose: (n,) pose on the class average.
        label: (n,) class index.
        half: (n,) half-set, 0 or 1.
        n_classes: number of classes.
        size: side of the images, pixels.
        device: device of the sums.
        part_of: number of the part of the particles (`runtime.processes`) to which a batch belongs;
            the batches of a part follow each other. None: all are of one part, on one process.

    Returns:
        The sums over the parts of all processes.
    """
    exact = ExactSum(2 * n_classes, size * size, device)
    total = torch.zeros(2 * n_classes, size * size, dtype=torch.float64, device=device)
    count, here = torch.zeros(2, 2 * n_classes, dtype=torch.int64)

    def sums(rows: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        images = read(rows)
        moved = pose[rows].to(device)
        # Only the groups that occur in this batch, so that the result is small.
        group = half[rows] * n_classes + label[rows]
        there, member, members = group.unique(return_inverse=True, return_counts=True)
        return (
            part_of(rows) if part_of is not None else 0,
            there,
            members,
            sum_aligned(
                images, moved.angle, moved.shift, moved.mirror, member.to(device), len(there)
            ),
        )

    def close_part() -> None:
        groups = here.nonzero().squeeze(1)
        exact.add(total[groups.to(device)], groups.to(device))
        count.add_(here)
        total.zero_(), here.zero_()

    present = None
    for number, there, members, images in map_in_order(sums, parts, workers_for(device)):
        if number != present:
            close_part()
        present = number
        total.index_add_(0, there.to(device), images.flatten(1))
        here.index_add_(0, there, members)
    close_part()
    return ClassSums(
        exact.total().reshape(2, n_classes, size, size),
        sum_over_ranks(count).reshape(2, n_classes).to(device),
    )


def displacement(pose: Pose) -> Tensor:
    """(n, 2) position of the centre of the particle's box on the reference, pixels."""
    return (pose.linear() @ pose.shift.unsqueeze(-1)).squeeze(-1)


def centring(averages: Tensor, pose: Pose, label: Tensor, centre: Centre, mask: Tensor) -> Tensor:
    """(k, 2) shifts (x, y) in pixels that centre class averages.

    Args:
        averages: (k, size, size).
        pose: (n,) poses of the members.
        label: (n,) class index.
        centre: see `Averaging`; shifts for ``mass`` are at most a quarter of the box.
        mask: (size, size) region in which the centre of mass is computed.
    """
    k, size = averages.shape[0], averages.shape[-1]
    if centre == "none":
        return averages.new_zeros(k, 2)
    if centre == "members":
        # On the CPU, where sums have a fixed order.
        moved, label = displacement(pose).cpu(), label.cpu()
        total = moved.new_zeros(k, 2).index_add(0, label, moved)
        count = torch.bincount(label, minlength=k)
        return (-total / count.clamp(min=1)[:, None]).to(averages)
    # Density well above the background, for either contrast.
    weight = (averages * mask).abs()
    peak = weight.flatten(1).amax(1)[:, None, None]
    weight = (weight - 0.3 * peak).clamp(min=0)
    mass = weight.flatten(1).sum(1)
    grid = pixel_grid((size, size), averages)
    centroid = torch.einsum("khw,hwx->kx", weight, grid) / mass.clamp(min=1e-12)[:, None]
    return torch.where(mass[:, None] > 0, -centroid, 0.0).clamp(-size / 4, size / 4)


def move(pose: Pose, shift: Tensor) -> Pose:
    """Poses (n,) on references that were moved by shifts (n, 2), pixels."""
    zero = torch.zeros_like(pose.angle)
    return compose(pose, Pose(zero, shift.to(pose.shift), torch.zeros_like(pose.mirror)))


def filtered_averages(sums: ClassSums, averaging: Averaging, mask: Tensor) -> Tensor:
    """(k, size, size) class averages, filtered by their FRC under a mask (size, size).

    The FRC of a class with fewer than `TRUSTED` members in a half is too noisy. Such an average is
    filtered by the mean curve of the other classes or, if there are none, by a low-pass at
    `LOW_PASS`.
    """
    averages = sums.averages()
    if averaging.filter == "none":
        return averages
    trusted = sums.count.amin(0) >= TRUSTED
    return filter_shells(averages, class_filters(sums.frc(mask), trusted))


def class_filters(curves: Tensor, trusted: Tensor) -> Tensor:
    """(k, shells) filters for `filtered_averages` from FRC curves (k, shells); ``trusted`` (k,)
    marks the curves of classes with enough members."""
    size = 2 * (curves.shape[1] - 1)
    if trusted.any():
        common = curves[trusted].mean(0, keepdim=True)
        return frc.wiener_curve(torch.where(trusted[:, None], curves, common))
    return low_pass_curve(size, LOW_PASS).to(curves).expand(len(curves), -1)
