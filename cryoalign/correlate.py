"""Rotational cross-correlation of ring spectra: the textbook, the operator, one chosen pose.

Shape letters: n particles, k references, s shifts, r rings, a angles, m = a // 2 + 1 angular
frequencies; hands are 0 (as is) and 1 (mirrored). Spectra come from `polar.ring_spectra` and
may carry further real weights per ring on either side.

With X a particle's and Y a reference's spectra, the score of turning the particle by phi is

    c(phi) = irfft_m( sum_r conj(X[r, m]) Y[r, m] ),

and, mirrored after turning, irfft_m( (-1)^m sum_r conj(X[r, m]) conj(Y[r, m]) ): mirroring
x -> -x takes the ring angle theta to pi - theta. (Chung et al. 2020, RPC; DESIGN of this project.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cryoalign.polar import Rings, normalised_spectra, ring_spectra, to_polar
from cryoalign.pose import Pose

# Entries of one block of the correlation table: as much as stays in a core's cache on a CPU,
# and enough to fill a GPU. It bounds the operator's workspace whatever n, k and s are.
CPU_BLOCK = 2**20
CUDA_BLOCK = 2**27
# Angular frequencies that share a ring product's extent: few leave little out, many are fast.
BAND = 16
# References that a ring product takes together. Some BLAS kernels round the columns past a
# multiple of their width otherwise, and equal references should score the same.
GROUP = 8


class Place(NamedTuple):
    """A place in the (s, hand, a) part of the table: three int64 tensors of one shape."""

    shift: Tensor
    mirror: Tensor
    angle: Tensor


def unravel_place(place: Tensor, angles: int, mirror: bool) -> Place:
    """Shift, hand and angle indices of the operator's flat ``place``."""
    hands = 1 + mirror
    return Place(place // (hands * angles), place // angles % hands, place % angles)


def correlation_table(particles: Tensor, references: Tensor, mirror: bool = True) -> Tensor:
    """Every score of every particle with every reference: the formula, for reading and testing.

    Args:
        particles: (n, s, r, m) complex ring spectra.
        references: (k, r, m) complex ring spectra.
        mirror: whether to try the mirrored hand.

    Returns:
        (n, k, s, hands, a), a = 2 (m - 1).
    """
    m = particles.shape[-1]
    same = torch.einsum("nsrm,krm->nksm", particles.conj(), references)
    hands = [same]
    if mirror:
        sign = 1 - 2 * (torch.arange(m, device=particles.device) % 2)
        hands.append(sign * torch.einsum("nsrm,krm->nksm", particles.conj(), references.conj()))
    return torch.fft.irfft(torch.stack(hands, -2), n=2 * (m - 1))


@torch.library.custom_op("cryoalign::correlation_peaks", mutates_args=())
def correlation_peaks(
    particles: Tensor, references: Tensor, mirror: bool = True
) -> tuple[Tensor, Tensor]:
    """The best score of every (particle, reference) pair, and where in the table it is.

    Equals the maximum of `correlation_table` over shifts, hands and angles, without the table:
    it is made in blocks of bounded size. Each particle's arithmetic is the same whatever
    else is in the batch.

    Args:
        particles: (n, s, r, m) complex64 or complex128 ring spectra.
        references: (k, r, m) ring spectra of the same dtype and device.
        mirror: whether to try the mirrored hand.

    Returns:
        score: (n, k) real.
        place: (n, k) int64, (shift * hands + hand) * a + angle; the first of equals. See
            `unravel_place`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(particles, references)
    return peaks_of(particles, ring_factors(references), mirror)


@correlation_peaks.register_fake
def _(particles: Tensor, references: Tensor, mirror: bool = True) -> tuple[Tensor, Tensor]:
    _check(particles, references)
    shape = (particles.shape[0], references.shape[0])
    return (
        particles.new_empty(shape, dtype=particles.real.dtype),
        particles.new_empty(shape, dtype=torch.int64),
    )


def _check(particles: Tensor, references: Tensor) -> None:
    if particles.ndim != 4 or references.ndim != 3:
        raise ValueError(
            "correlation_peaks takes particles (n, s, r, m) and references (k, r, m); got "
            f"{tuple(particles.shape)} and {tuple(references.shape)}"
        )
    if particles.shape[2:] != references.shape[1:]:
        raise ValueError(
            f"particles have rings x frequencies {tuple(particles.shape[2:])}, references "
            f"{tuple(references.shape[1:])}: make both with the same Rings"
        )
    if not particles.is_complex() or particles.dtype != references.dtype:
        raise ValueError(
            "particles and references must be complex spectra of one dtype; got "
            f"{particles.dtype} and {references.dtype}"
        )
    if particles.device != references.device:
        raise ValueError(
            f"particles are on {particles.device}, references on {references.device}: move one"
        )
    if particles.shape[1] == 0 or particles.shape[3] < 2:
        raise ValueError(
            f"no shift or fewer than 2 frequencies to search in spectra {tuple(particles.shape)}"
        )


class RingFactors(NamedTuple):
    """References made ready for ring products.

    Attributes:
        count: k.
        pairs: (m, 2, r, k', 2) real: Y as (Re, Im), then -i Y likewise; zeros past k.
        bands: (first m, end m, first ring, end ring) outside of which all references are zero.
    """

    count: int
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
    pairs = F.pad(pairs, (0, 0, 0, -k % GROUP if k > 2 else 0))
    return RingFactors(k, pairs.contiguous(), bands)


def peaks_of(particles: Tensor, factors: RingFactors, mirror: bool) -> tuple[Tensor, Tensor]:
    """`correlation_peaks` with references at hand."""
    score, place = hand_peaks(particles, factors, mirror, CPU_BLOCK, together=1)
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
        block: entries of the table at a time, on a CPU.
        together: particles at a time, at most, on a CPU. One keeps the block in cache, and its
            shape, hence the rounding, the same however many particles there are; small searches
            need more to be worth their calls.
    """
    n, s, r, m = particles.shape
    k, hands = factors.count, 1 + mirror
    score = particles.new_empty(n, k, hands, dtype=particles.real.dtype)
    place = torch.empty(n, k, hands, dtype=torch.int64, device=particles.device)
    cpu = particles.device.type == "cpu"
    block = block if cpu else CUDA_BLOCK
    per_pair = s * hands * 2 * (m - 1)
    most = max(1, block // per_pair)
    k_block = -(-k // math.ceil(k / most) // GROUP) * GROUP if k else 1
    n_block = max(1, min(n, block // (per_pair * min(k, k_block)), together if cpu else n))
    for start in range(0, n, n_block):
        rows = slice(start, start + n_block)
        x = torch.view_as_real(particles[rows].resolve_conj()).reshape(-1, 2 * m)
        x = x.T.contiguous().reshape(m, 2, -1, r)  # (m, 2, n' s, r); real pairs turn fastest
        for first in range(0, k, k_block):
            some = slice(first, min(first + k_block, k))
            score[rows, some], place[rows, some] = _block_peaks(x, s, factors, some, mirror)
    return score, place


def _block_peaks(
    parts: Tensor, s: int, factors: RingFactors, some: slice, mirror: bool
) -> tuple[Tensor, Tensor]:
    """Peaks of a block of particles against a block of references, (n, k, hands) each.

    Real and imaginary part of the particles make a correlation each, A of sum_r Re(X) Y and B of
    sum_r Im(X) (-i Y). Then A + B is the table's plain hand, and (A - B) read backwards from half
    a turn its mirrored one: two real products and two transforms serve both.

    Args:
        parts: (m, 2, n s, r) real and imaginary part of the particles' spectra.
    """
    m, _, ns, _ = parts.shape
    a = 2 * (m - 1)
    k = some.stop - some.start
    whole = slice(some.start, some.start + k + (-k % GROUP if k > 2 else 0))
    columns = factors.pairs[..., whole, :].flatten(3)  # (m, 2, r, k' 2)
    product = parts.new_empty(m, 2, ns, columns.shape[-1])
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
    tables = [plain]
    if mirror:
        tables.append(half_a - half_b)
    index = torch.arange(k, device=product.device)
    row = torch.arange(ns // s, device=product.device)[:, None] * s
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


def correlation_at(images: Tensor, references: Tensor, pose: Pose, rings: Rings) -> Tensor:
    """The score of particle i against reference i at pose i, differentiable in all of them.

    At poses of the grid it equals `correlation_table`'s entry; between, the rotation is the
    spectra's own trigonometric interpolation and the shift bilinear sampling. Its gradient is
    therefore the full table's maximum's, at the operator's choice.

    Args:
        images: (n, h, w).
        references: (n, h, w), or (1, h, w) shared.
        pose: (n,), particle onto reference.
        rings: the rings.

    Returns:
        (n,) correlation coefficients.
    """
    polar = to_polar(images, rings, pose.shift.unsqueeze(1))
    x = normalised_spectra(polar, rings)[:, 0]  # (n, r, m)
    y = ring_spectra(references, rings)[:, 0]
    m = x.shape[-1]
    frequency = torch.arange(m, device=x.device)
    sign = 1 - 2 * (frequency % 2)
    hand = pose.mirror[:, None, None]
    product = (x.conj() * torch.where(hand, sign * y.conj(), y)).sum(-2)  # (n, m)
    turn = torch.deg2rad(pose.angle).to(x.real.dtype)[:, None] * frequency
    multiplicity = torch.full_like(turn[0], 2.0 / (2 * (m - 1)))
    multiplicity[0] = multiplicity[-1] = 1.0 / (2 * (m - 1))
    # irfft's real part: Re(z e^{i m phi}); the Nyquist term has no phase of its own.
    imaginary = product.imag * (frequency < m - 1)
    return (multiplicity * (product.real * turn.cos() - imaginary * turn.sin())).sum(-1)
