"""Two numbers for every particle that tell junk: its evidence and its oddness.

Every particle is compared with the class average of the *other* half-set, which does not contain
it. Its own average would correlate with the particle's noise where a class has few members.

*Evidence* that the image is more than noise: with x the particle, y the other half's average moved
onto it and N the noise's power on Fourier shells, z = <x, y>_N / |y|_N is standard normal for an
image of pure noise. Its maximum over M poses and classes exceeds z with a probability of at most
M exp(-z^2 / 2) (Bonferroni). The evidence is z^2 / 2 - log M, in nats.

*Oddness* of the residual, what is left of the particle without its class average: the cube root of
its power on every shell is close to normally distributed (Wilson & Hilferty 1931), and is compared
with all particles' by median and median absolute deviation. So is the mean square of these
deviations over the shells, again by its cube root: the oddness is how many robust standard
deviations it lies above the median. Ice, carbon and neighbouring particles have evidence, because
they are bright, but they are odd.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells, rfft_weights, shell_index, shell_sums
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked
from cryoalign.images.polar import Rings
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Found, Pose
from cryoalign.results.averages import TRUSTED, ClassSums, class_filters
from cryoalign.results.pose_errors import CUDA_CHUNK, Curvature, covariance_on, curvature_of
from cryoalign.runtime.processes import gather_over_ranks
from cryoalign.runtime.threads import map_in_order, workers_for

JUDGE = "judge"  # name of this work for the progress
CHUNK = 64  # particles at a time, while noise is measured
SAMPLE = 2000  # particles that noise and its spread are measured on, at most
LEAST_EVIDENCE = math.log(20)  # nats; 1 in 20 images of pure noise has as much
FEW = 20  # with fewer particles no oddness is computed
ODD = 3.5  # oddness of an outlier, in robust standard deviations (Iglewicz & Hoaglin 1993)


class Scope(NamedTuple):
    """What poses were searched with.

    Attributes:
        mask: (size, size) of the class averages.
        rings: the disc that poses were refined on.
        trials: number of poses and classes that each particle was compared with (`trials_of`).
    """

    mask: Tensor
    rings: Rings
    trials: float


def trials_of(n_classes: int, max_shift: float, radius: float, mirror: bool) -> float:
    """Number of poses and classes that differ by a pixel or more at a radius (px)."""
    turns = max(1.0, 2 * math.pi * radius)
    return n_classes * (2 * max_shift + 1) ** 2 * turns * (1 + mirror)


def judge(
    particles: PreparedParticles, found: Found, sums: ClassSums, scope: Scope
) -> dict[str, Tensor]:
    """Quality of every usable particle, on every process.

    Returns:
        Columns (n,) on the CPU: ``evidence`` and ``oddness`` (see above); ``junk_score`` in nats,
        above zero where evidence is below `LEAST_EVIDENCE` or oddness above `ODD`; ``angle_sd``
        (degrees), ``shift_x_sd`` and ``shift_y_sd`` (pixels of the input), the standard deviations
        of the pose (`pose_errors.pose_covariance`).
    """
    references = held_out(sums, scope.mask)
    half = particles.half
    other = found.label + len(sums.sizes) * (1 - half)  # the average of the other half
    curvature, device = curvature_of(references, scope.rings), particles.device
    # On the device as a whole: a copy for each batch would wait for the batch before.
    comparison = _Comparison(found.pose.to(device), other.to(device), references, curvature, scope)
    # On the CPU, because PyTorch has no deterministic median on a GPU.
    measured = _typical_residual(_sample_shells(particles, comparison).cpu())
    typical = _TypicalResidual(*(each.to(device) for each in measured))

    def columns(members: Tensor) -> Tensor:
        images = particles.read(members)
        first, size = int(members[0]), images.shape[-1]
        # A GPU's batches are much larger than a CPU's.
        chunk = len(images) if device.type == "cpu" else max(1, CUDA_CHUNK // size**2)
        made = []
        for start in range(0, len(images), chunk):
            some = images[start : start + chunk]
            # The particles of a batch follow each other.
            part = slice(first + start, first + start + len(some))
            sd = comparison.covariance(part, some).diagonal(dim1=1, dim2=2).sqrt()
            shells = comparison.shells(part, some)
            z = _z_score(shells, typical)
            evidence = z.clamp(min=0).square() / 2 - math.log(scope.trials)
            unlike = _unlikeness(shells, typical)
            made.append(torch.cat([torch.stack([evidence, unlike], 1), sd], 1))
        return torch.cat(made)

    made = [torch.zeros(0, 5, dtype=torch.float64, device=particles.device)]
    made += map_in_order(columns, particles.parts(JUDGE), workers_for(particles.device))
    evidence, unlike, *sd = gather_over_ranks(torch.cat(made).cpu()).unbind(1)
    oddness = torch.zeros_like(unlike)
    if len(unlike) >= FEW:
        middle = unlike.median()
        oddness = (unlike - middle) / _deviation(unlike, middle)
    # From an average of few members no evidence follows, for a particle or against it.
    members = sums.count.cpu()[1 - half, found.label]
    evidence = torch.where(members < TRUSTED, torch.nan, evidence)
    judged = {
        "evidence": evidence,
        "oddness": oddness,
        "junk_score": junk_score(evidence, oddness),
        "angle_sd": sd[0],
        "shift_x_sd": sd[1] * particles.scale,
        "shift_y_sd": sd[2] * particles.scale,
    }
    return {name: column.float() for name, column in judged.items()}


def junk_score(evidence: Tensor, oddness: Tensor) -> Tensor:
    """(n,) nats, above zero for junk: the evidence that is missing, or the excess of oddness.

    Where evidence is NaN (unknown), oddness alone counts. An oddness of z standard deviations
    counts z^2 / 2 nats, as in the logarithm of a normal density.
    """
    odd = (oddness.clamp(min=0).square() - ODD**2) / 2
    return torch.maximum((LEAST_EVIDENCE - evidence).nan_to_num(nan=-math.inf), odd)


def held_out(sums: ClassSums, mask: Tensor) -> Tensor:
    """(2 k, size, size) averages of half 0, then of half 1, filtered by the FRC (the Wiener filter
    of a half average) and masked."""
    whole = class_filters(sums.frc(mask), sums.count.amin(0) >= TRUSTED)
    half = whole / (2 - whole)  # 2 F / (1 + F) -> F
    return torch.cat([masked(filter_shells(each, half), mask) for each in sums.half_averages()])


@dataclass(frozen=True)
class _Comparison:
    """Poses of particles and the averages that they are compared with, on their device."""

    pose: Pose
    other: Tensor  # (n,) index of each particle's reference
    references: Tensor  # (2 k, size, size)
    curvature: Curvature
    scope: Scope

    def shells(self, members: Tensor | slice, images: Tensor) -> Tensor:
        """Products of members (b,) with their references, on the shells from 1 on.

        Returns:
            (3, b, shells) float64: the residual's power per component; the sum of the product of
            particle and reference; the sum of the reference's power.
        """
        size, device = images.shape[-1], images.device
        # The reference is moved, because interpolation would damp the particle's noise.
        back = self.pose[members].inverse()
        own = transform(self.references[self.other[members]], back)
        mask = transform(self.scope.mask.expand_as(images), back)
        mean = (images * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
        particle = (images - mean[:, None, None]) * mask
        shell = shell_index(size, device)
        # float64, so that results do not depend on how many particles are computed together.
        twice = rfft_weights(size, mean.double()).expand(shell.shape)
        x, y = (torch.fft.rfft2(each, norm="ortho") for each in (particle, own))
        xx, xy, yy = (
            shell_sums((a * b.conj()).real * twice, shell, size // 2 + 1)
            for a, b in ((x, x), (x, y), (y, y))
        )
        count = shell_sums(twice, shell, size // 2 + 1)
        amplitude = xy.sum(1, keepdim=True) / yy.sum(1, keepdim=True).clamp(min=1e-20)
        left = xx - 2 * amplitude * xy + amplitude.square() * yy
        # Corrected for the noise that the mask removes. Shell 0 is the mean, which was subtracted.
        count = count * mask.square().mean((1, 2))[:, None].clamp(min=1e-6)
        return torch.stack([left.clamp(min=0) / count, xy, yy])[..., 1:]

    def covariance(self, members: Tensor | slice, images: Tensor) -> Tensor:
        """(b, 3, 3) of the poses of members (b,), from their images."""
        pose, other = self.pose[members], self.other[members]
        return covariance_on(images, self.references, self.curvature, other, pose, self.scope.rings)


def _sample_shells(particles: PreparedParticles, comparison: _Comparison) -> Tensor:
    """(3, b, shells) `_Comparison.shells` of at most `SAMPLE` particles, on every process."""
    step = math.ceil(len(particles) / SAMPLE)
    # Not `parts`, which would read every batch ahead.
    parts = torch.arange(len(particles))[particles.own].split(particles.batch_size)
    some = [few for part in parts for few in part[part % step == 0].split(CHUNK)]

    def shells(members: Tensor) -> Tensor:
        there = members.to(particles.device)
        return comparison.shells(there, particles.read(members)).transpose(0, 1)

    made = [torch.zeros(0, 3, particles.size // 2, dtype=torch.float64, device=particles.device)]
    made += map_in_order(shells, filter(len, some), workers_for(particles.device))
    return gather_over_ranks(torch.cat(made)).transpose(0, 1)


class _TypicalResidual(NamedTuple):
    """(shells,) the noise's power; centre and spread of `_roots` over many particles."""

    noise: Tensor
    centre: Tensor
    spread: Tensor


def _typical_residual(shells: Tensor) -> _TypicalResidual:
    """Of `_Comparison.shells` of many particles; the noise is the median of the residuals."""
    median = shells[0].median(0).values
    noise = median.clamp(min=1e-6 * float(median.max()) + 1e-20)
    roots = _roots(shells, noise)
    centre = roots.median(0).values
    return _TypicalResidual(noise, centre, _deviation(roots, centre))


def _z_score(shells: Tensor, typical: _TypicalResidual) -> Tensor:
    """(b,) standard normal for images of pure noise; see the top."""
    cross, power = ((each / typical.noise).sum(1) for each in shells[1:])
    return cross / power.clamp(min=1e-20).sqrt()


def _unlikeness(shells: Tensor, typical: _TypicalResidual) -> Tensor:
    """(b,) how far residuals are from the typical one; its cube root is close to normal."""
    deviation = (_roots(shells, typical.noise) - typical.centre) / typical.spread
    return deviation.square().mean(1) ** (1 / 3)


def _roots(shells: Tensor, noise: Tensor) -> Tensor:
    """(b, shells) cube roots of the residuals' power relative to the noise."""
    return (shells[0] / noise) ** (1 / 3)


def _deviation(values: Tensor, centre: Tensor) -> Tensor:
    """Standard deviation over the first axis from the median absolute deviation, at least 1e-6."""
    return (1.4826 * (values - centre).abs().median(0).values).clamp(min=1e-6)
