"""Soft assignment over classes, hands, angles and shifts at once: one step of expectation
maximisation in Fourier rings (Sigworth 1998; Scheres 2005, 2012).

Model: a whitened particle is its CTF times the class image, moved, plus unit white noise. With
the features X of the particle already multiplied by its CTF over the noise (`fourier_rings`),
q the ring means of CTF^2 / noise and Y the features of the class image,

    log p(particle | k, pose) = <X at pose, Y_k> - sum_r q_r P_k(r) / 2 + constant,

P_k(r) the power of Y_k on ring r. The posterior weights, summed back, are the gradient of the
log-sum-exp with respect to the products: the same matrices, transposed.

Shape letters: n particles, s shifts, k classes, h hands, a angles, r rings, m frequencies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.methods.classify.fourier_rings import FourierRings, ring_features

BLOCK = {"cpu": 2**21, "cuda": 2**27}  # entries of one block of the table: in cache; few launches
NEGLIGIBLE = -25.0  # log of a weight, relative to the largest, that is left out


@dataclass(frozen=True, eq=False)
class Features:
    """Particles ready for the E-step.

    Attributes:
        rows: (m, n, s, 2 r) float32: real and imaginary parts side by side per ring.
        weight: (n, r) ring means of CTF^2 / noise.
        shifts: (s, 2) trial shifts, pixels, beyond each particle's own.
        rings: theirs.
    """

    rows: Tensor
    weight: Tensor
    shifts: Tensor
    rings: FourierRings

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, members: Tensor) -> Features:
        """Those of some particles."""
        return Features(self.rows[:, members], self.weight[members], self.shifts, self.rings)


def features(
    polar: Tensor, weight: Tensor, own: Tensor, shifts: Tensor, rings: FourierRings
) -> Features:
    """Features about every particle's own shift (n, 2) plus trial shifts (s, 2)."""
    rows = torch.empty(
        rings.n_frequencies, len(polar), len(shifts), 2 * rings.last, device=polar.device
    )
    for start in range(0, len(polar), 128):
        part = slice(start, start + 128)
        made = ring_features(polar[part], own[part, None] + shifts, rings)  # (b, s, r, m)
        rows[:, part] = torch.view_as_real(made.permute(3, 0, 1, 2)).flatten(-2)
    return Features(rows, weight[:, : rings.last].contiguous(), shifts, rings)


class Posterior(NamedTuple):
    """What an E-step says of n particles.

    Attributes:
        log_evidence: (n,) log-sum-exp over everything (tempered logits).
        share: (n, k) posterior of the classes.
        best: (n, k) best logit of each class over poses, and where: shift, hand, angle indices.
    """

    log_evidence: Tensor
    share: Tensor
    best: Tensor
    shift: Tensor
    hand: Tensor
    angle: Tensor


class Sums(NamedTuple):
    """Weighted sums of aligned particles.

    Attributes:
        signal: (2, k, r, m) complex, by half-set.
        weight: (2, k, r) sums of posterior times CTF^2 / noise.
        size: (2, k) sums of posteriors.
    """

    signal: Tensor
    weight: Tensor
    size: Tensor


def expect(
    data: Features,
    classes: Tensor,
    *,
    half: Tensor | None = None,
    log_prior: Tensor | None = None,
    mirror: bool = False,
    temperature: float = 1.0,
) -> tuple[Posterior, Sums]:
    """One E-step, with the sums the M-step needs.

    Args:
        data: the particles.
        classes: (k, r, m) complex features of the class images.
        half: (n,) 0 or 1, the half-set of every particle; None goes by parity.
        log_prior: (k,) added to the logits.
        mirror: whether to try mirrored particles.
        temperature: divides the log-likelihood; above 1 the weights are softer.
    """
    device = classes.device
    half = torch.arange(len(data), device=device) % 2 if half is None else half.to(device)
    order = half.argsort(stable=True)
    job = _job(data, classes, log_prior, mirror, temperature)
    gradient = torch.zeros(2, *job.columns.shape, device=device)
    n_block = max(1, BLOCK[device.type] // (job.per_shift * len(data.shifts)))
    n_even = len(data) - int(half.sum())
    bounds = [*range(0, n_even, n_block), *range(n_even, len(order), n_block), len(order)]
    parts: list[tuple[Tensor, ...]] = []
    for start, stop in itertools.pairwise(bounds):
        into = gradient[int(start >= n_even)]
        parts.append(_expect_block(data, order[start:stop], job, into))
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
class _Job:
    """What all blocks of an E-step share."""

    columns: Tensor  # (m, 2, 2 r, k h) right factors of real and imaginary part
    power: Tensor  # (k, r) over twice the temperature
    log_prior: Tensor  # (k,)
    inverse: Tensor  # (a, 2 m)
    first: list[int]  # where each frequency's rows begin
    hands: int

    @property
    def per_shift(self) -> int:
        return self.columns.shape[-1] * len(self.inverse)


def _job(
    data: Features, classes: Tensor, log_prior: Tensor | None, mirror: bool, temperature: float
) -> _Job:
    rings, k = data.rings, len(classes)
    if classes.shape[1:] != (rings.last, rings.n_frequencies):
        raise ValueError(
            f"class features {tuple(classes.shape)} do not fit rings x frequencies "
            f"{(rings.last, rings.n_frequencies)} of the particles"
        )
    return _Job(
        _columns(classes / temperature, mirror),
        class_power(classes, rings) / (2 * temperature),
        classes.real.new_zeros(k) if log_prior is None else log_prior,
        _inverse_transform(rings.n_frequencies, rings.n_angles, classes.device),
        [2 * (rings.first_ring(m) - 1) for m in range(rings.n_frequencies)],
        1 + mirror,
    )


def _expect_block(data: Features, some: Tensor, job: _Job, gradient: Tensor) -> tuple[Tensor, ...]:
    """`Posterior`'s fields for a block of particles; their sums are added to ``gradient``."""
    x = data.rows[:, some].flatten(1, 2)  # (m, b s, 2 r)
    angles, hands, columns = len(job.inverse), job.hands, job.columns
    b, s, kh = len(some), len(data.shifts), columns.shape[-1]
    spectrum = x.new_empty(len(x), 2, b * s, kh)
    for m, first in enumerate(job.first):
        for part in (0, 1):
            torch.mm(x[m][:, first:], columns[m, part, first:], out=spectrum[m, part])
    constant = job.log_prior - data.weight[some] @ job.power.T  # (b, k)
    spectrum[0, 0].view(b, s, -1, hands).add_(angles * constant[:, None, :, None])
    table = (job.inverse @ spectrum.view(-1, b * s * kh)).view(angles, b, s, -1, hands)
    peak = table.amax(0)  # (b, s, k, h)
    best, place = peak.permute(0, 2, 1, 3).flatten(2).max(-1)  # (b, k)
    shift, hand = place // hands, place % hands
    row, column = torch.arange(b, device=x.device)[:, None], torch.arange(kh // hands)
    angle = table[:, row, shift, column.to(x.device), hand].argmax(0)
    top = best.amax(1)  # (b,)
    back = _weights(table, peak, top, job, spectrum)
    # Frequency 0 is the mean over angles.
    total = back[0, 0].view(b, s, -1, hands).sum((1, 3)) * angles  # (b, k)
    norm = total.sum(1).reciprocal().repeat_interleave(s)
    for m, first in enumerate(job.first):
        turned = (x[m][:, first:] * norm[:, None]).T
        for part in (0, 1):
            gradient[m, part, first:] += turned @ back[m, part]
    sum_all = total.sum(1, keepdim=True)
    return sum_all.squeeze(1).log() + top, total / sum_all, best, shift, hand, angle


def _weights(table: Tensor, peak: Tensor, top: Tensor, job: _Job, out: Tensor) -> Tensor:
    """(m, 2, b s, k h) sums over angles of exp(table - top) times the transform's waves.

    Only where (particle, shift, class, hand) matters at all: late in a climb that is little.

    Args:
        table: (a, b, s, k, h), overwritten; peak: (b, s, k, h) its maxima over angles.
        top: (b,) its maxima.
        out: (m, 2, b s, k h), overwritten and returned.
    """
    below = top[:, None, None, None]
    counts = (peak - below > NEGLIGIBLE).flatten().nonzero().squeeze(1)
    flat = table.flatten(1)  # (a, b s k h)
    if 2 * len(counts) > flat.shape[1]:
        weights = table.sub_(below).flatten(1)
    else:
        # Frequencies are sums of few columns then, and zero in the others.
        weights = flat[:, counts] - below.expand_as(peak).flatten()[counts]
    # Below the clamp nothing counts, and denormal numbers would cost tenfold.
    weights.clamp_(min=2 * NEGLIGIBLE).exp_()
    waves = out.flatten(0, 1).flatten(1)  # (2 m, b s k h)
    if weights.shape[1] == flat.shape[1]:
        torch.mm(job.inverse.T, weights, out=waves)
    else:
        waves.zero_()[:, counts] = job.inverse.T @ weights
    return out


def class_power(classes: Tensor, rings: FourierRings) -> Tensor:
    """(k, r) the power that features (k, r, m) have on every ring, in the product's units."""
    twice = torch.full((classes.shape[-1],), 2.0, device=classes.device)
    twice[0] = 1.0
    return (torch.view_as_real(classes).square().sum(-1) * twice).sum(-1) / rings.n_angles


def _columns(classes: Tensor, mirror: bool) -> Tensor:
    """(k, r, m) complex -> (m, 2, 2 r, k h) real: right factors of real and imaginary parts."""
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
    # The derivative of irfft's sum is twice the weighted sum over angles, over a, but for m = 0.
    scale = torch.full((len(g),), angles / 2.0, device=g.device)
    scale[0] = angles
    return (torch.complex(re, im) * scale[:, None, None]).permute(2, 1, 0)


def _inverse_transform(frequencies: int, angles: int, device: torch.device) -> Tensor:
    """(a, 2 m) the matrix of irfft with n = a from real and imaginary parts of m < a / 2."""
    turn = torch.arange(angles, device=device)[:, None] * torch.arange(frequencies, device=device)
    turn = turn % angles * (2 * math.pi / angles)
    scale = torch.full((frequencies,), 2.0 / angles, device=device)
    scale[0] = 1.0 / angles
    return torch.stack([turn.cos() * scale, -turn.sin() * scale], -1).flatten(1)


def no_sums(classes: Tensor) -> Sums:
    """The sums of no particles over classes (k, r, m)."""
    weight = classes.real.new_zeros(2, *classes.shape[:2])
    return Sums(classes.new_zeros(2, *classes.shape), weight, weight[..., 0])


def add_sums(parts: Sequence[Sums]) -> Sums:
    """The sums of several batches of particles."""
    return Sums(*(torch.stack(of).sum(0) for of in zip(*parts, strict=True)))


def mix_sums(old: Sums, new: Sums, momentum: float) -> Sums:
    """Running sums: ``momentum`` of the old ones, each per particle, and the rest of the new."""
    per = new.size.sum() / old.size.sum()
    return Sums(*(momentum * per * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)))


def join_classes(parts: Sequence[Sums]) -> Sums:
    """The sums of several sets of classes, as of one."""
    return Sums(*(torch.cat(of, 1) for of in zip(*parts, strict=True)))


def maximise(sums: Sums, rings: FourierRings) -> Tensor:
    """Class images from their sums: the Wiener filter of every class by its own half-sets.

    The least-squares image is signal / weight; each ring is then weighted by 2 FRC / (1 + FRC)
    of the half-sets' images there (`frc.wiener_curve`), smoothed over three rings.

    Returns:
        (k, r, m) complex features; zero for an empty class.
    """
    half = sums.signal / sums.weight.clamp(min=1e-6)[..., None]  # (2, k, r, m)
    twice = torch.full((half.shape[-1],), 2.0, device=half.device)
    twice[0] = 1.0
    cross = ((half[0].conj() * half[1]).real * twice).sum(-1)  # (k, r)
    power = (torch.view_as_real(half).square().sum(-1) * twice).sum(-1)  # (2, k, r)
    frc = cross / power.prod(0).sqrt().clamp(min=1e-20)
    padded = torch.nn.functional.pad(frc[:, None], (1, 1), mode="replicate")
    smooth = torch.nn.functional.avg_pool1d(padded, 3, stride=1)[:, 0].clamp(0, 0.999)
    images = sums.signal.sum(0) / sums.weight.sum(0).clamp(min=1e-6)[..., None]
    return images * (2 * smooth / (1 + smooth))[..., None]


def extend(classes: Tensor, old: FourierRings, new: FourierRings) -> Tensor:
    """Class features (k, r, m) on fewer rings as features on more: zero beyond."""
    longer = classes.new_zeros(len(classes), new.last, new.n_frequencies)
    longer[:, : old.last, : old.n_frequencies] = classes
    return longer * math.sqrt(new.n_angles / old.n_angles)
