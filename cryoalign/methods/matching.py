"""Compare all particles with all classes, and assign them by one of the rules of `assignment`."""

import math
from dataclasses import dataclass

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
from cryoalign.methods.references import AlignAndAverage, find_all, over_batches
from cryoalign.pose import Found, Pose
from cryoalign.results.averages import ClassSums, sum_parts
from cryoalign.runtime.processes import gather_over_ranks, same_on_all_ranks
from cryoalign.search.match import Target, log_evidence, match_all, refine_match

LEAST_WEIGHT = 0.01  # soft averages leave out smaller weights, which would only take time


@dataclass(frozen=True, eq=False)
class Matched:
    """Scores and poses of every particle with every class.

    Attributes:
        scores: (n, k) of all particles, on their device.
        pose: (m, k) of the m particles of this process.
    """

    scores: Tensor
    pose: Pose


def match_particles(work: AlignAndAverage, target: Target) -> Matched:
    """Compare all particles with the references of ``target``.

    The scores take 4 bytes a pair, and the poses 13 bytes a pair of this process.
    """

    def one(members: Tensor) -> tuple[Tensor, Pose]:
        found = match_all(work.particles.read(members), target)
        return found.score, found.pose

    k, device = len(target.templates), work.particles.device
    none = (torch.zeros(0, k, device=device), Pose.identity(0, k, device=device))
    scores, poses = zip(none, *over_batches(work.particles, one), strict=True)
    return Matched(gather_over_ranks(torch.cat(scores)), Pose.cat(poses))


def assign_particles(
    work: AlignAndAverage, target: Target, how: Assignment, label: Tensor, seed: int
) -> Found:
    """Assign all particles by a strategy other than ``best`` and ``soft``, and refine their poses.

    Args:
        work: the particles, and how they are aligned.
        target: `search.match.prepare_target` of the references.
        how: the strategy.
        label: (n,) present class of each particle, or -1.
        seed: seed of the random orders of ``stochastic``.
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
    """Refine the poses of all particles on their classes ``label`` (n,)."""
    start = work.particles.own.start

    def one(members: Tensor) -> Found:
        chosen = label[members.to(label.device)]
        own = matched.pose[(members - start).to(chosen.device), chosen]
        pose, score = refine_match(work.particles.read(members), target, chosen, own)
        return Found(chosen, pose, score)

    return find_all(work.particles, one)


def weigh(work: AlignAndAverage, target: Target, matched: Matched, cooling: float) -> Tensor:
    """(n, k) probabilities of the classes of all particles, summed over poses, at ``cooling`` times
    the temperature of the noise."""
    rings = target.rings if target.screen is None else target.screen.rings
    typical = float(matched.scores.amax(1).mean())
    temperature = cooling * noise_temperature(typical, math.pi * rings.last_ring**2)

    def one(members: Tensor) -> Tensor:
        evidence = log_evidence(work.particles.read(members), target, temperature)
        return soft_weights(evidence, temperature)

    return gather_over_ranks(torch.cat([matched.scores[:0], *over_batches(work.particles, one)]))


def soft_sums(
    work: AlignAndAverage, matched: Matched, weights: Tensor, label: Tensor, fine: Pose, k: int
) -> ClassSums:
    """Class sums in which every particle is added to all classes, weighted by its probabilities.

    Weights are scaled to a mean of 1 in each class and half-set, so that averages are weighted
    means. A particle whose label is not its likeliest class was moved to give a small class new
    members, and is added to that class only.

    Args:
        work: the particles, and how they are aligned.
        matched: their poses on the search's grid.
        weights: (n, k') probabilities of the classes that were searched.
        label: (n,) class of each particle.
        fine: (n,) refined poses on the likeliest classes.
        k: number of classes to sum, k' or more.
    """
    particles, own = work.particles, work.particles.own
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
    here = (row >= own.start) & (row < own.stop)
    row, column, weight, half = (each[here] for each in (row, column, weight, half))
    chosen = column == label[row]
    coarse = matched.pose[row - own.start, column.clamp(max=matched.scores.shape[1] - 1)]
    pose = fine.to(row.device)[row].where(chosen, coarse)

    def read(entries: Tensor) -> Tensor:
        images = particles.read(row[entries.to(row.device)].cpu())
        return images * weight[entries.to(weight.device)][:, None, None]

    # Batches of entries hold the entries of a batch of particles, or a part of them.
    batch, length = particles.batch_size, particles.part_length
    number, rows = torch.arange(len(row)), row.cpu()
    counts = torch.bincount((rows - own.start) // batch)
    parts = [part for some in number.split(counts.tolist()) for part in some.split(batch)]
    return sum_parts(
        [part for part in parts if len(part)], read, pose.to("cpu"), column.cpu(), half.cpu(), k,
        particles.size, particles.device, lambda entries: int(rows[entries[0]]) // length,
    )  # fmt: skip


def _correntropies(work: AlignAndAverage, target: Target, matched: Matched) -> Tensor:
    """(n, k) correntropies: means of exp(-d^2 / 2 s^2) over the pixels under the mask, where d is
    particle minus reference and s^2 twice the variance of the background, which is 1 (Sorzano et
    al. 2010)."""
    start, mask = work.particles.own.start, work.mask()
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

    return gather_over_ranks(torch.cat([matched.scores[:0], *over_batches(work.particles, one)]))
