"""The generations of ISAC: classes of equal size, and which of their members are stable.

In a generation, particles that no class accounts for yet are shared out to classes of equal size,
so that none attracts what is not its own; every class is aligned several times from random poses;
the particles whose poses come out alike are its stable members, and their average is the reference
of the next pass. A class with enough stable members is accepted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.images.fourier import filter_shells, fourier_resize, fourier_shrink, low_pass_curve
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked
from cryoalign.methods.assignment import assign_equal
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.split_and_merge import Likelihood
from cryoalign.methods.isac.realignment import (
    BATCH,
    Pyramid,
    build_pyramid,
    match_low,
    realign_groups,
    references_of,
    refine_at,
    scaled,
    scores_at,
)
from cryoalign.methods.isac.stability import common_frame, core_members, mean_pose, pixel_errors
from cryoalign.methods.state import MraState
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Pose, compose
from cryoalign.results.averages import LOW_PASS, TRUSTED, Averaging
from cryoalign.runtime.settings import FORBID
from cryoalign.runtime.threads import map_in_order, workers_for

Progress = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all) now and then."""

SHARING = 8  # iterations of sharing out, at most, in a pass
RESTED = 0.02  # share of particles that change class below which it is at rest
AGREE, RISING = 0.5, 0.05  # stable members are found: so alike to the pass before, rising no more
KICK, EVERY = 90.0, 4  # degrees that angles are rounded to, every so many iterations


@dataclass(frozen=True, config=FORBID)
class Isac:
    """What a stable class is, and how it is looked for.

    Attributes:
        images_per_group: particles that a class is given; so many times fewer classes are tried.
        min_group_size: stable members that a class needs; None is 0.3 of `images_per_group`.
        threshold: pixel error below which a particle is stable, pixels of the shrunk images.
        core: a stable particle whose score is so many deviations below the median of its class is
            left out, as noise among real particles is; None leaves none out.
        runs: independent realignments of every class.
        passes: of sharing out and realigning, at most, in a generation.
        mask_radius: of the particle, pixels of the prepared images; None is 0.4 of the box.
        target_radius: that particles are shrunk to, pixels; smaller ones stay as they are.
        max_shift: how far off centre particles may be, pixels of the prepared images.
        mirror: whether mirrored particles are of one class.
        ctf: whether to flip phases where the STAR file has a defocus.
        prealign: iterations, at most, of the alignment that centres particles; 0 for none.
        start: first references of a generation: random particles, or classes by likelihood.
        slack: how far classes may be from equal size, as a share of it.
        repeats: independent runs of everything, of which the first is the result and the others
            tell how much of it comes out again.
    """

    images_per_group: int = Field(default=200, ge=4, description="particles a class is given")
    min_group_size: int | None = Field(
        default=None, ge=2, description="stable members a class needs; null: 0.3 of the group"
    )
    threshold: float = Field(
        default=0.7, gt=0, description="pixel error below which a particle is stable, px (shrunk)"
    )
    core: float | None = Field(
        default=3.0,
        gt=0,
        description="deviations below its class's median score at which a "
        "stable particle is left out; null: none is",
    )
    runs: int = Field(default=5, ge=2, description="independent realignments of every class")
    passes: int = Field(default=4, ge=1, description="of a generation, at most")
    mask_radius: float | None = Field(
        default=None, gt=0, description="radius of the particle, px; null: 0.4 of the box"
    )
    target_radius: int = Field(
        default=29, ge=8, description="radius that particles are shrunk to, px"
    )
    max_shift: float = Field(default=3.0, ge=0, description="how far off centre, px")
    mirror: bool = Field(default=True, description="mirrored particles are of one class")
    ctf: bool = Field(default=True, description="flip phases where the STAR file has a defocus")
    prealign: int = Field(default=14, ge=0, description="iterations of centring, at most")
    start: Literal["random", "likelihood"] = Field(
        default="random", description="first references of a generation"
    )
    slack: float = Field(default=0.5, ge=0, description="how far from equal size classes may be")
    repeats: int = Field(
        default=1, ge=1, description="independent runs; more than one tell what comes out again"
    )

    def __post_init__(self) -> None:
        if self.least > self.images_per_group * (1 + self.slack):
            raise ValueError(
                f"isac.min_group_size {self.least} is above isac.images_per_group "
                f"{self.images_per_group}, so that no class could be accepted: make it smaller"
            )

    @property
    def least(self) -> int:
        """Stable members that a class needs."""
        return self.min_group_size or max(2, math.ceil(0.3 * self.images_per_group))


class Scale(NamedTuple):
    """Lengths in pixels of the shrunk images."""

    size: int
    factor: float  # prepared pixels to one of these
    last_ring: int
    max_shift: float


def scale_of(isac: Isac, size: int) -> Scale:
    """The shrunk images of prepared ones of ``size`` pixels."""
    room = (size - 1) // 2 - math.ceil(isac.max_shift)
    radius = isac.mask_radius or min(0.4 * size, room)
    if not 4 <= radius <= room:
        raise ValueError(
            f"a particle of radius {radius:g} px that may be {isac.max_shift:g} px off centre does "
            f"not fit a box of {size} px: use an isac.mask_radius from 4 to {room}, or a smaller "
            "isac.max_shift"
        )
    small = max(16, math.ceil(size * min(1.0, isac.target_radius / radius)))
    small = min(small, size)
    factor = size / small
    reach = isac.max_shift / factor
    last = min(round(radius / factor), (small - 1) // 2 - math.ceil(reach))
    return Scale(small, factor, last, reach)


@plain_dataclass(frozen=True, eq=False)
class Job:
    """What stays the same from one generation to the next."""

    particles: PreparedParticles
    isac: Isac
    averaging: Averaging
    scale: Scale
    progress: Progress | None

    def tell(self, doing: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(doing, done, total)

    def shrunk(self) -> Tensor:
        """(n, size, size) the prepared particles, shrunk."""
        parts = map_in_order(
            lambda part: fourier_resize(self.particles.take(part), self.scale.size),
            self.particles.parts(),
            workers_for(self.particles.device),
        )
        return torch.cat(list(parts))

    def pyramid(self, images: Tensor) -> Pyramid:
        half = self.particles.rows % 2
        averaging = replace(self.averaging, mask_radius=None)
        return build_pyramid(
            images, half, self.scale.last_ring, self.scale.max_shift, self.isac.mirror, averaging
        )


def generations(
    job: Job,
    resume: MraState | None,
    iterations: int,
    seed: int,
    on_iteration: Callable[[MraState], None] | None,
) -> MraState:
    """Generation after generation, until nothing new is found.

    In the state, ``pose`` is in pixels of the shrunk images: of a particle accounted for its pose
    in its class (``label``), of another (-1) the shift that centres it.
    """
    images = job.shrunk()
    state = _first_state(job, images) if resume is None else _checked(job, resume)
    centre = Pose.identity(len(state.label))
    centre = replace(centre, shift=torch.where(state.label[:, None] < 0, state.pose.shift, 0.0))
    particles = job.pyramid(_moved(images, centre))
    del images
    while state.iteration < iterations and not state.settled:
        rest = (state.label < 0).nonzero().squeeze(1)
        if len(rest) < job.isac.least:
            break
        generator = torch.Generator().manual_seed(seed + 1_000_003 * state.iteration)
        started = time.perf_counter()
        found = _generation(job, particles.take(rest), generator, state.iteration + 1)
        state = _accept(job, state, rest, found, started)
        if on_iteration is not None:
            on_iteration(state)
    return state


def _moved(images: Tensor, pose: Pose) -> Tensor:
    """Images (n, size, size) moved by whole pixels, which interpolates nothing."""

    def moved(rows: Tensor) -> Tensor:
        return transform(images[rows.to(images.device)], pose[rows].to(images.device))

    parts = torch.arange(len(images)).split(BATCH)
    return torch.cat(list(map_in_order(moved, parts, workers_for(images.device))))


def _checked(job: Job, state: MraState) -> MraState:
    if len(state.label) != len(job.particles) or state.fingerprint != job.particles.fingerprint:
        raise ValueError(
            "the checkpoint is of other particles: resume with the same input, or start another run"
        )
    return state


def _first_state(job: Job, images: Tensor) -> MraState:
    n = len(images)
    shift = prealign(job.pyramid(images), job.isac.prealign, job.tell)
    pose = replace(Pose.identity(n), shift=shift.round())
    return MraState(
        0, images.new_zeros(0, *images.shape[1:]).cpu(), torch.full((n,), -1), pose,
        torch.full((n,), torch.nan), fingerprint=job.particles.fingerprint,
    )  # fmt: skip


def prealign(particles: Pyramid, iterations: int, tell: Callable[[str, int, int], None]) -> Tensor:
    """(n, 2) shifts that centre particles, in pixels of the higher resolution.

    All are aligned to their own average, over and over. Now and then angles are rounded to a
    quarter turn, which shakes particles loose from what the average happened to show (as the
    ``dst`` of SPARX's reference-free alignment).
    """
    n = len(particles)
    label, pose = torch.zeros(n, dtype=torch.int64), Pose.identity(n)
    for i in range(iterations):
        before = pose.shift
        references, _ = references_of(
            particles.low, particles.half, label, pose, 1, particles.averaging
        )
        pose = match_low(particles, references).pose[:, 0]
        rest = float((pose.shift != before).any(1).double().mean()) < RESTED
        tell("centring", i + 1, iterations)
        if rest:
            break
        if (i + 1) % EVERY == 0:
            pose = replace(pose, angle=(pose.angle / KICK).round() * KICK)
    return pose.shift * particles.coarse.factor


class _Found(NamedTuple):
    """Of a generation's particles (n,): class, pose, pixel error, whether stable; and of itself."""

    label: Tensor
    pose: Pose
    error: Tensor
    stable: Tensor
    classes: int
    passes: int
    agreement: float


def _generation(job: Job, particles: Pyramid, generator: torch.Generator, number: int) -> _Found:
    """Passes of sharing out and realigning, until stable members are the same as before."""
    isac, radius = job.isac, job.scale.last_ring
    k = max(1, len(particles) // isac.images_per_group)
    references = _start(job, particles, k, generator)
    before, agreement = torch.full((len(particles),), -1), 0.0
    for step in range(isac.passes):
        job.tell(f"generation {number}: sharing out", step * k, isac.passes * k)
        label = _share(particles, references, k, isac.slack)

        def tell(done: int, step: int = step) -> None:
            job.tell(f"generation {number}: realigning", step * k + done, isac.passes * k)

        runs = realign_groups(particles, label, k, isac.runs, generator, tell)
        runs = common_frame(runs, label, k, radius, isac.threshold)
        error = pixel_errors(runs, radius)
        pose = mean_pose(runs).to(torch.float32)
        stable = _core(particles, label, pose, error < isac.threshold, k, isac.core)
        now = torch.where(stable, label, -1)
        last, agreement = agreement, _agreement(before, now, k)
        before = now
        if agreement > AGREE and agreement - last < RISING:
            break
        references = _stable_references(particles, label, stable, pose, k)
    return _Found(label, pose, error.float(), stable, k, step + 1, agreement)


def _start(job: Job, particles: Pyramid, k: int, generator: torch.Generator) -> Tensor:
    """(k, t, t) first references at the lower resolution."""
    low = particles.low
    if job.isac.start == "likelihood" and k > 1:
        likelihood = Likelihood(
            mask_radius=job.scale.last_ring, max_shift=job.scale.max_shift, mirror=job.isac.mirror
        )
        seed = int(torch.randint(2**31, (1,), generator=generator))
        found = classify(
            particles.high.images, k, likelihood=likelihood, averaging=particles.averaging,
            seed=seed, device=str(low.images.device), progress=job.progress,
        )  # fmt: skip
        averages = found.filtered_averages().to(low.images.device)
        return masked(fourier_shrink(averages, low.images.shape[-1]), low.mask)
    chosen = torch.randperm(len(particles), generator=generator)[:k]
    curve = low_pass_curve(low.images.shape[-1], LOW_PASS * particles.coarse.factor)
    images = low.images[chosen.to(low.images.device)]
    return masked(filter_shells(images, curve.to(images.device)), low.mask)


def _share(particles: Pyramid, references: Tensor, k: int, slack: float) -> Tensor:
    """(n,) classes of equal size, whose averages have become their references."""
    label = torch.full((len(particles),), -1)
    row = torch.arange(len(label))
    for _ in range(SHARING):
        found = match_low(particles, references)
        before, label = label, assign_equal(found.score, slack)
        if float((label != before).double().mean()) < RESTED:
            break
        pose = refine_at(particles.low, references, label, found.pose[row, label])
        references, _ = references_of(
            particles.low, particles.half, label, pose, k, particles.averaging
        )
    return label


def _core(
    particles: Pyramid, label: Tensor, pose: Pose, stable: Tensor, k: int, deviations: float | None
) -> Tensor:
    """Stable members (n,) that also fit the average which they make."""
    if deviations is None:
        return stable
    used = torch.where(stable, label, -1)
    references, pose = references_of(
        particles.high, particles.half, used, pose, k, particles.averaging
    )
    score = scores_at(particles.high, references, label, pose)
    return core_members(score, label, stable, deviations)


def _stable_references(
    particles: Pyramid, label: Tensor, stable: Tensor, pose: Pose, k: int
) -> Tensor:
    """(k, t, t) averages of stable members, or of all where those are too few for half-sets."""
    enough = torch.bincount(label[stable], minlength=k) >= 4 * TRUSTED
    used = torch.where(stable | ~enough[label], label, -1)
    low = scaled(pose, 1 / particles.coarse.factor)
    return references_of(particles.low, particles.half, used, low, k, particles.averaging)[0]


def _agreement(before: Tensor, now: Tensor, k: int) -> float:
    """Mean over classes of the Jaccard index of their stable members before and now (-1: none)."""
    common = torch.bincount(now[(now == before) & (now >= 0)], minlength=k)
    sizes = [torch.bincount(x[x >= 0], minlength=k) for x in (before, now)]
    either = sizes[0] + sizes[1] - common
    return float((common[either > 0] / either[either > 0]).mean()) if either.any() else 0.0


def _accept(job: Job, state: MraState, rest: Tensor, found: _Found, started: float) -> MraState:
    """The state with a generation's large enough stable classes."""
    sizes = torch.bincount(found.label[found.stable], minlength=found.classes)
    good = sizes >= job.isac.least
    accepted = sum(row["accepted"] for row in state.history)
    number = accepted + torch.cumsum(good, 0) - 1
    kept = found.stable & good[found.label]
    members = rest[kept]
    label, score = state.label.clone(), state.score.clone()
    label[members], score[rest] = number[found.label[kept]], found.error
    centre = state.pose[members]
    pose = compose(centre, found.pose[kept])
    angle, shift, mirror = (
        state.pose.angle.clone(), state.pose.shift.clone(), state.pose.mirror.clone(),
    )  # fmt: skip
    angle[members], shift[members], mirror[members] = pose.angle, pose.shift, pose.mirror
    accounted = int((label >= 0).sum())
    row = {
        "iteration": state.iteration + 1,
        "particles": len(rest),
        "classes": found.classes,
        "passes": found.passes,
        "stable_share": float(found.stable.double().mean()),
        "agreement": found.agreement,
        "accepted": int(good.sum()),
        "accounted": accounted,
        "accounted_share": accounted / len(label),
        "seconds": round(time.perf_counter() - started, 3),
    }
    left = len(label) - accounted
    return replace(
        state,
        iteration=state.iteration + 1,
        label=label,
        pose=Pose(angle, shift, mirror),
        score=score,
        history=[*state.history, row],
        settled=not good.any() or left < 2 * job.isac.images_per_group,
    )
