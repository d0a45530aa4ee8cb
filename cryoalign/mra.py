"""Multi-reference alignment (MRA): references become class averages, over and over.

Chung et al. 2020, Algorithm 1: every particle is searched against every reference over shifts,
hands and in-plane angles, joins the best, and the averages of what joined, filtered, masked and
centred, are the next references.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cryoalign import frc
from cryoalign.alignment import Alignment, over_all_rows
from cryoalign.average import (
    Averaging,
    ClassSums,
    centring,
    class_sums,
    filtered_averages,
    masked,
    move,
)
from cryoalign.checkpoint import MraState
from cryoalign.distributed import gather_over_ranks
from cryoalign.filters import fourier_resize, radial_mean, soft_mask
from cryoalign.geometry import transform
from cryoalign.io import image_pixel_size, read_images
from cryoalign.particles import Images, PreparedParticles, Stack, TensorStack, choose_device
from cryoalign.polar import Rings
from cryoalign.pose import Pose, pixel_error
from cryoalign.search import Search, best_poses, prepare
from cryoalign.seeding import SEEDINGS, seed_references
from cryoalign.workers import map_in_order, workers_for

Progress = Callable[[str, int, int], None]
"""Told (what is being done, particles done, particles in all) now and then."""


def align_multi_reference(
    particles: Stack | Tensor,
    references: Tensor | str | Path = "random",
    *,
    n_classes: int | None = None,
    iterations: int = 20,
    search: Search | None = None,
    images: Images | None = None,
    averaging: Averaging | None = None,
    min_class_share: float = 0.2,
    settle: float = 0.002,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    max_rejected: float = 0.1,
    resume: MraState | None = None,
    on_iteration: Callable[[MraState], None] | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Align particles to references and the references to what they gathered, until it settles.

    A class that ends an iteration with fewer members than ``min_class_share`` of the mean size is
    given half of the largest class: those members that fit there worst. The last iteration does
    not do so, and an empty class then has an average of zeros and no resolution.

    Args:
        particles: a stack (`io.read_particles`) or a tensor (n, size, size).
        references: (k, size, size), the path of such a stack, or a way to choose them
            (`seeding.SEEDINGS`).
        n_classes: how many, unless the references say.
        iterations: at most.
        search: what poses are tried.
        images: how particles are prepared.
        averaging: how averages become references.
        min_class_share: see above; 0 never re-seeds.
        settle: stop when no larger share of the particles changed class.
        seed: of the random choices.
        device: auto, cpu or cuda.
        batch_size: particles at a time; None chooses.
        max_rejected: largest share of unusable particles (NaN, constant) that is set aside.
        resume: go on from this state, with the same particles and settings.
        on_iteration: called with the state after every iteration.
        progress: called now and then.

    Returns:
        The `Alignment`, of the whole input on every process.

    Raises:
        ValueError: anything that does not fit, before the first iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    search, averaging = search or Search(), averaging or Averaging()
    stack = TensorStack(particles) if isinstance(particles, Tensor) else particles
    if stack.shape[0] == stack.shape[1]:  # what does not fit should say so before pixels are read
        search.rings((images or Images()).box or stack.shape[0])
    prepared = PreparedParticles(
        stack, images or Images(), choose_device(device), max_rejected, batch_size, progress
    )
    job = _Job(prepared, search, averaging, min_class_share, settle, progress)
    state = resume or _start(job, references, n_classes, seed)
    _refuse_other_particles(state, prepared)
    sums: ClassSums | None = None
    while state.iteration < iterations and not state.settled:
        state, sums = _iterate(job, state, last=state.iteration + 1 == iterations)
        if on_iteration is not None:
            on_iteration(state)
    if sums is None:  # resumed at its end: the averages follow from the poses
        sums = job.sum_classes(state.label, state.pose, len(state.references))
    return _finish(job, state, sums)


def _refuse_other_particles(state: MraState, prepared: PreparedParticles) -> None:
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


@dataclass(frozen=True)
class _Job:
    """What stays the same from one iteration to the next."""

    particles: PreparedParticles
    search: Search
    averaging: Averaging
    min_class_share: float
    settle: float
    progress: Progress | None

    @property
    def rings(self) -> Rings:
        return self.search.rings(self.particles.size)

    @property
    def mask_radius(self) -> float:
        return self.averaging.mask_radius or self.rings.last_ring

    def mask(self) -> Tensor:
        return soft_mask(
            self.particles.size, self.mask_radius, self.averaging.mask_edge, self.particles.device
        )

    def parts(self, doing: str) -> Iterator[Tensor]:
        """Members of this process's batches, with progress told as they are taken."""
        done = 0
        for members in self.particles.parts():
            yield members
            done += len(members)
            if self.progress is not None:
                self.progress(doing, done, len(self.particles))

    def sum_classes(self, label: Tensor, pose: Pose, k: int) -> ClassSums:
        # Half-sets by the row of the input, so that they do not depend on what was set aside.
        half = self.particles.rows % 2
        return class_sums(
            self.parts("average"), self.particles.take, pose, label, half, k, self.particles.size,
            self.particles.device,
        )  # fmt: skip


def _start(
    job: _Job, references: Tensor | str | Path, n_classes: int | None, seed: int
) -> MraState:
    n = len(job.particles)
    if isinstance(references, str) and references in SEEDINGS:
        if n_classes is None or not 1 <= n_classes <= n:
            raise ValueError(
                f"n_classes must be from 1 to the {n} usable particles when references are chosen "
                f"by {references!r}; got {n_classes}"
            )
        images = seed_references(job.particles, references, n_classes, seed)
    else:
        images = _given_references(job, references, n_classes)
    return MraState(
        iteration=0,
        references=masked(images, job.mask()),
        label=torch.full((n,), -1),
        pose=Pose.identity(n),
        score=torch.zeros(n),
        fingerprint=job.particles.fingerprint,
    )


def _given_references(job: _Job, references: Tensor | str | Path, n_classes: int | None) -> Tensor:
    """(k, size, size) references from a tensor or a file, in the prepared particles' box."""
    particles, stack = job.particles, job.particles.stack
    if isinstance(references, Tensor):
        images, pixel_size = references.detach(), None
    else:
        images, pixel_size = read_images(references), image_pixel_size(references)
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
    if n_classes is not None and n_classes != len(images):
        raise ValueError(
            f"n_classes is {n_classes} but there are {len(images)} references: leave "
            "n_classes out, or make them agree"
        )
    if not torch.isfinite(images).all():
        raise ValueError("references contain NaN or infinite pixels")
    images = fourier_resize(images.float().to(particles.device), particles.size)
    _warn_of_contrast(job, images)
    return images


def _warn_of_contrast(job: _Job, references: Tensor) -> None:
    """Say so where particles and references look like each other's negatives."""
    few = job.particles.read(torch.arange(min(len(job.particles), 512)))
    last = job.rings.last_ring
    ours, theirs = (radial_mean(x.mean(0))[: last + 1] for x in (few, references))
    pair = torch.stack([ours, theirs])
    if len(ours) > 4 and float(torch.corrcoef(pair)[0, 1]) < -0.7:
        warnings.warn(
            "the references' contrast looks reversed to the particles': density must be bright in "
            "both; images.invert turns the particles round, references are taken as they are",
            stacklevel=2,
        )


def _iterate(job: _Job, state: MraState, last: bool) -> tuple[MraState, ClassSums]:
    started = time.perf_counter()
    label, pose, score = _assign(job, state.references.to(job.particles.device))
    reassigned = float((label != state.label).double().mean())
    device = job.particles.device
    there = pose.to(device)  # where arithmetic on all poses is quick
    change = pixel_error(there, state.pose.to(device), job.rings.last_ring).sqrt().cpu()
    same_hand = pose.mirror == state.pose.mirror
    first = state.iteration == 0  # there is no pose yet to have changed
    settled = reassigned <= job.settle
    k = len(state.references)
    split = 0
    if not (last or settled):
        label, split = split_largest(label, score, k, job.min_class_share * len(label) / k)
    sums = job.sum_classes(label, pose, k)
    references, mask = filtered_averages(sums, job.averaging, job.mask()), job.mask()
    if not (last or settled):
        shift = centring(sums.averages(), there, label, job.averaging.centre, mask)
        references = transform(references, move(Pose.identity(k, device=device), shift))
        pose = move(there, shift[label.to(device)]).to("cpu")
    references = masked(references, mask)
    row = {
        "iteration": state.iteration + 1,
        "mean_score": float(score.mean()),
        "reassigned": reassigned,
        "pose_change_px": math.nan if first else float(change[same_hand].median()),
        "hand_changed": math.nan if first else float((~same_hand).double().mean()),
        "smallest_class": int(sums.sizes.min()),
        "largest_class": int(sums.sizes.max()),
        "empty_classes": int((sums.sizes == 0).sum()),
        "split_classes": split,
        "seconds": round(time.perf_counter() - started, 6),
    }
    history = [*state.history, row]
    done = replace(
        state,
        iteration=state.iteration + 1,
        references=references,
        label=label,
        pose=pose,
        score=score,
        history=history,
        settled=settled,
    )
    return done, sums


def _assign(job: _Job, references: Tensor) -> tuple[Tensor, Pose, Tensor]:
    """Best class, pose and score of every particle: (n,) each, on the CPU of every process."""
    target = prepare(references, job.search)

    def columns(members: Tensor) -> Tensor:
        label, pose, score = best_poses(job.particles.take(members), target)
        found = [label, pose.angle, pose.shift[:, 0], pose.shift[:, 1], pose.mirror, score]
        return torch.stack([c.double() for c in found], 1)  # (b, 6)

    found = [torch.zeros(0, 6, dtype=torch.float64, device=job.particles.device)]
    found += map_in_order(columns, job.parts("align"), workers_for(job.particles.device))
    table = gather_over_ranks(torch.cat(found).cpu())  # once: batches do not wait for each other
    pose = Pose(table[:, 1].float(), table[:, 2:4].float(), table[:, 4] > 0.5)
    return table[:, 0].long(), pose, table[:, 5].float()


def split_largest(label: Tensor, score: Tensor, k: int, least: float) -> tuple[Tensor, int]:
    """Give each class of fewer than ``least`` members half of the largest class.

    The half that fits there worst moves (as in CL2D, Sorzano et al. 2010): it keeps its poses,
    which hold on the new class as on the old. What members the small class has stay.

    Args:
        label: (n,) class index; score: (n,).
        k: number of classes.
        least: smallest size that is left alone.

    Returns:
        New labels (n,) and how many classes were so re-seeded.
    """
    label = label.clone()
    sizes = torch.bincount(label, minlength=k)
    small = [int(c) for c in sizes.argsort() if sizes[c] < least]
    done = 0
    for c in small:
        largest = int(sizes.argmax())
        if sizes[largest] < max(2 * least, 2):
            break
        members = (label == largest).nonzero().squeeze(1)
        worst = members[score[members].argsort(stable=True)[: len(members) // 2]]
        label[worst] = c
        sizes = torch.bincount(label, minlength=k)
        done += 1
    return label, done


def _finish(job: _Job, state: MraState, sums: ClassSums) -> Alignment:
    particles = job.particles
    pose, class_number, score = over_all_rows(
        len(particles.stack), particles.rows, state.label, state.pose, state.score, particles.scale
    )
    curves = sums.frc(job.mask())
    resolution = frc.resolution(curves, particles.size, particles.pixel_size or particles.scale)
    return Alignment(
        pose=pose,
        class_number=class_number,
        score=score,
        averages=sums.averages().cpu(),
        frc=curves.cpu(),
        resolution=resolution.cpu(),
        class_sizes=sums.sizes.cpu(),
        history=pd.DataFrame(state.history),
        rejected=particles.rejected,
        pixel_size=particles.pixel_size,
        scale=particles.scale,
    )
