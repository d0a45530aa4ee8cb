"""Many small, independent minimisations at once.

Each of n problems has p unknowns, a loss, its slope and an approximation of its curvature. The
loss is minus a log-likelihood, which gives a change of 1 a meaning. Every problem has its own
steps, accepts them and stops by itself, so that its result is the same in any batch, except for
rounding. (The optimisers of ``torch.optim`` have one step length and one stop for all.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# A problem stops when its next step is expected to lower the loss by less than this. The error
# that remains is then below sqrt(2 TOLERANCE) = 0.045 standard deviations, about what float32 sums
# over the pixels of a particle round a loss by.
TOLERANCE = 1e-3
# Share of the curvature's diagonal added to it: at the start, at least and at most.
DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-3, 1e-7, 1e7


class Point(NamedTuple):
    """Unknowns of n problems, and the loss there.

    Attributes:
        unknowns: (n, p).
        loss: (n,).
        slope: (n, p) derivative of the loss.
        curvature: (n, p, p) positive semi-definite approximation of its second derivative.
        notes: (n, q) other values that the caller wants at the end.
    """

    unknowns: Tensor
    loss: Tensor
    slope: Tensor
    curvature: Tensor
    notes: Tensor


Evaluate = Callable[[Tensor, Tensor], Point]
"""Computes the point of unknowns (m, p) of problems ``rows`` (m,), ascending: those not stopped."""


def gauss_newton(evaluate: Evaluate, start: Tensor, longest: Tensor, steps: int) -> Point:
    """Levenberg-Marquardt: damped steps (curvature + damping * its diagonal)^-1 slope.

    Args:
        evaluate: see `Evaluate`.
        start: (n, p).
        longest: (p,) largest change of each unknown in one step; longer steps are scaled down.
        steps: largest number of steps.

    Returns:
        The best point of each problem.
    """
    rows = torch.arange(len(start), device=start.device)
    best = now = evaluate(start, rows)
    damping = torch.full_like(now.loss, DAMPING)
    for _ in range(steps):
        step = _shortened(_damped_solve(now.curvature, -now.slope, damping), longest)
        going = _expected_decrease(now, step) >= TOLERANCE
        rows, now, step, damping = rows[going], _rows(now, going), step[going], damping[going]
        if not len(rows):
            break
        trial = evaluate(now.unknowns + step, rows)
        better = trial.loss < now.loss
        damping = torch.where(better, damping * 0.1, damping * 10)
        damping = damping.clamp(LEAST_DAMPING, MOST_DAMPING)
        now = _choose(better, trial, now)
        best = _replaced(best, rows, now)
    return best


def _damped_solve(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """(n, p) solutions of (matrix + damping * its diagonal) x = right, 0 where that is 0."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal.clamp(min=1e-300).rsqrt(), 0.0)  # (n, p)
    unit = scale[:, :, None] * matrix * scale[:, None, :]
    # The diagonal of ``unit`` is 1, or 0 where nothing is known; 1e-9 keeps it invertible.
    ridge = damping[:, None] + torch.where(diagonal > 0, 1e-9, 1.0)
    solved = torch.linalg.solve(unit + torch.diag_embed(ridge), (scale * right)[..., None])
    return scale * solved[..., 0]


def _expected_decrease(point: Point, step: Tensor) -> Tensor:
    """(n,) decrease of the loss that its quadratic model predicts for steps (n, p)."""
    bend = (step[:, None] @ point.curvature @ step[:, :, None])[:, 0, 0]
    return -(point.slope * step).sum(1) - bend / 2


def _shortened(step: Tensor, longest: Tensor) -> Tensor:
    return step / (step.abs() / longest).amax(1, keepdim=True).clamp(min=1)


def _choose(which: Tensor, new: Point, old: Point) -> Point:
    """The new point of the problems where ``which`` (n,) is true, else the old one."""
    return Point(
        *(
            torch.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(new, old, strict=True)
        )
    )


def _rows(point: Point, which: Tensor) -> Point:
    return Point(*(each[which] for each in point))


def _replaced(point: Point, rows: Tensor, new: Point) -> Point:
    """The point with ``rows`` (m,) replaced by the new ones."""
    return Point(*(a.index_copy(0, rows, b) for a, b in zip(point, new, strict=True)))
