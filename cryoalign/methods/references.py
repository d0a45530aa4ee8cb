"""References of `mra` and `rfa`: the first ones, and the averages that they become."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from cryoalign.search.settings import Search

SEEDINGS = ("random",)
"""Ways to choose first references from the particles."""


def find_all(particles: PreparedParticles, finder: Callable[[Tensor], Found]) -> Found:
    """What ``finder`` makes of the particles, batch by batch and over all processes.

    Args:
        particles: all of them; every process works on its share.
        finder: makes a `Found` of the particles with some indices (b,).

    Returns:
        A `Found` (n,) on the CPU of every process.
    """
    device = particles.device
    parts = map_in_order(
        lambda members: finder(members).to_table(), particles.parts("align"), workers_for(device)
    )
    none = torch.zeros(0, 6, dtype=torch.float64, device=device)
    return Found.from_table(gather_over_ranks(torch.cat([none, *parts]).cpu()))


@dataclass(frozen=True)
class AlignAndAverage:
    """How particles are aligned to references and averaged into new ones.

    Attributes:
        particles: all of them.
        averaging: how averages become references.
        search: what poses are tried.
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
            target: `search.match.prepare` of the references.
            about: (n, 2) whole pixels that each particle's trial shifts are taken about; None is
                zero.
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
        """Sums of the aligned particles by class and half-set."""
        return class_sums(self.particles, pose, label, k, doing="average")

    def renew(
        self, sums: ClassSums, label: Tensor, pose: Pose, centre: bool
    ) -> tuple[Tensor, Pose]:
        """New references from class sums.

        Args:
            sums: of the classes; label: (n,) and pose: (n,) of their members.
            centre: whether averages are centred, and their members' poses moved along.

        Returns:
            References (k, size, size), and the poses (n,).
        """
        mask = self.mask()
        references = filtered_averages(sums, self.averaging, mask)
        if centre:
            device = self.particles.device
            there = pose.to(device)  # where arithmetic on all poses is quick
            shift = centring(sums.averages(), there, label, self.averaging.centre, mask)
            still = Pose.identity(len(references), device=device)
            references = transform(references, move(still, shift))
            pose = move(there, shift[label.to(device)]).to("cpu")
        return masked(references, mask), pose

    def change(self, before: Pose, after: Pose, first: bool) -> dict[str, float]:
        """How far poses moved, for the history.

        Args:
            before, after: (n,).
            first: whether there were no poses before; the figures are then NaN.

        Returns:
            The median distance where the hand stayed, in pixels at the last ring, and the share
            of the particles whose hand did not.
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
        """The `Alignment` of a state; its averages follow from its poses.

        Args:
            state: the last one; quality: what becomes of junk.
            by_class: k rows that the method knows of the classes.
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
        particles: all of them.
        how: one of `SEEDINGS`; ``random`` takes particles at random, low-passed.
        n_classes: how many.
        seed: seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(particles), generator=generator)[:n_classes]
    images = particles.read(same_on_all_ranks(chosen))
    return filter_shells(images, low_pass_curve(particles.size, LOW_PASS).to(images.device))


def given_references(particles: PreparedParticles, references: Array | str | Path) -> Tensor:
    """(k, size, size) references from an array or a file, in the prepared particles' box.

    Raises:
        ValueError: they do not fit the particles.
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
            f"x {stack.shape[1]} px: they must be a stack (k, h, w) of the same box "
            "and pixel size (or of images.box)"
        )
    expected = boxes[images.shape[-1]]
    if pixel_size and expected and abs(pixel_size - expected) > 0.01 * expected:
        raise ValueError(
            f"references {references} have {pixel_size:.4g} Å per pixel, where the particles have "
            f"{expected:.4g} Å: rescale them, or put the header's voxel size right"
        )
    if not torch.isfinite(images).all():
        raise ValueError("references contain NaN or infinite pixels")
    return fourier_resize(images.float().to(particles.device), particles.size)
