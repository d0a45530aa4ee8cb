"""Reference-free alignment (RFA): particles of one view, aligned to their own average.

The first reference is the average of the particles without any alignment. In every iteration the
particles are aligned to the average, and a new average is made. The steps of a `Schedule` go from
large shifts and coarse trial shifts to small and fine ones; each step ends when the poses settle
(Penczek et al. 1992; SPARX's ``ali2d``).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.masks import masked
from cryoalign.methods.base import Method, align_with, shows_settings
from cryoalign.methods.references import (
    SEEDINGS,
    AlignAndAverage,
    find_all,
    given_references,
    random_poses,
)
from cryoalign.methods.state import State, pose_tensors
from cryoalign.operators.correlation import correlation_at
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.particles.settings import Box
from cryoalign.particles.stack import Stack
from cryoalign.pose import Found, Pose, wrap_degrees
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging
from cryoalign.runtime.arrays import Array
from cryoalign.search.match import prepare_target
from cryoalign.search.settings import Schedule, Search, SearchSettings

STEADY_HANDS = 0.01  # poses have settled if at most this share of particles changes its hand


@dataclass(frozen=True)
class ReferenceFree(Method):
    """Reference-free alignment of particles of one view.

    Every step of the schedule has at least one iteration.

    Attributes:
        references: as for `align_reference_free`; ``random`` means ``average``.
        n_classes: 1 or None.
        iterations: largest number of iterations of a step of the schedule.
        schedule: the steps, with the trial shifts of each.
        search: how poses are searched.
        averaging: how averages become references.
    """

    name = "rfa"
    purpose = "reference-free alignment, of one view"
    unused = frozenset({"particle.max_shift", "search.shift_step"})
    instead = {  # noqa: RUF012
        "particle.max_shift": "schedule.max_shift",
        "search.shift_step": "schedule.shift_step",
    }

    references: Array | str | Path = "average"
    n_classes: int | None = None
    iterations: int = 20
    schedule: Schedule = field(default_factory=Schedule)
    search: SearchSettings = field(default_factory=SearchSettings)
    averaging: Averaging = field(default_factory=Averaging)

    def check(self, box: Box, n: int | None = None) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        if self.n_classes not in (None, 1):
            raise ValueError("method=rfa makes one average: leave n_classes out, or use method=mra")
        self._search(box)

    @property
    def most_steps(self) -> int:
        return self.iterations * len(self.schedule)

    @property
    def shift_key(self) -> str:
        return "schedule.max_shift"

    def radius(self, box: Box) -> float:
        return self._search(box).rings(box.size).last_ring

    def max_shift(self, box: Box) -> float:
        return max(self.schedule.max_shift)

    def start(self, particles: PreparedParticles) -> State:
        work = self._work(particles)
        begun = [self._begin(work, image) for image in self._first_references(work)]
        if len(begun) == 1:
            return begun[0]
        ended = []
        for state in begun:
            while self._next_step(state) == 0:
                state = self.step(particles, state)
            ended.append(state)
        return max(ended, key=lambda state: float(state["score"].mean()))

    def is_done(self, state: State) -> bool:
        return self._next_step(state) >= len(self.schedule)

    def step(self, particles: PreparedParticles, state: State) -> State:
        started = time.perf_counter()
        work, schedule, number = self._work(particles), self.schedule, state.iteration + 1
        step = self._next_step(state)
        due = number % schedule.kick_every == 0 and number <= schedule.kicks * schedule.kick_every
        kicked = due and step + 1 < len(schedule)
        found = self._kick(work, state) if kicked else self._align(work, state, step)
        row: dict[str, Any] = {
            "iteration": number,
            "step": step + 1,
            "max_shift": schedule.max_shift[step],
            "shift_step": schedule.shift_step[step],
            "kicked": kicked,
            "mean_score": float(found.score.mean()),
            **work.change(state.pose, found.pose, first=number == 1),
        }
        sums = work.sum_classes(found.label, found.pose, 1)
        curve = sums.frc(work.mask())
        unit = particles.pixel_size or particles.scale
        row["resolution"] = float(frc.resolution(curve, particles.size, unit)[0])
        done = self.is_done(replace(state, iteration=number, history=[*state.history, row]))
        references, pose = work.renew(sums, found.label, found.pose, centre=not done)
        row["seconds"] = round(time.perf_counter() - started, 6)
        return state.next(
            row, done=done, pose=pose, unsaved={"sums": sums},
            references=references, label=found.label, score=found.score,
            average_iterations=torch.cat([state["average_iterations"], sums.averages().cpu()]),
            frc_iterations=torch.cat([state["frc_iterations"], curve.cpu()]),
        )  # fmt: skip

    def finish(self, particles: PreparedParticles, state: State) -> Alignment:
        return self._work(particles).result(state, self.quality)

    def line(self, row: Mapping[str, Any]) -> str:
        moved = ""
        if math.isfinite(row["pose_change_px"]):  # there was a pose before
            moved = (
                f"poses moved {row['pose_change_px']:.2f} px, {row['hand_changed']:.1%} changed "
                "hand, "
            )
        return (
            f"iteration {row['iteration']:3d}, step {row['step']} (±{row['max_shift']:g} px"
            f"{', coarse angles only' if row['kicked'] else ''}): score {row['mean_score']:.4f}, "
            f"{moved}{row['seconds']:.1f} s"
        )

    def step_files(
        self, state: State, box: Box
    ) -> tuple[dict[str, Tensor], dict[str, pd.DataFrame]]:
        curves = state["frc_iterations"]
        iterations, shells = curves.shape
        columns = {
            "iteration": torch.arange(1, iterations + 1).repeat_interleave(shells),
            "frequency": torch.arange(shells).double().repeat(iterations) / box.size,  # 1/px
            "frc": curves.flatten(),
        }
        stacks = {"average_iterations.mrcs": state["average_iterations"]}
        return stacks, {"frc_iterations.csv": pd.DataFrame(columns)}

    def _search(self, box: Box) -> Search:
        """The search of the step with the largest shifts, if the box has room for it."""
        search = self.search.on(replace(self.particle, max_shift="0 px"), box)
        search = self.schedule.widest(search)
        search.rings(box.size)
        return search

    def _work(self, particles: PreparedParticles) -> AlignAndAverage:
        search = self._search(particles.box)
        return AlignAndAverage(particles, self.averaging, search, search.rings(particles.size))

    def _first_references(self, work: AlignAndAverage) -> list[Tensor]:
        """(1, size, size) first reference of each start: the template; or averages of the particles
        without alignment for the first start, and at random angles for the others."""
        n, starts = len(work.particles), self.schedule.starts
        chosen = isinstance(self.references, str) and self.references in ("average", *SEEDINGS)
        if not chosen:
            template = given_references(work.particles, self.references)
            if len(template) != 1 or starts > 1:
                raise ValueError(
                    f"{len(template)} references and {starts} starts: reference-free alignment "
                    "takes one template and schedule.starts=1"
                )
            return [template]
        generator = torch.Generator().manual_seed(self.seed)
        turned = [random_poses(n, self.particle.mirror, generator) for _ in range(starts - 1)]
        label = torch.zeros(n, dtype=torch.int64)
        poses = [Pose.identity(n), *turned]
        return [work.sum_classes(label, pose, 1).averages() for pose in poses]

    def _begin(self, work: AlignAndAverage, image: Tensor) -> State:
        n, size = len(work.particles), work.particles.size
        tensors = {
            "references": masked(image, work.mask()),
            "label": torch.zeros(n, dtype=torch.int64),
            **pose_tensors(Pose.identity(n)),
            "score": torch.zeros(n),
            "average_iterations": torch.zeros(0, size, size),
            "frc_iterations": torch.zeros(0, size // 2 + 1),
        }
        return State(self.name, work.particles.fingerprint, tensors=tensors)

    def _next_step(self, state: State) -> int:
        """Index of the schedule's step for the next iteration; their number if none is left."""
        if not state.history:
            return 0
        row = state.history[-1]
        step = int(row["step"]) - 1
        done = sum(each["step"] == row["step"] for each in state.history)
        settled = (
            not row["kicked"]
            and state.iteration > 1
            and row["pose_change_px"] <= self.schedule.settle
            and row["hand_changed"] <= STEADY_HANDS
        )
        return step + 1 if settled or done >= self.iterations else step

    def _align(self, work: AlignAndAverage, state: State, step: int) -> Found:
        """Every particle's pose on the reference, with trial shifts about its present shift."""
        reach, last_ring = self.schedule.max_shift[step], work.rings.last_ring
        search = replace(
            work.search,
            max_shift=reach,
            shift_step=self.schedule.shift_step[step],
            last_ring=last_ring,  # the same in all steps
        )
        room = (work.particles.size - 1) // 2 - last_ring - math.ceil(reach)
        about = state.pose.shift.round().clamp(-room, room)
        references = state["references"].to(work.particles.device)
        return work.align(prepare_target(references, search), about)

    def _kick(self, work: AlignAndAverage, state: State) -> Found:
        """Every particle's best pose among multiples of the kick angle, at its present shift."""
        particles, rings, device = work.particles, work.rings, work.particles.device
        reference = state["references"].to(device)
        turned = torch.arange(0, 360, self.schedule.kick_angle, device=device)
        hands = [False, True] if self.particle.mirror else [False]

        def best(members: Tensor) -> Found:
            images = particles.read(members)
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
            return Found(torch.zeros_like(which), pose, score)

        return find_all(particles, best)


@shows_settings(ReferenceFree)
def align_reference_free(
    particles: Stack | Array | PreparedParticles,
    references: Array | str | Path = "average",
    **settings: Any,
) -> Alignment:
    """Align particles of one view to their own average, until poses settle.

    The history has, for each iteration, its step, the mean score, how much poses changed, the share
    of hands that changed and the resolution of the average.

    Args:
        particles: as for `align_multi_reference`.
        references: "average" starts from the average of the particles without alignment; or a
            template, as a stack of one image or its path.
        settings: those of `ReferenceFree`, and the arguments of `base.align`.

    Returns:
        The `Alignment`, with one class.

    Raises:
        ValueError: settings or a template that do not fit, before the first iteration.
    """
    return align_with(ReferenceFree, particles, references=references, **settings)
