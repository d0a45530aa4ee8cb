"""The agreement of independent alignments (runs) of the same particles.

Each run starts from other poses and ends with the whole class rotated, shifted and mirrored in
another way; this is the frame of the run. When all runs are transformed to one frame, the remaining
differences show the uncertainty of each particle's pose, which is largest for particles that belong
to another class (Yang, Fang, Chittuluri, Asturias & Penczek 2012, ISAC).
"""

import math

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cryoalign.pose import Pose, compose
from cryoalign.results.averages import displacement

ROUNDS = 10  # rounds of new weights; frames change only in the first few


def common_frame(runs: Pose, label: Tensor, k: int, radius: float, threshold: float) -> Pose:
    """Transform the runs of each class to one frame, that of the first run.

    Hands and angles are found by synchronisation (Singer 2011), from the leading eigenvector of
    the matrix of agreements between runs, and shifts by least squares. A particle has the weight
    1 / (threshold^2 + its squared pixel error), updated `ROUNDS` times, because particles that
    differ between runs should not determine the frame.

    Args:
        runs: (l, n) poses of n particles in l runs.
        label: (n,) class index, 0 … k - 1; each class has its own frame.
        k: number of classes.
        radius: radius of the particle, pixels.
        threshold: largest pixel error of a stable particle, pixels.

    Returns:
        (l, n) poses in float64.
    """
    runs = _same_hand(runs.to(torch.float64), label, k)
    weight = consistent_hands(runs).double()
    for _ in range(ROUNDS):
        runs = _same_place(_same_turn(runs, label, k, weight), label, k, weight)
        weight = 1 / (threshold**2 + pixel_errors(runs, radius).square())
    return runs


def pixel_errors(runs: Pose, radius: float) -> Tensor:
    """(n,) pixel error e of every particle, its spread over runs (l, n) of one frame, in pixels.

    e^2 = d^2 / 4 (1 - |sum over runs of exp(i angle)| / l) + var(x) + var(y), with d = 2 radius
    and (x, y) the position of the particle's centre on the reference. Infinite if hands differ.
    """
    together = torch.polar(torch.ones_like(runs.angle), torch.deg2rad(runs.angle)).mean(0).abs()
    spread = displacement(runs).var(0, correction=0).sum(-1)
    error = (radius**2 * (1 - together).clamp(min=0) + spread).sqrt()
    return torch.where(consistent_hands(runs), error, torch.inf)


def consistent_hands(runs: Pose) -> Tensor:
    """(n,) bool: whether all runs (l, n) of one frame give the particle the same hand."""
    return (runs.mirror == runs.mirror[:1]).all(0)


def mean_pose(runs: Pose) -> Pose:
    """(n,) mean pose of runs (l, n) of one frame; the pose in the first run if hands differ."""
    mirror = runs.mirror[0]
    angle = torch.deg2rad(runs.angle)
    turn = torch.rad2deg(torch.atan2(angle.sin().mean(0), angle.cos().mean(0)))
    turned = Pose(turn, torch.zeros_like(runs.shift[0]), mirror)
    shift = (turned.linear().mT @ displacement(runs).mean(0).unsqueeze(-1)).squeeze(-1)
    same = consistent_hands(runs)
    return Pose(
        torch.where(same, turn, runs.angle[0]),
        torch.where(same[:, None], shift, runs.shift[0]),
        mirror,
    )


def core_members(score: Tensor, label: Tensor, members: Tensor, deviations: float) -> Tensor:
    """(n,) bool: members whose score is not far below the median of their class.

    In a class of real particles, images of noise are aligned to the average as stably as
    particles, but with a lower score.

    Args:
        score: (n,).
        label: (n,) class index.
        members: (n,) bool, the members of the classes.
        deviations: largest distance below the median, in standard deviations, estimated as 1.4826
            times the median absolute deviation.
    """
    table = pd.DataFrame({"score": score.double().cpu(), "label": label.cpu()})
    table["score"] = table["score"].where(members.cpu().numpy())
    off = table["score"] - table.groupby("label")["score"].transform("median")
    spread = 1.4826 * off.abs().groupby(table["label"]).transform("median")
    return torch.tensor((off >= -deviations * spread).to_list()).to(members.device)


def match_classes(a: Tensor, b: Tensor) -> pd.DataFrame:
    """Pair the classes of two classifications so that pairs have most members in common.

    Args:
        a, b: (n,) class numbers of the same particles, from 1; 0 means in no class.

    Returns:
        A row per pair with common members: class_a, class_b, size_a, size_b, common, jaccard
        (common members over members of either class).

    Raises:
        ValueError: a and b have different lengths.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"class numbers {tuple(a.shape)} and {tuple(b.shape)} are not of the same particles"
        )
    one, two = a.cpu().numpy(), b.cpu().numpy()
    common = np.zeros((one.max(initial=0) + 1, two.max(initial=0) + 1), np.int64)
    np.add.at(common, (one, two), 1)
    sizes = common.sum(1), common.sum(0)
    rows, columns = linear_sum_assignment(common[1:, 1:], maximize=True)
    table = pd.DataFrame({"class_a": rows + 1, "class_b": columns + 1})
    table["size_a"] = sizes[0][table["class_a"]]
    table["size_b"] = sizes[1][table["class_b"]]
    table["common"] = common[table["class_a"], table["class_b"]]
    either = table["size_a"] + table["size_b"] - table["common"]
    table["jaccard"] = table["common"] / either.clip(lower=1)
    return table[table["common"] > 0].reset_index(drop=True)


def reproducibility(a: Tensor, b: Tensor) -> float:
    """Share of particles in matched classes (`match_classes`) among those that at least one
    classification has in a class; NaN if there are none. Arguments as `match_classes`."""
    either = int(((a > 0) | (b > 0)).sum())
    return float(match_classes(a, b)["common"].sum()) / either if either else math.nan


def _same_hand(runs: Pose, label: Tensor, k: int) -> Pose:
    """The runs, with each class mirrored if this makes its hands agree with the first run."""
    hand = torch.where(runs.mirror, -1.0, 1.0).to(runs.angle)  # (l, n)
    vector = _leading(hand, label, k, torch.ones_like(hand[0]))  # (k, l)
    flip = (vector * vector[:, :1])[label].T < 0  # (l, n)
    return compose(runs, Pose(torch.zeros_like(hand), torch.zeros_like(runs.shift), flip))


def _same_turn(runs: Pose, label: Tensor, k: int, weight: Tensor) -> Pose:
    """The runs, with each class rotated onto the first run."""
    # Poses mirror last, and F R(a) = R(-a) F: a rotation of the reference adds to -a.
    angle = torch.deg2rad(torch.where(runs.mirror, -runs.angle, runs.angle))
    vector = _leading(torch.polar(torch.ones_like(angle), angle), label, k, weight)
    turn = torch.rad2deg((vector[:, :1] * vector.conj()).angle())[label].T  # (l, n)
    still = torch.zeros_like(runs.mirror)
    return compose(runs, Pose(turn, torch.zeros_like(runs.shift), still))


def _same_place(runs: Pose, label: Tensor, k: int, weight: Tensor) -> Pose:
    """The runs, with each class shifted onto the first run."""
    place = (displacement(runs) * weight[:, None]).transpose(0, 1)  # (n, l, 2)
    total = place.new_zeros(k, *place.shape[1:]).index_add(0, label, place)
    count = weight.new_zeros(k).index_add(0, label, weight).clamp(min=1e-300)
    mean = total / count[:, None, None]  # (k, l, 2)
    shift = (mean[:, :1] - mean)[label].transpose(0, 1)  # (l, n, 2)
    return compose(runs, Pose(torch.zeros_like(runs.angle), shift, torch.zeros_like(runs.mirror)))


def _leading(unit: Tensor, label: Tensor, k: int, weight: Tensor) -> Tensor:
    """(k, l) leading eigenvector of the sum of weight z z^H over each class's members, where z is
    a column of ``unit`` (l, n)."""
    z = unit.T  # (n, l)
    products = (weight[:, None, None] * z[:, :, None] * z[:, None].conj()).resolve_conj()
    matrix = products.new_zeros(k, *products.shape[1:]).index_add(0, label, products)
    vector: Tensor = torch.linalg.eigh(matrix).eigenvectors[..., -1]
    return vector
