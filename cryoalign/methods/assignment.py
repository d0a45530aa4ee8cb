"""Which class a particle joins, from the scores of all particles with all classes.

Pure functions of an (n, k) matrix of scores, on its device, and the settings that choose among
them; `matching` brings them together with particles.
"""

import itertools
import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cryoalign.runtime.settings import settings

# Temperatures of the smoothed problem, in deviations of the scores, and sweeps at each.
HOT, COLD, COOLING, SWEEPS = 1.0, 1e-4, 0.5, 8


@settings
class Assignment:
    """How particles are assigned to classes."""

    strategy: Literal["best", "equal", "stochastic", "robust", "soft"] = Field(
        default="best",
        description="which class a particle joins: best: the one of best score; equal: classes of "
        "equal size; stochastic: some better class; robust: by the rank of scores among members "
        "and others; soft: weighted over all classes",
    )
    slack: float = Field(
        default=0.0, ge=0, description="equal: class sizes from their mean, as a share of it"
    )
    similarity: Literal["correlation", "correntropy"] = Field(
        default="correlation", description="robust: what is ranked"
    )
    start_classes: int | None = Field(
        default=None,
        ge=1,
        description="classes to begin with, doubled every level_iterations; null: all at once",
    )
    level_iterations: int = Field(
        default=4, ge=1, description="iterations until the classes are doubled"
    )
    anneal: float = Field(
        default=4.0, ge=1, description="soft: first temperature, in units of the noise's"
    )
    anneal_iterations: int = Field(
        default=8, ge=1, description="soft: until temperature and resolution are reached"
    )
    start_resolution: float = Field(
        default=0.1, gt=0, le=0.5, description="soft: first low-pass of references, 1/px"
    )

    def refuse_few(self, iterations: int, n_classes: int | None) -> None:
        """Make sure that so many iterations end with all classes, and cold.

        Raises:
            ValueError: they do not.
        """
        if self.strategy == "soft" and iterations <= self.anneal_iterations:
            raise ValueError(
                f"assign.strategy=soft anneals for {self.anneal_iterations} iterations, but there "
                f"are {iterations}: use more iterations, or a smaller assign.anneal_iterations"
            )
        if not self.start_classes:
            return
        if n_classes is None:
            raise ValueError("assign.start_classes needs n_classes, how many to end with")
        first = min(self.start_classes, n_classes)
        levels = math.ceil(math.log2(n_classes / first))
        if levels and levels * self.level_iterations >= iterations:
            raise ValueError(
                f"{first} classes become {n_classes} after {levels} times "
                f"{self.level_iterations} iterations, but there are {iterations}: use more "
                "iterations, a smaller assign.level_iterations or more assign.start_classes"
            )

    def cooling(self, iteration: int) -> float:
        """What the noise's temperature is multiplied by in an iteration, from 0."""
        return float(self.anneal ** max(0.0, 1 - iteration / self.anneal_iterations))

    def resolution(self, iteration: int) -> float:
        """Highest frequency of references in an iteration, from 0; 0.5 is all."""
        share = min(1.0, iteration / self.anneal_iterations)
        return self.start_resolution + share * (0.5 - self.start_resolution)


def assign_stochastic(scores: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """Every particle to the first class, in an order of its own, that beats the one it is in.

    Stochastic hill climbing (Elmlund, Elmlund & Bengio 2013): no step goes down, and few go
    straight to the next summit. Where nothing is better, a particle stays.

    Args:
        scores: (n, k) with the present references.
        label: (n,) the class each particle is in; -1, in none, takes the best.
        generator: of the orders, on the CPU.
    """
    n, k = scores.shape
    order = torch.rand(n, k, generator=generator).argsort(1).to(scores.device)
    best, label = scores.argmax(1), label.to(scores.device)
    own = scores.gather(1, label.clamp(min=0).unsqueeze(1))
    better = (scores > own).gather(1, order)  # (n, k) in each particle's order
    first = order.gather(1, better.to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)
    return torch.where(label < 0, best, torch.where(better.any(1), first, label))


def assign_robust(scores: Tensor, label: Tensor) -> Tensor:
    """Every particle to the class where its score ranks highest among members and others.

    A class whose scores are high for everyone attracts particles that are not its own. Here a score
    counts by its rank: the share of the class's members that score no better, times that of all
    other particles (CL2D, Sorzano et al. 2010, with the distributions themselves for their
    histograms).

    Args:
        scores: (n, k).
        label: (n,) the class each particle is in; -1, in none, counts as in its best.
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
    # Above all members, or in a class of none, the score itself decides.
    merit = torch.empty_like(merit).scatter_(0, order, merit)
    return (merit + 1e-9 * scores).argmax(1)


def noise_temperature(score: float, pixels: float) -> float:
    """The temperature T at which exp(c / T) is the likelihood of a correlation coefficient c.

    For a particle of signal, known but for its pose, plus white noise over ``pixels`` pixels,
    log p is pixels c sqrt(SNR (1 + SNR)) but for constants, and the score of the right pose is
    sqrt(SNR / (1 + SNR)): T = (1 - c^2) / (pixels c).

    Args:
        score: typical for right poses, between 0 and 1.
        pixels: compared.
    """
    c = min(max(score, 1e-3), 0.999)
    return (1 - c * c) / (pixels * c)


def soft_weights(evidence: Tensor, temperature: float) -> Tensor:
    """(n, k) posterior of the classes, exp(evidence / T) over its sum, from (n, k) soft maxima
    T log sum exp(c / T) over poses (`search.log_evidence`)."""
    return torch.softmax(evidence.double() / temperature, 1).float()


def capacities(n: int, k: int, slack: float) -> tuple[int, int]:
    """Smallest and largest class of n particles in k classes of sizes within ``slack`` of n / k."""
    return math.floor(n / k * max(0.0, 1 - slack) + 1e-9), math.ceil(n / k * (1 + slack) - 1e-9)


def assign_equal(scores: Tensor, slack: float = 0.0) -> Tensor:
    """The assignment of largest total score whose classes are of equal size.

    A transport problem, solved by its dual: every class has a price, and each particle joins the
    class of best score less price. Sinkhorn's iteration finds prices for an ever colder soft
    assignment (Cuturi 2013), on the scores' device. What few particles are then one too many are
    moved along shortest paths from class to class (Ahuja, Magnanti & Orlin 1993, ch. 9), which
    keeps the assignment optimal: the result is the optimum, not near it.

    Args:
        scores: (n, k), any unit; finite.
        slack: how far a class may be from n / k members, as a share of it; 0 is n / k rounded
            down or up.

    Returns:
        (n,) class indices.

    Raises:
        ValueError: a negative slack, or scores that are not (n, k) and finite.
    """
    if scores.ndim != 2 or scores.shape[1] == 0 or not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite and (n, k), got {tuple(scores.shape)}")
    if not slack >= 0:
        raise ValueError(f"slack must be 0 or more, not {slack}")
    scores = scores.detach().double()
    bounds = capacities(len(scores), scores.shape[1], slack)
    price = _prices(scores, *bounds)
    return _balance(scores, price, *bounds)


def _prices(scores: Tensor, least: int, most: int) -> Tensor:
    """(k,) prices at which a cold soft assignment fills classes with ``least`` to ``most``.

    Positive only for classes that are full, negative only for those that have the least.
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
    """Label (n,) within the bounds, of the largest total score.

    Particles flow through their class into a drain. The start, every particle where score less
    price is best, is optimal for the sizes that it has, whatever the prices; shortest paths then
    carry what is too much to where there is too little.
    """
    n, k = scores.shape
    label = (scores - price).argmax(1)
    size = torch.bincount(label, minlength=k).cpu().numpy()
    dual = np.append(price.cpu().numpy(), 0.0)  # the last is the drain's
    drained = np.where(dual[:k] > 0, most, np.where(dual[:k] < 0, least, size.clip(least, most)))
    arcs = np.full((k + 1, k + 1), np.inf)  # cost of moving one from node to node
    mover = np.zeros((k, k), np.int64)  # the particle that would move
    stale = set(range(k))
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
    """What it costs to move one member of class c to each other class (k,), and which (k,)."""
    members = (label == c).nonzero().squeeze(1)
    if not len(members):
        return np.full(scores.shape[1], np.inf), np.zeros(scores.shape[1], np.int64)
    own = scores[members]
    cost, which = (own[:, c : c + 1] - own).min(0)
    return cost.cpu().numpy(), members[which].cpu().numpy()


def _shortest_path(
    arcs: np.ndarray, dual: np.ndarray, excess: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """The shortest path from any node with too much to any with too little, and new duals.

    Lengths are arcs less the duals' difference, which are not negative (Bellman & Ford).
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
