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
from cryoalign.methods.classify.fourier_rings import (
    FourierRings,
    even_and_odd,
    move_half_circles,
    ring_scales,
    shift_phases,
    used_frequencies,
)

# Entries of a block of the table: fits a CPU's cache, and keeps the number of GPU launches small.
BLOCK = {"cpu": 2**21, "cuda": 2**28}
AT_A_TIME = {"cpu": 128, "cuda": 2048}  # particles whose features are made at a time
BAND = 4  # frequencies of a matrix product on a CPU; its inner rings without signal are left out
PIECES = 32  # parts of a sum over particles that a GPU computes at the same time
HIGHEST_FRC = 0.999  # larger FRCs count as this in the filter, as every class image has noise
NEGLIGIBLE = -25.0  # smallest log of weight / largest weight of a particle; exp(-25) is 1e-11


@dataclass(frozen=True, eq=False)
class Features:
    """Particles ready for the E-step.

    Attributes:
        rows: (m, n, s, 2 r) float32, for frequencies 0, 2, 4, … and then 1, 3, 5, …; real and
            imaginary part of each ring next to each other.
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

    @property
    def spectra(self) -> Tensor:
        """(n, s, r, m) complex features, frequencies in natural order."""
        pairs = torch.view_as_complex(self.rows.unflatten(-1, (-1, 2)).contiguous())
        return natural_order(pairs).permute(1, 2, 3, 0)

    def take(self, members: Tensor) -> Features:
        """The features of the particles with indices ``members`` (b,)."""
        return Features(self.rows[:, members], self.weight[members], self.shifts, self.rings)

    def part(self, start: int, stop: int) -> Features:
        """The features of the particles from ``start`` up to ``stop``, not copied."""
        some = slice(start, stop)
        return Features(self.rows[:, some], self.weight[some], self.shifts, self.rings)


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
    n_even, size = len(rows[::2]), AT_A_TIME[polar.device.type]
    used = used_frequencies(rings, polar.device)
    scales = ring_scales(rings, polar)
    phases = shift_phases(shifts, polar.shape[-1], rings)  # (s, r, a')
    for start in range(0, len(polar), size):
        part = slice(start, start + size)
        centred = move_half_circles(polar[part], own[part], rings)
        moved = (centred * scales)[:, None] * phases  # (b, s, r, a')
        halves = zip(even_and_odd(moved, rings), used, (rows[:n_even], rows[n_even:]), strict=True)
        for made, mask, into in halves:
            out = into[:, part].unflatten(-1, (-1, 2)).permute(1, 2, 3, 0, 4)  # (b, s, r, m', 2)
            torch.mul(made, mask[..., None], out=out)
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
    device, n = classes.device, len(data)
    half = torch.arange(n) % 2 if half is None else half.cpu()
    order = half.argsort(stable=True)
    if not torch.equal(order, torch.arange(n)):
        data = data.take(order.to(device))
    model = model_of(data.rings, classes[None], mirror)
    n_even = n - int(half.sum())
    size = block_size(device, model.per_shift * len(data.shifts))
    bounds = [*range(0, n_even, size), *range(n_even, n, size), n]
    gradient = torch.zeros(2, *model.columns.shape, device=device)  # (2, 2, m, 1, 2 r, k h)
    parts: list[Posterior] = []
    for start, stop in itertools.pairwise(bounds):
        some = data.part(start, stop)
        parts.append(expect_block(some, model, None, gradient[int(start >= n_even)]))
    posterior = Posterior(*(torch.cat(column) for column in zip(*parts, strict=True)))
    halves = [slice(0, n_even), slice(n_even, None)]
    sums = Sums(
        torch.stack([signal_of(g, 1 + mirror, data.rings.n_angles) for g in gradient])[:, 0],
        torch.stack([posterior.share[h].T @ data.weight[h] for h in halves]),
        torch.stack([posterior.share[h].sum(0) for h in halves]),
    )
    back = order.argsort().to(device)
    return Posterior(*(column[back] for column in posterior)), sums


def block_size(device: torch.device, entries: int) -> int:
    """Number of particles of a block, if the table of one has ``entries``."""
    size = max(1, BLOCK[device.type] // entries)
    return size if size < PIECES else size // PIECES * PIECES


@dataclass(frozen=True, eq=False)
class Model:
    """What all blocks of particles of an E-step use. Frequencies are separated by parity, because
    an angle and the opposite one differ by the sign of the odd ones."""

    columns: Tensor  # (2, m, g, 2 r, k h) `_columns` of the classes of each group
    penalty: Tensor  # (g, k, r) half of `class_power`
    inverse: tuple[Tensor, Tensor]  # (a / 2, 2 m') `_inverse_transform` of even and odd frequencies
    bands: list[list[tuple[slice, int]]]  # of each parity: frequencies, and their first row
    hands: int

    @property
    def per_shift(self) -> int:
        """Entries of the table for one particle and shift."""
        return self.columns.shape[-1] * 2 * len(self.inverse[0])


def model_of(rings: FourierRings, classes: Tensor, mirror: bool) -> Model:
    if classes.shape[2:] != (rings.last, rings.n_frequencies):
        raise ValueError(
            f"class features {tuple(classes.shape[1:])} do not fit rings x frequencies "
            f"{(rings.last, rings.n_frequencies)} of the particles"
        )
    device = classes.device
    inverse = _inverse_transform(rings.n_frequencies, rings.n_angles, device)
    bands = []
    for parity in (0, 1):
        own = range(parity, rings.n_frequencies, 2)
        if device.type == "cuda":  # one product of all frequencies, whose inner rings are zero
            bands.append([(slice(0, len(own)), 0)])
        else:
            first = [2 * (rings.first_ring(m) - 1) for m in own]
            bands.append([(slice(i, i + BAND), first[i]) for i in range(0, len(own), BAND)])
    return Model(
        _columns(classes, mirror),
        class_power(classes.flatten(0, 1), rings).view(classes.shape[:3]) / 2,
        (inverse[:, :, 0::2].flatten(1).contiguous(), inverse[:, :, 1::2].flatten(1).contiguous()),
        bands,
        1 + mirror,
    )


def expect_block(
    data: Features, model: Model, tiles: tuple[Tensor, Tensor] | None, gradient: Tensor
) -> Posterior:
    """The posterior of b = t p particles in t tiles. Their sums are added to ``gradient``.

    Args:
        data: the particles.
        model: the classes of all groups.
        tiles: (t,) group of each tile, and (t, p) bool, which particles count; None is one tile of
            the first group.
        gradient: (2, m, t, 2 r, k h), added to.
    """
    group, here = (None, None) if tiles is None else tiles
    penalty = model.penalty if group is None else model.penalty[group]  # (t, k, r)
    t, hands, kh = len(penalty), model.hands, model.columns.shape[-1]
    b, s, half = len(data), len(data.shifts), len(model.inverse[0])
    constant = -(data.weight.unflatten(0, (t, -1)) @ penalty.mT).flatten(0, 1)  # (b, k)
    inputs, spectra = products(data, model, group)
    spectra[0][0, 0].view(b, s, -1, hands).add_(2 * half * constant[:, None, :, None])
    even, odd = tables = [
        inverse @ spectrum.view(-1, b * s * kh)  # (a / 2, b s k h)
        for inverse, spectrum in zip(model.inverse, spectra, strict=True)
    ]
    # The logits of an angle and of the opposite one are even + odd and even - odd.
    peak = odd.abs().add_(even).amax(0).view(b, s, -1, hands)
    best, place = peak.permute(0, 2, 1, 3).flatten(2).max(-1)  # (b, k)
    shift, hand = place // hands, place % hands
    row, column = torch.arange(b, device=even.device)[:, None], torch.arange(kh // hands)
    where = ((row * s + shift) * (kh // hands) + column.to(even.device)) * hands + hand
    angle = _both_ways(even, odd, where.flatten()).argmax(0).view(best.shape)
    top = best.amax(1)  # (b,)
    total, rows, weights = _weights(tables, peak, top, model, spectra, here)
    of_parities = gradient.split([len(x) for x in inputs], 1)
    for parity, (x, g, back) in enumerate(zip(inputs, of_parities, weights, strict=True)):
        if rows is not None:
            x = x.index_select(2, rows)
        for band, first in model.bands[parity]:
            left = x[band, ..., first:]
            for part in (0, 1):
                _add_product(g[part, band, :, first:], left, back[part, band].unflatten(1, (t, -1)))
    sum_all = total.sum(1, keepdim=True)
    return Posterior(sum_all.squeeze(1).log() + top, total / sum_all, best, shift, hand, angle)


def products(
    data: Features, model: Model, group: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Products of b = t p particles in t tiles with their classes, without a sum over frequencies.

    Args:
        data: the particles.
        model: the classes of all groups.
        group: (t,) group of each tile; None is one tile of the first group.

    Returns:
        For even and odd frequencies the particles, (m', t, p s, 2 r), and the real and imaginary
        parts of the products, (2, m', b s, k h).
    """
    columns = model.columns if group is None else model.columns[:, :, group]
    t, kh = columns.shape[2], columns.shape[-1]  # (2, m, t, 2 r, k h)
    n_even = len(data.rows[::2])
    inputs, spectra = [], []
    for own, bands in zip((slice(0, n_even), slice(n_even, None)), model.bands, strict=True):
        x = data.rows[own].unflatten(1, (t, -1)).flatten(2, 3)  # (m', t, p s, 2 r)
        y = columns[:, own]  # (2, m', t, 2 r, k h)
        spectrum = x.new_empty(2, len(x), t * x.shape[2], kh)
        for band, first in bands:
            left = x[band, ..., first:].flatten(0, 1)
            for part in (0, 1):
                out = spectrum[part, band].unflatten(1, (t, -1)).flatten(0, 1)
                torch.bmm(left, y[part, band, :, first:].flatten(0, 1), out=out)
        inputs.append(x)
        spectra.append(spectrum)
    return inputs, spectra


def _both_ways(even: Tensor, odd: Tensor, columns: Tensor) -> Tensor:
    """(a, c) logits of some columns (c,) at all angles."""
    one, other = even[:, columns], odd[:, columns]
    return torch.cat([one + other, one - other])


def _add_product(into: Tensor, x: Tensor, back: Tensor) -> None:
    """Add the products of x (m, t, q, 2 r), transposed, with back (m, t, q, k h) to a view (m, t,
    2 r, k h). A GPU divides the sum over q into `PIECES`, to use all of its processors."""
    q = x.shape[2]
    if x.is_cuda and x.shape[1] < PIECES and q % PIECES == 0:
        left, right = (each.unflatten(2, (PIECES, -1)).flatten(0, 2) for each in (x, back))
        products = torch.bmm(left.mT, right).view(*x.shape[:2], PIECES, *into.shape[2:])
        into += products.sum(2)
    else:
        products = torch.bmm(x.flatten(0, 1).mT, back.flatten(0, 1))
        into += products.view(into.shape)


def _weights(
    tables: Sequence[Tensor], peak: Tensor, top: Tensor, model: Model, spectra: Sequence[Tensor],
    here: Tensor | None,
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:  # fmt: skip
    """The weights exp(table - top), as sums over poses and as Fourier sums over angles.

    They are computed only for combinations of particle, shift, class and hand with weights above
    `NEGLIGIBLE`, which are few once the classes have settled.

    Args:
        tables: (a / 2, b s k h) sums over even and over odd frequencies, overwritten.
        peak: (b, s, k, h) maxima over angles.
        top: (b,) maxima over angles, shifts, classes and hands.
        model: has the inverse transform.
        spectra: (2, m', b s, k h) for even and odd frequencies, overwritten.
        here: (t, p) bool, which of the b = t p particles count; None is all.

    Returns:
        (b, k) sums over poses; the indices (c,) of pairs of particle and shift, None for all; and
        for even and odd frequencies the (2, m', c, k h) Fourier sums over angles for these pairs,
        divided by the sum over the poses of a particle.
    """
    b, half, kh = len(peak), len(model.inverse[0]), spectra[0].shape[-1]
    enough = (peak - top[:, None, None, None] > NEGLIGIBLE).flatten()
    columns = enough.nonzero().squeeze(1)
    owner = columns // (len(enough) // b)
    few = 2 * len(columns) <= len(enough)
    even, odd = tables
    if few:
        logits = _both_ways(even, odd, columns).sub_(top[owner])
    else:
        even.view(half, b, -1).sub_(top[:, None])
        logits = even.new_empty(2 * half, len(enough))
        torch.add(even, odd, out=logits[:half])
        torch.sub(even, odd, out=logits[half:])
    # Smaller weights have no effect, and arithmetic with denormal numbers is ten times slower.
    weights = logits.clamp_(min=2 * NEGLIGIBLE).exp_()
    sums = weights.sum(0)
    if few:
        sums = sums.new_zeros(len(enough)).index_copy_(0, columns, sums)
    total = sums.view(peak.shape).sum((1, 3))  # (b, k)
    scale = total.sum(1).reciprocal()
    if here is not None:
        scale = scale * here.flatten()
    one, other = weights[:half], weights[half:]
    if not few:
        weights.view(2 * half, b, -1).mul_(scale[:, None])
        for inverse, spectrum, function, into in zip(
            model.inverse, spectra, (torch.add, torch.sub), tables, strict=True
        ):
            function(one, other, out=into)
            torch.mm(inverse.T, into, out=spectrum.flatten(0, 1).flatten(1))
        return total, None, spectra
    weights *= scale[owner]
    rows = None
    if here is None:
        used = enough.view(-1, kh).any(1)
        rows = used.nonzero().squeeze(1)
        columns = (used.cumsum(0) - 1)[columns // kh] * kh + columns % kh
        rows = torch.nn.functional.pad(rows, (0, -len(rows) % PIECES))  # further ones have weight 0
        spectra = [each.new_empty(*each.shape[:2], len(rows), kh) for each in spectra]
    for inverse, spectrum, both in zip(
        model.inverse, spectra, (one + other, one - other), strict=True
    ):
        spectrum.zero_().flatten(0, 1).flatten(1)[:, columns] = inverse.T @ both
    return total, rows, spectra


def class_power(classes: Tensor, rings: FourierRings) -> Tensor:
    """(k, r) power of features (k, r, m) on every ring, their inner product with themselves."""
    twice = rings.frequency_weights(classes.real)
    return (torch.view_as_real(classes).square().sum(-1) * twice).sum(-1) / rings.n_angles


def _columns(classes: Tensor, mirror: bool) -> Tensor:
    """Real matrices (2, m, g, 2 r, k h) of complex classes (g, k, r, m), even m before odd ones.

    The rows of a particle times these are the real and the imaginary part of the products with each
    class in each hand.
    """
    y = _even_first(classes.permute(3, 0, 2, 1))  # (m, g, r, k)
    re, im = y.real, y.imag
    hands = [torch.stack([torch.stack([re, im], 3), torch.stack([im, -re], 3)])]
    if mirror:
        sign = _mirror_sign(re)
        hands.append(sign * torch.stack([torch.stack([re, -im], 3), torch.stack([-im, -re], 3)]))
    # (2, m, g, r, 2, k, h)
    return torch.stack(hands, -1).flatten(5).flatten(3, 4).contiguous()


def signal_of(gradient: Tensor, hands: int, angles: int) -> Tensor:
    """The adjoint of `_columns`: (2, m, g, 2 r, k h) -> (g, k, r, m) complex sums of particles."""
    g = gradient.unflatten(3, (-1, 2)).unflatten(-1, (-1, hands))  # (2, m, g, r, 2, k, h)
    re = g[0, :, :, :, 0, :, 0] - g[1, :, :, :, 1, :, 0]
    im = g[0, :, :, :, 1, :, 0] + g[1, :, :, :, 0, :, 0]
    if hands == 2:
        sign = _mirror_sign(re)[..., 0]
        re = re + sign * (g[0, :, :, :, 0, :, 1] - g[1, :, :, :, 1, :, 1])
        im = im - sign * (g[0, :, :, :, 1, :, 1] + g[1, :, :, :, 0, :, 1])
    # Undo the factor weights / a of irfft, so that these are plain sums over angles.
    scale = _even_first(angles / rfft_weights(angles, re)[: len(re)])
    scaled = torch.complex(re, im) * scale[:, None, None, None]
    return natural_order(scaled).permute(1, 3, 2, 0)


def _even_first(frequencies: Tensor) -> Tensor:
    """Values (m, ...) at frequencies 0, 2, 4, …, 1, 3, 5, …"""
    return torch.cat([frequencies[::2], frequencies[1::2]])


def natural_order(values: Tensor) -> Tensor:
    """Values (m, ...) at frequencies 0, 1, 2, … from those at 0, 2, 4, …, 1, 3, 5, …"""
    return values[_even_first(torch.arange(len(values), device=values.device)).argsort()]


def _mirror_sign(like: Tensor) -> Tensor:
    """(m, 1, 1, 1, 1) the factor (-1)^m of mirrored particles, even m before odd ones."""
    sign = torch.ones(len(like), 1, 1, 1, 1, device=like.device)
    sign[len(like[::2]) :] = -1
    return sign


def _inverse_transform(frequencies: int, angles: int, device: torch.device) -> Tensor:
    """(a / 2, 2, m) factors of the real and imaginary parts of m < a / 2 frequencies in irfft to
    the first half of a angles."""
    turn = torch.arange(angles // 2, device=device)[:, None]
    turn = turn * torch.arange(frequencies, device=device) % angles * (2 * math.pi / angles)
    scale = rfft_weights(angles, turn)[:frequencies] / angles
    return torch.stack([turn.cos() * scale, -turn.sin() * scale], 1)


def no_sums(classes: Tensor) -> Sums:
    """The sums of no particles over classes (k, r, m)."""
    k, r, _ = classes.shape
    zeros = classes.real.new_zeros
    return Sums(classes.new_zeros(2, *classes.shape), zeros(2, k, r), zeros(2, k))


def mix_sums(old: Sums, new: Sums, momentum: float) -> Sums:
    """Weighted mean of sums: ``momentum`` times the old, scaled to the number of particles of the
    new, plus 1 - ``momentum`` times the new."""
    per = new.size.sum() / old.size.sum()
    return Sums(*(momentum * per * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)))


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
    frc = cross / (power[0] * power[1]).sqrt().clamp(min=1e-20)
    images = sums.signal.sum(0) / sums.weight.sum(0).clamp(min=1e-6)[..., None]
    return images * wiener_factors(frc, HIGHEST_FRC)[..., None]


def extend(classes: Tensor, old: FourierRings, new: FourierRings) -> Tensor:
    """Class features (k, r, m) on the ``new`` rings, without those beyond them, and zero beyond the
    ``old`` rings."""
    changed = classes.new_zeros(len(classes), new.last, new.n_frequencies)
    some = slice(min(old.last, new.last)), slice(min(old.n_frequencies, new.n_frequencies))
    changed[:, *some] = classes[:, *some]
    return changed * math.sqrt(new.n_angles / old.n_angles)
