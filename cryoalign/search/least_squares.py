"""Many small minimisations at once, none of which depends on another.

Each of n problems has p unknowns, a loss that is minus a log-likelihood (so that a change of 1
means something), its slope, and an approximation of its curvature. Problems step, accept and stop
each on its own: what a problem ends at is the same in any batch, but for rounding.

(``torch.optim.LBFGS`` takes all unknowns for one problem: one curvature and one step length for
all. docs/refinement.md has what that costs.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# A step that promises less than this of the loss is not taken. What is left of the error is then
# below sqrt(2 TOLERANCE) = 0.045 standard deviations; fp32's sums over a particle's pixels round
# a loss by about as much.
TOLERANCE = 1e-3
DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-3, 1e-7, 1e7
MEMORY = 5  # pairs of steps and slopes that LBFGS remembers
ARMIJO = 1e-4  # share of the promised decrease that a step must keep


class Point(NamedTuple):
    """Where n problems stand.

    Attributes:
        unknowns: (n, p).
        loss: (n,).
        slope: (n, p) of the loss.
        curvature: (n, p, p) positive semi-definite approximation of the loss's second derivative.
        notes: (n, q) what else the caller wants to know there.
    """

    unknowns: Tensor
    loss: Tensor
    slope: Tensor
    curvature: Tensor
    notes: Tensor


Evaluate = Callable[[Tensor, Tensor], Point]
"""The point of unknowns (m, p) of the problems ``rows`` (m,): those still at work, ascending."""


def gauss_newton(evaluate: Evaluate, start: Tensor, longest: Tensor, steps: int) -> Point:
    """Levenberg-Marquardt: damped steps (curvature + damping * its diagonal)^-1 slope.

    Args:
        evaluate: see `Evaluate`.
        start: (n, p).
        longest: (p,) a step is shortened, as a whole, until no unknown moves further.
        steps: at most.

    Returns:
        The best point of each problem.
    """
    rows = torch.arange(len(start), device=start.device)
    best = now = evaluate(start, rows)
    damping = torch.full_like(now.loss, DAMPING)
    for _ in range(steps):
        step = _shortened(_damped_solve(now.curvature, -now.slope, damping), longest)
        going = _promise(now, step) >= TOLERANCE
        rows, now, step, damping = rows[going], _of(now, going), step[going], damping[going]
        if not len(rows):
            break
        trial = evaluate(now.unknowns + step, rows)
        better = trial.loss < now.loss
        damping = torch.where(better, damping * 0.1, damping * 10)
        damping = damping.clamp(LEAST_DAMPING, MOST_DAMPING)
        now = _choose(better, trial, now)
        best = _put(best, rows, now)
    return best


def lbfgs(evaluate: Evaluate, start: Tensor, longest: Tensor, steps: int) -> Point:
    """Limited-memory BFGS (Nocedal 1980); steps are halved until Armijo's condition holds.

    The diagonal of the curvature at the start is its metric: unknowns have units of their own.
    Arguments and result as `gauss_newton`; ``steps`` counts evaluations.
    """
    rows = torch.arange(len(start), device=start.device)
    best = now = evaluate(start, rows)
    diagonal = now.curvature.diagonal(dim1=1, dim2=2)
    metric = torch.where(diagonal > 0, 1 / diagonal, 0.0)  # (n, p)
    moves, turns = start.new_zeros(2, MEMORY, *start.shape)
    length = torch.ones_like(now.loss)
    direction = _shortened(-metric * now.slope, longest)
    for _ in range(steps):
        going = -length * (now.slope * direction).sum(1) >= TOLERANCE
        rows, now, metric, length = rows[going], _of(now, going), metric[going], length[going]
        moves, turns, direction = moves[:, going], turns[:, going], direction[going]
        if not len(rows):
            break
        step = length[:, None] * direction
        trial = evaluate(now.unknowns + step, rows)
        better = trial.loss <= now.loss + ARMIJO * (now.slope * step).sum(1)
        # Without positive curvature along the step there is nothing to remember.
        turn = trial.slope - now.slope
        kept = better & ((turn * step).sum(1) > 0)
        moves, turns = (
            torch.where(kept[:, None], torch.cat([old[1:], new[None]]), old)
            for old, new in ((moves, step), (turns, turn))
        )
        now = _choose(better, trial, now)
        best = _put(best, rows, now)
        length = torch.where(better, 1.0, 0.5 * length)
        ahead = _shortened(-_two_loops(now.slope, moves, turns, metric), longest)
        direction = torch.where(better[:, None], ahead, direction)
    return best


def _damped_solve(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """(n, p) solutions of (matrix + damping * its diagonal) x = right; zero where it has none."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal.clamp(min=1e-300).rsqrt(), 0.0)  # (n, p)
    unit = scale[:, :, None] * matrix * scale[:, None, :]
    # Of unit diagonal, or of zero where nothing is known; a trace more, for what is nearly so.
    ridge = damping[:, None] + torch.where(diagonal > 0, 1e-9, 1.0)
    solved = torch.linalg.solve(unit + torch.diag_embed(ridge), (scale * right)[..., None])
    return scale * solved[..., 0]


def _promise(point: Point, step: Tensor) -> Tensor:
    """(n,) how much the quadratic model expects of the steps (n, p)."""
    bend = (step[:, None] @ point.curvature @ step[:, :, None])[:, 0, 0]
    return -(point.slope * step).sum(1) - bend / 2


def _two_loops(slope: Tensor, moves: Tensor, turns: Tensor, metric: Tensor) -> Tensor:
    """(n, p) the inverse curvature of the remembered pairs (MEMORY, n, p), times the slope.

    Pairs of zeros, which are not there yet, change nothing.
    """
    product = (moves * turns).sum(2)  # (MEMORY, n)
    inverse = torch.where(product > 0, 1 / product, 0.0)[..., None]
    vector, alphas = slope, []
    for move, turn, rho in zip(moves.flip(0), turns.flip(0), inverse.flip(0), strict=True):
        alphas.append(rho * (move * vector).sum(1, keepdim=True))
        vector = vector - alphas[-1] * turn
    latest = (turns[-1] * metric * turns[-1]).sum(1)
    size = torch.where(latest > 0, product[-1] / latest, 1.0)
    vector = size[:, None] * metric * vector
    for move, turn, rho, alpha in zip(moves, turns, inverse, reversed(alphas), strict=True):
        vector = vector + move * (alpha - rho * (turn * vector).sum(1, keepdim=True))
    return vector


def _shortened(step: Tensor, longest: Tensor) -> Tensor:
    return step / (step.abs() / longest).amax(1, keepdim=True).clamp(min=1)


def _choose(which: Tensor, new: Point, old: Point) -> Point:
    """The new point of the problems ``which`` (n,)."""
    return Point(
        *(
            torch.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(new, old, strict=True)
        )
    )


def _of(point: Point, which: Tensor) -> Point:
    return Point(*(each[which] for each in point))


def _put(point: Point, rows: Tensor, new: Point) -> Point:
    """The point with these of its rows (m,) new."""
    return Point(*(a.index_copy(0, rows, b) for a, b in zip(point, new, strict=True)))
