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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoalign.fourier_rings import FourierRings, ring_features

BLOCK = 2**21  # entries of one block of the table


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


@dataclass(frozen=True, eq=False)
class Posterior:
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


@dataclass(frozen=True, eq=False)
class Sums:
    """Weighted sums of aligned particles.

    Attributes:
        signal: (2, k, r, m) complex, by half-set.
        weight: (2, k, r) sums of posterior times CTF^2 / noise.
        count: (2, k) sums of posteriors.
    """

    signal: Tensor
    weight: Tensor
    count: Tensor


def expect(
    data: Features,
    classes: Tensor,
    *,
    members: Tensor | None = None,
    log_prior: Tensor | None = None,
    mirror: bool = False,
    temperature: float = 1.0,
    sums: bool = True,
) -> tuple[Posterior, Sums | None]:
    """One E-step, with the sums the M-step needs.

    Args:
        data: the particles.
        classes: (k, r, m) complex features of the class images.
        members: (b,) int64 particles to use; None is all. Half-sets are by parity of these.
        log_prior: (k,) added to the logits.
        mirror: whether to try mirrored particles.
        temperature: divides the log-likelihood; above 1 the weights are softer.
        sums: whether to make the sums.
    """
    k, rings = len(classes), data.rings
    hands, s, angles, frequencies = 1 + mirror, len(data.shifts), rings.n_angles, classes.shape[-1]
    members = torch.arange(len(data)) if members is None else members
    columns = _columns(classes, mirror)  # (m, 2 r, k h 2)
    gradient = torch.zeros(2, *columns.shape, device=columns.device)
    inverse = _inverse_transform(frequencies, angles, columns.device)  # (a, 2 m)
    power = class_power(classes, rings)  # (k, r)
    first = [2 * (rings.first_ring(m) - 1) for m in range(frequencies)]
    n_block = max(1, BLOCK // (s * k * hands * angles))
    parts: list[tuple[Tensor, ...]] = []
    share_of: list[Tensor] = []
    order = torch.cat([members[members % 2 == 0], members[members % 2 == 1]])
    n_even = int((members % 2 == 0).sum())
    bounds = [*range(0, n_even, n_block), *range(n_even, len(order), n_block), len(order)]
    weight = data.weight[order]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        half, some = int(start >= n_even), order[start:stop]
        b = len(some)
        x = data.rows[:, some].flatten(1, 2)  # (m, b s, 2 r)
        product = torch.empty(frequencies, b * s, k * hands * 2, device=x.device)
        for m in range(frequencies):
            torch.mm(x[m][:, first[m] :], columns[m, first[m] :], out=product[m])
        spectrum = product.unflatten(-1, (-1, 2)).permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        table = (inverse @ spectrum).view(angles, b, s, k, hands)
        table -= (weight[start:stop] @ power.T / 2)[:, None, :, None]
        table /= temperature
        if log_prior is not None:
            table += log_prior[:, None]
        found = _summary(table)
        parts.append(found)
        total = torch.logsumexp(found[0], 1)  # (b,)
        share_of.append((found[0] - total[:, None]).exp())
        if sums:
            table = (table - total[:, None, None, None]).exp_()
            back = (inverse.T @ table.view(angles, -1)).view(frequencies, 2, b * s, k * hands)
            back = back.permute(0, 2, 3, 1).reshape(frequencies, b * s, -1)
            for m in range(frequencies):
                gradient[half, m, first[m] :] += x[m][:, first[m] :].T @ back[m]
    undo = torch.empty_like(order)
    undo[order.argsort()] = torch.arange(len(order))
    back_order = torch.argsort(order)[torch.argsort(torch.argsort(members))]
    columns_of = [torch.cat(part)[back_order] for part in zip(*parts, strict=True)]
    share_sorted = torch.cat(share_of)
    share = share_sorted[back_order]
    posterior = Posterior(torch.logsumexp(columns_of[0], 1), share, *columns_of[1:])
    if not sums:
        return posterior, None
    halves = [slice(0, n_even), slice(n_even, None)]
    return posterior, Sums(
        torch.stack([_signal(g, hands, angles) for g in gradient]),
        torch.stack([share_sorted[h].T @ weight[h] for h in halves]),
        torch.stack([share_sorted[h].sum(0) for h in halves]),
    )


def class_power(classes: Tensor, rings: FourierRings) -> Tensor:
    """(k, r) the power that features (k, r, m) have on every ring, in the product's units."""
    twice = torch.full((classes.shape[-1],), 2.0, device=classes.device)
    twice[0] = 1.0
    return (torch.view_as_real(classes).square().sum(-1) * twice).sum(-1) / rings.n_angles


def _summary(table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a table (a, b, s, k, h): log-sum-exp, maximum and its place per (b, k)."""
    angles, b, s, k, hands = table.shape
    over_angle = table.amax(0)  # (b, s, k, h)
    best, place = over_angle.permute(0, 2, 1, 3).flatten(2).max(-1)  # (b, k)
    shift, hand = place // hands, place % hands
    row, column = torch.arange(b)[:, None], torch.arange(k)
    column_of = table[:, row, shift, column, hand]  # (a, b, k)
    angle = column_of.argmax(0)
    total = (table - best[:, None, :, None]).exp_().sum((0, 2, 4)).log() + best
    return total, best, shift, hand, angle


def _columns(classes: Tensor, mirror: bool) -> Tensor:
    """(k, r, m) complex -> (m, 2 r, k h 2) real: the right factor of the products."""
    y = classes.permute(2, 1, 0)  # (m, r, k)
    re, im = y.real, y.imag
    columns = [torch.stack([torch.stack([re, im], -1), torch.stack([im, -re], -1)], 2)]
    if mirror:
        sign = (1 - 2 * (torch.arange(len(y), device=y.device) % 2))[:, None, None, None, None]
        columns.append(
            sign * torch.stack([torch.stack([re, -im], -1), torch.stack([-im, -re], -1)], 2)
        )
    # (m, r, 2, k, h, 2)
    return torch.stack(columns, 4).flatten(3).flatten(1, 2).contiguous()


def _signal(gradient: Tensor, hands: int, angles: int) -> Tensor:
    """The adjoint of `_columns`: (m, 2 r, k h 2) -> (k, r, m) complex sums of aligned particles."""
    g = gradient.unflatten(1, (-1, 2)).unflatten(-1, (-1, hands, 2))  # (m, r, 2, k, h, 2)
    re = g[:, :, 0, :, 0, 0] - g[:, :, 1, :, 0, 1]
    im = g[:, :, 1, :, 0, 0] + g[:, :, 0, :, 0, 1]
    if hands == 2:
        sign = (1 - 2 * (torch.arange(len(g), device=g.device) % 2))[:, None, None]
        re = re + sign * (g[:, :, 0, :, 1, 0] - g[:, :, 1, :, 1, 1])
        im = im - sign * (g[:, :, 1, :, 1, 0] + g[:, :, 0, :, 1, 1])
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
