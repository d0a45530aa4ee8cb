"""Multi-reference alignment (MRA).

Every iteration compares every particle with every reference over shifts, hands and in-plane
angles, and adds it to the class of the best one. The averages of the classes are filtered, masked
and centred, and are the references of the next iteration (Chung et al. 2020, Algorithm 1).
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells, low_pass_curve, radial_mean
from cryoalign.images.masks import masked
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.base import Method, align_with, shows_settings
from cryoalign.methods.matching import assign_particles, match_particles, refined, soft_sums, weigh
from cryoalign.methods.references import (
    SEEDINGS,
    AlignAndAverage,
    given_references,
    seed_references,
)
from cryoalign.methods.state import State, pose_tensors
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.particles.settings import Box
from cryoalign.particles.stack import Stack
from cryoalign.pose import Found, Pose
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging, ClassSums
from cryoalign.runtime.arrays import Array
from cryoalign.search.match import prepare_target
from cryoalign.search.settings import SearchSettings

Soft = Callable[[Tensor, int], ClassSums]
"""Makes soft class sums from the labels (n,) and the number of classes."""


@dataclass(frozen=True)
class MultiReference(Method):
    """Multi-reference alignment.

    A class with fewer members than ``min_class_share`` of the mean size after an iteration is
    given half of the largest class, the members that fit there worst. The last iteration does not
    do this; an empty class then has an average of zeros and no resolution.

    Attributes:
        references: as for `align_multi_reference`.
        n_classes: number of classes; None takes the number of references.
        iterations: largest number of iterations.
        search: how poses are searched.
        assign: which class a particle joins.
        averaging: how averages become references.
        min_class_share: see above; 0 never gives a class new members. None is 0.2, or 0 if
            references are given, so that rare views keep theirs.
        settle: the run stops when at most this share of the particles changes class.
    """

    name = "mra"
    purpose = "multi-reference alignment"

    references: Array | str | Path = "random"
    n_classes: int | None = None
    iterations: int = 20
    search: SearchSettings = field(default_factory=SearchSettings)
    assign: Assignment = field(default_factory=Assignment)
    averaging: Averaging = field(default_factory=Averaging)
    min_class_share: float | None = None
    settle: float = 0.002

    @classmethod
    def needs_classes(cls, chosen: bool) -> bool:
        return chosen

    def check(self, box: Box, n: int | None = None) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        self.assign.refuse_few(self.iterations, self.n_classes)
        self.search.on(self.particle, box)
        if n is None or not self._chosen:
            return
        if not isinstance(self.n_classes, Integral) or not 1 <= self.n_classes <= n:
            raise ValueError(
                f"n_classes must be a whole number from 1 to the {n} usable particles when "
                f"references are chosen by {self.references!r}; got {self.n_classes}: use at most "
                f"{n}"
            )

    @property
    def _chosen(self) -> bool:
        """Whether the first references are chosen from the particles."""
        return isinstance(self.references, str) and self.references in SEEDINGS

    @property
    def _least_share(self) -> float:
        """The share of the mean size below which a class is given new members."""
        if self.min_class_share is not None:
            return self.min_class_share
        return 0.2 if self._chosen or self.assign.start_classes else 0.0

    @property
    def most_steps(self) -> int:
        return self.iterations

    def radius(self, box: Box) -> float:
        return self.search.on(self.particle, box).rings(box.size).last_ring

    def start(self, particles: PreparedParticles) -> State:
        if self._chosen:
            assert isinstance(self.references, str)
            assert self.n_classes is not None
            images = seed_references(particles, self.references, self.n_classes, self.seed)
        else:
            images = given_references(particles, self.references)
            if self.n_classes is not None and self.n_classes != len(images):
                raise ValueError(
                    f"n_classes is {self.n_classes} but there are {len(images)} references: leave "
                    "n_classes out, or give the number of references"
                )
            self._warn_of_contrast(particles, images)
        n, k = len(particles), len(images)
        work = self._work(particles)
        # With assign.start_classes there are fewer references at first, which are split later.
        references = masked(images, work.mask())[: min(self.assign.start_classes or k, k)]
        tensors = {
            "references": references,
            "label": torch.full((n,), -1),
            **pose_tensors(Pose.identity(n)),
            "score": torch.zeros(n),
            "n_classes": torch.tensor(k),
        }
        return State(self.name, particles.fingerprint, tensors=tensors)

    def is_done(self, state: State) -> bool:
        return state.done or state.iteration >= self.iterations

    def step(self, particles: PreparedParticles, state: State) -> State:
        started = time.perf_counter()
        work, k, wanted = self._work(particles), len(state["references"]), int(state["n_classes"])
        last = state.iteration + 1 == self.iterations
        (label, pose, score), soft = self._assigned(work, state)
        reassigned = float((label != state["label"]).double().mean())
        change = work.change(state.pose, pose, first=state.iteration == 0)
        settled = reassigned <= self.settle and self._may_settle(state, wanted)
        split = 0
        if not (last or settled):
            if (state.iteration + 1) % self.assign.level_iterations == 0:
                k = min(2 * k, wanted)
            fewest = self._least_share * len(label) / k
            fewest = max(fewest, float(k > len(state["references"])))
            label, split = split_largest(label, score, k, fewest)
        sizes = torch.bincount(label, minlength=k)
        hard = last or settled or soft is None
        sums = work.sum_classes(label, pose, k) if hard or soft is None else soft(label, k)
        references, pose = work.renew(sums, label, pose, centre=not (last or settled))
        row = {
            "iteration": state.iteration + 1,
            "mean_score": float(score.mean()),
            "reassigned": reassigned,
            **change,
            "smallest_class": int(sizes.min()),
            "largest_class": int(sizes.max()),
            "empty_classes": int((sizes == 0).sum()),
            "split_classes": split,
            "seconds": round(time.perf_counter() - started, 6),
        }
        return state.next(
            row, done=settled, pose=pose, unsaved={"sums": sums},
            references=references, label=label, score=score,
        )  # fmt: skip

    def finish(self, particles: PreparedParticles, state: State) -> Alignment:
        k = len(state["references"])
        # A class that was given members of another one does not come from its reference any more.
        split = any(row["split_classes"] for row in state.history) or self.assign.start_classes
        numbers = None
        if not (self._chosen or split):
            numbers = pd.DataFrame({"reference": range(1, k + 1)})
        return self._work(particles).result(state, self.quality, by_class=numbers)

    def line(self, row: Mapping[str, Any]) -> str:
        notes = [f"{row['seconds']:.1f} s"]
        if row["empty_classes"]:
            notes.insert(0, f"{row['empty_classes']} empty")
        if row["split_classes"]:
            notes.insert(0, f"{row['split_classes']} given new members")
        return (
            f"iteration {row['iteration']:3d} of {self.iterations}: score {row['mean_score']:.4f}, "
            f"{row['reassigned']:6.1%} changed class, classes of {row['smallest_class']} to "
            f"{row['largest_class']}, {', '.join(notes)}"
        )

    def _work(self, particles: PreparedParticles) -> AlignAndAverage:
        search = self.search.on(self.particle, particles.box)
        return AlignAndAverage(particles, self.averaging, search, search.rings(particles.size))

    def _assigned(self, work: AlignAndAverage, state: State) -> tuple[Found, Soft | None]:
        """Class, pose and score of all particles, and for soft assignment how to sum classes."""
        how, references = self.assign, state["references"].to(work.particles.device)
        if how.strategy == "soft" and how.resolution(state.iteration) < 0.5:
            curve = low_pass_curve(work.particles.size, how.resolution(state.iteration))
            references = filter_shells(references, curve.to(references.device))
        target = prepare_target(references, work.search)
        if how.strategy == "best":
            return work.align(target), None
        if how.strategy != "soft":
            seed = self.seed + 1_000_003 * state.iteration
            return assign_particles(work, target, how, state["label"], seed), None
        matched = match_particles(work, target)
        weights = weigh(work, target, matched, how.cooling(state.iteration))
        found = refined(work, target, matched, weights.argmax(1))
        return found, lambda label, k: soft_sums(work, matched, weights, label, found.pose, k)

    def _may_settle(self, state: State, wanted: int) -> bool:
        """Whether there are all classes, and soft assignment is at its last temperature."""
        annealing = self.assign.strategy == "soft" and (
            state.iteration < self.assign.anneal_iterations
        )
        return len(state["references"]) == wanted and not annealing

    def _warn_of_contrast(self, particles: PreparedParticles, references: Tensor) -> None:
        """Warn if the contrast of the references seems to be the reverse of the particles'."""
        few = particles.read(torch.arange(min(len(particles), 512)))
        last = int(self.radius(particles.box))
        pair = torch.stack([radial_mean(x.mean(0))[: last + 1] for x in (few, references)])
        if pair.shape[1] > 4 and float(torch.corrcoef(pair)[0, 1]) < -0.7:
            warnings.warn(
                "the references' contrast looks reversed to the particles': density must be "
                "bright in both. Use images.invert=true to invert the particles, or invert the "
                "references' file",
                stacklevel=2,
            )


@shows_settings(MultiReference)
def align_multi_reference(
    particles: Stack | Array | PreparedParticles,
    references: Array | str | Path = "random",
    **settings: Any,
) -> Alignment:
    """Align particles to references, which become class averages, until the classes settle.

    Args:
        particles: a stack (`io.read_particles`), an array (n, size, size), or particles from
            `prepare`.
        references: (k, size, size), the path of such a stack, or a way to choose them
            (`references.SEEDINGS`).
        settings: those of `MultiReference`, and the arguments of `base.align`.

    Returns:
        The `Alignment` of the whole input, on every process.

    Raises:
        ValueError: settings or references that do not fit, before the first iteration.
    """
    return align_with(MultiReference, particles, references=references, **settings)


def split_largest(label: Tensor, score: Tensor, k: int, least: float) -> tuple[Tensor, int]:
    """Give each class with fewer than ``least`` members half of the largest class.

    The members with the lowest scores move and keep their poses (as in CL2D, Sorzano et al. 2010).
    The present members of the small class stay.

    Args:
        label: (n,) class index.
        score: (n,).
        k: number of classes.
        least: smallest size of a class that is not given new members.

    Returns:
        New labels (n,), and how many classes were given new members.
    """
    label = label.clone()
    sizes = torch.bincount(label, minlength=k)
    small = [int(c) for c in sizes.argsort() if sizes[c] < least]
    for done, c in enumerate(small):
        largest = int(sizes.argmax())
        if sizes[largest] < max(2 * least, 2):
            return label, done
        members = (label == largest).nonzero().squeeze(1)
        worst = members[score[members].argsort(stable=True)[: len(members) // 2]]
        label[worst] = c
        sizes = torch.bincount(label, minlength=k)
    return label, len(small)
