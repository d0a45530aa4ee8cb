"""Products of ring spectra: how the operators of `correlation` compute blocks of the table.

The shape letters are those of `correlation`. References are prepared once, by `ring_factors`, and
can then be used in any number of calls.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Angular frequencies that are multiplied together, over the rings on which any of them has power.
# Smaller groups skip more zeros, larger ones are faster.
GROUP = 16
# A product of more than two references is padded to at least so many. With fewer columns some BLAS
# kernels round each column differently, and equal references should have equal scores.
LEAST_COLUMNS = 8


class RingFactors(NamedTuple):
    """References that are prepared for ring products.

    Attributes:
        size: number of references k.
        pairs: (m, 2, r, k', 2) real: Y as (Re, Im), then -i Y as (Re, Im); zeros past k.
        groups: (first m, end m, first ring, end ring) outside of which all references are zero.
    """

    size: int
    pairs: Tensor
    groups: list[tuple[int, int, int, int]]


def ring_factors(references: Tensor) -> RingFactors:
    """Prepare reference spectra (k, r, m) for `hand_peaks` and `logsumexp_of`."""
    y = references.permute(2, 1, 0).resolve_conj()  # (m, r, k)
    both = torch.stack([y.real, y.imag, y.imag, -y.real], -1).unflatten(-1, (2, 2))
    held = (references != 0).any(0).cpu()  # (r, m)
    groups = []
    for start in range(0, len(y), GROUP):
        rows = held[:, start : start + GROUP].any(1).nonzero()
        if len(rows):
            end = min(start + GROUP, len(y))
            groups.append((start, end, int(rows[0]), int(rows[-1]) + 1))
    pairs = both.permute(0, 3, 1, 2, 4)  # (m, 2, r, k, 2)
    k = len(references)
    pairs = F.pad(pairs, (0, 0, 0, _spare(k)))
    return RingFactors(k, pairs.contiguous(), groups)


def best_hand(score: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The better hand: score and place (n, k) from (n, k, hands). Equal scores: the first place."""
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
        mirror: whether to search the mirrored hand too.
        block: how many entries of the table to compute at a time.
        together: how many particles to compute at a time, at most.

    Returns:
        Scores, and places (shift * hands + hand) * a + angle; the first of equal ones.
    """
    n, s = particles.shape[:2]
    k, hands = factors.size, 1 + mirror
    score = particles.new_empty(n, k, hands, dtype=particles.real.dtype)
    place = torch.empty(n, k, hands, dtype=torch.int64, device=particles.device)
    for rows, some, x, room in _blocks(particles, factors, mirror, block, together):
        found = _block_peaks(_tables(x, factors, some, mirror, room), s)
        score[rows, some], place[rows, some] = found
    return score, place


def pair_peaks(particles: Tensor, references: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """The best score (p,) over all angles of p pairs, and the index (p,) of the angle.

    Args:
        particles: (p, r, m) spectra at one shift.
        references: (p, r, m) spectra.
        mirror: (p,) bool, whether the mirrored hand is compared.
    """
    a = 2 * (particles.shape[-1] - 1)
    x = torch.where(mirror[:, None, None], particles, particles.conj())
    table = torch.fft.irfft((x * references).sum(1), n=a)
    score, angle = table.max(1)
    # In the mirrored hand's table, entry i belongs to angle a / 2 - i, as in `_tables`.
    return score, torch.where(mirror, (a // 2 - angle) % a, angle)


def logsumexp_of(
    particles: Tensor, factors: RingFactors, temperature: float, mirror: bool, *block: int
) -> Tensor:
    """(n, k): T log sum exp(score / T) over all poses, with T = ``temperature`` in units of the
    score. The other arguments are those of `hand_peaks`, in its order."""
    n, s = particles.shape[:2]
    out = particles.new_empty(n, factors.size, dtype=particles.real.dtype)
    for rows, some, x, room in _blocks(particles, factors, mirror, *block):
        logits = _logits(_tables(x, factors, some, mirror, room), s, temperature)
        out[rows, some] = temperature * torch.logsumexp(logits, (0, 1, 3))
    return out


def logsumexp_gradients(
    grad: Tensor,
    particles: Tensor,
    factors: RingFactors,
    temperature: float,
    mirror: bool,
    *block: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `logsumexp_of` with respect to particles (n, s, r, m), references (k, r, m).

    The table is computed again, block by block. Its gradient, the weights of the poses, then goes
    through the steps of `_tables` in reverse: hands to halves, angles to frequencies, and two real
    products.

    Args:
        grad: (n, k) gradient with respect to the output. See `logsumexp_of` for the others.
    """
    s, r, m = particles.shape[1:]
    a, k = 2 * (m - 1), factors.size
    by_particle = torch.empty_like(particles, memory_format=torch.contiguous_format)
    by_pairs = grad.new_zeros(m, 2, r, k, 2)
    # The weights of the frequencies in irfft: rfft times these weights is the transpose of irfft.
    multiplicity = grad.new_full((m, 1, 1, 1), 2.0 / a)
    multiplicity[0] = multiplicity[-1] = 1.0 / a
    for rows, some, x, room in _blocks(particles, factors, mirror, *block):
        logits = _logits(_tables(x, factors, some, mirror, room), s, temperature)
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
    real = by_pairs[:, 0, ..., 0] - by_pairs[:, 1, ..., 1]  # (m, r, k)
    imaginary = by_pairs[:, 0, ..., 1] + by_pairs[:, 1, ..., 0]
    return by_particle, torch.complex(real, imaginary).permute(2, 1, 0).contiguous()


def _blocks(
    particles: Tensor, factors: RingFactors, mirror: bool, block: int, together: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Go through the table in blocks.

    Yields:
        The rows of particles, those of references, the particles' real and imaginary parts
        (m, 2, n' s, r), and memory for the product.
    """
    n, s, r, m = particles.shape
    k = factors.size
    per_pair = s * (1 + mirror) * 2 * (m - 1)
    most = max(1, block // per_pair)
    k_block = math.ceil(k / math.ceil(k / most)) if k else 1
    n_block = max(1, min(n, block // (per_pair * min(k, k_block)), together))
    # All blocks share this memory: to allocate new memory takes longer than the product itself.
    widest = k_block if k == k_block <= 2 else max(k_block, LEAST_COLUMNS)  # see `_tables`
    room = particles.new_empty(m * 2 * n_block * s * 2 * widest, dtype=particles.real.dtype)
    for start in range(0, n, n_block):
        rows = slice(start, start + n_block)
        x = torch.view_as_real(particles[rows].resolve_conj()).reshape(-1, 2 * m)
        x = x.T.contiguous().reshape(
            m, 2, -1, r
        )  # (m, 2, n' s, r); transposing real pairs is fastest
        for first in range(0, k, k_block):
            yield rows, slice(first, min(first + k_block, k)), x, room


def _spare(k: int) -> int:
    """How many references that are zero have to be added to k references."""
    return max(0, LEAST_COLUMNS - k) if k > 2 else 0


def _block_peaks(tables: list[Tensor], s: int) -> tuple[Tensor, Tensor]:
    """Scores and places (n, k, hands) of a block, from its `_tables` at s shifts."""
    (a, ns, k), device = tables[0].shape, tables[0].device
    index = torch.arange(k, device=device)
    row = torch.arange(ns // s, device=device)[:, None] * s
    scores, places = [], []
    for hand, table in enumerate(tables):
        score, shift = table.amax(0).reshape(-1, s, k).max(1)  # (n, k)
        best = table[:, row + shift, index]  # (a, n, k)
        if hand == 1:
            best = best.roll(-1 - a // 2, 0).flip(0)  # entry i is angle a / 2 - i
        angle = (best == score).to(torch.uint8).argmax(0)
        scores.append(score)
        places.append((shift * len(tables) + hand) * a + angle)
    return torch.stack(scores, -1), torch.stack(places, -1)


def _logits(tables: list[Tensor], s: int, temperature: float) -> Tensor:
    """The scores of a block divided by the temperature, (hands, a, n, s, k)."""
    return (torch.stack(tables) / temperature).unflatten(2, (-1, s))


def _tables(
    parts: Tensor, factors: RingFactors, some: slice, mirror: bool, room: Tensor
) -> list[Tensor]:
    """Scores (a, n s, k) of a block, one tensor per hand.

    In the mirrored hand's tensor, entry i belongs to angle a / 2 - i. The real and the imaginary
    part of the particles give one correlation each: A from sum_r Re(X) Y, and B from
    sum_r Im(X) (-i Y). Then A + B is the table of hand 0, and A - B in this order of angles that of
    hand 1, so that two real products and two transforms are enough for both hands.
    """
    m, _, ns, _ = parts.shape
    a = 2 * (m - 1)
    k = some.stop - some.start
    columns = factors.pairs[..., some, :]  # (m, 2, r, k, 2)
    spare = _spare(k) if factors.size == k else max(0, LEAST_COLUMNS - k)  # part of many references
    if spare:
        whole = factors.size == k
        columns = factors.pairs if whole else F.pad(columns, (0, 0, 0, spare))
    columns = columns.flatten(3)  # (m, 2, r, k' 2)
    shape = (m, 2, ns, columns.shape[-1])
    product = room[: math.prod(shape)].view(shape)
    done = 0
    for start, end, low, high in factors.groups:
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
