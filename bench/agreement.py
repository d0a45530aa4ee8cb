"""Agreement of a blind classification with the truth.

A class has no name, and its average is turned and moved at will. So a class is taken to show the
view that most of its members show, and within such a cell of (class, view) the pose of the view
on the class, truth inverted and then pose found, should be one constant: the cell's own gauge,
estimated robustly. What is left over is error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cryoalign.pose import Pose, compose, wrap_degrees
from cryoalign.results.averages import displacement


class Agreement(NamedTuple):
    """Scores of one classification."""

    rand_index: float  # adjusted, of classes with views
    empty: int  # classes with fewer than 0.2 % of the particles
    views_found: int  # views that make up at least half of some class
    right: float  # share of all particles: view and hand, within 10 degrees and 2 px
    angle: float  # median error, degrees, of particles of right view and hand
    shift: float  # the same, pixels


def agreement(label: Tensor, pose: Pose, view: Tensor, truth: Pose, classes: int) -> Agreement:
    """Score a classification.

    Args:
        label: (n,) class index of each particle, pose: (n,) onto that class.
        view: (n,) true view, truth: (n,) pose onto that view.
        classes: number of classes.
    """
    counts = torch.zeros(classes, int(view.max()) + 1, dtype=torch.int64)
    counts.index_put_((label, view), torch.ones_like(label), accumulate=True)
    sizes, (most, shown) = counts.sum(1), counts.max(1)
    least = 0.002 * len(label)
    clear = (sizes >= max(5.0, least)) & (2 * most >= sizes)
    gauge = compose(truth.to(torch.float64).inverse(), pose.to(torch.float64))
    angle = torch.full((len(label),), torch.inf, dtype=torch.float64)
    shift = angle.clone()
    for c in range(classes):
        cell = ((label == c) & (view == shown[c])).nonzero().squeeze(1)
        if len(cell) >= 3:
            members, turn, move = _cell_errors(gauge[cell])
            angle[cell[members]], shift[cell[members]] = turn, move
    right, known = (angle < 10) & (shift < 2), angle.isfinite()
    return Agreement(
        float(adjusted_rand_score(view.numpy(), label.numpy())),
        int((sizes < max(1.0, least)).sum()),
        len(shown[clear].unique()),
        float(right.double().mean()),
        float(angle[known].median()),
        float(shift[known].median()),
    )


def _cell_errors(gauge: Pose) -> tuple[Tensor, Tensor, Tensor]:
    """Members of the commoner hand, and how far each is from the cell's own turn and place."""
    mirrored = bool(2 * int(gauge.mirror.sum()) > len(gauge))
    members = (gauge.mirror == mirrored).nonzero().squeeze(1)
    angle, place = gauge.angle[members], displacement(gauge[members])
    # The member with the most neighbours is a start that outliers cannot drag away.
    apart = wrap_degrees(angle[:, None] - angle).abs()
    offset = wrap_degrees(angle - angle[(apart < 10).sum(1).argmax()])
    near = offset.abs() < 20
    turn = wrap_degrees(offset - offset[near].mean()).abs()
    return members, turn, (place - place.median(0).values).norm(dim=1)


def pose_errors(label: Tensor, pose: Pose, view: Tensor, truth: Pose) -> tuple[Tensor, Tensor]:
    """Which particles are right, and their poses' errors in the particle's own frame.

    Args:
        label: (n,) class index, negative where set aside; pose: (n,) onto the class.
        view: (n,) true view, negative for junk; truth: (n,) pose onto that view.

    Returns:
        right (n,): of the class's commonest view and hand, within 10 degrees and 2 px; error
        (n, 3): degrees and pixels (x, y) from the pose that the truth and the class's own turn
        and place make, these being means over its right members. NaN elsewhere.
    """
    pose, truth = pose.to(torch.float64), truth.to(torch.float64)
    error = torch.full((len(label), 3), torch.nan, dtype=torch.float64)
    for c in range(int(label.max()) + 1):
        members = ((label == c) & (view >= 0)).nonzero().squeeze(1)
        if len(members) == 0:
            continue
        members = members[view[members] == view[members].mode().values]
        gauge = compose(truth[members].inverse(), pose[members])
        kept, turn, place = _cell_errors(gauge)
        near = kept[(turn < 10) & (place < 2)]
        if len(near) < 3:
            continue
        members, gauge = members[near], gauge[near]
        angle = gauge.angle[0] + wrap_degrees(gauge.angle - gauge.angle[0]).mean()
        level = Pose(angle.expand(len(near)), torch.zeros_like(gauge.shift), gauge.mirror)
        shift = (level.linear().mT @ displacement(gauge).mean(0)).squeeze(-1)
        expected = compose(truth[members], Pose(level.angle, shift, level.mirror))
        error[members, 0] = wrap_degrees(pose.angle[members] - expected.angle)
        error[members, 1:] = pose.shift[members] - expected.shift
    right = (error[:, 0].abs() < 10) & (error[:, 1:].norm(dim=1) < 2)
    return right, error
