"""Iterative stable alignment and clustering (ISAC).

ISAC finds classes whose members get the same poses whenever they are aligned (Yang, Fang,
Chittuluri, Asturias & Penczek 2012). Particles are shrunk, centred and classified in generations
until the particles that are left make no stable class (`generations`). Then averages of the stable
members are made at full size, and ordered so that neighbours are similar.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.methods.base import Method, align_with, shows_settings
from cryoalign.methods.isac.generations import (
    Work,
    accept,
    centre_particles,
    centred_pyramid,
    generation,
    shrunk_pose,
)
from cryoalign.methods.isac.ordering import order_averages
from cryoalign.methods.isac.settings import Isac, scale_of
from cryoalign.methods.isac.stability import match_classes, reproducibility
from cryoalign.methods.references import refine_on_averages
from cryoalign.methods.state import State
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.particles.settings import Box
from cryoalign.particles.stack import Stack
from cryoalign.pose import Found, compose
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging, class_sums
from cryoalign.results.evidence import Scope, trials_of
from cryoalign.results.quality import conclude
from cryoalign.runtime.arrays import Array
from cryoalign.search.settings import Search

UNSTABLE = "in no stable class"  # reason in the list of particles set aside


@dataclass(frozen=True, eq=False)
class StableClasses:
    """The result of ISAC.

    Attributes:
        alignment: stable members of accepted classes. All other particles are set aside (class
            number 0) and listed in ``rejected``, with the reason. ``class_quality`` has the columns
            ``pixel_error``, the mean of the class's members, and ``order``, the place of the class
            in an order in which neighbours are similar.
    """

    alignment: Alignment

    @property
    def pixel_error(self) -> Tensor:
        """(n,) pixel error between realignments of every particle of the input, in pixels of the
        shrunk images, when last measured; NaN if unusable, infinite if hands differ."""
        return torch.from_numpy(self.alignment.particle_quality["pixel_error"].to_numpy().copy())

    @property
    def generation(self) -> Tensor:
        """(n,) generation in which the particle's class was accepted; 0 if it has no class."""
        return torch.from_numpy(self.alignment.particle_quality["generation"].to_numpy().copy())

    @property
    def matched(self) -> pd.DataFrame:
        """A row per class and its partner in a repeated run (`stability.match_classes`, and the
        column ``repeat``); empty without repeats."""
        return self.alignment.tables.get("reproducibility", _NO_MATCH)

    @property
    def reproduced(self) -> float:
        """Share of particles in matched classes among those that the first run or the repeat has in
        a class, averaged over repeats; NaN without repeats."""
        return self.alignment.figures.get("reproduced", math.nan)

    def to_frame(self) -> pd.DataFrame:
        """A row per input particle: index, class_number, generation, pixel_error."""
        return self.alignment.tables["stability"]


_NO_MATCH = pd.DataFrame(
    {name: pd.Series(dtype="int64") for name in ("class_a", "class_b", "size_a", "size_b")}
    | {"common": pd.Series(dtype="int64"), "jaccard": pd.Series(dtype="float64")}
    | {"repeat": pd.Series(dtype="int64")}
)


@dataclass(frozen=True)
class StableClassification(Method):
    """Iterative stable alignment and clustering (ISAC).

    Poses in its state are in pixels of the shrunk images. The pose of a particle in a class
    (``label``) is that on the class average; the pose of another particle (label -1) is the shift
    that centres it.

    Attributes:
        iterations: largest number of generations.
        isac: what a stable class is, and how it is found.
        averaging: how averages become references.
    """

    name = "isac"
    purpose = "stable classes of equal size"
    instead = {"n_classes": "isac.images_per_group"}  # noqa: RUF012
    in_order = True

    iterations: int = 20
    isac: Isac = field(default_factory=Isac)
    averaging: Averaging = field(default_factory=Averaging)

    def check(self, box: Box, n: int | None = None) -> None:
        scale_of(self.isac, self.particle, box)
        if n is not None and n < self.isac.images_per_group:
            raise ValueError(
                f"{n} usable particles are fewer than a class needs, isac.images_per_group "
                f"{self.isac.images_per_group}: use a smaller isac.images_per_group"
            )

    def start(self, particles: PreparedParticles) -> State:
        work = self._work(particles)
        images, n = work.shrunk(), len(particles)
        pose, label = centre_particles(work, images), torch.full((n,), -1)
        error = torch.full((n,), torch.nan)
        return State(
            self.name,
            particles.fingerprint,
            tensors={
                "label": label,
                "pixel_error": error,
                "angle": pose.angle,
                "shrunk_shift": pose.shift,
                "mirror": pose.mirror,
            },
            unsaved={"pyramid": centred_pyramid(work, images, label, pose)},
        )

    def is_done(self, state: State) -> bool:
        left = int((state["label"] < 0).sum())
        return state.done or state.iteration >= self.iterations or left < self.isac.least

    def step(self, particles: PreparedParticles, state: State) -> State:
        started, work = time.perf_counter(), self._work(particles)
        pyramid = state.unsaved.get("pyramid")
        if pyramid is None:
            pyramid = centred_pyramid(work, work.shrunk(), state["label"], shrunk_pose(state))
        state.unsaved["pyramid"] = pyramid
        rest = (state["label"] < 0).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * state.iteration)
        found = generation(work, pyramid.take(rest), generator, state.iteration + 1)
        return accept(work, state, rest, found, started)

    def finish(self, particles: PreparedParticles, state: State) -> Alignment:
        state.unsaved.pop("pyramid", None)  # large, and not needed any more
        first = self._conclude(particles, state)
        numbers_here = _class_numbers(particles, state, first)
        stability = first.to_frame()[["index", "class_number", "generation", "pixel_error"]]
        tables = {"stability": stability}
        matched, shares = list[pd.DataFrame](), list[float]()
        for again in range(1, self.isac.repeats):
            method = replace(self, seed=self.seed + again)
            other = method.start(particles)
            while not method.is_done(other):
                other = method.step(particles, other)
            numbers = torch.zeros_like(first.class_number)
            numbers[particles.rows] = other["label"] + 1
            pairs = match_classes(numbers_here, numbers)
            matched.append(pairs.assign(repeat=again))
            shares.append(reproducibility(numbers_here, numbers))
        if not shares:
            return replace(first, tables=tables)
        tables["reproducibility"] = pd.concat(matched, ignore_index=True)
        return replace(first, tables=tables, figures={"reproduced": sum(shares) / len(shares)})

    def line(self, row: Mapping[str, Any]) -> str:
        return (
            f"generation {row['iteration']:3d}: {row['accepted']} of {row['classes']} classes "
            f"accepted, {row['stable_share']:.1%} of {row['particles']} particles stable; "
            f"{row['accounted']} in classes ({row['accounted_share']:.1%}), "
            f"{row['seconds']:.1f} s"
        )

    def _work(self, particles: PreparedParticles) -> Work:
        scale = scale_of(self.isac, self.particle, particles.box)
        return Work(particles, self.isac, self.averaging, self.particle.mirror, scale)

    def _conclude(self, particles: PreparedParticles, state: State) -> Alignment:
        """Refine poses on averages at full size, order these, and make the `Alignment`."""
        members = (state["label"] >= 0).nonzero().squeeze(1)
        if not len(members):
            raise ValueError(
                f"no class has {self.isac.least} stable members: use a larger isac.threshold, a "
                "smaller isac.min_group_size, or a smaller isac.images_per_group "
                f"(now {self.isac.images_per_group}, of {len(particles)} particles)"
            )
        work, label = self._work(particles), state["label"][members]
        some = work.particles.only(members, UNSTABLE)
        size, device, k = some.size, some.device, int(label.max()) + 1
        radius = work.scale.last_ring * work.scale.factor
        mask = soft_mask(size, self.particle.radius_in(some.box) or radius,
                         self.averaging.mask_edge, device)  # fmt: skip
        rings = Rings(last_ring=min(round(radius), (size - 1) // 2 - 1))  # room for a shift
        pose = shrunk_pose(state)[members].scaled(work.scale.factor)
        found, references = refine_on_averages(some, label, pose, k, self.averaging, mask, rings)
        search = Search(max_shift=1, last_ring=rings.last_ring, mirror=self.particle.mirror)
        order, turn = order_averages(references, search)
        found = Found(label, compose(found.pose, turn[label]), found.score)
        trials = trials_of(
            k, self.particle.max_shift_in(some.box), rings.last_ring, self.particle.mirror
        )
        error = _class_means(state["pixel_error"][members], label, k)
        by_class = pd.DataFrame(
            {"order": order.argsort().numpy() + 1, "pixel_error": error.numpy()}
        )
        return conclude(
            some, found, class_sums(some, found.pose, label, k), Scope(mask, rings, trials),
            state.history, self.quality, by_class=by_class, by_row=self._by_row(particles, state),
        )  # fmt: skip

    def _by_row(self, particles: PreparedParticles, state: State) -> pd.DataFrame:
        """Generation and pixel error of all rows of the input."""
        error = torch.full((len(particles.stack),), torch.nan)
        error[particles.rows] = state["pixel_error"]
        counts = [(row["iteration"], row["accepted"]) for row in state.history]
        born = torch.tensor([number for number, accepted in counts for _ in range(accepted)])
        generation = torch.zeros(len(error), dtype=torch.int64)
        label = state["label"]
        generation[particles.rows[label >= 0]] = born[label[label >= 0]]
        return pd.DataFrame({"generation": generation.numpy(), "pixel_error": error.numpy()})


def _class_numbers(particles: PreparedParticles, state: State, result: Alignment) -> Tensor:
    """(n,) class number of every row of the input, also of members that were set aside as junk."""
    members = state["label"] >= 0
    rows, label = particles.rows[members], state["label"][members]
    kept = result.class_number[rows] > 0
    number = torch.zeros(int(label.max()) + 1, dtype=torch.int64)
    number[label[kept]] = result.class_number[rows[kept]]
    numbers = torch.zeros_like(result.class_number)
    numbers[rows] = number[label]
    return numbers


@shows_settings(StableClassification)
def classify_stable(particles: Stack | Array | PreparedParticles, **settings: Any) -> StableClasses:
    """Find classes whose members get the same poses whenever they are aligned.

    Shrunk images are kept in memory, those of a generation twice: about 60 kB a particle.

    Args:
        particles: as for `align_multi_reference`.
        settings: those of `StableClassification`, and the arguments of `base.align`. A step is a
            generation.

    Raises:
        ValueError: settings that do not fit, before the work starts; or no class is stable.
    """
    return StableClasses(align_with(StableClassification, particles, **settings))


def _class_means(values: Tensor, label: Tensor, k: int) -> Tensor:
    """(k,) means of values (n,) over the members of k classes, none of which is empty."""
    total = torch.bincount(label, values.double(), minlength=k)
    return (total / torch.bincount(label, minlength=k)).float()
