"""Merging classes that show the same view: Ward's criterion with alignment.

Two classes of sums N (signal) and D (weight) explain their members better apart than together by

    loss(a, b) = L(N_a, D_a) + L(N_b, D_b) - max over poses L(N_a + moved N_b, D_a + D_b),

L(N, D) = sum_r |N|^2_r / (2 D_r) being the log-likelihood that the best class image gains. It is
Ward's (1963) linkage, the distance being one between *views*: free of turn, shift and hand.
"""

from __future__ import annotations

from collections.abc import Sequence
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

FINER = 4  # angles tried per angle of the E-step: averages are worth aligning exactly


class Joint(NamedTuple):
    """How a class lies on others: (j,) each."""

    loss: Tensor  # of log-likelihood, were they one class
    angle: Tensor  # radians, the pose that takes *them* onto this class
    shift: Tensor  # (k, 2) pixels
    mirror: Tensor


def merge_classes(
    sums: Sums, rings: FourierRings, shifts: Tensor, n_classes: int, mirror: bool
) -> tuple[Sums, Tensor]:
    """Merge the cheapest pair of classes, over and over, until ``n_classes`` are left.

    Args:
        sums: of k classes.
        rings: theirs.
        shifts: (s, 2) pixels by which classes may lie apart.
        n_classes: how many to keep.
        mirror: whether mirrored views are one view.

    Returns:
        The sums of the classes left, and (k,) the new index of every old class.
    """
    signal, weight, count = (total.clone() for total in sums)
    k = signal.shape[1]
    if k <= n_classes:
        return sums, torch.arange(k, device=signal.device)
    alive = torch.ones(k, dtype=torch.bool, device=signal.device)
    target = torch.arange(k, device=signal.device)
    moved = ring_features(half_circle_of(signal.sum(0), rings), shifts, rings)  # (k, s, r, m)

    def row(a: int, others: Tensor) -> Joint:
        return join(signal.sum(0), weight.sum(0), moved, a, others, shifts, rings, mirror)

    # Every pair once, from the side of its first; (k, k) tables.
    later = [torch.arange(a + 1, k, device=signal.device) for a in range(k)]
    workers = workers_for(signal.device)
    rows = list(map_in_order(lambda a: row(a, later[a]), range(k - 1), workers))
    pairs = Joint(*(_table_of(of, later, k) for of in zip(*rows, strict=True)))
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
        others = (alive & (torch.arange(k, device=alive.device) != a)).nonzero().squeeze(1)
        if not len(others):
            break
        for table, of in zip(pairs, row(a, others), strict=True):
            table[a, others] = of
    number = torch.cumsum(alive, 0) - 1
    return Sums(signal[:, alive], weight[:, alive], count[:, alive]), number[target]


def _table_of(rows: Sequence[Tensor], columns: Sequence[Tensor], k: int) -> Tensor:
    """(k, k, ...) of rows that have some columns each; infinite elsewhere (False for hands)."""
    nothing = False if rows[0].dtype == torch.bool else torch.inf
    table = rows[0].new_full((k, k, *rows[0].shape[1:]), nothing)
    for a, row in enumerate(rows):
        table[a, columns[a]] = row
    return table


def join(
    signal: Tensor, weight: Tensor, moved: Tensor, a: int, others: Tensor, shifts: Tensor,
    rings: FourierRings, mirror: bool,
) -> Joint:  # fmt: skip
    """What other classes would lose in one class with class ``a``.

    Args:
        signal: (k, r, m); weight: (k, r) of all classes.
        moved: (k, s, r, m) the signals moved by the shifts (s, 2).
        others: (j,) the classes asked about.
    """
    power = class_power(signal, rings)
    weight = weight.clamp(min=1e-6)
    alone = (power / weight).sum(1) / 2  # (k,)
    both = weight[a] + weight[others]  # (j, r)
    angles = FINER * rings.n_angles
    table = _table(moved[others], signal[a] / both[..., None], mirror, angles)  # (j, s, h, a)
    table *= FINER  # irfft divides by its length, the features' scale is by the rings' own
    best, place = table.flatten(1).max(1)
    hands = table.shape[2]
    together = ((power[others] + power[a]) / both).sum(1) / 2 + best
    return Joint(
        alone[a] + alone[others] - together,
        place % angles * (2 * torch.pi / angles),
        shifts[place // (angles * hands)],
        (place // angles % hands).bool(),
    )


def _table(moved: Tensor, references: Tensor, mirror: bool, angles: int) -> Tensor:
    """(k, s, h, a) products of moved (k, s, r, m) with each its reference (k, r, m)."""
    same = torch.einsum("ksrm,krm->ksm", moved.conj(), references)
    spectra = [same]
    if mirror:
        sign = 1 - 2 * (torch.arange(moved.shape[-1], device=moved.device) % 2)
        spectra.append(sign * torch.einsum("ksrm,krm->ksm", moved.conj(), references.conj()))
    return torch.fft.irfft(torch.stack(spectra, 2), n=angles)
