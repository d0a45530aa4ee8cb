"""Merge classes of the same view by Ward's (1963) criterion, after aligning them.

Two classes a and b have sums N (signal) and D (weight). Merging them lowers the log-likelihood of
their members by

    loss(a, b) = L(N_a, D_a) + L(N_b, D_b) - max over poses L(N_a + moved N_b, D_a + D_b),

where L(N, D) = sum_r |N|^2_r / (2 D_r) is the log-likelihood of the members with the best class
image. The maximum over poses makes the loss independent of rotation, shift and hand of the classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.methods.classify.em_step import Sums, class_power
from cryoalign.methods.classify.fourier_rings import (
    FourierRings,
    half_circle_of,
    move_features,
    ring_features,
)
from cryoalign.runtime.threads import map_in_order, workers_for

FINER = 4  # trial angles per angle of the E-step, because averages have less noise than particles
PAIRS = {"cpu": 16, "cuda": 4096}  # pairs of classes that are compared at a time


class Merger(NamedTuple):
    """The best mergers of j pairs of classes. The pose moves the second class of a pair."""

    loss: Tensor  # (j,) loss of log-likelihood
    angle: Tensor  # (j,) radians
    shift: Tensor  # (j, 2) pixels
    mirror: Tensor  # (j,) bool


def merge_classes(
    sums: Sums, rings: FourierRings, shifts: Tensor, n_classes: int, mirror: bool
) -> tuple[Sums, Tensor]:
    """Merge the two classes with the least loss repeatedly, until ``n_classes`` are left.

    Args:
        sums: sums of k classes.
        rings: rings of the sums.
        shifts: (s, 2) trial shifts between two classes of the same view, pixels.
        n_classes: number of classes to keep.
        mirror: whether a view and its mirror image may be merged.

    Returns:
        The sums of the remaining classes, and (k,) the new index of every old class.
    """
    signal, weight, count = (total.clone() for total in sums)
    k = signal.shape[1]
    if k <= n_classes:
        return sums, torch.arange(k, device=signal.device)
    alive = torch.ones(k, dtype=torch.bool)
    target = torch.arange(k, device=signal.device)
    moved = ring_features(half_circle_of(signal.sum(0), rings), shifts, rings)  # (k, s, r, m)

    def compare(pairs: Tensor) -> Merger:
        return best_mergers(signal.sum(0), weight.sum(0), moved, pairs, shifts, rings, mirror)

    # (k, k) tables in which every pair occurs once, in the row of its first class.
    every = torch.triu_indices(k, k, 1, device=signal.device)  # (2, j)
    parts = every.split(PAIRS[signal.device.type], 1)
    found = list(map_in_order(compare, parts, workers_for(signal.device)))
    pairs = Merger(*(_table_of(torch.cat(of), every, k) for of in zip(*found, strict=True)))
    for _ in range(k - n_classes):
        place = int(pairs.loss.argmin())
        a, b = place // k, place % k
        angle, shift, hand = (of[a, b].expand(2, *of.shape[2:]) for of in pairs[1:])
        total = signal[:, a] + move_features(signal[:, b], angle, shift, hand, rings)
        signal[:, a], weight[:, a] = total, weight[:, a] + weight[:, b]
        count[:, a] += count[:, b]
        alive[b] = False
        target[target == b] = a
        moved[a] = ring_features(half_circle_of(total.sum(0)[None], rings), shifts, rings)[0]
        for gone in (a, b):
            pairs.loss[gone], pairs.loss[:, gone] = torch.inf, torch.inf
        others = (alive & (torch.arange(k) != a)).nonzero().squeeze(1).to(signal.device)
        if not len(others):
            break
        of_a = torch.stack([torch.full_like(others, a), others])
        for table, of in zip(pairs, compare(of_a), strict=True):
            table[a, others] = of
    alive = alive.to(signal.device)
    number = torch.cumsum(alive, 0) - 1
    return Sums(signal[:, alive], weight[:, alive], count[:, alive]), number[target]


def _table_of(values: Tensor, pairs: Tensor, k: int) -> Tensor:
    """(k, k, ...) table with values (j, ...) for pairs (2, j); infinity or False for the others."""
    nothing = False if values.dtype == torch.bool else torch.inf
    table = values.new_full((k, k, *values.shape[1:]), nothing)
    table[pairs[0], pairs[1]] = values
    return table


def best_mergers(
    signal: Tensor, weight: Tensor, moved: Tensor, pairs: Tensor, shifts: Tensor,
    rings: FourierRings, mirror: bool,
) -> Merger:  # fmt: skip
    """The best mergers of pairs of classes.

    Args:
        signal: (k, r, m) signal of all classes.
        weight: (k, r) weight of all classes.
        moved: (k, s, r, m) signal moved by the shifts.
        pairs: (2, j) indices of the two classes of each pair.
        shifts: (s, 2) trial shifts, pixels.
        rings: rings of the signal.
        mirror: whether a view and its mirror image may be merged.
    """
    a, others = pairs
    power = class_power(signal, rings)
    weight = weight.clamp(min=1e-6)
    alone = (power / weight).sum(1) / 2  # (k,)
    both = weight[a] + weight[others]  # (j, r)
    angles = FINER * rings.n_angles
    table = _table(moved[others], signal[a] / both[..., None], mirror, angles)  # (j, s, h, a)
    table *= FINER  # irfft divides by ``angles``, but features are scaled for n_angles
    best, place = table.flatten(1).max(1)
    hands = table.shape[2]
    together = ((power[others] + power[a]) / both).sum(1) / 2 + best
    return Merger(
        alone[a] + alone[others] - together,
        place % angles * (2 * torch.pi / angles),
        shifts[place // (angles * hands)],
        (place // angles % hands).bool(),
    )


def _table(moved: Tensor, references: Tensor, mirror: bool, angles: int) -> Tensor:
    """(k, s, h, a) products of each moved class (k, s, r, m) with its reference (k, r, m)."""
    same = torch.einsum("ksrm,krm->ksm", moved.conj(), references)
    spectra = [same]
    if mirror:
        sign = 1 - 2 * (torch.arange(moved.shape[-1], device=moved.device) % 2)
        spectra.append(sign * torch.einsum("ksrm,krm->ksm", moved.conj(), references.conj()))
    return torch.fft.irfft(torch.stack(spectra, 2), n=angles)
