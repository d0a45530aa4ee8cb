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

from cryoalign.methods.classify.em_step import (
    Features,
    Sums,
    class_power,
    features,
    model_of,
    natural_order,
    products,
)
from cryoalign.methods.classify.fourier_rings import (
    FourierRings,
    half_circle_of,
    move_features,
)
from cryoalign.runtime.threads import map_in_order, workers_for

FINER = 4  # trial angles per angle of the E-step, because averages have less noise than particles
LIKELY = 8  # pairs of shift and hand that are looked at with finer angles
PAIRS = {"cpu": 32, "cuda": 4096}  # pairs of classes that are compared at a time


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
    moved = moved_classes(signal.sum(0), shifts, rings)

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
        moved.rows[:, a] = moved_classes(total.sum(0)[None], shifts, rings).rows[:, 0]
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


def moved_classes(signal: Tensor, shifts: Tensor, rings: FourierRings) -> Features:
    """Features of classes (k, r, m) that are moved by shifts (s, 2), pixels."""
    weight, centre = signal.real.new_ones(len(signal), rings.last), shifts.new_zeros(1, 2)
    polar = half_circle_of(signal, rings)
    return features(polar, weight, centre.expand(len(signal), 2), shifts, rings)


def best_mergers(
    signal: Tensor, weight: Tensor, moved: Features, pairs: Tensor, shifts: Tensor,
    rings: FourierRings, mirror: bool,
) -> Merger:  # fmt: skip
    """The best mergers of pairs of classes.

    The shifts and hands of the best mergers are looked for at the angles of the E-step, and the
    likeliest `LIKELY` of them then at `FINER` angles.

    Args:
        signal: (k, r, m) signal of all classes.
        weight: (k, r) weight of all classes.
        moved: features of the signal moved by the shifts.
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
    model = model_of(rings, (signal[a] / both[..., None])[:, None], mirror)
    number = torch.arange(len(a), device=signal.device)
    _, spectra = products(moved.take(others), model, number)
    even, odd = (
        inverse @ spectrum.view(inverse.shape[1], -1)
        for inverse, spectrum in zip(model.inverse, spectra, strict=True)
    )
    peak = odd.abs_().add_(even).amax(0).view(len(a), -1)  # (j, s h)
    likely = peak.topk(min(LIKELY, peak.shape[1])).indices  # (j, c)
    columns = (number[:, None] * peak.shape[1] + likely).flatten()
    real, imaginary = torch.cat([each.flatten(2)[..., columns] for each in spectra], 1)  # (m, j c)
    spectrum = natural_order(torch.complex(real, imaginary)).mT.unflatten(0, (len(a), -1))
    angles = FINER * rings.n_angles
    # irfft divides by ``angles``, but features are scaled for n_angles.
    table = FINER * torch.fft.irfft(spectrum, n=angles)  # (j, c, a)
    best, place = table.flatten(1).max(1)
    chosen = likely.gather(1, (place // angles)[:, None]).squeeze(1)
    together = ((power[others] + power[a]) / both).sum(1) / 2 + best
    return Merger(
        alone[a] + alone[others] - together,
        place % angles * (2 * torch.pi / angles),
        shifts[chosen // model.hands],
        (chosen % model.hands).bool(),
    )
