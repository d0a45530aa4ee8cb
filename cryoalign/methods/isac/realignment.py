"""Independent realignments of the members of a class, on images at two resolutions.

All realignments (runs) of a class compare the same particles, each with the reference of its run,
so that the particles' ring spectra are computed once for all runs and iterations.

Every process has the shrunk images of all particles. Processes share searches of all particles by
batches, and realignments by classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoalign.images.fourier import fourier_shrink
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked, soft_mask
from cryoalign.images.polar import Rings, reference_spectra, ring_spectra
from cryoalign.methods.references import random_poses
from cryoalign.operators.aligned_sums import sum_aligned
from cryoalign.operators.correlation import correlation_peaks
from cryoalign.pose import Pose
from cryoalign.results.averages import Averaging, ClassSums, centring, filtered_averages, move
from cryoalign.runtime.processes import ExactSum, gather_over_ranks, shard
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.coarse_to_fine import CoarseReferences, prepare_coarse
from cryoalign.search.match import Match
from cryoalign.search.refine import grid_pose, refine

BATCH = 64  # particles that are worked on at a time; limits the memory
SEARCHES = 6  # iterations of a realignment at the lower resolution, before the refinement


@dataclass(frozen=True, eq=False)
class Level:
    """Particles at one resolution.

    Attributes:
        images: (n, size, size).
        rings: rings on which images are compared.
        mask: (size, size) mask of references.
    """

    images: Tensor
    rings: Rings
    mask: Tensor

    def take(self, members: Tensor) -> Level:
        """The images with indices ``members`` (b,)."""
        return Level(self.images[members.to(self.images.device)], self.rings, self.mask)


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Particles at two resolutions.

    Attributes:
        high, low: images at the higher and the lower resolution.
        coarse: rings and trial shifts of the search at the lower resolution.
        half: (n,) half-set of every particle, 0 or 1.
        averaging: how averages become references.
    """

    high: Level
    low: Level
    coarse: CoarseReferences
    half: Tensor
    averaging: Averaging

    def __len__(self) -> int:
        return len(self.half)

    def take(self, members: Tensor) -> Pyramid:
        """The particles with indices ``members`` (b,)."""
        return Pyramid(
            self.high.take(members), self.low.take(members), self.coarse, self.half[members],
            self.averaging,
        )  # fmt: skip


def build_pyramid(
    images: Tensor, half: Tensor, last_ring: int, max_shift: float, mirror: bool,
    averaging: Averaging,
) -> Pyramid:  # fmt: skip
    """Make the images of the lower resolution, and the rings and masks of both.

    Args:
        images: (n, size, size) at the higher resolution.
        half: (n,) half-set, 0 or 1.
        last_ring: radius of the particle, pixels of ``images``.
        max_shift: largest trial shift, pixels of ``images``.
        mirror: whether mirrored particles are tried.
        averaging: how averages become references.
    """
    size, device = images.shape[-1], images.device
    rings = Rings(last_ring=last_ring)
    coarse = prepare_coarse(images.new_zeros(1, size, size), rings, max_shift, mirror)
    parts = map_in_order(
        lambda part: fourier_shrink(part, coarse.size), images.split(BATCH), workers_for(device)
    )
    small = torch.cat(list(parts))
    edge = averaging.mask_edge
    high = Level(images, rings, soft_mask(size, last_ring, edge, device))
    low_mask = soft_mask(coarse.size, last_ring / coarse.factor, edge / coarse.factor, device)
    return Pyramid(high, Level(small, coarse.rings, low_mask), coarse, half, averaging)


def search_low(spectra: Tensor, references: Tensor, coarse: CoarseReferences) -> Match:
    """Best score and pose of every particle on every reference, at the lower resolution.

    Args:
        spectra: (n, s, r, m) `ring_spectra` of the particles at the trial shifts.
        references: (k, size, size) at the lower resolution.
        coarse: rings and trial shifts.
    """
    theirs = reference_spectra(references, coarse.rings)
    score, place = correlation_peaks(spectra, theirs, coarse.mirror)
    return Match(score, grid_pose(place, coarse.shifts, coarse.rings, coarse.mirror))


def match_low(particles: Pyramid, references: Tensor) -> Match:
    """`search_low` of all particles, in batches of all processes: scores and poses (n, k) on the
    CPU."""
    coarse, images, k = particles.coarse, particles.low.images, len(references)

    def matched(part: Tensor) -> Match:
        found = search_low(ring_spectra(part, coarse.rings, coarse.shifts), references, coarse)
        return Match(found.score.cpu(), found.pose.to("cpu"))

    own = images[shard(len(images), BATCH)]
    found = [Match(torch.zeros(0, k), Pose.identity(0, k))]
    found += map_in_order(matched, filter(len, own.split(BATCH)), workers_for(images.device))
    poses = pose_over_ranks(Pose.cat([each.pose for each in found]))
    return Match(gather_over_ranks(torch.cat([each.score for each in found])), poses)


def pose_over_ranks(pose: Pose) -> Pose:
    """The poses of all processes, joined along the first axis."""
    return Pose(*(gather_over_ranks(each) for each in (pose.angle, pose.shift, pose.mirror)))


def refine_at(
    level: Level, references: Tensor, label: Tensor, pose: Pose, shared: bool = False
) -> Pose:
    """(n,) poses refined on the references with indices ``label`` (n,), on the CPU. If ``shared``,
    all processes have these particles and share the work."""
    return _refined(level, references, label, pose, 2, shared)[0]


def scores_at(level: Level, references: Tensor, label: Tensor, pose: Pose) -> Tensor:
    """(n,) correlation coefficients at given poses (n,) with the references with indices ``label``
    (n,), on the CPU. All processes have these particles and share the work."""
    return _refined(level, references, label, pose, 0, shared=True)[1]


def _refined(
    level: Level, references: Tensor, label: Tensor, pose: Pose, steps: int, shared: bool
) -> tuple[Pose, Tensor]:
    """`search.refine.refine` of all particles in batches: poses and scores (n,) on the CPU."""
    device = level.images.device

    def refined(rows: Tensor) -> tuple[Pose, Tensor]:
        images, start = level.images[rows.to(device)], pose[rows].to(device)
        found, score = refine(images, references, label[rows].to(device), start, level.rings, steps)
        return found.to("cpu"), score.cpu()

    batches = _batches(torch.arange(len(label)), shared)
    found = [(pose[:0].to("cpu"), torch.zeros(0))]
    found += map_in_order(refined, batches, workers_for(device))
    poses, scores = Pose.cat([each for each, _ in found]), torch.cat([each for _, each in found])
    return (pose_over_ranks(poses), gather_over_ranks(scores)) if shared else (poses, scores)


def _batches(rows: Tensor, shared: bool) -> list[Tensor]:
    """Batches of particles with indices ``rows`` (b,): all, or those of this process if the
    processes share them."""
    own = rows[shard(len(rows), BATCH)] if shared else rows
    return [batch for batch in own.split(BATCH) if len(batch)]  # an empty tensor has one part


def references_of(
    level: Level, half: Tensor, label: Tensor, pose: Pose, k: int, averaging: Averaging,
    shared: bool = False,
) -> tuple[Tensor, Pose]:  # fmt: skip
    """Filtered, centred and masked class averages (k, size, size), and poses (n,) on them.

    Args:
        level: images of n particles.
        half: (n,) half-set, 0 or 1.
        label: (n,) class index; -1 leaves a particle out.
        pose: (n,), in pixels of ``level``.
        k: number of classes.
        averaging: how averages become references.
        shared: whether all processes have these particles and share the work.
    """
    images, size = level.images, level.images.shape[-1]
    total = torch.zeros(2 * k, size**2, dtype=torch.float64, device=images.device)
    exact = ExactSum(2 * k, size**2, images.device) if shared else None
    group = half * k + label
    used = (label >= 0).nonzero().squeeze(1)

    def summed(rows: Tensor) -> tuple[Tensor, Tensor]:
        there, member = group[rows].unique(return_inverse=True)
        moved, some = pose[rows].to(images.device), images[rows.to(images.device)]
        return there, sum_aligned(
            some, moved.angle, moved.shift, moved.mirror, member.to(images.device), len(there)
        )

    batches = _batches(used, shared)
    for there, part in map_in_order(summed, batches, workers_for(images.device)):
        there, part = there.to(images.device), part.flatten(1)
        if exact is None:
            total.index_add_(0, there, part)
        else:
            exact.add(part, there)
    total = total if exact is None else exact.total()
    count = torch.bincount(group[used], minlength=2 * k).to(images.device)
    sums = ClassSums(total.view(2, k, size, size), count.view(2, k))
    references = filtered_averages(sums, averaging, level.mask)
    shift = centring(sums.averages(), pose[used], label[used], averaging.centre, level.mask)
    references = transform(references, move(Pose.identity(k, device=images.device), shift))
    moved = move(pose, shift.cpu()[label.clamp(min=0)])
    return masked(references, level.mask), moved


def realign(group: Pyramid, start: Pose) -> Pose:
    """Align the particles of a class to their own average, independently in every run.

    Args:
        group: the n members of the class.
        start: (l, n) poses of l runs, in pixels of the lower resolution.

    Returns:
        (l, n) poses, in pixels of the higher resolution.
    """
    runs, n = start.angle.shape
    run = torch.arange(runs).repeat_interleave(n)  # (l n,) run of each copy of each particle
    low, averaging = repeated(group.low, runs), group.averaging
    half = group.half.repeat(runs)
    flat = start.reshape(runs * n)
    spectra = ring_spectra(group.low.images, group.coarse.rings, group.coarse.shifts)
    for _ in range(SEARCHES):
        references, _ = references_of(low, half, run, flat, runs, averaging)
        pose = search_low(spectra, references, group.coarse).pose.to("cpu")  # (n, runs)
        flat = Pose.cat([pose[:, i] for i in range(runs)])
    for level, factor in ((low, 1.0), (repeated(group.high, runs), group.coarse.factor)):
        references, flat = references_of(level, half, run, flat.scaled(factor), runs, averaging)
        flat = refine_at(level, references, run, flat)
    return flat.reshape(runs, n)


def repeated(level: Level, times: int) -> Level:
    """``times`` copies of all particles: the whole set, then the whole set again."""
    return Level(level.images.repeat(times, 1, 1), level.rings, level.mask)


def realign_groups(
    particles: Pyramid, label: Tensor, k: int, runs: int, generator: torch.Generator,
    on_class: Callable[[int], None] | None = None,
) -> Pose:  # fmt: skip
    """Independent realignments of the members of every class: (runs, n) poses, on the CPU. The
    processes share the classes.

    Args:
        particles: n particles.
        label: (n,) class index.
        k: number of classes.
        runs: number of realignments, each from random angles and hands.
        generator: random numbers.
        on_class: called with the number of classes that this process has done.
    """
    n = len(label)
    start = random_poses(runs * n, particles.coarse.mirror, generator).reshape(runs, n)
    groups = [(label == c).nonzero().squeeze(1) for c in range(k)]

    def aligned(members: Tensor) -> Pose:
        return realign(particles.take(members), start[:, members])

    angle, shift, mirror = start.angle.clone(), start.shift.clone(), start.mirror.clone()
    groups = [members for members in groups if len(members)]
    if not groups:
        return start
    workers = workers_for(particles.low.images.device)
    found = [Pose.identity(0, runs)]
    for each in map_in_order(aligned, groups[shard(len(groups))], workers):
        found.append(Pose(each.angle.T, each.shift.transpose(0, 1), each.mirror.T))
        if on_class is not None:
            on_class(len(found) - 1)
    members, whole = torch.cat(groups), pose_over_ranks(Pose.cat(found))  # (n, runs)
    angle[:, members], shift[:, members] = whole.angle.T, whole.shift.transpose(0, 1)
    mirror[:, members] = whole.mirror.T
    return Pose(angle, shift, mirror)
