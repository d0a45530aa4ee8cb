"""Poses from averages, averages from poses, in turn: what every alignment here is made of.

Multi-reference alignment (`mra`) and reference-free alignment (`rfa`) differ in where they begin,
in what they search, and in when they stop; a turn is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.fourier import fourier_resize
from cryoalign.images.geometry import transform, translate
from cryoalign.images.masks import masked, soft_mask
from cryoalign.images.polar import Rings
from cryoalign.io.formats import image_pixel_size, read_images
from cryoalign.methods.state import MraState
from cryoalign.particles.prepare import Images, PreparedParticles
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.pose import Pose, pixel_error
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import (
    Averaging,
    ClassSums,
    centring,
    class_sums,
    filtered_averages,
    move,
)
from cryoalign.results.evidence import Aligned, Scope, trials_of
from cryoalign.results.quality import Quality, conclude
from cryoalign.runtime.arrays import Array, as_tensor
from cryoalign.runtime.processes import choose_device, gather_over_ranks
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.match import Target, best_poses
from cryoalign.search.settings import Search

Progress = Callable[[str, int, int], None]
"""Told (what is being done, particles done, particles in all) now and then."""
Finder = Callable[[Tensor], tuple[Tensor, Pose, Tensor]]
"""Makes label (b,), pose (b,) and score (b,) of some particles, given by their members (b,)."""


class Found(NamedTuple):
    """What a search found for all usable particles, on the CPU of every process."""

    label: Tensor  # (n,)
    pose: Pose  # (n,)
    score: Tensor  # (n,)


def prepare_particles(
    particles: Stack | Array,
    images: Images | None,
    device: str,
    max_rejected: float,
    batch_size: int | None,
    progress: Progress | None,
) -> PreparedParticles:
    """The usable particles of a stack or an array (n, size, size)."""
    return PreparedParticles(
        as_stack(particles),
        images or Images(),
        choose_device(device),
        max_rejected,
        batch_size,
        progress,
    )


@dataclass(frozen=True)
class Alternation:
    """Particles, and how their averages are made and made into references."""

    particles: PreparedParticles
    averaging: Averaging
    rings: Rings
    progress: Progress | None

    def mask(self) -> Tensor:
        """(size, size) soft mask of the references."""
        return soft_mask(
            self.particles.size,
            self.averaging.mask_radius or self.rings.last_ring,
            self.averaging.mask_edge,
            self.particles.device,
        )

    def parts(self, doing: str) -> Iterator[Tensor]:
        """Members of this process's batches, with progress told as they are taken."""
        done = 0
        for members in self.particles.parts():
            yield members
            done += len(members)
            if self.progress is not None:
                self.progress(doing, done, len(self.particles))

    def search(self, target: Target, about: Tensor | None = None) -> Found:
        """Every particle's best class, pose and score.

        Args:
            target: `search.prepare` of the references.
            about: (n, 2) whole pixels that each particle's trial shifts are taken about; None is
                zero.
        """
        if about is None:
            return self.find(lambda members: best_poses(self.particles.take(members), target))

        def about_own(members: Tensor) -> tuple[Tensor, Pose, Tensor]:
            images = self.particles.take(members)
            own = about[members].to(images.device)
            label, pose, score = best_poses(translate(images, own), target)
            return label, Pose(pose.angle, pose.shift + own, pose.mirror), score

        return self.find(about_own)

    def find(self, finder: Finder) -> Found:
        """What ``finder`` makes of the particles, batch by batch and over all processes."""

        def columns(members: Tensor) -> Tensor:
            label, pose, score = finder(members)
            found = [label, pose.angle, pose.shift[:, 0], pose.shift[:, 1], pose.mirror, score]
            return torch.stack([c.double() for c in found], 1)  # (b, 6)

        device = self.particles.device
        found = [torch.zeros(0, 6, dtype=torch.float64, device=device)]
        found += map_in_order(columns, self.parts("align"), workers_for(device))
        table = gather_over_ranks(torch.cat(found).cpu())  # once: batches need not wait
        pose = Pose(table[:, 1].float(), table[:, 2:4].float(), table[:, 4] > 0.5)
        return Found(table[:, 0].long(), pose, table[:, 5].float())

    def sum_classes(self, label: Tensor, pose: Pose, k: int) -> ClassSums:
        """Sums of the aligned particles by class and half-set."""
        # Half-sets by the row of the input, so that they do not depend on what was set aside.
        half = self.particles.rows % 2
        return class_sums(
            self.parts("average"), self.particles.take, pose, label, half, k, self.particles.size,
            self.particles.device,
        )  # fmt: skip

    def renew(
        self, sums: ClassSums, label: Tensor, pose: Pose, centre: bool
    ) -> tuple[Tensor, Pose]:
        """References (k, size, size) of class sums, and the members' poses, moved along where
        averages are centred."""
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

    def change(self, before: Pose, after: Pose) -> dict[str, float]:
        """How far poses moved, for the history: the median where the hand stayed, and the share
        of hands that did not."""
        device = self.particles.device
        moved = pixel_error(after.to(device), before.to(device), self.rings.last_ring).sqrt().cpu()
        same = before.mirror == after.mirror
        return {
            "pose_change_px": float(moved[same].median()) if same.any() else math.inf,
            "hand_changed": float((~same).double().mean()),
        }

    def result(self, state: MraState, search: Search, quality: Quality | None) -> Alignment:
        """The `Alignment` of a state; its averages follow from its poses."""
        k = len(state.references)
        return conclude(
            self.particles,
            Aligned(state.label, state.pose, state.score, {}),
            state.sums or self.sum_classes(state.label, state.pose, k),
            Scope(
                self.mask(),
                self.rings,
                trials_of(k, search.max_shift, self.rings.last_ring, search.mirror),
            ),
            pd.DataFrame(state.history),
            quality,
        )


def refuse_other_particles(state: MraState, prepared: PreparedParticles) -> None:
    """Make sure that a checkpoint is of these particles.

    Raises:
        ValueError: it is not.
    """
    if len(state.label) != len(prepared) or state.references.shape[-1] != prepared.size:
        raise ValueError(
            f"the checkpoint has {len(state.label)} particles of {state.references.shape[-1]} px, "
            f"the input {len(prepared)} of {prepared.size} px: resume with the same input and "
            "settings"
        )
    if state.fingerprint != prepared.fingerprint:
        raise ValueError(
            "the checkpoint is of other particles: the stack's pixels have changed since; resume "
            "with the same input, or start another run"
        )


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
