"""All particles against all classes, and what an `Assignment` makes of the scores."""

from __future__ import annotations

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
from cryoalign.methods.base import Alternation, Found
from cryoalign.pose import Pose
from cryoalign.results.averages import ClassSums, class_sums
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


def match_particles(turns: Alternation, target: Target) -> Matched:
    """Scores and poses of all pairs: 4 bytes a pair for all, 13 for this process's own."""

    def one(members: Tensor) -> tuple[Tensor, Pose]:
        found = match_all(turns.particles.take(members), target)
        return found.score, found.pose

    k, device = len(target.templates), turns.particles.device
    none = (torch.zeros(0, k, device=device), Pose.identity(0, k, device=device))
    scores, poses = zip(none, *_batches(turns, one), strict=True)
    return Matched(gather_over_ranks(torch.cat(scores)), Pose.cat(poses))


def assign_particles(
    turns: Alternation, target: Target, how: Assignment, label: Tensor, seed: int
) -> Found:
    """Classes of all particles by a strategy other than `best` and `soft`, and their poses.

    Args:
        turns: the particles.
        target: `search.prepare` of the references.
        how: the strategy.
        label: (n,) the class each particle is in, or -1.
        seed: of random orders.
    """
    matched = match_particles(turns, target)
    if how.strategy == "equal":
        label = assign_equal(matched.scores, how.slack)
    elif how.strategy == "stochastic":
        generator = torch.Generator().manual_seed(seed)
        label = assign_stochastic(matched.scores, label, generator)
    else:
        scores = matched.scores
        if how.similarity == "correntropy":
            scores = _correntropies(turns, target, matched)
        label = assign_robust(scores, label)
    return refined(turns, target, matched, same_on_all_ranks(label))


def refined(turns: Alternation, target: Target, matched: Matched, label: Tensor) -> Found:
    """Poses of all particles on the classes (n,) they were given."""
    start = shard(len(turns.particles)).start

    def one(members: Tensor) -> tuple[Tensor, Pose, Tensor]:
        chosen = label[members.to(label.device)]
        own = matched.pose[(members - start).to(chosen.device), chosen]
        pose, score = refine_match(turns.particles.take(members), target, chosen, own)
        return chosen, pose, score

    return turns.find(one)


def weigh(turns: Alternation, target: Target, matched: Matched, cooling: float) -> Tensor:
    """(n, k) posterior of the classes of all particles, poses summed over, at the temperature of
    the noise times ``cooling``."""
    rings = target.rings if target.screen is None else target.screen.rings
    typical = float(matched.scores.amax(1).mean())
    temperature = cooling * noise_temperature(typical, math.pi * rings.last_ring**2)

    def one(members: Tensor) -> Tensor:
        evidence = log_evidence(turns.particles.take(members), target, temperature)
        return soft_weights(evidence, temperature)

    return gather_over_ranks(torch.cat([matched.scores[:0], *_batches(turns, one)]))


def soft_sums(
    turns: Alternation, matched: Matched, weights: Tensor, label: Tensor, fine: Pose, k: int
) -> ClassSums:
    """Class sums with every particle in every class that it may belong to, by its weight.

    Weights are scaled to a mean of 1 in each class and half, so that sums over members are
    weighted means. A particle whose label is not its likeliest class was moved (re-seeding), and
    counts there alone.

    Args:
        turns: the particles.
        matched: their poses.
        weights: (n, k') posteriors of the classes that were searched.
        label: (n,) hard labels; fine: (n,) poses on the likeliest classes.
        k: classes to sum, k' or more.
    """
    particles, start = turns.particles, shard(len(turns.particles)).start
    label, likeliest = label.to(weights.device), weights.argmax(1)
    weights = torch.nn.functional.pad(weights, (0, k - weights.shape[1]))
    moved = (label != likeliest).nonzero().squeeze(1)
    weights[moved] = 0
    weights[moved, label[moved]] = 1
    row, column = (weights > LEAST_WEIGHT).nonzero().unbind(1)
    half = (particles.rows % 2).to(row.device)[row]
    weight = weights[row, column]
    group = half * k + column
    total = torch.zeros(2 * k, device=row.device).index_add(0, group, weight)
    weight = weight * (torch.bincount(group, minlength=2 * k) / total.clamp(min=1e-12))[group]
    own = (row >= start) & (row < shard(len(particles)).stop)
    row, column, weight, half = (each[own] for each in (row, column, weight, half))
    chosen = column == label[row]
    coarse = matched.pose[row - start, column.clamp(max=matched.scores.shape[1] - 1)]
    fine = fine.to(row.device)[row]
    pose = Pose(
        torch.where(chosen, fine.angle, coarse.angle),
        torch.where(chosen[:, None], fine.shift, coarse.shift),
        torch.where(chosen, fine.mirror, coarse.mirror),
    )

    def read(entries: Tensor) -> Tensor:
        images = particles.read(row[entries.to(row.device)].cpu())
        return images * weight[entries.to(weight.device)][:, None, None]

    parts = [part for part in torch.arange(len(row)).split(particles.batch_size) if len(part)]
    return class_sums(
        parts, read, pose.to("cpu"), column.cpu(), half.cpu(), k, particles.size, particles.device
    )


def _correntropies(turns: Alternation, target: Target, matched: Matched) -> Tensor:
    """(n, k) mean of exp(-d^2 / 2 s^2) over the pixels under the mask, d being particle less
    reference, s^2 twice the background's variance (Sorzano et al. 2010)."""
    start, mask = shard(len(turns.particles)).start, turns.mask()
    inside = mask > 0.5
    references = target.templates[:, 0][:, inside]  # (k, p)

    def one(members: Tensor) -> Tensor:
        images = turns.particles.take(members)
        found = []
        for c, reference in enumerate(references):
            pose = matched.pose[(members - start).to(images.device), c]
            aligned = masked(transform(images, pose, "bilinear"), mask)[:, inside]
            found.append(torch.exp(-0.25 * (aligned - reference).square()).mean(1))
        return torch.stack(found, 1)

    return gather_over_ranks(torch.cat([matched.scores[:0], *_batches(turns, one)]))


def _batches(turns: Alternation, function: Callable[[Tensor], Outcome]) -> list[Outcome]:
    """What a function makes of every batch of this process, on all cores."""
    return list(map_in_order(function, turns.parts("align"), workers_for(turns.particles.device)))
