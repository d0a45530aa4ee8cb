"""The climb from random particles to classes, step by step.

Expectation maximisation with the full likelihood (classes, hands, angles and shifts weighted, CTF
and noise spectrum in the model; `expectation`) finds most views from random single particles if
it starts with more classes than asked, at a resolution where the table is small. What it leaves
is of two kinds, views that have several classes and classes that hold several views, and both are
mended by moves that need no luck: *merging* the classes that explain their members as well
together (`merge`), and *splitting* every class by an expectation maximisation of its own members
alone, which costs no more than a class each. Merging back to the number asked then keeps what
splitting found. Cycles of these, then ever more rings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.methods.classify.band import Band, Found, shift_grid, sums_over_ranks
from cryoalign.methods.classify.em_step import (
    Features,
    Sums,
    expect,
    extend,
    join_classes,
    maximise,
    mix_sums,
    no_sums,
)
from cryoalign.methods.classify.invariants import SAMPLE, seeds_from_invariants
from cryoalign.methods.classify.merging import merge_classes
from cryoalign.methods.classify.whitening import Observations
from cryoalign.methods.state import ClimbState
from cryoalign.runtime.processes import gather_over_ranks, same_on_all_ranks, shard
from cryoalign.runtime.settings import FORBID

Progress = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all) now and then."""

START_STEPS, RELAX_STEPS, SPLIT_STEPS = 4, 8, 4  # of expectation maximisation, at most
SETTLED = 1e-3  # gain of log-evidence in a step, as a share of it, below which it is at rest
SUBSET, SUBSET_STEPS = 8, 5  # particles per class of the first subset; steps at a resolution
COARSEST, RISES = 0.6, 3  # the first resolution as a share of the start's; resolutions
MOMENTUM = 0.5  # share of the sums that a subset leaves of those before
FEWEST = 8  # members per child of a class that is split


@dataclass(frozen=True, config=FORBID)
class Likelihood:
    """What the likelihood knows and how it is climbed.

    Attributes:
        mask_radius: of the particle, pixels of the prepared images; None is 0.4 of the box.
        max_shift: how far off centre particles may be, pixels.
        mirror: whether mirrored particles are of one class.
        ctf: use the CTF where the STAR file has a defocus; false never does.
        start: how a climb starts: `singles` from random particles by expectation maximisation
            over all particles; `stochastic` by steps on random subsets that grow; `invariants`
            from groups that look alike before anything is aligned.
        starts: independent starts, of which the likeliest goes on.
        surplus: classes to start with, per class asked.
        split: children that every class is split into.
        cycles: of splitting, merging and relaxing at a resolution, at most: the first that does
            not gain is the last.
        start_detail, end_detail: resolution of the start and the end, periods across the
            particle's diameter.
    """

    mask_radius: float | None = Field(
        default=None, gt=0, description="radius of the particle, px; null: 0.4 of the box"
    )
    max_shift: float = Field(default=3.0, ge=0, description="how far off centre, px")
    mirror: bool = Field(default=True, description="mirrored particles are of one class")
    ctf: bool = Field(default=True, description="use the CTF where the STAR file has a defocus")
    start: Literal["singles", "stochastic", "invariants"] = Field(
        default="singles",
        description="singles: from random particles; stochastic: by growing random subsets; "
        "invariants: from groups by rotation-invariant features",
    )
    starts: int = Field(default=1, ge=1, description="independent starts; the likeliest goes on")
    surplus: float = Field(default=1.5, ge=1, description="classes to start with per class asked")
    split: int = Field(default=3, ge=2, description="children every class is split into")
    cycles: int = Field(
        default=4, ge=0, description="of splitting, merging and relaxing, while they gain"
    )
    start_detail: float = Field(
        default=8.0, gt=1, description="resolution at the start, periods across the particle"
    )
    end_detail: float = Field(
        default=11.2, gt=1, description="resolution at the end, periods across the particle"
    )

    def __post_init__(self) -> None:
        if self.end_detail < self.start_detail:
            raise ValueError(
                f"likelihood.end_detail {self.end_detail:g} is coarser than start_detail "
                f"{self.start_detail:g}: make it as large at least"
            )


@plain_dataclass(frozen=True)
class Plan:
    """The settings in the units of the prepared images.

    Attributes:
        likelihood: the settings.
        n_classes: classes asked.
        radius: of the particle, pixels.
        size: box, pixels.
    """

    likelihood: Likelihood
    n_classes: int
    radius: float
    size: int

    def __post_init__(self) -> None:
        room = self.size / 2 - 1
        if self.size < 16 or self.radius > room:
            raise ValueError(
                f"a particle of radius {self.radius:g} px leaves no background in a box of "
                f"{self.size} px: likelihood.mask_radius can be at most {room:g}, of a box of 16 "
                "px at least"
            )

    def ring(self, detail: float) -> int:
        """The Fourier ring of so many periods across the particle."""
        most = self.size // 2 - 1
        return min(max(3, round(detail * self.size / (2 * self.radius))), most)

    @property
    def levels(self) -> list[tuple[int, float, float]]:
        """Last ring, reach and step of the trial shifts: wide and coarse, then narrow and fine
        about what was found."""
        start, end = self.ring(self.likelihood.start_detail), self.ring(self.likelihood.end_detail)
        reach = self.likelihood.max_shift
        wide = 2.0 if reach >= 2 else 1.0
        return [(start, reach, wide), (round((start + end) / 2), 1.0, 1.0), (end, 1.0, 0.5)]


class _Rest(NamedTuple):
    """Where an expectation maximisation came to rest."""

    evidence: float  # mean log-evidence of a particle
    classes: Tensor  # (k, r, m)
    found: Found
    sums: Sums


class Climb:
    """The climb, with one process's particles, in step with the other processes'."""

    def __init__(
        self, plan: Plan, observations: Observations, n: int, seed: int,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            plan: the settings.
            observations: of this process's shard of the particles.
            n: particles of all processes.
            seed: of the random choices, the same on all.
            progress: told after every step.
        """
        self.plan, self.observations, self.n = plan, observations, n
        self.generator = torch.Generator().manual_seed(seed)
        self.progress, self.history = progress, list[dict[str, Any]]()
        self.clock = time.perf_counter()
        self._band: tuple[int, Band] | None = None

    def begin(self) -> ClimbState:
        """The likeliest of the starts."""
        band = self.band(0, torch.zeros(self.n, 2))
        found = [self.start(band) for _ in range(self.plan.likelihood.starts)]
        return self.state(0, 0, band, max(found, key=lambda each: each.evidence))

    def advance(self, state: ClimbState) -> ClimbState:
        """A cycle of splitting and merging or, where that gains no more, more rings."""
        self.history = list(state.history)
        self.generator.set_state(state.generator)
        band, level = self.band(state.level, state.own), state.level + 1
        if state.cycle < self.plan.likelihood.cycles and level < len(self.plan.levels):
            trial = self.merge(band, self.split(band, state.found.label), "cycle")
            if trial.evidence > state.evidence:
                return self.state(state.level, state.cycle + 1, band, trial)
        finer = self.band(level, state.found.shift)
        classes = extend(state.classes.to(band.device), band.rings, finer.rings)
        return self.state(level, 0, finer, self.relax(finer, classes, "relax"))

    def state(self, level: int, cycle: int, band: Band, rest: _Rest) -> ClimbState:
        """Where the climb is."""
        return ClimbState(
            level=level,
            cycle=cycle,
            done=level + 1 == len(self.plan.levels),
            evidence=rest.evidence,
            classes=rest.classes.cpu(),
            own=band.own,
            found=rest.found,
            history=list(self.history),
            generator=self.generator.get_state(),
        )

    def band(self, level: int, own: Tensor) -> Band:
        """What a level iterates; the last one asked for is kept, with its features."""
        if self._band is None or self._band[0] != level:
            last, reach, step = self.plan.levels[level]
            device = self.observations.polar.device
            band = Band(
                self.observations, shard(self.n).start, own, shift_grid(reach, step, device),
                self.observations.rings.to(last), self.plan.likelihood.mirror,
            )  # fmt: skip
            self._band = level, band
        return self._band[1]

    def start(self, band: Band) -> _Rest:
        """From random single particles, more than the classes asked, merged to as many."""
        if self.plan.likelihood.start == "invariants":
            return self.relax(band, self.alike(band), "start")
        many = math.ceil(self.plan.likelihood.surplus * self.plan.n_classes)
        rows = self.random(self.n)[: min(many, self.n // 2)]
        if self.plan.likelihood.start == "stochastic":
            classes = self.descend(band, rows)
        else:
            classes = band.single_particles(rows, band.signal_power())
        rest = self.relax(band, classes, "start", START_STEPS)
        return self.merge(band, rest.sums, "start")

    def alike(self, band: Band) -> Tensor:
        """Classes of particles that look alike before any is aligned (`invariants`).

        An expectation maximisation of every group's own members, from the one most like them.
        """
        rows = self.random(self.n)[:SAMPLE].sort().values
        here = (rows[band.is_here(rows)] - band.start).to(band.device)
        polar = torch.view_as_real(self.observations.polar[here])
        some = Observations(
            torch.view_as_complex(gather_over_ranks(polar)),
            gather_over_ranks(self.observations.weight[here]),
            self.observations.rings,
        )
        seeds = seeds_from_invariants(
            some, some.rings, shift_grid(self.plan.likelihood.max_shift, 1.0, band.device),
            self.plan.n_classes, mirror=band.mirror, seed=int(self.random(2**16)[0]),
        )  # fmt: skip
        label, members = same_on_all_ranks(seeds.label), same_on_all_ranks(seeds.member)
        families = [_Family(band, rows[label == c]) for c in range(self.plan.n_classes)]
        classes = band.single_particles(rows[members], band.signal_power())
        _, classes = self.raise_families(band, families, list(classes.split(1)))
        return classes

    def descend(self, band: Band, seeds: Tensor) -> Tensor:
        """Classes by small steps on random subsets that grow, while rings are added.

        The sums of a subset are the gradient of its log-likelihood with respect to the classes;
        mixed into those before they are a natural-gradient step with momentum (online expectation
        maximisation: Cappé & Moulines 2009). What few particles know is soon forgotten, and early
        wrong turns with it.
        """
        rise = torch.linspace(COARSEST, 1.0, RISES) * band.rings.last
        bands = [replace(band, rings=band.rings.to(max(3, round(r)))) for r in rise.tolist()]
        classes = bands[0].single_particles(seeds, bands[0].signal_power())
        first = min(self.n, SUBSET * len(seeds))
        step = 0
        for before, now in zip([bands[0], *bands], bands, strict=False):
            classes, total = extend(classes, before.rings, now.rings), None
            for _ in range(SUBSET_STEPS):
                grown = (step / (RISES * SUBSET_STEPS)) ** 2 / 2  # up to half of all
                size = first + round(grown * (self.n - first))
                rows = self.random(self.n)[:size].sort().values
                evidence, sums = now.sums_of(rows, classes)
                total = sums if total is None else mix_sums(total, sums, MOMENTUM)
                classes = maximise(total, now.rings)
                step += 1
                self.note("subset", now, len(classes), evidence)
        return classes

    def merge(self, band: Band, sums: Sums, step: str) -> _Rest:
        """Merged to the number of classes asked, and relaxed."""
        apart = shift_grid(self.plan.likelihood.max_shift + 1, 1.0, band.device)
        merged, _ = merge_classes(sums, band.rings, apart, self.plan.n_classes, band.mirror)
        return self.relax(band, maximise(merged, band.rings), step)

    def relax(self, band: Band, classes: Tensor, step: str, steps: int = RELAX_STEPS) -> _Rest:
        """Plain expectation maximisation, until it rests or for so many steps."""
        evidence = -math.inf
        for _ in range(steps):
            found, sums = band.expect(classes)
            classes = maximise(sums, band.rings)
            before, evidence = evidence, float(found.log_evidence.mean())
            self.note(step, band, len(classes), evidence, found)
            if evidence - before < SETTLED * abs(evidence):
                break
        return _Rest(evidence, classes, found, sums)

    def split(self, band: Band, label: Tensor) -> Sums:
        """Children of every class: an expectation maximisation of its members alone."""
        groups = [(label == c).nonzero().squeeze(1) for c in range(int(label.max()) + 1)]
        groups = [members for members in groups if len(members)]
        seeds = [members[self.seeds(len(members))] for members in groups]
        children = [len(each) for each in seeds]
        classes = band.single_particles(torch.cat(seeds), band.signal_power())
        families = [_Family(band, members) for members in groups]
        return self.raise_families(band, families, list(classes.split(children)))[0]

    def raise_families(
        self, band: Band, families: list[_Family], classes: list[Tensor]
    ) -> tuple[Sums, Tensor]:
        """Sums and images of all classes, those of each family made of its members alone."""
        children = [len(each) for each in classes]
        for _ in range(SPLIT_STEPS):
            pairs = zip(families, classes, strict=True)
            parts = list(band.over(lambda pair: pair[0].expect(pair[1]), pairs))
            sums = sums_over_ranks(join_classes(parts))
            images = maximise(sums, band.rings)
            classes = list(images.split(children))
        return sums, images

    def seeds(self, members: int) -> Tensor:
        """Which of a class's members its children start from."""
        children = max(1, min(self.plan.likelihood.split, members // FEWEST))
        return self.random(members)[:children].sort().values

    def random(self, n: int) -> Tensor:
        """0 … n - 1 in random order."""
        return torch.randperm(n, generator=self.generator)

    def note(
        self, step: str, band: Band, k: int, evidence: float, found: Found | None = None
    ) -> None:
        """A row of the history; steps on subsets know nothing of all particles."""
        row = {
            "iteration": len(self.history) + 1,
            "step": step,
            "rings": band.rings.last,
            "classes": k,
            "log_evidence": evidence,
            "certainty": math.nan,
            "smallest_class": 0,
            "largest_class": 0,
            "empty_classes": 0,
            "seconds": round(time.perf_counter() - self.clock, 3),
        }
        if found is not None:
            sizes = torch.bincount(found.label, minlength=k)
            row |= {
                "certainty": float(found.share.mean()),
                "smallest_class": int(sizes.min()),
                "largest_class": int(sizes.max()),
                "empty_classes": int((sizes == 0).sum()),
            }
        self.history.append(row)
        self.clock = time.perf_counter()
        if self.progress is not None:
            self.progress(step, len(self.history), 0)


class _Family:
    """The members of a class, of which its children are made; this process's part of them."""

    def __init__(self, band: Band, members: Tensor) -> None:
        here = band.is_here(members)
        self.band, self.rows = band, members[here]
        self.half = (torch.arange(len(members)) % 2)[here]
        self.kept: Features | None = None

    def expect(self, classes: Tensor) -> Sums:
        """Sums of an E-step of these members over these classes alone."""
        if not len(self.rows):
            return no_sums(classes)
        made = self.kept or self.band.of(self.rows)
        if self.band.fits(len(self.band.observations)):
            self.kept = made
        return expect(made, classes, half=self.half, mirror=self.band.mirror)[1]
