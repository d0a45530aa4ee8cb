"""Ring products: what the operators of `correlate` compute in PyTorch, in blocks of the table.

Shape letters as in `correlate`. Prepared references (`ring_factors`) serve any number of calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Angular frequencies that share a ring product's extent: few leave little out, many are fast.
BAND = 16
# References that a ring product takes at least, unless there are but two: with fewer columns some
# BLAS kernels round by the column, and equal references should score the same.
LEAST = 8


class RingFactors(NamedTuple):
    """References made ready for ring products.

    Attributes:
        size: k.
        pairs: (m, 2, r, k', 2) real: Y as (Re, Im), then -i Y likewise; zeros past k.
        bands: (first m, end m, first ring, end ring) outside of which all references are zero.
    """

    size: int
    pairs: Tensor
    bands: list[tuple[int, int, int, int]]


def ring_factors(references: Tensor) -> RingFactors:
    """Make spectra (k, r, m) ready for `peaks_of`."""
    y = references.permute(2, 1, 0).resolve_conj()  # (m, r, k)
    both = torch.stack([y.real, y.imag, y.imag, -y.real], -1).unflatten(-1, (2, 2))
    held = (references != 0).any(0).cpu()  # (r, m)
    bands = []
    for start in range(0, len(y), BAND):
        rows = held[:, start : start + BAND].any(1).nonzero()
        if len(rows):
            end = min(start + BAND, len(y))
            bands.append((start, end, int(rows[0]), int(rows[-1]) + 1))
    pairs = both.permute(0, 3, 1, 2, 4)  # (m, 2, r, k, 2)
    k = len(references)
    pairs = F.pad(pairs, (0, 0, 0, _spare(k)))
    return RingFactors(k, pairs.contiguous(), bands)


def peaks_of(
    particles: Tensor, factors: RingFactors, mirror: bool, block: int, together: int
) -> tuple[Tensor, Tensor]:
    """The best of both hands of `hand_peaks`, (n, k) each."""
    return best_hand(*hand_peaks(particles, factors, mirror, block, together))


def best_hand(score: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The better of hands (n, k, hands), (n, k) each: the first place of equals."""
    best = score.amax(-1)
    last = torch.iinfo(place.dtype).max
    return best, place.masked_fill(score < best.unsqueeze(-1), last).amin(-1)


def hand_peaks(
    particles: Tensor, factors: RingFactors, mirror: bool, block: int, together: int
) -> tuple[Tensor, Tensor]:
    """The best score of every particle, reference and hand, and its place: (n, k, hands) each.

    Args:
        particles: (n, s, r, m) spectra.
        factors: `ring_factors` of the references.
        mirror: whether to try the mirrored hand.
        block: entries of the table at a time.
        together: particles at a time, at most.

    Returns:
        Scores, and places (shift * len(tables) + hand) * a + angle, the first of equals.
    """
    n, s = particles.shape[:2]
    k, hands = factors.size, 1 + mirror
    score = particles.new_empty(n, k, hands, dtype=particles.real.dtype)
    place = torch.empty(n, k, hands, dtype=torch.int64, device=particles.device)
    for rows, some, x, room in _blocks(particles, factors, mirror, block, together):
        score[rows, some], place[rows, some] = _block_peaks(x, s, factors, some, mirror, room)
    return score, place


def logsumexp_of(
    particles: Tensor,
    factors: RingFactors,
    temperature: float,
    mirror: bool,
    block: int,
    together: int,
) -> Tensor:
    """(n, k) T log sum exp(score / T) over all poses; arguments as `hand_peaks`."""
    n, s = particles.shape[:2]
    out = particles.new_empty(n, factors.size, dtype=particles.real.dtype)
    for rows, some, x, room in _blocks(particles, factors, mirror, block, together):
        logits = _logits(x, s, factors, some, temperature, mirror, room)
        out[rows, some] = temperature * torch.logsumexp(logits, (0, 1, 3))
    return out


def logsumexp_gradients(
    grad: Tensor,
    particles: Tensor,
    factors: RingFactors,
    temperature: float,
    mirror: bool,
    block: int,
    together: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `logsumexp_of` by particles (n, s, r, m) and references (k, r, m).

    The table is made again, block by block. Its gradient, the weights, goes back the way it came:
    hands to halves, angles to frequencies, and two real products.

    Args:
        grad: (n, k) of the output.
    """
    s, r, m = particles.shape[1:]
    a, k = 2 * (m - 1), factors.size
    by_particle = torch.empty_like(particles, memory_format=torch.contiguous_format)
    by_pairs = grad.new_zeros(m, 2, r, k, 2)
    # irfft's weights of the frequencies: rfft with them is its transpose.
    multiplicity = grad.new_full((m, 1, 1, 1), 2.0 / a)
    multiplicity[0] = multiplicity[-1] = 1.0 / a
    for rows, some, x, room in _blocks(particles, factors, mirror, block, together):
        logits = _logits(x, s, factors, some, temperature, mirror, room)
        weight = (logits - logits.logsumexp((0, 1, 3), keepdim=True)).exp()
        weight = (weight * grad[rows, some].unsqueeze(1)).flatten(2, 3)  # (h, a, n' s, k')
        plain = weight[0]
        halves = torch.stack([plain, plain], 1)
        if mirror:
            halves[:, 0] += weight[1]
            halves[:, 1] -= weight[1]
        spectrum = torch.fft.rfft(halves, dim=0) * multiplicity  # (m, 2, n' s, k')
        product = torch.view_as_real(spectrum).flatten(3).flatten(0, 1)  # (m 2, n' s, k' 2)
        columns = factors.pairs[..., some, :].flatten(3).flatten(0, 1)  # (m 2, r, k' 2)
        parts = torch.bmm(product, columns.mT).reshape(2 * m, -1).T.contiguous()
        found = torch.view_as_complex(parts.reshape(-1, s, r, m, 2))
        if some.start == 0:
            by_particle[rows] = found
        else:
            by_particle[rows] += found
        here = torch.bmm(x.flatten(0, 1).mT, product)  # (m 2, r, k' 2)
        by_pairs[:, :, :, some] += here.reshape(m, 2, r, -1, 2)
    real = by_pairs[:, 0, ..., 0] - by_pairs[:, 1, ..., 1]  # (m, r, k): as `ring_factors` has them
    imaginary = by_pairs[:, 0, ..., 1] + by_pairs[:, 1, ..., 0]
    return by_particle, torch.complex(real, imaginary).permute(2, 1, 0).contiguous()


def _blocks(
    particles: Tensor, factors: RingFactors, mirror: bool, block: int, together: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of the table: particles, references, the particles' parts, and room for a product."""
    n, s, r, m = particles.shape
    k = factors.size
    per_pair = s * (1 + mirror) * 2 * (m - 1)
    most = max(1, block // per_pair)
    k_block = math.ceil(k / math.ceil(k / most)) if k else 1
    n_block = max(1, min(n, block // (per_pair * min(k, k_block)), together))
    # One workspace for all blocks: fresh memory costs more than what is done in it.
    widest = k_block if k == k_block <= 2 else max(k_block, LEAST)  # as `_tables` pads them
    room = particles.new_empty(m * 2 * n_block * s * 2 * widest, dtype=particles.real.dtype)
    for start in range(0, n, n_block):
        rows = slice(start, start + n_block)
        x = torch.view_as_real(particles[rows].resolve_conj()).reshape(-1, 2 * m)
        x = x.T.contiguous().reshape(m, 2, -1, r)  # (m, 2, n' s, r); real pairs turn fastest
        for first in range(0, k, k_block):
            yield rows, slice(first, min(first + k_block, k)), x, room


def _spare(k: int) -> int:
    """Columns of zeros that k references need."""
    return max(0, LEAST - k) if k > 2 else 0


def _block_peaks(
    parts: Tensor, s: int, factors: RingFactors, some: slice, mirror: bool, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Peaks of a block of particles against a block of references, (n, k, hands) each.

    Args:
        parts, room: of `_blocks`.
    """
    tables = _tables(parts, factors, some, mirror, room)
    (a, ns, k), device = tables[0].shape, tables[0].device
    index = torch.arange(k, device=device)
    row = torch.arange(ns // s, device=device)[:, None] * s
    scores, places = [], []
    for hand, table in enumerate(tables):
        score, shift = table.amax(0).reshape(-1, s, k).max(1)  # (n, k)
        best = table[:, row + shift, index]  # (a, n, k)
        if hand == 1:
            best = best.roll(-1 - a // 2, 0).flip(0)  # entry i is that at a / 2 - i
        angle = (best == score).to(torch.uint8).argmax(0)
        scores.append(score)
        places.append((shift * len(tables) + hand) * a + angle)
    return torch.stack(scores, -1), torch.stack(places, -1)


def _logits(
    parts: Tensor,
    s: int,
    factors: RingFactors,
    some: slice,
    temperature: float,
    mirror: bool,
    room: Tensor,
) -> Tensor:
    """Scores over the temperature, (hands, a, n, s, k): `_tables` of a block."""
    tables = _tables(parts, factors, some, mirror, room)
    return (torch.stack(tables) / temperature).unflatten(2, (-1, s))


def _tables(
    parts: Tensor, factors: RingFactors, some: slice, mirror: bool, room: Tensor
) -> list[Tensor]:
    """Scores (a, n s, k) of a block, hand by hand; a mirrored hand's angle i is that at a / 2 - i.

    Real and imaginary part of the particles make a correlation each, A of sum_r Re(X) Y and B of
    sum_r Im(X) (-i Y). Then A + B is the table's plain hand, and (A - B) read backwards from half
    a turn its mirrored one: two real products and two transforms serve both.

    Args:
        parts: (m, 2, n s, r) real and imaginary part of the particles' spectra.
        room: memory for the product.
    """
    m, _, ns, _ = parts.shape
    a = 2 * (m - 1)
    k = some.stop - some.start
    columns = factors.pairs[..., some, :]  # (m, 2, r, k, 2)
    spare = _spare(k) if factors.size == k else max(0, LEAST - k)  # a part of many: like them
    if spare:
        whole = factors.size == k
        columns = factors.pairs if whole else F.pad(columns, (0, 0, 0, spare))
    columns = columns.flatten(3)  # (m, 2, r, k' 2)
    shape = (m, 2, ns, columns.shape[-1])
    product = room[: math.prod(shape)].view(shape)
    done = 0
    for start, end, low, high in factors.bands:
        product[done:start] = 0
        torch.bmm(
            parts[start:end, :, :, low:high].flatten(0, 1),
            columns[start:end, :, low:high].flatten(0, 1),
            out=product[start:end].flatten(0, 1),
        )
        done = end
    product[done:] = 0
    spectrum = torch.view_as_complex(product.unflatten(-1, (-1, 2)))[..., :k]  # (m, 2, n s, k)
    half_a, half_b = torch.fft.irfft(spectrum, n=a, dim=0).unbind(1)  # (a, n s, k) each
    plain = half_a + half_b
    return [plain, half_a.sub_(half_b)] if mirror else [plain]
