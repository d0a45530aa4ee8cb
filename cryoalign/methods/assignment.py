"""Rules that choose the class of every particle from the scores of all particles with all classes.

The rules are functions of an (n, k) matrix of scores, on any device; `matching` computes the scores
and applies the rule that the settings choose.
"""

import itertools
import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cryoalign.runtime.settings import settings

# Equal assignment solves a smoothed problem at temperatures from HOT to COLD, in standard
# deviations of the scores. Each temperature is COOLING times the one before and has SWEEPS sweeps.
HOT, COLD, COOLING, SWEEPS = 1.0, 1e-4, 0.5, 8


@settings
class Assignment:
    """How particles are assigned to classes."""

    strategy: Literal["best", "equal", "stochastic", "robust", "soft"] = Field(
        default="best",
        description="which class a particle joins: best: the class with the best score; equal: "
        "classes of equal size; stochastic: a random better class; robust: by the rank of its "
        "score among members and others; soft: all classes, weighted by their probabilities",
    )
    slack: float = Field(
        default=0.0, ge=0, description="equal: deviation of class sizes from their mean, as a share"
    )
    similarity: Literal["correlation", "correntropy"] = Field(
        default="correlation", description="robust: the score that is ranked"
    )
    start_classes: int | None = Field(
        default=None,
        ge=1,
        description="number of classes at the start, doubled every level_iterations until it is "
        "n_classes; null: n_classes from the start",
    )
    level_iterations: int = Field(
        default=4, ge=1, description="number of iterations after which the classes are doubled"
    )
    anneal: float = Field(
        default=4.0, ge=1, description="soft: first temperature over that of the noise"
    )
    anneal_iterations: int = Field(
        default=8, ge=1, description="soft: iterations until the last temperature and resolution"
    )
    start_resolution: float = Field(
        default=0.1, gt=0, le=0.5, description="soft: first low-pass of references, 1/px"
    )

    def refuse_few(self, iterations: int, n_classes: int | None) -> None:
        """Make sure that this number of iterations reaches all classes and the last temperature.

        Raises:
            ValueError: there are too few iterations, or no ``n_classes``.
        """
        if self.strategy == "soft" and iterations <= self.anneal_iterations:
            raise ValueError(
                f"assign.strategy=soft anneals for {self.anneal_iterations} iterations, but there "
                f"are {iterations}: use more iterations, or a smaller assign.anneal_iterations"
            )
        if not self.start_classes:
            return
        if n_classes is None:
            raise ValueError("assign.start_classes needs n_classes, the number of classes at last")
        first = min(self.start_classes, n_classes)
        levels = math.ceil(math.log2(n_classes / first))
        if levels and levels * self.level_iterations >= iterations:
            raise ValueError(
                f"{first} classes become {n_classes} after {levels} times "
                f"{self.level_iterations} iterations, but there are {iterations}: use more "
                "iterations, a smaller assign.level_iterations or more assign.start_classes"
            )

    def cooling(self, iteration: int) -> float:
        """Temperature over that of the noise, in an iteration counted from 0."""
        return float(self.anneal ** max(0.0, 1 - iteration / self.anneal_iterations))

    def resolution(self, iteration: int) -> float:
        """Highest frequency of references, 1/px, in an iteration counted from 0; 0.5 is all."""
        share = min(1.0, iteration / self.anneal_iterations)
        return self.start_resolution + share * (0.5 - self.start_resolution)


def assign_stochastic(scores: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """Move every particle to a random class among those that are better than its present class.

    Stochastic hill climbing (Elmlund, Elmlund & Bengio 2013): the score of a particle never gets
    worse, but it is not always moved to its best class, so that fewer particles end in a local
    optimum. A particle stays where no class is better.

    Args:
        scores: (n, k) with the present references.
        label: (n,) present class of each particle; -1 (no class) takes the best one.
        generator: random numbers, on the CPU.

    Returns:
        (n,) class indices.
    """
    n, k = scores.shape
    order = torch.rand(n, k, generator=generator).argsort(1).to(scores.device)
    best, label = scores.argmax(1), label.to(scores.device)
    own = scores.gather(1, label.clamp(min=0).unsqueeze(1))
    better = (scores > own).gather(1, order)  # (n, k) in a random order for each particle
    first = order.gather(1, better.to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)
    return torch.where(label < 0, best, torch.where(better.any(1), first, label))


def assign_robust(scores: Tensor, label: Tensor) -> Tensor:
    """Move every particle to the class where its score has the highest rank.

    A class with high scores for all particles attracts particles that do not belong to it. Ranks
    prevent this: the value of a score is the share of the class's members that score no better,
    times the share of all other particles that score no better (CL2D, Sorzano et al. 2010, but
    with the scores themselves instead of histograms).

    Args:
        scores: (n, k).
        label: (n,) present class of each particle; -1 (no class) counts as its best class.

    Returns:
        (n,) class indices.
    """
    n, k = scores.shape
    label = label.to(scores.device)
    label = torch.where(label < 0, scores.argmax(1), label)
    order = scores.argsort(dim=0, stable=True)  # (n, k)
    inside = (label[order] == torch.arange(k, device=scores.device)).double()
    rank = torch.arange(1, n + 1, device=scores.device, dtype=torch.float64)[:, None]
    members = inside.cumsum(0)
    others = rank - members
    merit = (members / members[-1:].clamp(min=1)) * (others / others[-1:].clamp(min=1))
    # The score itself decides above all members and in an empty class.
    merit = torch.empty_like(merit).scatter_(0, order, merit)
    return (merit + 1e-9 * scores).argmax(1)


def noise_temperature(score: float, pixels: float) -> float:
    """The temperature T at which exp(c / T) is the likelihood of a correlation coefficient c.

    If a particle is a known signal plus white noise, its log-likelihood is
    pixels c sqrt(SNR (1 + SNR)) plus a constant, and the score of the right pose is
    sqrt(SNR / (1 + SNR)); together, T = (1 - c^2) / (pixels c).

    Args:
        score: typical score of right poses, between 0 and 1.
        pixels: number of pixels that are compared.
    """
    c = min(max(score, 1e-3), 0.999)
    return (1 - c * c) / (pixels * c)


def soft_weights(evidence: Tensor, temperature: float) -> Tensor:
    """(n, k) probabilities of the classes, from the ``evidence`` (n, k) that
    `search.match.log_evidence` computes at the same temperature."""
    return torch.softmax(evidence.double() / temperature, 1).float()


def capacities(n: int, k: int, slack: float) -> tuple[int, int]:
    """Smallest and largest allowed size of k classes of n particles: n / k, and ``slack`` times
    n / k less or more."""
    return math.floor(n / k * max(0.0, 1 - slack) + 1e-9), math.ceil(n / k * (1 + slack) - 1e-9)


def assign_equal(scores: Tensor, slack: float = 0.0) -> Tensor:
    """Assign particles to classes of equal size so that the sum of their scores is largest.

    This is a transport problem. Every class has a price, and each particle joins the class with
    the largest score minus price. First, Sinkhorn's iteration finds prices for a soft assignment
    at falling temperatures (Cuturi 2013), on the scores' device. Then the few particles that are
    too many in a class are moved along shortest paths from class to class (Ahuja, Magnanti & Orlin
    1993, ch. 9). This keeps the assignment optimal, so that the result is the exact optimum.

    Args:
        scores: (n, k), any unit; finite.
        slack: largest deviation of a class from n / k members, as a share of n / k; 0 allows n / k
            rounded down or up.

    Returns:
        (n,) class indices.

    Raises:
        ValueError: a negative slack, or scores that are not (n, k) and finite.
    """
    if scores.ndim != 2 or scores.shape[1] == 0 or not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite and (n, k) with k > 0; got {tuple(scores.shape)}")
    if not slack >= 0:
        raise ValueError(f"slack must be 0 or more, not {slack}")
    scores = scores.detach().double()
    bounds = capacities(len(scores), scores.shape[1], slack)
    price = _prices(scores, *bounds)
    return _balance(scores, price, *bounds)


def _prices(scores: Tensor, least: int, most: int) -> Tensor:
    """(k,) prices at which a soft assignment has classes of ``least`` to ``most`` particles.

    A price is positive only if the class is full, and negative only if it has the least size.
    """
    n, k = scores.shape
    price = scores.new_zeros(k)
    spread = float(scores.std(1).mean()) if n and k > 1 else 0.0
    if spread == 0:
        return price
    temperature = HOT * spread
    while temperature > COLD * spread:
        for _ in range(SWEEPS):
            size = torch.softmax((scores - price) / temperature, 1).sum(0).clamp(min=1e-300)
            dear = price + temperature * (size / most).log()
            cheap = price + temperature * (size / max(least, 1e-300)).log()
            price = dear.clamp(min=0) + cheap.clamp(max=0)
        temperature *= COOLING
    return price


def _balance(scores: Tensor, price: Tensor, least: int, most: int) -> Tensor:
    """(n,) classes of ``least`` to ``most`` particles with the largest total score.

    Particles flow through the node of their class into one last node, the drain. At the start,
    every particle is in the class with the largest score minus price; this is optimal for the
    class sizes that result. Then particles are moved along shortest paths from nodes with too many
    to nodes with too few.
    """
    n, k = scores.shape
    label = (scores - price).argmax(1)
    size = torch.bincount(label, minlength=k).cpu().numpy()
    dual = np.append(price.cpu().numpy(), 0.0)  # the last entry belongs to the drain
    drained = np.where(dual[:k] > 0, most, np.where(dual[:k] < 0, least, size.clip(least, most)))
    arcs = np.full((k + 1, k + 1), np.inf)  # cost of moving one particle from node to node
    mover = np.zeros((k, k), np.int64)  # the particle that would move
    stale = set(range(k))  # classes whose costs must be computed again
    while True:
        for c in stale:
            arcs[c, :k], mover[c] = _cheapest(scores, label, c)
        arcs[:k, k] = np.where(drained < most, 0.0, np.inf)
        arcs[k, :k] = np.where(drained > least, 0.0, np.inf)
        excess = np.append(size - drained, drained.sum() - n)
        if not excess.any():
            return label
        path, dual = _shortest_path(arcs, dual, excess)
        for a, b in itertools.pairwise(path):
            if b == k:
                drained[a] += 1
            elif a == k:
                drained[b] -= 1
            else:
                label[int(mover[a, b])] = b
                size[a], size[b] = size[a] - 1, size[b] + 1
        stale = set(path) - {k}


def _cheapest(scores: Tensor, label: Tensor, c: int) -> tuple[np.ndarray, np.ndarray]:
    """(k,) lowest cost of moving a member of class c to each class, and (k,) the member moved."""
    members = (label == c).nonzero().squeeze(1)
    if not len(members):
        return np.full(scores.shape[1], np.inf), np.zeros(scores.shape[1], np.int64)
    own = scores[members]
    cost, which = (own[:, c : c + 1] - own).min(0)
    return cost.cpu().numpy(), members[which].cpu().numpy()


def _shortest_path(
    arcs: np.ndarray, dual: np.ndarray, excess: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """The shortest path from a node with too many particles to one with too few, and new duals.

    The length of an arc is its cost minus the difference of the duals, which is never negative;
    the path is found by the algorithm of Bellman and Ford.
    """
    length = (arcs - dual[:, None] + dual).clip(min=0)
    distance = np.where(excess > 0, 0.0, np.inf)
    before = np.full(len(dual), -1)
    while True:
        through = distance[:, None] + length
        best = through.argmin(0)
        reached = through[best, np.arange(len(dual))]
        better = reached < distance
        if not better.any():
            break
        distance[better], before[better] = reached[better], best[better]
    lacking = np.flatnonzero(excess < 0)
    end = int(lacking[distance[lacking].argmin()])
    path = [end]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1], dual - distance.clip(max=distance[end])
