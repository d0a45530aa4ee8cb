"""Multi-reference alignment (MRA): references become class averages, over and over.

Chung et al. 2020, Algorithm 1: every particle is searched against every reference over shifts,
hands and in-plane angles, joins the best, and the averages of what joined, filtered, masked and
centred, are the next references.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells, low_pass_curve, radial_mean
from cryoalign.images.masks import masked
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.base import (
    Alternation,
    Found,
    Progress,
    given_references,
    prepare_particles,
    refuse_other_particles,
)
from cryoalign.methods.matching import assign_particles, match_particles, refined, soft_sums, weigh
from cryoalign.methods.references import SEEDINGS, seed_references
from cryoalign.methods.state import MraState
from cryoalign.particles.prepare import Images
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.pose import Pose
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging, ClassSums
from cryoalign.results.quality import Quality
from cryoalign.runtime.arrays import Array
from cryoalign.search.match import prepare
from cryoalign.search.settings import Search

Soft = Callable[[Tensor, int], ClassSums]
"""Makes soft class sums of so many classes, given the hard labels (n,)."""


def align_multi_reference(
    particles: Stack | Array,
    references: Array | str | Path = "random",
    *,
    n_classes: int | None = None,
    iterations: int = 20,
    assign: Assignment | None = None,
    search: Search | None = None,
    images: Images | None = None,
    averaging: Averaging | None = None,
    quality: Quality | None = None,
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
        particles: a stack (`io.read_particles`) or an array (n, size, size), a tensor or another
            (`interop.Array`).
        references: (k, size, size), the path of such a stack, or a way to choose them
            (`seeding.SEEDINGS`).
        n_classes: how many, unless the references say.
        iterations: at most.
        assign: which class a particle joins; None is the best.
        search: what poses are tried.
        images: how particles are prepared.
        averaging: how averages become references.
        min_class_share: see above; 0 never re-seeds.
        settle: stop when no larger share of the particles changed class.
        quality: what becomes of junk.
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
    assign = assign or Assignment()
    assign.refuse_few(iterations, n_classes)
    particles = as_stack(particles)
    shape = particles.shape
    if shape[0] == shape[1]:  # what does not fit should say so before pixels are read
        search.rings((images or Images()).box or shape[0])
    prepared = prepare_particles(particles, images, device, max_rejected, batch_size, progress)
    turns = Alternation(prepared, averaging, search.rings(prepared.size), progress)
    state = resume or _start(turns, references, n_classes, seed)
    refuse_other_particles(state, prepared)
    wanted = n_classes or len(state.references)
    rules = _Rules(search, assign, wanted, min_class_share, settle, seed)
    if resume is None:
        state = rules.fewer_at_first(state)
    while state.iteration < iterations and not state.settled:
        state = _iterate(turns, rules, state, last=state.iteration + 1 == iterations)
        if on_iteration is not None:
            on_iteration(state)
    return turns.result(state, search, quality)


@dataclass(frozen=True)
class _Rules:
    """What an iteration goes by."""

    search: Search
    assign: Assignment
    n_classes: int
    min_class_share: float
    settle: float
    seed: int

    def fewer_at_first(self, state: MraState) -> MraState:
        """The first state with the classes that are there before any is split."""
        first = min(self.assign.start_classes or self.n_classes, self.n_classes)
        return replace(state, references=state.references[:first])

    def assigned(self, turns: Alternation, state: MraState) -> tuple[Found, Soft | None]:
        """Where particles belong, and how their averages are made where that is soft."""
        how, references = self.assign, state.references.to(turns.particles.device)
        if how.strategy == "soft" and how.resolution(state.iteration) < 0.5:
            curve = low_pass_curve(turns.particles.size, how.resolution(state.iteration))
            references = filter_shells(references, curve.to(references.device))
        target = prepare(references, self.search)
        if how.strategy == "best":
            return turns.search(target), None
        if how.strategy != "soft":
            seed = self.seed + 1_000_003 * state.iteration
            return assign_particles(turns, target, how, state.label, seed), None
        matched = match_particles(turns, target)
        weights = weigh(turns, target, matched, how.cooling(state.iteration))
        found = refined(turns, target, matched, weights.argmax(1))
        return found, lambda label, k: soft_sums(turns, matched, weights, label, found.pose, k)

    def annealed(self, state: MraState) -> bool:
        """Whether nothing is to change any more but the classes themselves."""
        soft = self.assign.strategy == "soft"
        return len(state.references) == self.n_classes and not (
            soft and state.iteration < self.assign.anneal_iterations
        )


def _start(
    turns: Alternation, references: Array | str | Path, n_classes: int | None, seed: int
) -> MraState:
    particles = turns.particles
    n = len(particles)
    if isinstance(references, str) and references in SEEDINGS:
        if not isinstance(n_classes, Integral) or not 1 <= n_classes <= n:
            raise ValueError(
                f"n_classes must be a whole number from 1 to the {n} usable particles when "
                f"references are chosen by {references!r}; got {n_classes}"
            )
        images = seed_references(particles, references, n_classes, seed)
    else:
        images = given_references(particles, references)
        if n_classes is not None and n_classes != len(images):
            raise ValueError(
                f"n_classes is {n_classes} but there are {len(images)} references: leave "
                "n_classes out, or make them agree"
            )
        _warn_of_contrast(turns, images)
    return MraState(
        iteration=0,
        references=masked(images, turns.mask()),
        label=torch.full((n,), -1),
        pose=Pose.identity(n),
        score=torch.zeros(n),
        fingerprint=particles.fingerprint,
    )


def _warn_of_contrast(turns: Alternation, references: Tensor) -> None:
    """Say so where particles and references look like each other's negatives."""
    few = turns.particles.read(torch.arange(min(len(turns.particles), 512)))
    last = turns.rings.last_ring
    ours, theirs = (radial_mean(x.mean(0))[: last + 1] for x in (few, references))
    pair = torch.stack([ours, theirs])
    if len(ours) > 4 and float(torch.corrcoef(pair)[0, 1]) < -0.7:
        warnings.warn(
            "the references' contrast looks reversed to the particles': density must be bright in "
            "both; images.invert turns the particles round, references are taken as they are",
            stacklevel=2,
        )


def _iterate(turns: Alternation, rules: _Rules, state: MraState, last: bool) -> MraState:
    started = time.perf_counter()
    k = len(state.references)
    (label, pose, score), soft = rules.assigned(turns, state)
    reassigned = float((label != state.label).double().mean())
    change = turns.change(state.pose, pose)
    if state.iteration == 0:  # there is no pose yet to have changed
        change = dict.fromkeys(change, math.nan)
    settled = reassigned <= rules.settle and rules.annealed(state)
    split = 0
    if not (last or settled):
        if (state.iteration + 1) % rules.assign.level_iterations == 0:
            k = min(2 * k, rules.n_classes)
        least = max(rules.min_class_share * len(label) / k, float(k > len(state.references)))
        label, split = split_largest(label, score, k, least)
    sizes = torch.bincount(label, minlength=k)
    sums = turns.sum_classes(label, pose, k) if last or settled or soft is None else soft(label, k)
    references, pose = turns.renew(sums, label, pose, centre=not (last or settled))
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
    return replace(
        state,
        iteration=state.iteration + 1,
        references=references,
        label=label,
        pose=pose,
        score=score,
        history=[*state.history, row],
        settled=settled,
        sums=sums,
    )


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
