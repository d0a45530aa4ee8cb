"""Parts that the methods share: first references, aligning all particles, new references."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells, fourier_resize, low_pass_curve
from cryoalign.images.geometry import transform, translate
from cryoalign.images.masks import masked, soft_mask
from cryoalign.images.polar import Rings
from cryoalign.io.formats import image_pixel_size, read_images
from cryoalign.methods.state import State
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Found, Pose, pixel_error
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import (
    LOW_PASS,
    Averaging,
    ClassSums,
    centring,
    class_sums,
    filtered_averages,
    move,
)
from cryoalign.results.evidence import Scope, trials_of
from cryoalign.results.quality import Quality, conclude
from cryoalign.runtime.arrays import Array, as_tensor
from cryoalign.runtime.processes import gather_over_ranks, same_on_all_ranks
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.match import Target, best_poses
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search

Outcome = TypeVar("Outcome")
SEEDINGS = ("random",)
"""Ways to choose first references from the particles."""


def over_batches(
    particles: PreparedParticles, function: Callable[[Tensor], Outcome]
) -> list[Outcome]:
    """Results of a function of the members (b,) of every batch of this process, on all cores."""
    return list(map_in_order(function, particles.parts("align"), workers_for(particles.device)))


def find_all(particles: PreparedParticles, finder: Callable[[Tensor], Found]) -> Found:
    """Class, pose and score of all particles, found batch by batch on all processes.

    Args:
        particles: all particles; every process works on its share.
        finder: gives the `Found` of the particles with some indices (b,).

    Returns:
        A `Found` (n,) on the CPU of every process.
    """
    parts = over_batches(particles, lambda members: finder(members).to_table())
    none = torch.zeros(0, 6, dtype=torch.float64, device=particles.device)
    return Found.from_table(gather_over_ranks(torch.cat([none, *parts]).cpu()))


def refine_on_averages(
    particles: PreparedParticles, label: Tensor, pose: Pose, k: int, averaging: Averaging,
    mask: Tensor, rings: Rings,
) -> tuple[Found, Tensor]:  # fmt: skip
    """Refine poses on the averages that the particles themselves make.

    Args:
        particles: n particles.
        label: (n,) class index.
        pose: (n,) poses to start from.
        k: number of classes.
        averaging: how averages become references.
        mask: (size, size) mask of the references.
        rings: the disc that is compared.

    Returns:
        A `Found` (n,) on the CPU of every process, and the references (k, size, size).
    """
    device = particles.device
    sums = class_sums(particles, pose, label, k)
    references = masked(filtered_averages(sums, averaging, mask), mask)

    def refined(rows: Tensor) -> Found:
        own, start = label[rows].to(device), pose[rows].to(device)
        return Found(own, *refine(particles.read(rows), references, own, start, rings))

    return find_all(particles, refined), references


def random_poses(n: int, mirror: bool, generator: torch.Generator) -> Pose:
    """(n,) poses with random angles, no shift, and with random hands if ``mirror``."""
    angle = torch.rand(n, generator=generator) * 360 - 180
    hand = torch.rand(n, generator=generator) < 0.5
    return Pose(angle, torch.zeros(n, 2), hand if mirror else torch.zeros_like(hand))


@dataclass(frozen=True)
class AlignAndAverage:
    """How particles are aligned to references and averaged into new ones.

    Attributes:
        particles: all particles.
        averaging: how averages become references.
        search: which poses are tried.
        rings: the disc that is compared.
    """

    particles: PreparedParticles
    averaging: Averaging
    search: Search
    rings: Rings

    def mask(self) -> Tensor:
        """(size, size) soft mask of the references."""
        particles, edge = self.particles, self.averaging.mask_edge
        return soft_mask(particles.size, self.rings.last_ring, edge, particles.device)

    def align(self, target: Target, about: Tensor | None = None) -> Found:
        """Every particle's best reference, pose and score.

        Args:
            target: `search.match.prepare_target` of the references.
            about: (n, 2) centre of each particle's trial shifts, in whole pixels; None is zero.
        """
        if about is None:
            return find_all(
                self.particles, lambda part: best_poses(self.particles.read(part), target)
            )

        def about_own(members: Tensor) -> Found:
            images = self.particles.read(members)
            own = about[members].to(images.device)
            label, pose, score = best_poses(translate(images, own), target)
            return Found(label, Pose(pose.angle, pose.shift + own, pose.mirror), score)

        return find_all(self.particles, about_own)

    def sum_classes(self, label: Tensor, pose: Pose, k: int) -> ClassSums:
        """Sums of the aligned particles by class and half-set, for k classes."""
        return class_sums(self.particles, pose, label, k, doing="average")

    def renew(
        self, sums: ClassSums, label: Tensor, pose: Pose, centre: bool
    ) -> tuple[Tensor, Pose]:
        """New references from class sums.

        Args:
            sums: sums of the k classes.
            label: (n,) class index.
            pose: (n,) poses from which the sums were made.
            centre: whether averages are centred, and their members' poses changed accordingly.

        Returns:
            References (k, size, size), and the poses (n,).
        """
        mask = self.mask()
        references = filtered_averages(sums, self.averaging, mask)
        if centre:
            device = self.particles.device
            there = pose.to(device)  # arithmetic on all poses is fast on a GPU
            shift = centring(sums.averages(), there, label, self.averaging.centre, mask)
            still = Pose.identity(len(references), device=device)
            references = transform(references, move(still, shift))
            pose = move(there, shift[label.to(device)]).to("cpu")
        return masked(references, mask), pose

    def change(self, before: Pose, after: Pose, first: bool) -> dict[str, float]:
        """How much poses changed, for the history.

        Args:
            before, after: (n,) poses.
            first: whether there were no poses before; the numbers are then NaN.

        Returns:
            ``pose_change_px``, the median distance in pixels at the last ring of particles with
            the same hand, and ``hand_changed``, the share of particles with another hand.
        """
        device = self.particles.device
        moved = pixel_error(after.to(device), before.to(device), self.rings.last_ring).sqrt().cpu()
        same = before.mirror == after.mirror
        distance = float(moved[same].median()) if same.any() else math.inf
        changed = float((~same).double().mean())
        figures = {"pose_change_px": distance, "hand_changed": changed}
        return dict.fromkeys(figures, math.nan) if first else figures

    def result(
        self, state: State, quality: Quality | None, by_class: pd.DataFrame | None = None
    ) -> Alignment:
        """The `Alignment` of the last state; its averages are made from its poses.

        Args:
            state: the last state.
            quality: what happens to junk particles.
            by_class: k rows of further columns about the classes.
        """
        found, k = state.found, len(state["references"])
        sums = state.unsaved.get("sums") or self.sum_classes(found.label, found.pose, k)
        search = self.search
        trials = trials_of(k, search.max_shift, self.rings.last_ring, search.mirror)
        scope = Scope(self.mask(), self.rings, trials)
        return conclude(
            self.particles, found, sums, scope, state.history, quality, by_class=by_class
        )


def seed_references(particles: PreparedParticles, how: str, n_classes: int, seed: int) -> Tensor:
    """(k, size, size) first references chosen from the particles.

    Args:
        particles: all particles.
        how: one of `SEEDINGS`; ``random`` takes random particles and low-passes them.
        n_classes: number of references.
        seed: seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(particles), generator=generator)[:n_classes]
    images = particles.read_shared(same_on_all_ranks(chosen))
    return filter_shells(images, low_pass_curve(particles.size, LOW_PASS).to(images.device))


def given_references(particles: PreparedParticles, references: Array | str | Path) -> Tensor:
    """(k, size, size) references from an array or a file, resized to the prepared particles.

    Raises:
        ValueError: references that do not fit the particles, or with NaN or infinite pixels.
    """
    stack = particles.stack
    if isinstance(references, str | Path):
        images, pixel_size = read_images(references), image_pixel_size(references)
    else:
        images, pixel_size = as_tensor(references).detach(), None
    boxes = {stack.shape[0]: stack.pixel_size, particles.size: particles.pixel_size}
    if images.ndim != 3 or images.shape[-2] != images.shape[-1] or images.shape[-1] not in boxes:
        raise ValueError(
            f"references {tuple(images.shape)} do not fit particles of {stack.shape[0]} "
            f"x {stack.shape[1]} px: give a stack (k, h, w) with the box and pixel size of the "
            "particles (or of images.box)"
        )
    expected = boxes[images.shape[-1]]
    if pixel_size and expected and abs(pixel_size - expected) > 0.01 * expected:
        raise ValueError(
            f"references {references} have {pixel_size:.4g} Å per pixel, but the particles have "
            f"{expected:.4g} Å: rescale them, or correct the voxel size in their header"
        )
    if not torch.isfinite(images).all():
        raise ValueError("references contain NaN or infinite pixels: leave those images out")
    return fourier_resize(images.float().to(particles.device), particles.size)
