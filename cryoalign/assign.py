"""Which class a particle joins, from the scores of all particles with all classes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

# Temperatures of the smoothed problem, in deviations of the scores, and sweeps at each.
HOT, COLD, COOLING, SWEEPS = 1.0, 1e-4, 0.5, 8


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
