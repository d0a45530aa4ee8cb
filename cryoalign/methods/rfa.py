"""Reference-free alignment (RFA): particles of one view, aligned to their own average.

The average of the stack as it comes is the first reference. Then, in the steps of a `Schedule`,
from wide and coarse shifts to narrow and fine ones, every particle is aligned to the average, and
the average made again, until poses come to rest (Penczek et al. 1992; SPARX's ``ali2d``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.masks import masked
from cryoalign.methods.base import (
    Alternation,
    Found,
    Progress,
    given_references,
    prepare_particles,
    refuse_other_particles,
)
from cryoalign.methods.state import MraState
from cryoalign.operators.correlation import correlation_at
from cryoalign.particles.prepare import Images
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging
from cryoalign.results.quality import Quality
from cryoalign.runtime.arrays import Array
from cryoalign.search.match import prepare
from cryoalign.search.settings import Schedule, Search

STEADY_HANDS = 0.01  # share of hands that may still change where poses are at rest


def align_reference_free(
    particles: Stack | Array,
    references: Array | str | Path = "average",
    *,
    schedule: Schedule | None = None,
    iterations: int = 20,
    search: Search | None = None,
    images: Images | None = None,
    averaging: Averaging | None = None,
    quality: Quality | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    max_rejected: float = 0.1,
    resume: MraState | None = None,
    on_iteration: Callable[[MraState], None] | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Align particles of one view to their own average, until they come to rest.

    Every step of the schedule is run, for one iteration at least. The history says of each
    iteration its step, the mean score, how far poses moved, the share of hands that changed and
    the resolution of the average.

    Args:
        particles: a stack (`io.read_particles`) or an array (n, size, size), a tensor or another
            (`interop.Array`).
        references: "average" begins with that of the particles as they come; or a template, a
            stack of one image or its path.
        schedule: the steps.
        iterations: of a step, at most.
        search: what poses are tried; its shifts are the schedule's.
        images, averaging, quality, device, batch_size, max_rejected, progress: as for
            `mra.align_multi_reference`.
        seed: of the random turns of further starts.
        resume: go on from this state, with the same particles and settings.
        on_iteration: called with the state after every iteration; with several starts, those of
            the first step come when the best is known.

    Returns:
        The `Alignment`, with one class.

    Raises:
        ValueError: anything that does not fit, before the first iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    schedule, averaging = schedule or Schedule(), averaging or Averaging()
    search = schedule.widest(search or Search())
    particles = as_stack(particles)
    shape = particles.shape
    if shape[0] == shape[1]:  # what does not fit should say so before pixels are read
        search.rings((images or Images()).box or shape[0])
    prepared = prepare_particles(particles, images, device, max_rejected, batch_size, progress)
    turns = Alternation(prepared, averaging, search.rings(prepared.size), progress)
    told = on_iteration or (lambda _: None)
    climb = _Climb(turns, schedule, search, iterations)
    if resume is None:
        state = climb.start(references, seed, told)
    else:
        state = resume
        refuse_other_particles(state, prepared)
    return turns.result(climb.run(state, len(schedule), told), search, quality)


@dataclass(frozen=True)
class _Climb:
    """Iterations along a schedule."""

    turns: Alternation
    schedule: Schedule
    search: Search
    iterations: int

    def start(
        self, references: Array | str | Path, seed: int, told: Callable[[MraState], None]
    ) -> MraState:
        """The best of the starts, after the first step; or the only one, before it."""
        firsts = self.first_references(references, seed)
        if len(firsts) == 1:
            return self._begin(firsts[0])
        found: list[list[MraState]] = []
        for first in firsts:
            passed: list[MraState] = []
            self.run(self._begin(first), 1, passed.append)
            found.append(passed)
        best = max(found, key=lambda states: float(states[-1].score.mean()))
        for state in best:
            told(state)
        return best[-1]

    def first_references(self, references: Array | str | Path, seed: int) -> list[Tensor]:
        """(1, size, size) of each start: the template, or averages of the particles, as they come
        and then turned at random."""
        turns, starts = self.turns, self.schedule.starts
        n = len(turns.particles)
        label, still = torch.zeros(n, dtype=torch.int64), Pose.identity(n)
        if not (isinstance(references, str) and references == "average"):
            template = given_references(turns.particles, references)
            if len(template) != 1 or starts > 1:
                raise ValueError(
                    f"{len(template)} references and {starts} starts: reference-free alignment "
                    "takes one template, and starts from it once"
                )
            return [template]
        generator = torch.Generator().manual_seed(seed)
        poses = [still]
        for _ in range(starts - 1):
            angle = 360 * torch.rand(n, generator=generator) - 180
            mirror = (torch.rand(n, generator=generator) < 0.5) & self.search.mirror
            poses.append(Pose(angle, still.shift, mirror))
        return [turns.sum_classes(label, pose, 1).averages() for pose in poses]

    def _begin(self, image: Tensor) -> MraState:
        n = len(self.turns.particles)
        return MraState(
            iteration=0,
            references=masked(image, self.turns.mask()),
            label=torch.zeros(n, dtype=torch.int64),
            pose=Pose.identity(n),
            score=torch.zeros(n),
            fingerprint=self.turns.particles.fingerprint,
        )

    def run(self, state: MraState, steps: int, told: Callable[[MraState], None]) -> MraState:
        """Iterate to the end of so many steps of the schedule."""
        while (step := self.next_step(state)) < steps:
            state = self.iterate(state, step)
            told(state)
        return state

    def next_step(self, state: MraState) -> int:
        """Index of the step that the next iteration belongs to; past the last: there is none."""
        if not state.history:
            return 0
        row = state.history[-1]
        step = int(row["step"]) - 1
        done = sum(each["step"] == row["step"] for each in state.history)
        rests = (
            not row["kicked"]
            and state.iteration > 1
            and row["pose_change_px"] <= self.schedule.settle
            and row["hand_changed"] <= STEADY_HANDS
        )
        return step + 1 if rests or done >= self.iterations else step

    def iterate(self, state: MraState, step: int) -> MraState:
        """One iteration of a step."""
        started = time.perf_counter()
        turns, schedule, number = self.turns, self.schedule, state.iteration + 1
        due = number % schedule.kick_every == 0 and number <= schedule.kicks * schedule.kick_every
        kicked = due and step + 1 < len(schedule)
        found = self.kick(state, schedule.kick_angle) if kicked else self.align(state, step)
        row: dict[str, Any] = {
            "iteration": number,
            "step": step + 1,
            "max_shift": schedule.max_shift[step],
            "shift_step": schedule.shift_step[step],
            "kicked": kicked,
            "mean_score": float(found.score.mean()),
            **turns.change(state.pose, found.pose),
        }
        if number == 1:  # there is no pose yet to have changed
            row |= {"pose_change_px": math.nan, "hand_changed": math.nan}
        sums = turns.sum_classes(found.label, found.pose, 1)
        curve, particles = sums.frc(turns.mask()), turns.particles
        unit = particles.pixel_size or particles.scale
        row["resolution"] = float(frc.resolution(curve, particles.size, unit)[0])
        done = replace(
            state, iteration=number, label=found.label, score=found.score,
            history=[*state.history, row], sums=sums, frc=curve,
        )  # fmt: skip
        last = self.next_step(done) == len(schedule)
        references, pose = turns.renew(sums, found.label, found.pose, centre=not last)
        row["seconds"] = round(time.perf_counter() - started, 6)
        return replace(done, references=references, pose=pose, settled=last)

    def align(self, state: MraState, step: int) -> Found:
        """Every particle's pose on the reference, about its own shift."""
        turns, last_ring = self.turns, self.turns.rings.last_ring
        reach = self.schedule.max_shift[step]
        search = replace(
            self.search,
            max_shift=reach,
            shift_step=self.schedule.shift_step[step],
            last_ring=last_ring,  # of the widest step, whatever room a narrower one leaves
        )
        room = (turns.particles.size - 1) // 2 - last_ring - math.ceil(reach)
        about = state.pose.shift.round().clamp(-room, room)
        return turns.search(prepare(state.references.to(turns.particles.device), search), about)

    def kick(self, state: MraState, angle: float) -> Found:
        """Every particle's best pose at its own shift and multiples of an angle."""
        particles, rings = self.turns.particles, self.turns.rings
        reference = state.references.to(particles.device)
        turned = torch.arange(0, 360, angle, device=particles.device)
        hands = [False, True] if self.search.mirror else [False]

        def best(members: Tensor) -> tuple[Tensor, Pose, Tensor]:
            images = particles.take(members)
            shift = state.pose.shift[members].to(images)
            tried = [
                Pose(each.expand(len(images)), shift, torch.full_like(members, hand).bool())
                for hand in hands
                for each in turned
            ]
            tried = [pose.to(images.device) for pose in tried]
            scores = [correlation_at(images, reference, pose, rings) for pose in tried]
            score, which = torch.stack(scores).max(0)
            mirror = which >= len(turned)
            pose = Pose(wrap_degrees(turned[which % len(turned)]), shift, mirror)
            return torch.zeros_like(which), pose, score

        return self.turns.find(best)
