"""What speaks for a particle, and what against it.

A particle is judged by the class average of the *other* half-set, which has nothing of it: so the
noise of a particle cannot recommend it, as it does where each of few members is a good part of
the average. Two questions, asked without labels:

*Is there more than noise in it?* With x the particle, y the other half's average
moved onto it and N the noise's power on Fourier shells, z = <x, y>_N / |y|_N is standard normal
for noise. Its maximum over M poses and classes exceeds z with a probability of at most
M exp(-z^2 / 2) (Bonferroni), so z^2 / 2 - log M is *evidence*, in nats, against pure noise.

*Is what is left noise?* The residual's power on every shell, its cube root being close to normal
(Wilson & Hilferty 1931), is held against all particles' by median and MAD; the mean square, by its
cube root again, makes the *oddness*. Ice, carbon and neighbours are bright, but odd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked
from cryoalign.images.polar import Rings
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Found, Pose
from cryoalign.results.averages import TRUSTED, ClassSums, class_filters
from cryoalign.results.pose_errors import Curvature, covariance_on, curvature_of, shells_of
from cryoalign.runtime.processes import gather_over_ranks
from cryoalign.runtime.threads import map_in_order, workers_for

CHUNK = 64
SAMPLE = 2000  # particles that noise and its spread are measured on, at most
LEAST_EVIDENCE = math.log(20)  # nats: 1 in 20 noise images would show as much
FEW = 20  # particles of whom none can be called odd
ODD = 3.5  # robust deviations (Iglewicz & Hoaglin 1993)


class Scope(NamedTuple):
    """What poses were sought in.

    Attributes:
        mask: (size, size) of the classes.
        rings: the disc that poses were refined on.
        trials: how many poses and classes a particle was tried on (`trials_of`).
    """

    mask: Tensor
    rings: Rings
    trials: float


def trials_of(n_classes: int, max_shift: float, radius: float, mirror: bool) -> float:
    """Poses and classes that differ by a pixel or more at a radius (px)."""
    turns = max(1.0, 2 * math.pi * radius)
    return n_classes * (2 * max_shift + 1) ** 2 * turns * (1 + mirror)


def judge(
    particles: PreparedParticles, found: Found, sums: ClassSums, scope: Scope
) -> dict[str, Tensor]:
    """What there is to know of every usable particle, on every process.

    Returns:
        Columns of (n,) on the CPU: ``evidence`` against pure noise and ``oddness`` (see above);
        ``junk_score``, above zero where the one is below `LEAST_EVIDENCE` or the other above
        `ODD`, in nats; ``angle_sd`` (degrees), ``shift_x_sd`` and ``shift_y_sd`` (pixels of the
        input), standard deviations of the pose (`uncertainty.pose_covariance`).
    """
    references = held_out(sums, scope.mask)
    # The other half's average: see the top.
    other = found.label + len(sums.sizes) * (1 - particles.half)
    curvature = curvature_of(references, scope.rings)
    job = _Job(particles, found.pose, other, references, curvature, scope)
    few = torch.arange(0, len(particles), math.ceil(len(particles) / SAMPLE))
    sample = torch.cat([job.shells(part, particles.read(part)) for part in few.split(CHUNK)], 1)
    noise = _noise(sample)
    roots = _roots(sample, noise)
    centre = roots.median(0).values
    yardstick = _Yardstick(noise, centre, _deviation(roots, centre))

    def columns(members: Tensor) -> Tensor:
        images = particles.read(members)
        covariance = job.covariance(members, images)
        sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
        judged = yardstick.judge(job.shells(members, images), scope.trials)
        return torch.cat([judged, sd.double()], 1)  # (b, 5)

    made = [torch.zeros(0, 5, dtype=torch.float64, device=particles.device)]
    made += map_in_order(columns, particles.parts(), workers_for(particles.device))
    evidence, unlike, *sd = gather_over_ranks(torch.cat(made).cpu()).unbind(1)
    middle = unlike.median()
    oddness = (unlike - middle) / _deviation(unlike, middle)
    if len(unlike) < FEW:
        oddness = torch.zeros_like(oddness)
    # An average of few says as little against a particle as for it.
    half = particles.half
    judges = sums.count.cpu()[1 - half, found.label]
    evidence = torch.where(judges < TRUSTED, torch.nan, evidence)
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
    """(n,) nats, above zero for junk: what evidence lacks, or what oddness has too much.

    Where evidence is NaN nobody could say, and oddness alone counts. An oddness of z deviations
    is worth z^2 / 2, as the logarithm of a normal density.
    """
    odd = (oddness.clamp(min=0).square() - ODD**2) / 2
    return torch.maximum((LEAST_EVIDENCE - evidence).nan_to_num(nan=-math.inf), odd)


def held_out(sums: ClassSums, mask: Tensor) -> Tensor:
    """(2 k, size, size) averages of half 0, then of half 1, each weighted by what its own noise
    leaves (the FRC, Wiener's filter for a half) and masked."""
    whole = class_filters(sums.frc(mask), sums.count.amin(0) >= TRUSTED)
    half = whole / (2 - whole)  # 2 F / (1 + F) -> F
    return torch.cat([masked(filter_shells(each, half), mask) for each in sums.half_averages()])


@dataclass(frozen=True)
class _Job:
    """Particles and the averages they are held against."""

    particles: PreparedParticles
    pose: Pose
    other: Tensor  # (n,) which of the references
    references: Tensor  # (2 k, size, size)
    curvature: Curvature
    scope: Scope

    def shells(self, members: Tensor, images: Tensor) -> Tensor:
        """(3, b, shells) from shell 1 on: the residual's power per component; sums of the product
        of particle and reference, and of the reference's power."""
        size, device = images.shape[-1], images.device
        # The reference is moved, not the particle, whose noise interpolation would damp.
        back = self.pose[members].to(device).inverse()
        own = transform(self.references[self.other[members].to(device)], back)
        mask = transform(self.scope.mask.expand_as(images), back)
        mean = (images * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
        particle = (images - mean[:, None, None]) * mask
        shell, twice = shells_of(size, device)
        # float64: what follows must not show how many particles were looked at together.
        shell, twice = shell.clamp(max=size // 2), twice.double()
        count = twice.new_zeros(size // 2 + 1).index_add_(0, shell, twice)

        def by_shell(product: Tensor) -> Tensor:
            sums = twice.new_zeros(len(product), size // 2 + 1)
            return sums.index_add_(1, shell, product.flatten(1) * twice)

        x, y = (torch.fft.rfft2(each, norm="ortho") for each in (particle, own))
        xx, xy, yy = (by_shell((a * b.conj()).real) for a, b in ((x, x), (x, y), (y, y)))
        amplitude = xy.sum(1, keepdim=True) / yy.sum(1, keepdim=True).clamp(min=1e-20)
        left = xx - 2 * amplitude * xy + amplitude.square() * yy
        # As if the mask let all noise through; shell 0 is the mean, which the mask took.
        count = count * mask.square().mean((1, 2))[:, None].clamp(min=1e-6)
        return torch.stack([left.clamp(min=0) / count, xy, yy])[..., 1:]

    def covariance(self, members: Tensor, images: Tensor) -> Tensor:
        pose, other = self.pose[members].to(images.device), self.other[members].to(images.device)
        return covariance_on(images, self.references, self.curvature, other, pose, self.scope.rings)


@dataclass(frozen=True)
class _Yardstick:
    """What particles are measured by: (shells,) the noise's power, and centre and spread of the
    cube root of the residual's power over it."""

    noise: Tensor
    centre: Tensor
    spread: Tensor

    def judge(self, shells: Tensor, trials: float) -> Tensor:
        """(b, 2) evidence, and how unlike the others a residual is, of `_Job.shells`."""
        cross, power = ((each / self.noise).sum(1) for each in shells[1:])
        z = cross / power.clamp(min=1e-20).sqrt()
        deviation = (_roots(shells, self.noise) - self.centre) / self.spread
        unlike = deviation.square().mean(1) ** (1 / 3)
        return torch.stack([z.clamp(min=0).square() / 2 - math.log(trials), unlike], 1)


def _noise(shells: Tensor) -> Tensor:
    """(shells,) power of the noise: the median of many residuals'."""
    median = shells[0].median(0).values
    return median.clamp(min=1e-6 * float(median.max()) + 1e-20)


def _roots(shells: Tensor, noise: Tensor) -> Tensor:
    return (shells[0] / noise) ** (1 / 3)


def _deviation(values: Tensor, centre: Tensor) -> Tensor:
    """Standard deviation over the first axis by the median absolute deviation, at least a trace."""
    return (1.4826 * (values - centre).abs().median(0).values).clamp(min=1e-6)
