"""How well independent alignments of the same particles agree.

Runs that start anew end in frames of their own: the whole class turned, moved or mirrored. Brought
to one frame they differ by what each particle's pose really is uncertain by, and a particle that
belongs elsewhere differs most (Yang, Fang, Chittuluri, Asturias & Penczek 2012, ISAC).
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cryoalign.pose import Pose, compose
from cryoalign.results.averages import displacement

ROUNDS = 10  # of re-weighting; frames rest after a few


def common_frame(runs: Pose, label: Tensor, k: int, radius: float, threshold: float) -> Pose:
    """Runs brought to one frame per class: that of the first run.

    Hands and angles by synchronisation (Singer 2011): the leading eigenvector of the matrix of
    agreements between runs. Shifts by least squares. Particles that disagree between runs should
    have no say in where the frame is: each counts by 1 / (threshold^2 + its squared pixel error),
    over and over.

    Args:
        runs: (l, n) poses of n particles in l runs.
        label: (n,) class index, 0 … k - 1: a class's frame is its own.
        k: number of classes.
        radius: of the particle, pixels.
        threshold: of the pixel error, pixels.

    Returns:
        (l, n) float64.
    """
    runs = _same_hand(runs.to(torch.float64), label, k)
    weight = consistent_hands(runs).double()
    for _ in range(ROUNDS):
        runs = _same_place(_same_turn(runs, label, k, weight), label, k, weight)
        weight = 1 / (threshold**2 + pixel_errors(runs, radius).square())
    return runs


def pixel_errors(runs: Pose, radius: float) -> Tensor:
    """(n,) how far runs (l, n) of one frame are apart for every particle, pixels.

    e^2 = d^2 / 4 (1 - |sum over runs of exp(i angle)| / l) + var(x) + var(y), d = 2 radius and
    (x, y) where the particle's centre lies on the reference; infinite where hands differ.
    """
    together = torch.polar(torch.ones_like(runs.angle), torch.deg2rad(runs.angle)).mean(0).abs()
    spread = displacement(runs).var(0, correction=0).sum(-1)
    error = (radius**2 * (1 - together).clamp(min=0) + spread).sqrt()
    return torch.where(consistent_hands(runs), error, torch.inf)


def consistent_hands(runs: Pose) -> Tensor:
    """(n,) whether all runs (l, n) of one frame give a particle the same hand."""
    return (runs.mirror == runs.mirror[:1]).all(0)


def mean_pose(runs: Pose) -> Pose:
    """(n,) the pose amid runs (l, n) of one frame; of the first run where hands differ."""
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
    """(n,) those of the members (n,) whose score is not far below their class's median.

    Noise in a class of real particles aligns as stably as they do, to the average that they make,
    but not as well.

    Args:
        score: (n,); label: (n,) class index; members: (n,) bool.
        deviations: how far below is too far, in standard deviations (1.4826 median deviations).
    """
    table = pd.DataFrame({"score": score.double().cpu(), "label": label.cpu()})
    table["score"] = table["score"].where(members.cpu().numpy())
    off = table["score"] - table.groupby("label")["score"].transform("median")
    spread = 1.4826 * off.abs().groupby(table["label"]).transform("median")
    return torch.tensor((off >= -deviations * spread).to_list()).to(members.device)


def match_classes(a: Tensor, b: Tensor) -> pd.DataFrame:
    """Which class of one classification is which of another, by the members that they share.

    The pairing with most members in common (Kuhn-Munkres, "Hungarian").

    Args:
        a, b: (n,) class numbers of the same particles, from 1; 0 = in none.

    Returns:
        A row per pair: class_a, class_b, size_a, size_b, common, jaccard (common members over
        those of either); pairs without a common member are left out.

    Raises:
        ValueError: a and b are not of one length.
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
    """Share of the particles that either classification has in a class, which both have in
    matched classes; arguments as `match_classes`. NaN if there is no such particle."""
    either = int(((a > 0) | (b > 0)).sum())
    return float(match_classes(a, b)["common"].sum()) / either if either else math.nan


def _same_hand(runs: Pose, label: Tensor, k: int) -> Pose:
    """Runs mirrored as a whole, class by class, where that makes hands agree."""
    hand = torch.where(runs.mirror, -1.0, 1.0).to(runs.angle)  # (l, n)
    vector = _leading(hand, label, k, torch.ones_like(hand[0]))  # (k, l)
    flip = (vector * vector[:, :1])[label].T < 0  # (l, n)
    return compose(runs, Pose(torch.zeros_like(hand), torch.zeros_like(runs.shift), flip))


def _same_turn(runs: Pose, label: Tensor, k: int, weight: Tensor) -> Pose:
    """Runs turned as a whole, class by class, onto the first."""
    # Mirrored last, F R(a) = R(-a) F: a turn of the reference adds to -a.
    angle = torch.deg2rad(torch.where(runs.mirror, -runs.angle, runs.angle))
    vector = _leading(torch.polar(torch.ones_like(angle), angle), label, k, weight)
    turn = torch.rad2deg((vector[:, :1] * vector.conj()).angle())[label].T  # (l, n)
    still = torch.zeros_like(runs.mirror)
    return compose(runs, Pose(turn, torch.zeros_like(runs.shift), still))


def _same_place(runs: Pose, label: Tensor, k: int, weight: Tensor) -> Pose:
    """Runs moved as a whole, class by class, onto the first."""
    place = (displacement(runs) * weight[:, None]).transpose(0, 1)  # (n, l, 2)
    total = place.new_zeros(k, *place.shape[1:]).index_add(0, label, place)
    count = weight.new_zeros(k).index_add(0, label, weight).clamp(min=1e-300)
    mean = total / count[:, None, None]  # (k, l, 2)
    shift = (mean[:, :1] - mean)[label].transpose(0, 1)  # (l, n, 2)
    return compose(runs, Pose(torch.zeros_like(runs.angle), shift, torch.zeros_like(runs.mirror)))


def _leading(unit: Tensor, label: Tensor, k: int, weight: Tensor) -> Tensor:
    """(k, l) leading eigenvector of each class's sum of weight z z^H, z = unit (l, n)."""
    z = unit.T  # (n, l)
    products = (weight[:, None, None] * z[:, :, None] * z[:, None].conj()).resolve_conj()
    matrix = products.new_zeros(k, *products.shape[1:]).index_add(0, label, products)
    vector: Tensor = torch.linalg.eigh(matrix).eigenvectors[..., -1]
    return vector
