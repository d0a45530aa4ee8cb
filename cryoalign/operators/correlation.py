"""Rotational cross-correlation of ring spectra: the formula, the operators, and single poses.

Shape letters: n particles, k references, s shifts, r rings, a angles, and m = a // 2 + 1 angular
frequencies. Hand 0 is the particle as it is, hand 1 the mirrored particle. `polar.ring_spectra`
makes the spectra; both sides may be multiplied by real weights for each ring.

With X the spectra of a particle and Y those of a reference, the score of turning the particle by
phi is

    c(phi) = irfft_m( sum_r conj(X[r, m]) Y[r, m] ).

Mirroring after the turn takes x to -x and therefore the ring angle theta to pi - theta. The score
is then irfft_m( (-1)^m sum_r conj(X[r, m]) conj(Y[r, m]) ). (Chung et al. 2020, RPC.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cryoalign.images.polar import Rings, normalised_spectra, ring_spectra, to_polar
from cryoalign.operators.kernels import cpu as cpu_kernels
from cryoalign.operators.kernels import peaks as kernels
from cryoalign.operators.registration import operator
from cryoalign.operators.ring_products import (
    RingFactors,
    best_hand,
    hand_peaks,
    logsumexp_gradients,
    logsumexp_of,
    ring_factors,
)
from cryoalign.pose import Pose

# Entries of the correlation table that are computed at a time, whatever n, k and s are: as many as
# stay in the cache of a CPU core, and enough to keep a GPU busy.
CPU_BLOCK = 3 * 2**18
CUDA_BLOCK = 2**27


class Place(NamedTuple):
    """Where in the (s, hand, a) part of the table a score is: three int64 tensors of one shape."""

    shift: Tensor
    mirror: Tensor
    angle: Tensor


def unravel_place(place: Tensor, angles: int, mirror: bool) -> Place:
    """Indices of shift, hand and angle from the flat ``place`` that the operators return.

    Args:
        place: int64 tensor of any shape.
        angles: number of angles a.
        mirror: whether the mirrored hand was searched too.
    """
    hands = 1 + mirror
    return Place(place // (hands * angles), place // angles % hands, place % angles)


def correlation_table(particles: Tensor, references: Tensor, mirror: bool = True) -> Tensor:
    """Every score of every particle with every reference: the formula, for reading and testing.

    Args:
        particles: (n, s, r, m) complex ring spectra.
        references: (k, r, m) complex ring spectra.
        mirror: whether to search the mirrored hand too.

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


def _check(
    particles: Tensor, references: Tensor, mirror: bool = True, candidates: int | None = None
) -> None:
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


def _fake_scores(particles: Tensor, references: Tensor, *options: Any) -> Tensor:
    _check(particles, references)
    shape = (particles.shape[0], references.shape[0])
    return particles.new_empty(shape, dtype=particles.real.dtype)


def _fake_peaks(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    score = _fake_scores(*args)
    return score, score.new_empty(score.shape, dtype=torch.int64)


def _compiled_peaks(
    particles: Tensor, references: Tensor, mirror: bool, candidates: int | None
) -> tuple[Tensor, Tensor] | None:
    found = cpu_kernels.spectra_peaks(particles, references, mirror)
    return None if found is None else best_hand(*found)


@operator(check=_check, fake=_fake_peaks, cpu=_compiled_peaks, cuda=kernels.fused_peaks)
def correlation_peaks(
    particles: Tensor, references: Tensor, mirror: bool = True, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best score of every (particle, reference) pair, and where in the table it is.

    The result is the maximum of `correlation_table` over shifts, hands and angles. The table is
    computed in blocks of bounded size and never held in memory. The result for a particle does not
    depend on the other particles.

    On an NVIDIA GPU the compiled kernels choose the hand and shift of a pair from spectra in half
    precision with sums in single precision, and then compute the score in single precision. Among
    scores that differ by less than about 1e-3 of their value, the choice may differ.

    Args:
        particles: (n, s, r, m) complex64 or complex128 ring spectra.
        references: (k, r, m) ring spectra of the same dtype and device.
        mirror: whether to search the mirrored hand too.
        candidates: for how many references per particle, the best ones, the place is needed. The
            other references may come with place -1 and a less exact score, which is below that of
            the candidates. This saves time on a GPU. None means all references.

    Returns:
        score: (n, k) real.
        place: (n, k) int64, (shift * hands + hand) * a + angle; the first of equal ones. See
            `unravel_place`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return table_peaks(particles, ring_factors(references), mirror)


def table_peaks(
    particles: Tensor, factors: RingFactors, mirror: bool = True
) -> tuple[Tensor, Tensor]:
    """`correlation_peaks` in PyTorch, from references that `ring_factors` has prepared."""
    return best_hand(*hand_peaks(particles, factors, mirror, *_block(particles)))


def _block(particles: Tensor, copies: int = 1) -> tuple[int, int]:
    """How many entries of the table and how many particles to compute at a time.

    ``copies`` is how many arrays of the table's size are in memory at once.
    """
    # On a CPU one particle at a time: the block stays in the cache, and its shape, and so the
    # rounding, does not depend on the number of particles.
    if particles.device.type == "cpu":
        return CPU_BLOCK, 1
    return CUDA_BLOCK // copies, max(1, len(particles))


def _check_soft(particles: Tensor, references: Tensor, temperature: float, mirror: bool) -> None:
    _check(particles, references)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@operator(check=_check_soft, fake=_fake_scores, cuda=kernels.fused_logsumexp)
def correlation_logsumexp(
    particles: Tensor, references: Tensor, temperature: float, mirror: bool = True
) -> Tensor:
    """The soft maximum T log sum exp(c / T) of every (particle, reference) pair over all poses.

    It is differentiable. The weights exp(c / T) / sum exp(c / T) are those of expectation
    maximisation, so the gradient with respect to a reference is the weighted sum of the particles'
    spectra, turned and shifted to every pose. As T goes to 0 the result goes to the score of
    `correlation_peaks`. The table is not held in memory here either.

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
    factors = ring_factors(references)
    return logsumexp_of(particles, factors, temperature, mirror, *_block(particles, 8))


def _fake_gradients(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(spectra.new_empty(spectra.shape) for spectra in inputs[:2])


@operator(fake=_fake_gradients)
def correlation_logsumexp_backward(
    grad: Tensor, particles: Tensor, references: Tensor, temperature: float, mirror: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `correlation_logsumexp` with respect to particles and references.

    Args:
        grad: (n, k) gradient with respect to the operator's result.
        particles, references, temperature, mirror: the operator's arguments.
    """
    with torch.autocast(grad.device.type, enabled=False):  # matrix products in full precision
        factors, block = ring_factors(references), _block(particles, 8)
        return logsumexp_gradients(grad, particles, factors, temperature, mirror, *block)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    particles, references, ctx.temperature, ctx.mirror = inputs
    ctx.save_for_backward(particles, references)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    particles, references = ctx.saved_tensors
    found = correlation_logsumexp_backward(grad, particles, references, ctx.temperature, ctx.mirror)
    return *found, None, None


torch.library.register_autograd(
    "cryoalign::correlation_logsumexp", _backward, setup_context=_save_for_backward
)


def correlation_at(images: Tensor, references: Tensor, pose: Pose, rings: Rings) -> Tensor:
    """The score of particle i against reference i at pose i, differentiable in all of them.

    At the poses of the search grid the score equals the entry of `correlation_table`. Between them
    the rotation is interpolated by the Fourier series and the shift by bilinear sampling. At the
    pose that the operator chose, the gradient is therefore that of the table's maximum.

    Args:
        images: (n, h, w).
        references: (n, h, w), or (1, h, w) for one reference that all images share.
        pose: (n,), which takes the particle onto the reference.
        rings: the rings on which the images are compared.

    Returns:
        (n,) correlation coefficients.
    """
    polar = to_polar(images, rings, pose.shift.unsqueeze(1))
    x = normalised_spectra(polar, rings)[:, 0]  # (n, r, m)
    y = ring_spectra(references, rings)[:, 0]
    return turned_correlation(x, y, pose.angle, pose.mirror)


def turned_correlation(x: Tensor, y: Tensor, angle: Tensor, mirror: Tensor) -> Tensor:
    """Scores (n,) at any angle, not only at those of `correlation_table`.

    Args:
        x: (n, r, m) spectra of the particles.
        y: (n, r, m) or (1, r, m) spectra of the references.
        angle: (n,) by how much each particle is turned, degrees.
        mirror: (n,) bool, which particles are mirrored after the turn.
    """
    m = x.shape[-1]
    frequency = torch.arange(m, device=x.device)
    sign = 1 - 2 * (frequency % 2)
    hand = mirror[:, None, None]
    product = (x.conj() * torch.where(hand, sign * y.conj(), y)).sum(-2)  # (n, m)
    turn = torch.deg2rad(angle).to(x.real.dtype)[:, None] * frequency
    multiplicity = torch.full_like(turn[0], 2.0 / (2 * (m - 1)))
    multiplicity[0] = multiplicity[-1] = 1.0 / (2 * (m - 1))
    # irfft's real part: Re(z e^{i m phi}); the Nyquist frequency has a real part only.
    imaginary = product.imag * (frequency < m - 1)
    return (multiplicity * (product.real * turn.cos() - imaginary * turn.sin())).sum(-1)
