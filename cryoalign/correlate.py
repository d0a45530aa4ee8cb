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

from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.polar import Rings, normalised_spectra, ring_spectra, to_polar
from cryoalign.pose import Pose

# Entries of one block of the correlation table: as much as stays in a core's cache on a CPU,
# and enough to fill a GPU. It bounds the operator's workspace whatever n, k and s are.
CPU_BLOCK = 2**20
CUDA_BLOCK = 2**27


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
    n, s, r, m = particles.shape
    k, hands = len(references), 1 + mirror
    score = particles.new_empty(n, k, dtype=particles.real.dtype)
    place = torch.empty(n, k, dtype=torch.int64, device=particles.device)
    cpu = particles.device.type == "cpu"
    per_pair = s * hands * 2 * (m - 1)
    k_block = max(1, min(k, (CPU_BLOCK if cpu else CUDA_BLOCK) // per_pair))
    # One particle at a time on a CPU: the block stays in cache, and its shape, hence the
    # rounding, does not depend on how many particles there are.
    n_block = 1 if cpu else max(1, min(n, CUDA_BLOCK // (per_pair * k_block)))
    for first in range(0, k, k_block):
        some = slice(first, first + k_block)
        columns = _reference_columns(references[some], mirror)  # (m, 2r, k' hands 2)
        for start in range(0, n, n_block):
            rows = slice(start, start + n_block)
            score[rows, some], place[rows, some] = _block_peaks(particles[rows], columns, hands)
    return score, place


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


def _reference_columns(references: Tensor, mirror: bool) -> Tensor:
    """(k, r, m) complex -> (m, 2r, k hands 2) real: right factor of the ring product.

    Against a row [Re X, Im X] of every ring the columns of a reference give the real and
    imaginary part of sum_r conj(X) Y, and of (-1)^m sum_r conj(X) conj(Y) for the mirrored hand.
    """
    y = references.permute(2, 1, 0)  # (m, r, k)
    re, im = y.real, y.imag
    columns = [torch.stack([re, im], 2), torch.stack([im, -re], 2)]  # (m, r, 2, k) each
    if mirror:
        sign = 1 - 2 * (torch.arange(len(y), device=y.device) % 2)
        sign = sign.to(re.dtype)[:, None, None, None]
        columns += [sign * torch.stack([re, -im], 2), -sign * torch.stack([im, re], 2)]
    return torch.stack(columns, -1).flatten(3).flatten(1, 2)


def _block_peaks(particles: Tensor, columns: Tensor, hands: int) -> tuple[Tensor, Tensor]:
    """Peaks of a block of particles against a block of references, (n, k) each."""
    n, s, _, m = particles.shape
    a = 2 * (m - 1)
    rows = torch.view_as_real(particles.permute(3, 0, 1, 2).contiguous())  # (m, n, s, r, 2)
    product = torch.bmm(rows.reshape(m, n * s, -1), columns)  # (m, n s, k hands 2)
    spectrum = torch.view_as_complex(product.unflatten(-1, (-1, 2)))  # (m, n s, k hands)
    table = torch.fft.irfft(spectrum, n=a, dim=0)  # (a, n s, k hands)
    peak = table.amax(0).reshape(n, s, -1, hands).permute(0, 2, 1, 3)  # (n, k, s, hands)
    score, pose = peak.flatten(2).max(-1)  # (n, k)
    n_index = torch.arange(n, device=pose.device)[:, None]
    k_index = torch.arange(pose.shape[1], device=pose.device)
    best = table[:, n_index * s + pose // hands, k_index * hands + pose % hands]  # (a, n, k)
    angle = (best == score).to(torch.uint8).argmax(0)
    return score, pose * a + angle


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
