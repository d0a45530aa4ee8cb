"""The generations of ISAC.

In a generation, particles that are not yet in an accepted class are assigned to classes of equal
size, because otherwise some classes attract particles that do not belong to them. The members of
every class are aligned several times from random poses. Members whose poses agree are stable, and
their average is the reference of the next pass. A class with enough stable members is accepted.
"""

import time
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells, fourier_resize, fourier_shrink, low_pass_curve
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked
from cryoalign.methods.assignment import assign_equal
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.isac.realignment import (
    BATCH,
    Pyramid,
    build_pyramid,
    match_low,
    realign_groups,
    references_of,
    refine_at,
    scores_at,
)
from cryoalign.methods.isac.settings import Isac, Scale
from cryoalign.methods.isac.stability import common_frame, core_members, mean_pose, pixel_errors
from cryoalign.methods.state import State, pose_tensors
from cryoalign.particles.prepare import PreparedParticles, Progress
from cryoalign.particles.settings import Particle
from cryoalign.pose import Pose, compose
from cryoalign.results.averages import LOW_PASS, TRUSTED, Averaging
from cryoalign.runtime.processes import gather_over_ranks
from cryoalign.runtime.threads import map_in_order, workers_for

SHARING = 8  # largest number of iterations of the assignment in a pass; limits the time
RESTED = 0.02  # iterations end when a smaller share of particles changes class (or shift)
# Passes end when the stable members agree with those of the pass before by more than AGREE, and
# this agreement has risen by less than RISING since the pass before.
AGREE, RISING = 0.5, 0.05
KICK, EVERY = 90.0, 4  # centring rounds angles to multiples of KICK degrees every EVERY iterations


@plain_dataclass(frozen=True, eq=False)
class Work:
    """What is the same in all generations.

    Attributes:
        particles: all particles.
        isac, averaging: the settings.
        mirror: whether mirrored particles are tried.
        scale: size of the shrunk images, and lengths in their pixels.
    """

    particles: PreparedParticles
    isac: Isac
    averaging: Averaging
    mirror: bool
    scale: Scale

    def shrunk(self) -> Tensor:
        """(n, size, size) shrunk images of all particles."""
        size, device = self.scale.size, self.particles.device
        parts = map_in_order(
            lambda part: fourier_resize(self.particles.read(part), size),
            self.particles.parts(),
            workers_for(device),
        )
        return gather_over_ranks(torch.cat([torch.zeros(0, size, size, device=device), *parts]))

    def pyramid(self, images: Tensor) -> Pyramid:
        """Shrunk images (n, size, size) at two resolutions."""
        return build_pyramid(
            images, self.particles.half, self.scale.last_ring, self.scale.max_shift, self.mirror,
            self.averaging,
        )  # fmt: skip


def shrunk_pose(state: State) -> Pose:
    """(n,) poses in pixels of the shrunk images: of a particle accounted for its pose on its class
    average, of another (label -1) the shift that centres it."""
    return Pose(state["angle"], state["shrunk_shift"], state["mirror"])


def centre_particles(work: Work, images: Tensor) -> Pose:
    """(n,) poses that centre shrunk images (n, size, size) by shifts of whole pixels."""
    shift = prealign(work.pyramid(images), work.isac.prealign, work.particles.report)
    return replace(Pose.identity(len(images)), shift=shift.round())


def centred_pyramid(work: Work, images: Tensor, label: Tensor, pose: Pose) -> Pyramid:
    """Shrunk images (n, size, size) at two resolutions. Particles that are in no class yet (label
    -1) are centred by the shift of their pose (n,)."""
    centre = replace(
        Pose.identity(len(label)), shift=torch.where(label[:, None] < 0, pose.shift, 0.0)
    )
    return work.pyramid(_moved(images, centre))


def _moved(images: Tensor, pose: Pose) -> Tensor:
    """Images (n, size, size) moved by whole pixels, without interpolation."""

    def moved(rows: Tensor) -> Tensor:
        return transform(images[rows.to(images.device)], pose[rows].to(images.device))

    parts = torch.arange(len(images)).split(BATCH)
    return torch.cat(list(map_in_order(moved, parts, workers_for(images.device))))


def prealign(particles: Pyramid, iterations: int, report: Progress) -> Tensor:
    """(n, 2) shifts that centre particles, in pixels of the higher resolution.

    All particles are aligned to their common average, at most ``iterations`` times. Every `EVERY`
    iterations, angles are rounded to a quarter turn, so that particles do not stay at the first
    features that the average happened to show (as ``dst`` in SPARX's reference-free alignment).
    """
    n = len(particles)
    label, pose = torch.zeros(n, dtype=torch.int64), Pose.identity(n)
    for i in range(iterations):
        before = pose.shift
        references, _ = references_of(
            particles.low, particles.half, label, pose, 1, particles.averaging, shared=True
        )
        pose = match_low(particles, references).pose[:, 0]
        rest = float((pose.shift != before).any(1).double().mean()) < RESTED
        report("centring", i + 1, iterations)
        if rest:
            break
        if (i + 1) % EVERY == 0:
            pose = replace(pose, angle=(pose.angle / KICK).round() * KICK)
    return pose.shift * particles.coarse.factor


class Generation(NamedTuple):
    """The result of a generation for its n particles."""

    label: Tensor  # (n,) class index
    pose: Pose  # (n,) on the class average, pixels of the shrunk images
    error: Tensor  # (n,) pixel error, pixels of the shrunk images
    stable: Tensor  # (n,) bool
    classes: int  # number of classes
    passes: int  # number of passes
    agreement: float  # of the stable members in the last two passes, 0 to 1


def generation(
    work: Work, particles: Pyramid, generator: torch.Generator, number: int
) -> Generation:
    """Assign and realign particles in passes, until the stable members stay the same.

    Args:
        work: what is the same in all generations.
        particles: the particles that are in no accepted class.
        generator: random numbers.
        number: number of the generation, for the progress.
    """
    isac, radius, report = work.isac, work.scale.last_ring, work.particles.report
    k = max(1, len(particles) // isac.images_per_group)
    references = _start(work, particles, k, generator)
    before, agreement = torch.full((len(particles),), -1), 0.0
    for step in range(isac.passes):
        report(f"generation {number}: assigning", step * k, isac.passes * k)
        label = _share(particles, references, k, isac.slack)

        def on_class(done: int, step: int = step) -> None:
            report(f"generation {number}: realigning", step * k + done, isac.passes * k)

        runs = realign_groups(particles, label, k, isac.runs, generator, on_class)
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
    return Generation(label, pose, error.float(), stable, k, step + 1, agreement)


def _start(work: Work, particles: Pyramid, k: int, generator: torch.Generator) -> Tensor:
    """(k, t, t) first references at the lower resolution, t pixels wide."""
    low = particles.low
    if work.isac.start == "likelihood" and k > 1:
        particle = Particle(
            radius=f"{work.scale.last_ring} px", max_shift=f"{work.scale.max_shift} px",
            mirror=work.mirror,
        )  # fmt: skip
        seed = int(torch.randint(2**31, (1,), generator=generator))
        found = classify(
            particles.high.images, k, particle=particle, averaging=particles.averaging,
            seed=seed, device=str(low.images.device), progress=work.particles.progress,
        )  # fmt: skip
        averages = found.filtered_averages().to(low.images.device)
        return masked(fourier_shrink(averages, low.images.shape[-1]), low.mask)
    chosen = torch.randperm(len(particles), generator=generator)[:k]
    curve = low_pass_curve(low.images.shape[-1], LOW_PASS * particles.coarse.factor)
    images = low.images[chosen.to(low.images.device)]
    return masked(filter_shells(images, curve.to(images.device)), low.mask)


def _share(particles: Pyramid, references: Tensor, k: int, slack: float) -> Tensor:
    """(n,) classes of equal size, found by aligning to class averages until few labels change."""
    label = torch.full((len(particles),), -1)
    row = torch.arange(len(label))
    for _ in range(SHARING):
        found = match_low(particles, references)
        before, label = label, assign_equal(found.score, slack)
        if float((label != before).double().mean()) < RESTED:
            break
        pose = refine_at(particles.low, references, label, found.pose[row, label], shared=True)
        references, _ = references_of(
            particles.low, particles.half, label, pose, k, particles.averaging, shared=True
        )
    return label


def _core(
    particles: Pyramid, label: Tensor, pose: Pose, stable: Tensor, k: int, deviations: float | None
) -> Tensor:
    """(n,) bool: stable members whose score with their average is not far below the median."""
    if deviations is None:
        return stable
    used = torch.where(stable, label, -1)
    references, pose = references_of(
        particles.high, particles.half, used, pose, k, particles.averaging, shared=True
    )
    score = scores_at(particles.high, references, label, pose)
    return core_members(score, label, stable, deviations)


def _stable_references(
    particles: Pyramid, label: Tensor, stable: Tensor, pose: Pose, k: int
) -> Tensor:
    """(k, t, t) averages of the stable members; of all members if these are too few for an FRC."""
    enough = torch.bincount(label[stable], minlength=k) >= 4 * TRUSTED
    used = torch.where(stable | ~enough[label], label, -1)
    low = pose.scaled(1 / particles.coarse.factor)
    references, _ = references_of(
        particles.low, particles.half, used, low, k, particles.averaging, shared=True
    )
    return references


def _agreement(before: Tensor, now: Tensor, k: int) -> float:
    """Agreement of two labels (n,) with -1 for no class: the Jaccard index, mean over classes."""
    common = torch.bincount(now[(now == before) & (now >= 0)], minlength=k)
    sizes = [torch.bincount(x[x >= 0], minlength=k) for x in (before, now)]
    either = sizes[0] + sizes[1] - common
    return float((common[either > 0] / either[either > 0]).mean()) if either.any() else 0.0


def accept(work: Work, state: State, rest: Tensor, found: Generation, started: float) -> State:
    """The state with the stable classes of a generation that are large enough.

    Args:
        work: what is the same in all generations.
        state: state before the generation.
        rest: (m,) indices of the particles of the generation.
        found: result of the generation for these.
        started: time in seconds at which the generation began.
    """
    sizes = torch.bincount(found.label[found.stable], minlength=found.classes)
    good = sizes >= work.isac.least
    accepted = sum(row["accepted"] for row in state.history)
    number = accepted + torch.cumsum(good, 0) - 1
    kept = found.stable & good[found.label]
    members = rest[kept]
    label, error = state["label"].clone(), state["pixel_error"].clone()
    label[members], error[rest] = number[found.label[kept]], found.error
    before = shrunk_pose(state)
    moved = compose(before[members], found.pose[kept])
    angle, shift, mirror = (each.clone() for each in pose_tensors(before).values())
    angle[members], shift[members], mirror[members] = moved.angle, moved.shift, moved.mirror
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
    return state.next(
        row, done=bool(not good.any() or left < 2 * work.isac.images_per_group),
        unsaved=state.unsaved, label=label, pixel_error=error,
        angle=angle, shrunk_shift=shift, mirror=mirror,
    )  # fmt: skip
