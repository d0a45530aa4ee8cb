"""All particles against all classes, and what an `Assignment` makes of the scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked
from cryoalign.methods.assignment import (
    Assignment,
    assign_equal,
    assign_robust,
    assign_stochastic,
    noise_temperature,
    soft_weights,
)
from cryoalign.methods.references import AlignAndAverage, find_all
from cryoalign.pose import Found, Pose
from cryoalign.results.averages import ClassSums, sum_parts
from cryoalign.runtime.processes import gather_over_ranks, same_on_all_ranks, shard
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.match import Target, log_evidence, match_all, refine_match

Outcome = TypeVar("Outcome")
LEAST_WEIGHT = 0.01  # smaller ones are left out of soft averages


@dataclass(frozen=True, eq=False)
class Matched:
    """Every particle with every class.

    Attributes:
        scores: (n, k) of all particles, on their device.
        pose: (m, k) of the m particles that are this process's.
    """

    scores: Tensor
    pose: Pose


def match_particles(work: AlignAndAverage, target: Target) -> Matched:
    """Scores and poses of all pairs: 4 bytes a pair for all, 13 for this process's own."""

    def one(members: Tensor) -> tuple[Tensor, Pose]:
        found = match_all(work.particles.read(members), target)
        return found.score, found.pose

    k, device = len(target.templates), work.particles.device
    none = (torch.zeros(0, k, device=device), Pose.identity(0, k, device=device))
    scores, poses = zip(none, *_batches(work, one), strict=True)
    return Matched(gather_over_ranks(torch.cat(scores)), Pose.cat(poses))


def assign_particles(
    work: AlignAndAverage, target: Target, how: Assignment, label: Tensor, seed: int
) -> Found:
    """Classes of all particles by a strategy other than `best` and `soft`, and their poses.

    Args:
        work: the particles, and how they are aligned.
        target: `search.prepare` of the references.
        how: the strategy.
        label: (n,) the class each particle is in, or -1.
        seed: of random orders.
    """
    matched = match_particles(work, target)
    if how.strategy == "equal":
        label = assign_equal(matched.scores, how.slack)
    elif how.strategy == "stochastic":
        generator = torch.Generator().manual_seed(seed)
        label = assign_stochastic(matched.scores, label, generator)
    else:
        scores = matched.scores
        if how.similarity == "correntropy":
            scores = _correntropies(work, target, matched)
        label = assign_robust(scores, label)
    return refined(work, target, matched, same_on_all_ranks(label))


def refined(work: AlignAndAverage, target: Target, matched: Matched, label: Tensor) -> Found:
    """Poses of all particles on the classes (n,) they were given."""
    start = shard(len(work.particles)).start

    def one(members: Tensor) -> Found:
        chosen = label[members.to(label.device)]
        own = matched.pose[(members - start).to(chosen.device), chosen]
        pose, score = refine_match(work.particles.read(members), target, chosen, own)
        return Found(chosen, pose, score)

    return find_all(work.particles, one)


def weigh(work: AlignAndAverage, target: Target, matched: Matched, cooling: float) -> Tensor:
    """(n, k) posterior of the classes of all particles, poses summed over, at the temperature of
    the noise times ``cooling``."""
    rings = target.rings if target.screen is None else target.screen.rings
    typical = float(matched.scores.amax(1).mean())
    temperature = cooling * noise_temperature(typical, math.pi * rings.last_ring**2)

    def one(members: Tensor) -> Tensor:
        evidence = log_evidence(work.particles.read(members), target, temperature)
        return soft_weights(evidence, temperature)

    return gather_over_ranks(torch.cat([matched.scores[:0], *_batches(work, one)]))


def soft_sums(
    work: AlignAndAverage, matched: Matched, weights: Tensor, label: Tensor, fine: Pose, k: int
) -> ClassSums:
    """Class sums with every particle in every class that it may belong to, by its weight.

    Weights are scaled to a mean of 1 in each class and half, so that sums over members are
    weighted means. A particle whose label is not its likeliest class was moved (re-seeding), and
    counts there alone.

    Args:
        work: the particles, and how they are aligned.
        matched: their poses.
        weights: (n, k') posteriors of the classes that were searched.
        label: (n,) hard labels; fine: (n,) poses on the likeliest classes.
        k: classes to sum, k' or more.
    """
    particles, start = work.particles, shard(len(work.particles)).start
    label, likeliest = label.to(weights.device), weights.argmax(1)
    weights = torch.nn.functional.pad(weights, (0, k - weights.shape[1]))
    moved = (label != likeliest).nonzero().squeeze(1)
    weights[moved] = 0
    weights[moved, label[moved]] = 1
    row, column = (weights > LEAST_WEIGHT).nonzero().unbind(1)
    half = particles.half.to(row.device)[row]
    weight = weights[row, column]
    group = half * k + column
    total = torch.zeros(2 * k, device=row.device).index_add(0, group, weight)
    weight = weight * (torch.bincount(group, minlength=2 * k) / total.clamp(min=1e-12))[group]
    own = (row >= start) & (row < shard(len(particles)).stop)
    row, column, weight, half = (each[own] for each in (row, column, weight, half))
    chosen = column == label[row]
    coarse = matched.pose[row - start, column.clamp(max=matched.scores.shape[1] - 1)]
    pose = fine.to(row.device)[row].where(chosen, coarse)

    def read(entries: Tensor) -> Tensor:
        images = particles.read(row[entries.to(row.device)].cpu())
        return images * weight[entries.to(weight.device)][:, None, None]

    parts = [part for part in torch.arange(len(row)).split(particles.batch_size) if len(part)]
    return sum_parts(
        parts, read, pose.to("cpu"), column.cpu(), half.cpu(), k, particles.size, particles.device
    )


def _correntropies(work: AlignAndAverage, target: Target, matched: Matched) -> Tensor:
    """(n, k) mean of exp(-d^2 / 2 s^2) over the pixels under the mask, d being particle less
    reference, s^2 twice the background's variance (Sorzano et al. 2010)."""
    start, mask = shard(len(work.particles)).start, work.mask()
    inside = mask > 0.5
    references = target.templates[:, 0][:, inside]  # (k, p)

    def one(members: Tensor) -> Tensor:
        images = work.particles.read(members)
        found = []
        for c, reference in enumerate(references):
            pose = matched.pose[(members - start).to(images.device), c]
            aligned = masked(transform(images, pose, "bilinear"), mask)[:, inside]
            found.append(torch.exp(-0.25 * (aligned - reference).square()).mean(1))
        return torch.stack(found, 1)

    return gather_over_ranks(torch.cat([matched.scores[:0], *_batches(work, one)]))


def _batches(work: AlignAndAverage, function: Callable[[Tensor], Outcome]) -> list[Outcome]:
    """What a function makes of every batch of this process, on all cores."""
    return list(
        map_in_order(function, work.particles.parts("align"), workers_for(work.particles.device))
    )
