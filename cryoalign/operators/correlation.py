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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cryoalign.images.polar import Rings, normalised_spectra, ring_spectra, to_polar
from cryoalign.operators.kernels import cpu as cpu_kernels
from cryoalign.operators.kernels import peaks as kernels
from cryoalign.operators.ring_products import (
    RingFactors,
    best_hand,
    logsumexp_gradients,
    logsumexp_of,
    peaks_of,
    ring_factors,
)
from cryoalign.pose import Pose

# Entries of one block of the correlation table: as much as stays in a core's cache on a CPU,
# and enough to fill a GPU. It bounds the operator's workspace whatever n, k and s are.
CPU_BLOCK = 3 * 2**18
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
    particles: Tensor, references: Tensor, mirror: bool = True, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best score of every (particle, reference) pair, and where in the table it is.

    Equals the maximum of `correlation_table` over shifts, hands and angles, without the table:
    it is made in blocks of bounded size. Each particle's arithmetic is the same whatever
    else is in the batch.

    On an NVIDIA GPU the kernels choose hand and shift of a pair by fp16 spectra with fp32 sums,
    and score it in fp32: among near equals (to about 1e-3 of the score) the choice may differ.

    Args:
        particles: (n, s, r, m) complex64 or complex128 ring spectra.
        references: (k, r, m) ring spectra of the same dtype and device.
        mirror: whether to try the mirrored hand.
        candidates: of how many references per particle, the best ones, the place is needed. The
            others may come with place -1 and a less exact score, which is below the
            candidates'. None is all of them. Saves time on a GPU.

    Returns:
        score: (n, k) real.
        place: (n, k) int64, (shift * hands + hand) * a + angle; the first of equals. See
            `unravel_place`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(particles, references, candidates)
    return _table_peaks(particles, references, mirror)


@correlation_peaks.register_kernel("cuda")
def _(
    particles: Tensor, references: Tensor, mirror: bool = True, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    _check(particles, references, candidates)
    found = kernels.fused_peaks(particles, references, mirror, candidates)
    return _table_peaks(particles, references, mirror) if found is None else found


def _table_peaks(particles: Tensor, references: Tensor, mirror: bool) -> tuple[Tensor, Tensor]:
    """`correlation_peaks` on any device: in PyTorch, or the compiled search of a CPU."""
    found = cpu_kernels.spectra_peaks(particles, references, mirror)
    if found is not None:
        return best_hand(*found)
    return table_peaks(particles, ring_factors(references), mirror)


def table_peaks(
    particles: Tensor, factors: RingFactors, mirror: bool = True
) -> tuple[Tensor, Tensor]:
    """`correlation_peaks` in PyTorch, with `products.ring_factors` of the references at hand."""
    # One particle at a time on a CPU: the block stays in cache, and its shape, hence the
    # rounding, does not depend on how many particles there are.
    if particles.device.type == "cpu":
        return peaks_of(particles, factors, mirror, CPU_BLOCK, 1)
    return peaks_of(particles, factors, mirror, CUDA_BLOCK, max(1, len(particles)))


@correlation_peaks.register_fake
def _(
    particles: Tensor, references: Tensor, mirror: bool = True, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    _check(particles, references, candidates)
    shape = (particles.shape[0], references.shape[0])
    return (
        particles.new_empty(shape, dtype=particles.real.dtype),
        particles.new_empty(shape, dtype=torch.int64),
    )


def _check(particles: Tensor, references: Tensor, candidates: int | None = None) -> None:
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
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


@torch.library.custom_op("cryoalign::correlation_logsumexp", mutates_args=())
def correlation_logsumexp(
    particles: Tensor, references: Tensor, temperature: float, mirror: bool = True
) -> Tensor:
    """The soft maximum of every (particle, reference) pair over all poses, T log sum exp(c / T).

    Differentiable: the weights exp(c / T) / sum exp(c / T) are those of expectation
    maximisation, so its gradient with respect to the references is made of the particles' spectra,
    each turned and shifted to every pose and weighted. As T goes to 0 it is `correlation_peaks`'
    score. Like that, it never holds the table.

    Args:
        particles: (n, s, r, m) complex64 or complex128 ring spectra.
        references: (k, r, m) ring spectra of the same dtype and device.
        temperature: T > 0, in units of the score.
        mirror: whether to sum over the mirrored hand too.

    Returns:
        (n, k) real.

    Raises:
        ValueError: a temperature that is not positive; shapes, dtypes or devices that do not fit.
    """
    _check(particles, references)
    _check_temperature(temperature)
    return _table_logsumexp(particles, references, temperature, mirror)


@correlation_logsumexp.register_kernel("cuda")
def _(particles: Tensor, references: Tensor, temperature: float, mirror: bool = True) -> Tensor:
    _check(particles, references)
    _check_temperature(temperature)
    found = kernels.fused_logsumexp(particles, references, temperature, mirror)
    return _table_logsumexp(particles, references, temperature, mirror) if found is None else found


@correlation_logsumexp.register_fake
def _(particles: Tensor, references: Tensor, temperature: float, mirror: bool = True) -> Tensor:
    _check(particles, references)
    return particles.new_empty(
        (particles.shape[0], references.shape[0]), dtype=particles.real.dtype
    )


@torch.library.custom_op("cryoalign::correlation_logsumexp_backward", mutates_args=())
def _logsumexp_backward(
    grad: Tensor, particles: Tensor, references: Tensor, temperature: float, mirror: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `correlation_logsumexp` by particles and references, block by block again."""
    with torch.autocast(grad.device.type, enabled=False):  # products of matrices, in full
        return logsumexp_gradients(
            grad, particles, ring_factors(references), temperature, mirror, *_blocks(particles)
        )


@_logsumexp_backward.register_fake
def _(
    grad: Tensor, particles: Tensor, references: Tensor, temperature: float, mirror: bool
) -> tuple[Tensor, Tensor]:
    return particles.new_empty(particles.shape), references.new_empty(references.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    particles, references, ctx.temperature, ctx.mirror = inputs
    ctx.save_for_backward(particles, references)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grads = _logsumexp_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.mirror)
    return *grads, None, None


correlation_logsumexp.register_autograd(_backward, setup_context=_save_for_backward)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _blocks(particles: Tensor) -> tuple[int, int]:
    """Entries of the table, and particles, at a time, where several times the table is alive."""
    if particles.device.type == "cpu":
        return CPU_BLOCK, 1
    return CUDA_BLOCK // 8, max(1, len(particles))


def _table_logsumexp(
    particles: Tensor, references: Tensor, temperature: float, mirror: bool
) -> Tensor:
    """`correlation_logsumexp` in PyTorch, on any device."""
    factors = ring_factors(references)
    return logsumexp_of(particles, factors, temperature, mirror, *_blocks(particles))


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
    return turned_correlation(x, y, pose.angle, pose.mirror)


def turned_correlation(x: Tensor, y: Tensor, angle: Tensor, mirror: Tensor) -> Tensor:
    """(n,) scores of spectra x (n, r, m), turned by angles (n,) in degrees and then mirrored where
    ``mirror`` (n,), with spectra y (n or 1, r, m): `correlation_table` at any angle."""
    m = x.shape[-1]
    frequency = torch.arange(m, device=x.device)
    sign = 1 - 2 * (frequency % 2)
    hand = mirror[:, None, None]
    product = (x.conj() * torch.where(hand, sign * y.conj(), y)).sum(-2)  # (n, m)
    turn = torch.deg2rad(angle).to(x.real.dtype)[:, None] * frequency
    multiplicity = torch.full_like(turn[0], 2.0 / (2 * (m - 1)))
    multiplicity[0] = multiplicity[-1] = 1.0 / (2 * (m - 1))
    # irfft's real part: Re(z e^{i m phi}); the Nyquist term has no phase of its own.
    imaginary = product.imag * (frequency < m - 1)
    return (multiplicity * (product.real * turn.cos() - imaginary * turn.sin())).sum(-1)
