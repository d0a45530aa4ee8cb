"""Find classes by expectation maximisation with splitting and merging.

Expectation maximisation with the full likelihood (`em_step`: classes, hands, angles and shifts are
weighted, CTF and noise spectrum are in the model) starts from random single particles, at a low
resolution, where it is fast. It finds most views if it starts with more classes than ``n_classes``.
Two kinds of error are left: a view has several classes, or a class has several views. *Merging*
joins classes that explain their members as well together as apart (`merging`). *Splitting* makes
new classes by an expectation maximisation of the members of each class alone; merging then reduces
their number to ``n_classes`` again. Cycles of splitting and merging are repeated as long as they
raise the likelihood. Then the resolution is increased.

Of many particles, a random sample (`sample_of`) takes part until the classes are found. The steps
at the last level of resolution are done with all particles.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cryoalign.methods.classify.em_step import (
    Sums,
    extend,
    maximise,
    mix_sums,
)
from cryoalign.methods.classify.fourier_rings import FourierRings
from cryoalign.methods.classify.groups import Groups
from cryoalign.methods.classify.invariants import SAMPLE, seeds_from_invariants
from cryoalign.methods.classify.merging import merge_classes
from cryoalign.methods.classify.resolution_level import Classified, ResolutionLevel, own_of
from cryoalign.methods.classify.settings import Plan
from cryoalign.methods.classify.whitening import Observations, Observer
from cryoalign.methods.state import State, pose_tensors
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.runtime.processes import gather_over_ranks, same_on_all_ranks
from cryoalign.search.settings import shift_grid

# Largest numbers of steps of an expectation maximisation, which limit the time.
START_STEPS, RELAX_STEPS, SPLIT_STEPS = 4, 8, 4
SETTLED = 1e-3  # stop when a step raises the log-evidence by less than this share of it
SUBSET, SUBSET_STEPS = 8, 5  # particles per class in the first subset; steps per resolution
COARSEST, RISES = 0.6, 3  # first resolution over that of the level; number of resolutions
MOMENTUM = 0.5  # weight of the earlier sums when those of a subset are added
FEWEST = 8  # smallest number of members per part of a class that is split
# Size of the sample of many particles: for each class, and the smallest and the largest.
SAMPLE_PER_CLASS, SMALLEST_SAMPLE, LARGEST_SAMPLE = 400, 20_000, 200_000


class _Result(NamedTuple):
    """The result of an expectation maximisation."""

    evidence: float  # mean log-evidence of a particle
    classes: Tensor  # (k, r, m) features of the class images
    found: Classified
    sums: Sums


class SplitAndMerge:
    """The classification of all particles, as done by one of the processes."""

    def __init__(
        self, plan: Plan, observe: Observer, particles: PreparedParticles, seed: int
    ) -> None:
        """
        Args:
            plan: the settings.
            observe: whitens some of the particles.
            particles: all particles; their ``report`` is called after every step.
            seed: seed of the random choices, the same on all processes.
        """
        self.plan, self.observe, self.particles = plan, observe, particles
        self.n = len(particles)
        self.sample = sample_of(self.n, plan.n_classes, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.history = list[dict[str, Any]]()
        self.clock = time.perf_counter()
        self._observed: tuple[bool, Observations] | None = None
        self._level: tuple[tuple[int, bool], ResolutionLevel] | None = None

    @property
    def sampled(self) -> bool:
        """Whether only a sample of the particles takes part until the last level."""
        return len(self.sample) < self.n

    def begin(self) -> State:
        """The state after the start with the highest likelihood."""
        level = self.level(0, torch.zeros(len(self.sample), 2))
        found = [self.start(level) for _ in range(self.plan.likelihood.starts)]
        return self.state(0, 0, level, max(found, key=lambda each: each.evidence))

    def advance(self, state: State) -> State:
        """Do a cycle of splitting and merging or, if it does not raise the likelihood, go on to
        the next level of resolution."""
        self.history = list(state.history)
        self.generator.set_state(state["generator"])
        number, cycle = int(state["level"]), int(state["cycle"])
        level = self.level(number, self.of_sample(state["own_shift"]))
        if cycle < self.plan.likelihood.cycles and number + 1 < len(self.plan.levels):
            label = self.of_sample(state["label"])
            trial = self.merge(level, self.split(level, label), "cycle")
            if trial.evidence > float(state["evidence"]):
                return self.state(number, cycle + 1, level, trial)
        classes, shift = state["classes"].to(level.device), self.of_sample(state["shift"])
        whole = self.sampled and number + 2 == len(self.plan.levels)
        if whole:
            shift = self.find_shifts(classes, level.rings)
        finer = self.level(number + 1, shift, whole)
        classes = extend(classes, level.rings, finer.rings)
        return self.state(number + 1, 0, finer, self.relax(finer, classes, "relax"))

    def find_shifts(self, classes: Tensor, rings: FourierRings) -> Tensor:
        """(n, 2) shifts of all particles, pixels, by an E-step at every level but the last.

        Args:
            classes: (k, r, m) features of the class images.
            rings: their rings.
        """
        shift = torch.zeros(self.n, 2)
        for number in range(len(self.plan.levels) - 1):
            level = self.level(number, shift, whole=True)
            found, _ = level.expect(extend(classes, rings, level.rings))
            self.note("all", level, len(classes), float(found.log_evidence.mean()), found)
            shift = found.shift
        return shift

    def of_sample(self, values: Tensor) -> Tensor:
        """Values (s, ...) of the sample from values (n, ...) of all particles."""
        return values[self.sample] if self.sampled else values

    def state(self, number: int, cycle: int, level: ResolutionLevel, result: _Result) -> State:
        """The state at level ``number``, after ``cycle`` cycles at this level. Particles that took
        no part yet have label -1."""
        found, part = result.found, len(level) < self.n

        def of_all(values: Tensor, unknown: float = 0) -> Tensor:
            if not part:
                return values
            filled = values.new_full((self.n, *values.shape[1:]), unknown)
            return filled.index_copy(0, self.sample, values)

        return State(
            "classify",
            self.particles.fingerprint,
            iteration=len(self.history),
            done=number + 1 == len(self.plan.levels),
            history=list(self.history),
            tensors={
                "n_classes": torch.tensor(self.plan.n_classes),
                "level": torch.tensor(number),
                "cycle": torch.tensor(cycle),
                "evidence": torch.tensor(result.evidence, dtype=torch.float64),
                "classes": result.classes.cpu(),
                "own_shift": of_all(level.own),
                "label": of_all(found.label, -1),
                **{name: of_all(values) for name, values in pose_tensors(found.pose).items()},
                "posterior": of_all(found.share),
                "runner_up": of_all(found.runner_up),
                "generator": self.generator.get_state(),
            },
            unsaved={"work": self},
        )

    def level(self, number: int, own: Tensor, whole: bool = False) -> ResolutionLevel:
        """Level ``number`` of the sample. The last one is kept, with its features.

        Args:
            number: number of the level.
            own: (s, 2) centres of the trial shifts, pixels.
            whole: of all particles, not of the sample.
        """
        whole = whole or not self.sampled
        if self._level is None or self._level[0] != (number, whole):
            self._level = None  # first, so that its memory is free
            last, reach, step = self.plan.levels[number]
            seen = self.observations(whole)
            level = ResolutionLevel(
                seen, own_of(len(own), seen.device).start, own,
                shift_grid(reach, step, seen.device), seen.rings.to(last), self.plan.mirror,
            )  # fmt: skip
            self._level = (number, whole), level
        return self._level[1]

    def observations(self, whole: bool) -> Observations:
        """This process's parts of all particles, or of the sample."""
        if self._observed is None or self._observed[0] != whole:
            self._observed = None
            rows = torch.arange(self.n) if whole else self.sample
            own = own_of(len(rows), self.particles.device)
            self._observed = whole, self.observe(rows[own])
        return self._observed[1]

    def start(self, level: ResolutionLevel) -> _Result:
        """Make the first classes: more than ``n_classes``, which are then merged."""
        if self.plan.likelihood.start == "invariants":
            return self.relax(level, self.from_invariants(level), "start")
        many = math.ceil(self.plan.likelihood.surplus * self.plan.n_classes)
        rows = self.random(len(level))[: min(many, len(level) // 2)]
        if self.plan.likelihood.start == "stochastic":
            classes = self.from_subsets(level, rows)
        else:
            classes = level.single_particles(rows, level.signal_power())
        result = self.relax(level, classes, "start", START_STEPS)
        return self.merge(level, result.sums, "start")

    def from_invariants(self, level: ResolutionLevel) -> Tensor:
        """Classes from groups of particles with similar rotation-invariant features (`invariants`).

        Each class is made by an expectation maximisation of the members of a group, which starts
        from the member that is most similar to the others.
        """
        seen, rows = level.observations, self.random(len(level))[:SAMPLE].sort().values
        polar, weight = seen.take(rows[level.is_here(rows)] - level.start)
        polar = torch.view_as_complex(gather_over_ranks(torch.view_as_real(polar)))
        some = Observations(polar, gather_over_ranks(weight), seen.rings)
        seeds = seeds_from_invariants(
            some, some.rings, shift_grid(self.plan.max_shift, 1.0, level.device),
            self.plan.n_classes, mirror=level.mirror, seed=int(self.random(2**16)[0]),
        )  # fmt: skip
        label, member = same_on_all_ranks(seeds.label), same_on_all_ranks(seeds.member)
        groups = Groups(level, [rows[label == c] for c in range(self.plan.n_classes)])
        classes = level.single_particles(rows[member], level.signal_power())
        _, classes = self.expect_members(level, groups, list(classes.split(1)))
        return classes

    def from_subsets(self, level: ResolutionLevel, seeds: Tensor) -> Tensor:
        """Classes from small steps on growing random subsets, while rings are added.

        The sums of a subset are the gradient of its log-likelihood with respect to the classes.
        Averaging them with the earlier sums is a natural-gradient step with momentum (online
        expectation maximisation: Cappé & Moulines 2009). The weight of early subsets, and with it
        the effect of early errors, falls quickly.
        """
        rise = torch.linspace(COARSEST, 1.0, RISES) * level.rings.last
        levels = [replace(level, rings=level.rings.to(max(3, round(r)))) for r in rise.tolist()]
        classes = levels[0].single_particles(seeds, levels[0].signal_power())
        n = len(level)
        first = min(n, SUBSET * len(seeds))
        step = 0
        for before, now in zip([levels[0], *levels], levels, strict=False):
            classes, total = extend(classes, before.rings, now.rings), None
            for _ in range(SUBSET_STEPS):
                grown = (step / (RISES * SUBSET_STEPS)) ** 2 / 2  # up to half of all
                size = first + round(grown * (n - first))
                rows = self.random(n)[:size].sort().values
                evidence, sums = now.sums_of(rows, classes)
                total = sums if total is None else mix_sums(total, sums, MOMENTUM)
                classes = maximise(total, now.rings)
                step += 1
                self.note("subset", now, len(classes), evidence)
        return classes

    def merge(self, level: ResolutionLevel, sums: Sums, step: str) -> _Result:
        """Merge to ``n_classes`` classes, followed by expectation maximisation."""
        apart = shift_grid(self.plan.max_shift + 1, 1.0, level.device)
        merged, _ = merge_classes(sums, level.rings, apart, self.plan.n_classes, level.mirror)
        return self.relax(level, maximise(merged, level.rings), step)

    def relax(
        self, level: ResolutionLevel, classes: Tensor, step: str, steps: int = RELAX_STEPS
    ) -> _Result:
        """Expectation maximisation until it settles, or for ``steps`` steps."""
        evidence = -math.inf
        for _ in range(steps):
            found, sums = level.expect(classes)
            classes = maximise(sums, level.rings)
            before, evidence = evidence, float(found.log_evidence.mean())
            self.note(step, level, len(classes), evidence, found)
            if evidence - before < SETTLED * abs(evidence):
                break
        return _Result(evidence, classes, found, sums)

    def split(self, level: ResolutionLevel, label: Tensor) -> Sums:
        """Split every class, by an expectation maximisation of its members alone."""
        members = [(label == c).nonzero().squeeze(1) for c in range(int(label.max()) + 1)]
        members = [each for each in members if len(each)]
        seeds = [each[self.seeds(len(each))] for each in members]
        classes = level.single_particles(torch.cat(seeds), level.signal_power())
        counts = [len(each) for each in seeds]
        return self.expect_members(level, Groups(level, members), list(classes.split(counts)))[0]

    def expect_members(
        self, level: ResolutionLevel, groups: Groups, classes: list[Tensor]
    ) -> tuple[Sums, Tensor]:
        """Sums and images of all classes, where the classes of each group are made of its members.

        Args:
            level: the level of resolution.
            groups: the groups.
            classes: (j, r, m) first class images of each group.
        """
        children = [len(each) for each in classes]
        for _ in range(SPLIT_STEPS):
            sums = groups.expect(classes)
            images = maximise(sums, level.rings)
            classes = list(images.split(children))
        return sums, images

    def seeds(self, members: int) -> Tensor:
        """Indices among the members of a class of those from which its parts start."""
        children = max(1, min(self.plan.likelihood.split, members // FEWEST))
        return self.random(members)[:children].sort().values

    def random(self, n: int) -> Tensor:
        """0 … n - 1 in random order."""
        return torch.randperm(n, generator=self.generator)

    def note(
        self, step: str, level: ResolutionLevel, k: int, evidence: float,
        found: Classified | None = None,
    ) -> None:  # fmt: skip
        """Add a row to the history; ``found`` is None for a step on a subset of the particles."""
        sizes = torch.zeros(1) if found is None else torch.bincount(found.label, minlength=k)
        row = {
            "iteration": len(self.history) + 1,
            "step": step,
            "rings": level.rings.last,
            "classes": k,
            "log_evidence": evidence,
            "certainty": math.nan if found is None else float(found.share.mean()),
            "smallest_class": int(sizes.min()),
            "largest_class": int(sizes.max()),
            "empty_classes": 0 if found is None else int((sizes == 0).sum()),
            "seconds": round(time.perf_counter() - self.clock, 3),
        }
        self.history.append(row)
        self.clock = time.perf_counter()
        self.particles.report(step, len(self.history), 0)


def sample_of(n: int, n_classes: int, seed: int) -> Tensor:
    """(s,) indices of the particles with which classes are found, in ascending order: a random
    sample of `SAMPLE_PER_CLASS` for each class, within limits, or all n if there are no more."""
    size = max(SMALLEST_SAMPLE, min(LARGEST_SAMPLE, SAMPLE_PER_CLASS * n_classes))
    if size >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size].sort().values
