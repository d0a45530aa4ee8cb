"""Merging classes that show the same view: Ward's criterion with alignment.

Two classes of sums N (signal) and D (weight) explain their members better apart than together by

    loss(a, b) = L(N_a, D_a) + L(N_b, D_b) - max over poses L(N_a + moved N_b, D_a + D_b),

L(N, D) = sum_r |N|^2_r / (2 D_r) being the log-likelihood that the best class image gains. It is
Ward's (1963) linkage, the distance being one between *views*: free of turn, shift and hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.expectation import Sums, class_power
from cryoalign.fourier_rings import FourierRings, half_circle_of, move_features, ring_features

FINER = 4  # angles tried per angle of the E-step: averages are worth aligning exactly


class Joint(NamedTuple):
    """How a class lies on others: (k,) each."""

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
    alive = torch.ones(k, dtype=torch.bool, device=signal.device)
    target = torch.arange(k, device=signal.device)
    rows = [join(signal.sum(0), weight.sum(0), a, rings, shifts, mirror) for a in range(k)]
    loss = torch.stack([row.loss for row in rows])  # (k, k)
    loss.fill_diagonal_(torch.inf)
    for _ in range(k - n_classes):
        place = int(loss.argmin())
        a, b = place // k, place % k
        row = rows[a]
        moved = move_features(
            signal[:, b], row.angle[b].expand(2), row.shift[b].expand(2, 2),
            row.mirror[b].expand(2), rings,
        )  # fmt: skip
        signal[:, a] += moved
        weight[:, a] += weight[:, b]
        count[:, a] += count[:, b]
        alive[b] = False
        target[target == b] = a
        rows[a] = join(signal.sum(0), weight.sum(0), a, rings, shifts, mirror)
        loss[a] = torch.where(alive, rows[a].loss, torch.inf)
        loss[b] = loss[:, b] = torch.inf
        loss[:, a] = torch.inf  # the pose is known from a's side only
        loss[a, a] = torch.inf
    number = torch.cumsum(alive, 0) - 1
    return Sums(signal[:, alive], weight[:, alive], count[:, alive]), number[target]


def join(
    signal: Tensor, weight: Tensor, a: int, rings: FourierRings, shifts: Tensor, mirror: bool
) -> Joint:
    """What every class would lose in one class with class ``a``.

    Args:
        signal: (k, r, m); weight: (k, r).
    """
    weight = weight.clamp(min=1e-6)
    both = weight[a] + weight  # (k, r)
    moved = ring_features(half_circle_of(signal, rings), shifts, rings)  # (k, s, r, m)
    angles = FINER * rings.n_angles
    table = _table(moved, signal[a] / both[..., None], mirror, angles)  # (k, s, h, a)
    table *= FINER  # irfft divides by its length, the features' scale is by the rings' own
    best, place = table.flatten(1).max(1)
    hands = table.shape[2]
    power = class_power(signal, rings)
    alone = (power / weight).sum(1) / 2
    together = ((power + power[a]) / both).sum(1) / 2 + best
    angle = place % angles * (2 * torch.pi / angles)
    hand = place // angles % hands
    return Joint(
        alone[a] + alone - together,
        angle,
        shifts[place // (angles * hands)],
        hand.bool(),
    )


def _table(moved: Tensor, references: Tensor, mirror: bool, angles: int) -> Tensor:
    """(k, s, h, a) products of moved (k, s, r, m) with each its reference (k, r, m)."""
    same = torch.einsum("ksrm,krm->ksm", moved.conj(), references)
    spectra = [same]
    if mirror:
        sign = 1 - 2 * (torch.arange(moved.shape[-1], device=moved.device) % 2)
        spectra.append(sign * torch.einsum("ksrm,krm->ksm", moved.conj(), references.conj()))
    return torch.fft.irfft(torch.stack(spectra, 2), n=angles)
