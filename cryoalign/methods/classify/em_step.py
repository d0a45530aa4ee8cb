"""One step of expectation maximisation on Fourier rings (Sigworth 1998; Scheres 2005, 2012).

Particles are assigned to all classes, hands, angles and shifts with their probabilities. In the
model, a whitened particle is its CTF times the moved class image, plus white noise of variance 1.
With X the features of the particle, already multiplied by CTF / noise (`fourier_rings`), q the ring
means of CTF^2 / noise and Y_k the features of class image k,

    log p(particle | k, pose) = <X at pose, Y_k> - sum_r q_r P_k(r) / 2 + constant,

where P_k(r) is the power of Y_k on ring r. The sums of particles with their posterior weights are
the gradient of the log-sum-exp with respect to the products, and use the same matrices transposed.

Letters of shapes: n particles, s shifts, k classes, h hands, a angles, r rings, m frequencies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import rfft_weights
from cryoalign.images.frc import wiener_factors
from cryoalign.methods.classify.fourier_rings import FourierRings, ring_features

# Entries of a block of the table: fits a CPU's cache, and keeps the number of GPU launches small.
BLOCK = {"cpu": 2**21, "cuda": 2**27}
HIGHEST_FRC = 0.999  # larger FRCs count as this in the filter, as every class image has noise
NEGLIGIBLE = -25.0  # smallest log of weight / largest weight of a particle; exp(-25) is 1e-11


@dataclass(frozen=True, eq=False)
class Features:
    """Particles ready for the E-step.

    Attributes:
        rows: (m, n, s, 2 r) float32, real and imaginary part of each ring next to each other.
        weight: (n, r) ring means of CTF^2 / noise.
        shifts: (s, 2) trial shifts, added to each particle's own shift, pixels.
        rings: rings of the features.
    """

    rows: Tensor
    weight: Tensor
    shifts: Tensor
    rings: FourierRings

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, members: Tensor) -> Features:
        """The features of the particles with indices ``members`` (b,)."""
        return Features(self.rows[:, members], self.weight[members], self.shifts, self.rings)


def features(
    polar: Tensor, weight: Tensor, own: Tensor, shifts: Tensor, rings: FourierRings
) -> Features:
    """Features of particles at each particle's own shift plus every trial shift.

    Args:
        polar: (n, r', a // 2) `half_circle` transforms, multiplied by CTF / noise.
        weight: (n, r') ring means of CTF^2 / noise.
        own: (n, 2) own shifts, pixels.
        shifts: (s, 2) trial shifts, pixels.
        rings: rings of the features, at most r'.
    """
    rows = torch.empty(
        rings.n_frequencies, len(polar), len(shifts), 2 * rings.last, device=polar.device
    )
    for start in range(0, len(polar), 128):
        part = slice(start, start + 128)
        made = ring_features(polar[part], own[part, None] + shifts, rings)  # (b, s, r, m)
        rows[:, part] = torch.view_as_real(made.permute(3, 0, 1, 2)).flatten(-2)
    return Features(rows, weight[:, : rings.last].contiguous(), shifts, rings)


class Posterior(NamedTuple):
    """The result of an E-step for n particles.

    Attributes:
        log_evidence: (n,) log-sum-exp of the logits over classes and poses.
        share: (n, k) posterior of the classes.
        best: (n, k) largest logit of each class over poses.
        shift, hand, angle: (n, k) int64 indices of the pose with that logit.
    """

    log_evidence: Tensor
    share: Tensor
    best: Tensor
    shift: Tensor
    hand: Tensor
    angle: Tensor


class Sums(NamedTuple):
    """Sums of aligned particles, weighted by their posteriors, for each half-set.

    Attributes:
        signal: (2, k, r, m) complex sums of the features.
        weight: (2, k, r) sums of the ring means of CTF^2 / noise.
        size: (2, k) sums of the posteriors.
    """

    signal: Tensor
    weight: Tensor
    size: Tensor


def expect(
    data: Features, classes: Tensor, *, half: Tensor | None = None, mirror: bool = False
) -> tuple[Posterior, Sums]:
    """One E-step: posteriors, and the sums that the M-step needs.

    Args:
        data: the particles.
        classes: (k, r, m) complex features of the class images.
        half: (n,) 0 or 1, the half-set of every particle; None alternates.
        mirror: whether mirrored particles are tried.
    """
    device = classes.device
    half = torch.arange(len(data), device=device) % 2 if half is None else half.to(device)
    order = half.argsort(stable=True)
    model = _model(data.rings, classes, mirror)
    gradient = torch.zeros(2, *model.columns.shape, device=device)
    n_block = max(1, BLOCK[device.type] // (model.per_shift * len(data.shifts)))
    n_even = len(data) - int(half.sum())
    bounds = [*range(0, n_even, n_block), *range(n_even, len(order), n_block), len(order)]
    parts: list[tuple[Tensor, ...]] = []
    for start, stop in itertools.pairwise(bounds):
        into = gradient[int(start >= n_even)]
        parts.append(_expect_block(data, order[start:stop], model, into))
    back = order.argsort()
    posterior = Posterior(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))
    share, weight = posterior.share[order], data.weight[order]
    halves = [slice(0, n_even), slice(n_even, None)]
    return posterior, Sums(
        torch.stack([_signal(g, 1 + mirror, data.rings.n_angles) for g in gradient]),
        torch.stack([share[h].T @ weight[h] for h in halves]),
        torch.stack([share[h].sum(0) for h in halves]),
    )


@dataclass(frozen=True, eq=False)
class _Model:
    """What all blocks of particles of an E-step use."""

    columns: Tensor  # (m, 2, 2 r, k h) `_columns` of the classes
    power: Tensor  # (k, r) half of `class_power`
    inverse: Tensor  # (a, 2 m) `_inverse_transform`
    first: list[int]  # index of the first row of each frequency's first ring
    hands: int

    @property
    def per_shift(self) -> int:
        """Entries of the table for one particle and shift."""
        return self.columns.shape[-1] * len(self.inverse)


def _model(rings: FourierRings, classes: Tensor, mirror: bool) -> _Model:
    if classes.shape[1:] != (rings.last, rings.n_frequencies):
        raise ValueError(
            f"class features {tuple(classes.shape)} do not fit rings x frequencies "
            f"{(rings.last, rings.n_frequencies)} of the particles"
        )
    return _Model(
        _columns(classes, mirror),
        class_power(classes, rings) / 2,
        _inverse_transform(rings.n_frequencies, rings.n_angles, classes.device),
        [2 * (rings.first_ring(m) - 1) for m in range(rings.n_frequencies)],
        1 + mirror,
    )


def _expect_block(
    data: Features, some: Tensor, model: _Model, gradient: Tensor
) -> tuple[Tensor, ...]:
    """The fields of `Posterior` for the particles with indices ``some`` (b,). Their sums are added
    to ``gradient``."""
    x = data.rows[:, some].flatten(1, 2)  # (m, b s, 2 r)
    angles, hands, columns = len(model.inverse), model.hands, model.columns
    b, s, kh = len(some), len(data.shifts), columns.shape[-1]
    spectrum = x.new_empty(len(x), 2, b * s, kh)
    for m, first in enumerate(model.first):
        for part in (0, 1):
            torch.mm(x[m][:, first:], columns[m, part, first:], out=spectrum[m, part])
    constant = -(data.weight[some] @ model.power.T)  # (b, k)
    spectrum[0, 0].view(b, s, -1, hands).add_(angles * constant[:, None, :, None])
    table = (model.inverse @ spectrum.view(-1, b * s * kh)).view(angles, b, s, -1, hands)
    peak = table.amax(0)  # (b, s, k, h)
    best, place = peak.permute(0, 2, 1, 3).flatten(2).max(-1)  # (b, k)
    shift, hand = place // hands, place % hands
    row, column = torch.arange(b, device=x.device)[:, None], torch.arange(kh // hands)
    angle = table[:, row, shift, column.to(x.device), hand].argmax(0)
    top = best.amax(1)  # (b,)
    back = _weights(table, peak, top, model, spectrum)
    # Frequency 0 is the mean of the weights over angles.
    total = back[0, 0].view(b, s, -1, hands).sum((1, 3)) * angles  # (b, k)
    norm = total.sum(1).reciprocal().repeat_interleave(s)
    for m, first in enumerate(model.first):
        scaled = (x[m][:, first:] * norm[:, None]).T
        for part in (0, 1):
            gradient[m, part, first:] += scaled @ back[m, part]
    sum_all = total.sum(1, keepdim=True)
    return sum_all.squeeze(1).log() + top, total / sum_all, best, shift, hand, angle


def _weights(table: Tensor, peak: Tensor, top: Tensor, model: _Model, out: Tensor) -> Tensor:
    """(m, 2, b s, k h) Fourier sums over angles of the weights exp(table - top).

    They are computed only for combinations of particle, shift, class and hand with weights above
    `NEGLIGIBLE`, which are few once the classes have settled.

    Args:
        table: (a, b, s, k, h) logits, overwritten.
        peak: (b, s, k, h) maxima over angles.
        top: (b,) maxima over angles, shifts, classes and hands.
        model: has the inverse transform.
        out: (m, 2, b s, k h), overwritten and returned.
    """
    below = top[:, None, None, None]
    counts = (peak - below > NEGLIGIBLE).flatten().nonzero().squeeze(1)
    flat = table.flatten(1)  # (a, b s k h)
    if 2 * len(counts) > flat.shape[1]:
        weights = table.sub_(below).flatten(1)
    else:
        # Only these columns have weights; the others are set to zero below.
        weights = flat[:, counts] - below.expand_as(peak).flatten()[counts]
    # Smaller weights have no effect, and arithmetic with denormal numbers is ten times slower.
    weights.clamp_(min=2 * NEGLIGIBLE).exp_()
    waves = out.flatten(0, 1).flatten(1)  # (2 m, b s k h)
    if weights.shape[1] == flat.shape[1]:
        torch.mm(model.inverse.T, weights, out=waves)
    else:
        waves.zero_()[:, counts] = model.inverse.T @ weights
    return out


def class_power(classes: Tensor, rings: FourierRings) -> Tensor:
    """(k, r) power of features (k, r, m) on every ring, their inner product with themselves."""
    twice = rings.frequency_weights(classes.real)
    return (torch.view_as_real(classes).square().sum(-1) * twice).sum(-1) / rings.n_angles


def _columns(classes: Tensor, mirror: bool) -> Tensor:
    """Real matrices (m, 2, 2 r, k h) of complex classes (k, r, m). The rows of a particle times
    these are the real and the imaginary part of the products with each class in each hand."""
    y = classes.permute(2, 1, 0)  # (m, r, k)
    re, im = y.real, y.imag
    hands = [torch.stack([torch.stack([re, im], 2), torch.stack([im, -re], 2)], 1)]
    if mirror:
        sign = (1 - 2 * (torch.arange(len(y), device=y.device) % 2))[:, None, None, None, None]
        mirrored = torch.stack([torch.stack([re, -im], 2), torch.stack([-im, -re], 2)], 1)
        hands.append(sign * mirrored)
    return torch.stack(hands, -1).flatten(4).flatten(2, 3).contiguous()


def _signal(gradient: Tensor, hands: int, angles: int) -> Tensor:
    """The adjoint of `_columns`: (m, 2, 2 r, k h) -> (k, r, m) complex sums of particles."""
    g = gradient.unflatten(2, (-1, 2)).unflatten(-1, (-1, hands))  # (m, 2, r, 2, k, h)
    re = g[:, 0, :, 0, :, 0] - g[:, 1, :, 1, :, 0]
    im = g[:, 0, :, 1, :, 0] + g[:, 1, :, 0, :, 0]
    if hands == 2:
        sign = (1 - 2 * (torch.arange(len(g), device=g.device) % 2))[:, None, None]
        re = re + sign * (g[:, 0, :, 0, :, 1] - g[:, 1, :, 1, :, 1])
        im = im - sign * (g[:, 0, :, 1, :, 1] + g[:, 1, :, 0, :, 1])
    # Undo the factor weights / a of irfft, so that these are plain sums over angles.
    scale = angles / rfft_weights(angles, g)[: len(g)]
    return (torch.complex(re, im) * scale[:, None, None]).permute(2, 1, 0)


def _inverse_transform(frequencies: int, angles: int, device: torch.device) -> Tensor:
    """(a, 2 m) matrix of irfft, from real and imaginary parts of m < a / 2 frequencies to a
    angles."""
    turn = torch.arange(angles, device=device)[:, None] * torch.arange(frequencies, device=device)
    turn = turn % angles * (2 * math.pi / angles)
    scale = rfft_weights(angles, turn)[:frequencies] / angles
    return torch.stack([turn.cos() * scale, -turn.sin() * scale], -1).flatten(1)


def no_sums(classes: Tensor) -> Sums:
    """The sums of no particles over classes (k, r, m)."""
    weight = classes.real.new_zeros(2, *classes.shape[:2])
    return Sums(classes.new_zeros(2, *classes.shape), weight, weight[..., 0])


def mix_sums(old: Sums, new: Sums, momentum: float) -> Sums:
    """Weighted mean of sums: ``momentum`` times the old, scaled to the number of particles of the
    new, plus 1 - ``momentum`` times the new."""
    per = new.size.sum() / old.size.sum()
    return Sums(*(momentum * per * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)))


def join_classes(parts: Sequence[Sums]) -> Sums:
    """Join the sums of several sets of classes into those of one set."""
    return Sums(*(torch.cat(of, 1) for of in zip(*parts, strict=True)))


def maximise(sums: Sums, rings: FourierRings) -> Tensor:
    """Class images from their sums, filtered by the FRC of their half-sets.

    The least-squares image is signal / weight. Each ring is multiplied by `wiener_factors` of the
    Fourier ring correlation of the half-sets' images.

    Args:
        sums: sums of k classes.
        rings: rings of the sums.

    Returns:
        (k, r, m) complex features; zero for an empty class.
    """
    half = sums.signal / sums.weight.clamp(min=1e-6)[..., None]  # (2, k, r, m)
    twice = rings.frequency_weights(half.real)
    cross = ((half[0].conj() * half[1]).real * twice).sum(-1)  # (k, r)
    power = (torch.view_as_real(half).square().sum(-1) * twice).sum(-1)  # (2, k, r)
    frc = cross / power.prod(0).sqrt().clamp(min=1e-20)
    images = sums.signal.sum(0) / sums.weight.sum(0).clamp(min=1e-6)[..., None]
    return images * wiener_factors(frc, HIGHEST_FRC)[..., None]


def extend(classes: Tensor, old: FourierRings, new: FourierRings) -> Tensor:
    """Class features (k, r, m) on the ``new`` rings, which are zero beyond the ``old`` rings."""
    longer = classes.new_zeros(len(classes), new.last, new.n_frequencies)
    longer[:, : old.last, : old.n_frequencies] = classes
    return longer * math.sqrt(new.n_angles / old.n_angles)
