"""Particles at two resolutions, searched at the lower; and groups of them aligned anew.

The independent realignments of a group are a search of the same particles against as many
references as there are runs: their ring spectra are made once for all runs and iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked, soft_mask
from cryoalign.images.polar import Rings, reference_spectra, ring_spectra
from cryoalign.operators.aligned_sums import sum_aligned
from cryoalign.operators.correlation import correlation_peaks, unravel_place
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.results.averages import Averaging, ClassSums, centring, filtered_averages, move
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.coarse_to_fine import Screen, prepare_screen, reduce
from cryoalign.search.match import Match
from cryoalign.search.refine import refine

BATCH = 64
SEARCHES = 6  # of a realignment, at the lower resolution


@dataclass(frozen=True, eq=False)
class Level:
    """Particles at one resolution.

    Attributes:
        images: (n, size, size).
        rings: what is compared; mask: (size, size) of references.
    """

    images: Tensor
    rings: Rings
    mask: Tensor

    def take(self, members: Tensor) -> Level:
        """The same of some particles."""
        return Level(self.images[members.to(self.images.device)], self.rings, self.mask)


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Particles at two resolutions; shifts of poses are in pixels of the lower or the higher.

    Attributes:
        high, low: the particles.
        screen: grid of the search at the lower resolution.
        half: (n,) half-set of every particle, 0 or 1.
        averaging: how references are made.
    """

    high: Level
    low: Level
    screen: Screen
    half: Tensor
    averaging: Averaging

    def __len__(self) -> int:
        return len(self.half)

    def take(self, members: Tensor) -> Pyramid:
        """The same of some particles."""
        return Pyramid(
            self.high.take(members), self.low.take(members), self.screen, self.half[members],
            self.averaging,
        )  # fmt: skip


def build_pyramid(
    images: Tensor, half: Tensor, last_ring: int, max_shift: float, mirror: bool,
    averaging: Averaging,
) -> Pyramid:  # fmt: skip
    """Particles (n, size, size) of radius ``last_ring`` pixels, at both resolutions."""
    size, device = images.shape[-1], images.device
    rings = Rings(last_ring=last_ring)
    screen = prepare_screen(images.new_zeros(1, size, size), rings, max_shift, mirror)
    parts = map_in_order(
        lambda part: reduce(part, screen.size), images.split(BATCH), workers_for(device)
    )
    small = torch.cat(list(parts))
    edge = averaging.mask_edge
    high = Level(images, rings, soft_mask(size, last_ring, edge, device))
    low_mask = soft_mask(screen.size, last_ring / screen.factor, edge / screen.factor, device)
    return Pyramid(high, Level(small, screen.rings, low_mask), screen, half, averaging)


def search_low(spectra: Tensor, references: Tensor, screen: Screen) -> Match:
    """Best score and pose of every particle on every reference, at the lower resolution.

    Args:
        spectra: (n, s, r, m) of the particles at the screen's shifts.
        references: (k, t, t).
    """
    score, place = correlation_peaks(
        spectra, reference_spectra(references, screen.rings), screen.mirror
    )
    at = unravel_place(place, screen.rings.n_angles, screen.mirror)
    angle = wrap_degrees(at.angle * (360.0 / screen.rings.n_angles)).to(score.dtype)
    return Match(score, Pose(angle, screen.shifts[at.shift], at.mirror.bool()))


def match_low(particles: Pyramid, references: Tensor) -> Match:
    """`search_low` of all particles, on the CPU: scores and poses (n, k)."""
    screen = particles.screen

    def matched(part: Tensor) -> Match:
        found = search_low(ring_spectra(part, screen.rings, screen.shifts), references, screen)
        return Match(found.score.cpu(), found.pose.to("cpu"))

    images = particles.low.images
    parts = list(map_in_order(matched, images.split(BATCH), workers_for(images.device)))
    return Match(torch.cat([p.score for p in parts]), Pose.cat([p.pose for p in parts]))


def refine_at(level: Level, references: Tensor, label: Tensor, pose: Pose) -> Pose:
    """Poses (n,) refined on their references, on the CPU."""

    def refined(rows: Tensor) -> Pose:
        images = level.images[rows.to(level.images.device)]
        where = images.device
        return refine(images, references, label[rows].to(where), pose[rows].to(where), level.rings)[
            0
        ].to("cpu")

    parts = torch.arange(len(label)).split(BATCH)
    return Pose.cat(list(map_in_order(refined, parts, workers_for(level.images.device))))


def scores_at(level: Level, references: Tensor, label: Tensor, pose: Pose) -> Tensor:
    """(n,) correlation coefficients with references at poses (n,), on the CPU."""

    def scored(rows: Tensor) -> Tensor:
        images = level.images[rows.to(level.images.device)]
        where = images.device
        return refine(
            images, references, label[rows].to(where), pose[rows].to(where), level.rings, steps=0
        )[1].cpu()

    parts = torch.arange(len(label)).split(BATCH)
    return torch.cat(list(map_in_order(scored, parts, workers_for(level.images.device))))


def references_of(
    level: Level, half: Tensor, label: Tensor, pose: Pose, k: int, averaging: Averaging
) -> tuple[Tensor, Pose]:
    """Filtered, centred and masked class averages (k, size, size), and the poses on them.

    Args:
        half, label, pose: (n,) of the level's particles; a label of -1 has no part in them.
    """
    images, size = level.images, level.images.shape[-1]
    total = torch.zeros(2 * k, size, size, dtype=torch.float64, device=images.device)
    group = half * k + label
    used = (label >= 0).nonzero().squeeze(1)

    def summed(rows: Tensor) -> tuple[Tensor, Tensor]:
        there, member = group[rows].unique(return_inverse=True)
        moved, some = pose[rows].to(images.device), images[rows.to(images.device)]
        return there, sum_aligned(
            some, moved.angle, moved.shift, moved.mirror, member.to(images.device), len(there)
        )

    parts = [rows for rows in used.split(BATCH) if len(rows)]  # none where no label is used
    for there, part in map_in_order(summed, parts, workers_for(images.device)):
        total.index_add_(0, there.to(images.device), part)
    count = torch.bincount(group[used], minlength=2 * k).to(images.device)
    sums = ClassSums(total.view(2, k, size, size), count.view(2, k))
    references = filtered_averages(sums, averaging, level.mask)
    shift = centring(sums.averages(), pose[used], label[used], averaging.centre, level.mask)
    references = transform(references, move(Pose.identity(k, device=images.device), shift))
    moved = move(pose, shift.cpu()[label.clamp(min=0)])
    return masked(references, level.mask), moved


def scaled(pose: Pose, factor: float) -> Pose:
    """Poses in pixels of which ``factor`` make one of theirs."""
    return Pose(pose.angle, pose.shift * factor, pose.mirror)


def random_poses(n: int, mirror: bool, generator: torch.Generator) -> Pose:
    """(n,) poses of any angle, and hand if mirrored ones are tried; no shift."""
    angle = torch.rand(n, generator=generator) * 360 - 180
    hand = torch.rand(n, generator=generator) < 0.5
    return Pose(angle, torch.zeros(n, 2), hand if mirror else torch.zeros_like(hand))


def realign(group: Pyramid, start: Pose) -> Pose:
    """Align a group's particles without references, once from every start.

    Args:
        group: n particles.
        start: (l, n) poses, of l runs; shifts in pixels of the lower resolution.

    Returns:
        (l, n) poses, in pixels of the higher resolution.
    """
    runs, n = start.angle.shape
    run = torch.arange(runs).repeat_interleave(n)  # of every copy of a particle
    low, averaging = repeated(group.low, runs), group.averaging
    half = group.half.repeat(runs)
    flat = Pose(start.angle.flatten(), start.shift.flatten(0, 1), start.mirror.flatten())
    spectra = ring_spectra(group.low.images, group.screen.rings, group.screen.shifts)
    for _ in range(SEARCHES):
        references, _ = references_of(low, half, run, flat, runs, averaging)
        pose = search_low(spectra, references, group.screen).pose.to("cpu")  # (n, runs)
        flat = Pose(
            pose.angle.T.flatten(),
            pose.shift.transpose(0, 1).flatten(0, 1),
            pose.mirror.T.flatten(),
        )
    for level, factor in ((low, 1.0), (repeated(group.high, runs), group.screen.factor)):
        flat = scaled(flat, factor)
        references, flat = references_of(level, half, run, flat, runs, averaging)
        flat = refine_at(level, references, run, flat)
    return Pose(flat.angle.view(runs, n), flat.shift.view(runs, n, 2), flat.mirror.view(runs, n))


def repeated(level: Level, times: int) -> Level:
    """All particles, over and over."""
    return Level(level.images.repeat(times, 1, 1), level.rings, level.mask)


def realign_groups(
    particles: Pyramid, label: Tensor, k: int, runs: int, generator: torch.Generator,
    tell: Callable[[int], None] | None = None,
) -> Pose:  # fmt: skip
    """Independent realignments of every class's members: (runs, n) poses, on the CPU.

    Args:
        label: (n,) class index.
        runs: how many, each from random angles and hands.
        tell: given the number of classes done, now and then.
    """
    n = len(label)
    start = random_poses(runs * n, particles.screen.mirror, generator)
    start = Pose(
        start.angle.view(runs, n), start.shift.view(runs, n, 2), start.mirror.view(runs, n)
    )
    groups = [(label == c).nonzero().squeeze(1) for c in range(k)]

    def aligned(members: Tensor) -> Pose:
        return realign(particles.take(members), start[:, members])

    angle, shift, mirror = start.angle.clone(), start.shift.clone(), start.mirror.clone()
    groups = [members for members in groups if len(members)]
    workers = workers_for(particles.low.images.device)
    for done, (members, found) in enumerate(
        zip(groups, map_in_order(aligned, groups, workers), strict=True)
    ):
        angle[:, members], shift[:, members] = found.angle, found.shift
        mirror[:, members] = found.mirror
        if tell is not None:
            tell(done + 1)
    return Pose(angle, shift, mirror)
