"""A search in two stages: all hypotheses at low resolution, then refinement of the best few.

An exhaustive search computes a ring product for every trial shift at full resolution and for all
angles. Most of these hypotheses (a reference, a hand and a pose) are far from the best. So here
every particle is first compared with all references at half the resolution, where shifts 2 px
apart and half the angles lose little (at more than half, where references have too much detail:
`coarse_factor`). The best few (reference, hand) pairs are refined at that resolution, from the
poses of the coarse grid. The one or two that remain are refined at full resolution, and the scores
there decide. The result of a refinement does not depend on the grid that it starts from, as long
as the start lies on the same peak of the score.

The hypotheses kept at each stage are those whose score is within a margin of the best. Most of the
noise is common to two hypotheses for one particle, and the coarse grid lowers a score by some
tenths of the margin at most. ``python -m bench adaptive-accuracy`` measures what is lost.

The compiled library searches all angles of the coarse grid. PyTorch searches half of them first,
and then all angles of the pairs that are best there.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import fourier_shrink, radial_mean, rfft_weights
from cryoalign.images.geometry import radius_grid, sample_at, sampling_places
from cryoalign.images.polar import (
    Rings,
    angular_samples,
    normalised_spectra,
    reference_spectra,
    shifted_rings,
)
from cryoalign.images.templates import templates_of
from cryoalign.operators.kernels import cpu
from cryoalign.operators.kernels.images import KERNEL_ANGLES
from cryoalign.operators.ring_products import RingFactors, hand_peaks, pair_peaks, ring_factors
from cryoalign.pose import Pose
from cryoalign.search.refine import grid_pose, refine_on

# Least number of rings at low resolution; with fewer, views are hard to distinguish.
LEAST_RINGS = 16
# Image pixels per coarse pixel that are tried, coarsest first, and the share of the score of the
# exhaustive grid that a coarse grid must keep. At SNR 0.005, with white references, a grid that
# kept 0.75 lost 16 of the 463 poses found exhaustively, 0.65 lost 49 of 443 and 0.52 lost 166 of
# 439. Molecules keep 0.86 to 0.95.
FACTORS, LEAST_KEPT = (2.0, 1.5, 1.25), 0.85
# Larger boxes are searched on still fewer pixels, if so many rings remain.
LARGE_FACTORS, LARGE_RINGS = (4.0, 3.0), 40
# Share of the power that must exceed the noise, measured at the highest frequencies; with less,
# the references' structure cannot be located. White noise has 0 +- 0.03, averages of a single
# particle at SNR 0.02 have 0.35, and molecules more.
LEAST_STRUCTURE = 0.1
# Hypotheses that are refined at low resolution, and those of them that are refined at full
# resolution: how many at most, and how far below the best score, in standard deviations of a score
# without signal, 1 / sqrt(pixels).
COARSE_KEPT, COARSE_MARGIN = 8, 1.5
# The same for PyTorch's search on half the angles, which comes before all angles of the best. At
# SNR 0.01, with averages of 50 particles as references, 91.5 and 77.5 % of the particles of two
# sets have the right class and hand, 91.2 and 78.3 % if all angles are searched; at SNR 0.02 and
# more the choices are the same. On a quarter of the angles 90.6 % of the first set are right.
SCREENED, SCREEN_MARGIN = 16, 2.5
# Share of the score that half the angles must keep on average. Molecules keep 0.99, averages of 50
# particles at SNR 0.01 0.96, white noise up to 0.3 cycles/px 0.90: there one choice in 100 is lost.
HALF_KEPT = 0.95
FINE_KEPT, FINE_MARGIN = 2, 1.0
COARSE_STEPS = 1  # Gauss-Newton steps at low resolution
BATCH = 1024  # particles at a time, in all stages together
# In PyTorch's coarse search: particles at a time that share sampling weights, and the most bytes
# of their spectra; entries of the correlation table at a time, and the particles that share them.
CHUNK, CHUNK_BYTES = 32, 2**25
BLOCK, TOGETHER = 2**20, 32


class CoarseReferences(NamedTuple):
    """References at low resolution, with the grid of poses that is searched there.

    Attributes:
        factor: image pixels per coarse pixel.
        size: box, coarse pixels.
        templates: (k, 3, size, size) `templates_of` the references at low resolution.
        spectra: (k, r, m) their ring spectra.
        factors: `ring_factors` of the spectra.
        half_factors: `ring_factors` of half the frequencies, for half the angles; None where these
            lose too much of the score, and on a GPU.
        rings: in coarse pixels.
        shifts: (s, 2) trial shifts, coarse pixels.
        places: `sampling_places` of the rings at all trial shifts.
        mirror: whether mirrored particles are tried.
    """

    factor: float
    size: int
    templates: Tensor
    spectra: Tensor
    factors: RingFactors
    half_factors: RingFactors | None
    rings: Rings
    shifts: Tensor
    places: Tensor
    mirror: bool


def prepare_coarse(
    references: Tensor, rings: Rings, max_shift: float, mirror: bool
) -> CoarseReferences:
    """References (k, size, size) made ready for the coarse search.

    Args:
        references: at full resolution.
        rings: at full resolution.
        max_shift: largest trial shift along x and along y, image pixels.
        mirror: whether to try mirrored particles.
    """
    size = references.shape[-1]
    small = math.ceil(size / coarse_factor(references, rings))
    factor = size / small
    last = max(2, math.floor(rings.last_ring / factor))
    first = min(last, max(1, round(rings.first_ring / factor)))
    step = max(1, round(rings.ring_step / factor))
    on_gpu = references.device.type == "cuda"
    low = Rings(first, last, step, angles=_angles(last, on_gpu))
    reduced = fourier_shrink(references, small)
    spectra = reference_spectra(reduced, low)
    shifts = coarse_shifts(max_shift / factor).to(references)
    places = sampling_places(shifted_rings(reduced, low, shifts), small, small)
    return CoarseReferences(
        factor, small, templates_of(reduced), spectra, ring_factors(spectra),
        None if on_gpu else _half_factors(spectra), low, shifts, places, mirror,
    )  # fmt: skip


def _half_factors(spectra: Tensor) -> RingFactors | None:
    """`ring_factors` of the lower half of the frequencies of references (k, r, m), with which
    scores at half the angles are those at all angles; None if these lose too much."""
    count = spectra.shape[-1] // 2  # frequencies that are kept, a quarter of the number of angles
    power = torch.view_as_real(spectra).square().sum((0, 1, 3))
    power = power * rfft_weights(4 * count, power)
    # The best angle is off by up to half a step, which damps frequency m by sinc(m / angles).
    m = torch.arange(count, device=spectra.device)
    kept = (power[:count] * torch.sinc(m / (2 * count))).sum()
    if not bool(kept >= HALF_KEPT * power.sum()):
        return None
    half = spectra[..., : count + 1] / 2  # irfft divides by the number of angles
    half[..., -1] = 0
    return ring_factors(half)


def coarse_factor(references: Tensor, rings: Rings) -> float:
    """The most image pixels per coarse pixel that references (k, size, size) allow, 1 to 4."""
    coarsest = rings.last_ring / LEAST_RINGS
    if coarsest <= 1:
        return 1.0
    # The radial mean of all references does not distinguish two hypotheses.
    common = radial_mean(references.mean(0))
    ring = radius_grid(references.shape[-1], references.device).round().long()
    spectrum = torch.fft.fft2(references - common[ring.clamp(max=len(common) - 1)])
    power = spectrum.abs().square().mean(0)  # (size, size)
    # The averages' noise has power at all frequencies: that of the highest, where there is hardly
    # any structure, is subtracted everywhere.
    kx = torch.fft.fftfreq(len(power), device=power.device)
    structure = power - power[(torch.hypot(kx, kx[:, None]) - 0.45).abs() < 0.05].mean()
    most = _kept_power(structure, 1.0)
    if most < LEAST_STRUCTURE * _kept_power(power, 1.0):
        return 1.0
    factors = [each for each in LARGE_FACTORS if rings.last_ring / each >= LARGE_RINGS]
    factors += [min(each, coarsest) for each in FACTORS]
    return next(
        (each for each in factors if _kept_power(structure, each) >= LEAST_KEPT * most), 1.0
    )


def _kept_power(power: Tensor, factor: float) -> float:
    """The part of power (size, size) that remains in the scores of a grid of ``factor`` pixels.

    Shifts that are off by up to half a grid step damp by sinc(k), linear sampling by sinc(k)^2.
    """
    k = factor * torch.fft.fftfreq(len(power), device=power.device)
    kept = torch.sinc(k) ** 3 * (k.abs() < 0.5)
    return float((power * kept * kept[:, None]).sum())


def coarse_shifts(reach: float) -> Tensor:
    """(s, 2) shifts, so dense that one is within half a pixel, along each axis, of any shift up to
    ``reach`` pixels."""
    count = max(1, math.ceil(2 * reach - 1e-6))
    axis = (torch.arange(count) + 0.5) * (2 * reach / count) - reach
    return torch.cartesian_prod(axis, axis)


def adaptive_poses(
    images: Tensor, templates: Tensor, coarse: CoarseReferences, rings: Rings
) -> tuple[Tensor, Pose, Tensor]:
    """Best reference, pose and score of every particle.

    Args:
        images: (n, size, size), background zero.
        templates: (k, 3, size, size) `templates_of` the references.
        coarse: `prepare_coarse` of the references.
        rings: at full resolution.

    Returns:
        label (n,), pose (n,), score (n,) as `refine` computes it.
    """
    found = [_batch_poses(part, templates, coarse, rings) for part in images.split(BATCH)]
    labels, poses, scores = zip(*found, strict=True)
    return torch.cat(labels), Pose.cat(poses), torch.cat(scores)


class _Hypotheses(NamedTuple):
    """The h hypotheses that are left; those of one particle follow each other."""

    particle: Tensor  # (h,) row of the particle
    label: Tensor  # (h,) reference
    pose: Pose  # (h,) shifts in pixels of the stage's images
    score: Tensor  # (h,)


def _batch_poses(
    images: Tensor, templates: Tensor, coarse: CoarseReferences, rings: Rings
) -> tuple[Tensor, Pose, Tensor]:
    n = len(images)
    small = fourier_shrink(images, coarse.size)
    deviation = 1 / (math.sqrt(math.pi) * coarse.rings.last_ring)
    low = _coarse_hypotheses(small, coarse, deviation)
    low = _refined(small, coarse.templates, low, coarse.rings, COARSE_STEPS)
    low = _best(low, low.score, n, FINE_KEPT, FINE_MARGIN * deviation)
    start = low._replace(pose=_scaled(low.pose, coarse.factor))
    fine = _refined(images, templates, start, rings, fine_steps(coarse.factor))
    # At full resolution, averages of few particles fit a particle's noise better the noisier they
    # are. The sum of both resolutions' scores chooses between classes more reliably.
    last = _best(fine, fine.score + low.score, n, 1, 0.0)
    return last.label, last.pose, last.score


def coarse_poses(images: Tensor, coarse: CoarseReferences) -> tuple[Tensor, Pose]:
    """The coarse search's score (n, k) and pose (n, k), in image pixels, for every pair of a
    particle (n, size, size) and a reference."""
    score, place = _peaks(fourier_shrink(images, coarse.size), coarse)
    score, hand = score.max(2)
    place = place.gather(2, hand.unsqueeze(2)).squeeze(2)
    pose = grid_pose(place, coarse.shifts, coarse.rings, coarse.mirror)
    return score, _scaled(pose, coarse.factor)


def refine_coarse(
    images: Tensor,
    templates: Tensor,
    coarse: CoarseReferences,
    rings: Rings,
    label: Tensor,
    pose: Pose,
) -> tuple[Pose, Tensor]:
    """Poses (n,) of `coarse_poses` on chosen references (n,), refined at both resolutions.

    Returns:
        Poses (n,) and scores (n,) as `refine` gives them.
    """
    start = Pose(pose.angle, pose.shift / coarse.factor, pose.mirror)
    small = fourier_shrink(images, coarse.size)
    low, _ = refine_on(small, coarse.templates, label, start, coarse.rings, COARSE_STEPS)
    start = _scaled(low, coarse.factor)
    return refine_on(images, templates, label, start, rings, fine_steps(coarse.factor))


def fine_steps(factor: float) -> int:
    """Gauss-Newton steps at full resolution, after one of ``factor`` image pixels per pixel."""
    return 1 if factor <= 2 else 2


def _scaled(pose: Pose, factor: float) -> Pose:
    return Pose(pose.angle, pose.shift * factor, pose.mirror)


def _coarse_hypotheses(small: Tensor, coarse: CoarseReferences, deviation: float) -> _Hypotheses:
    """The best (reference, hand) pairs of every particle, at most `COARSE_KEPT`."""
    margin = COARSE_MARGIN * deviation
    found = cpu.image_peaks(small, coarse.spectra, coarse.rings, coarse.shifts, coarse.mirror)
    if found is None and coarse.half_factors is not None:
        these = _screened(small, coarse, coarse.half_factors, SCREEN_MARGIN * deviation)
        return _best(these, these.score, len(small), COARSE_KEPT, margin)
    found = _peaks_in_pytorch(small, coarse) if found is None else found
    particle, which, place, score = _near_best(*found, COARSE_KEPT, margin)
    pose = grid_pose(place, coarse.shifts, coarse.rings, coarse.mirror)
    return _Hypotheses(particle, which // (1 + coarse.mirror), pose, score)


def _screened(
    small: Tensor, coarse: CoarseReferences, half_factors: RingFactors, margin: float
) -> _Hypotheses:
    """The best (reference, hand) pairs on half the angles, at most `SCREENED` of every particle;
    angles and scores are then those on all angles at the pair's best shift."""
    a, hands = coarse.rings.n_angles, 1 + coarse.mirror
    parts, done = [], 0
    for spectra in _spectra(small, coarse):
        half = spectra[..., : a // 4 + 1]
        peaks = hand_peaks(half, half_factors, coarse.mirror, BLOCK, TOGETHER)
        particle, which, place, _ = _near_best(*peaks, SCREENED, margin)
        label, hand, shift = which // hands, which % hands, place // (hands * a // 2)
        x = spectra[particle, shift]
        score, angle = pair_peaks(x, coarse.spectra[label], hand.bool())
        place = (shift * hands + hand) * a + angle
        parts.append((particle + done, label, place, score))
        done += len(spectra)
    particle, label, place, score = (torch.cat(each) for each in zip(*parts, strict=True))
    pose = grid_pose(place, coarse.shifts, coarse.rings, coarse.mirror)
    return _Hypotheses(particle, label, pose, score)


def _near_best(
    score: Tensor, place: Tensor, most: int, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``most`` pairs of every particle, within ``margin`` of its best one.

    Args:
        score, place: (n, k, hands).

    Returns:
        Particle, index of the pair, place and score, (h,) each; those of a particle follow each
        other.
    """
    best, which = score.flatten(1).topk(min(most, score[0].numel()), 1)
    near = best >= best[:, :1] - margin
    near[:, 0] = True  # also where scores are NaN
    particle, rank = near.nonzero().unbind(1)
    which = which[particle, rank]
    return particle, which, place.flatten(1)[particle, which], best[particle, rank]


def _peaks(small: Tensor, coarse: CoarseReferences) -> tuple[Tensor, Tensor]:
    """Best score and place of every particle, reference and hand, (n, k, hands) each."""
    found = cpu.image_peaks(small, coarse.spectra, coarse.rings, coarse.shifts, coarse.mirror)
    return _peaks_in_pytorch(small, coarse) if found is None else found


def _peaks_in_pytorch(small: Tensor, coarse: CoarseReferences) -> tuple[Tensor, Tensor]:
    peaks = [
        hand_peaks(spectra, coarse.factors, coarse.mirror, BLOCK, TOGETHER)
        for spectra in _spectra(small, coarse)
    ]
    score, place = (torch.cat(parts) for parts in zip(*peaks, strict=True))
    return score, place


def _spectra(small: Tensor, coarse: CoarseReferences) -> Iterator[Tensor]:
    """Ring spectra (n', s, r, m) of some particles after the other."""
    each = 8 * len(coarse.shifts) * len(coarse.rings.radii()) * coarse.rings.n_angles  # bytes
    for part in small.split(max(1, min(CHUNK, CHUNK_BYTES // each))):
        yield normalised_spectra(sample_at(part, coarse.places), coarse.rings)


def _refined(
    images: Tensor, templates: Tensor, these: _Hypotheses, rings: Rings, steps: int
) -> _Hypotheses:
    # Every particle has at least one hypothesis: as many as particles means one for each.
    alone = len(these.particle) == len(images)
    chosen = images if alone else images.index_select(0, these.particle)
    pose, score = refine_on(chosen, templates, these.label, these.pose, rings, steps)
    return these._replace(pose=pose, score=score)


def _best(these: _Hypotheses, merit: Tensor, n: int, most: int, margin: float) -> _Hypotheses:
    """The best ``most`` of each of n particles by ``merit`` (h,), within ``margin`` of its best."""
    order = merit.argsort(descending=True, stable=True)
    order = order[these.particle[order].argsort(stable=True)]  # by particle, best first
    particle, merit = these.particle[order], merit[order]
    first = torch.searchsorted(particle, torch.arange(n, device=particle.device))
    rank = torch.arange(len(particle), device=particle.device) - first[particle]
    near = merit >= merit[first[particle]] - margin
    kept = order[(rank == 0) | ((rank < most) & near)]
    return _Hypotheses(these.particle[kept], these.label[kept], these.pose[kept], these.score[kept])


def _angles(last_ring: int, on_gpu: bool = False) -> int:
    """An even number of angles with a fast FFT, at most 1 px apart on the last ring and at most 3
    degrees. On a GPU that of its kernels, as long as it is enough for the last ring."""
    if on_gpu and angular_samples(last_ring) == KERNEL_ANGLES:
        return KERNEL_ANGLES
    needed = max(120, math.ceil(2 * math.pi * last_ring))
    return min(16 * 2**i * f for i in range(10) for f in (1, 3, 5) if 16 * 2**i * f >= needed)
