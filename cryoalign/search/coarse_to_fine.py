"""Search less: a coarse screen of all hypotheses, then least squares for the few that are left.

An exhaustive search costs a ring product for every trial shift, full resolution and all angles.
Most of that only tells hypotheses apart that are far from the best. So here every particle is first
*screened* at half the resolution, where shifts 2 px apart and half the angles lose little (finer,
where references have too much beyond: `screen_factor`); the best few (reference, hand) of the
screen are *refined* there from where the screen saw them; and the one or two left are refined on
the images themselves, whose scores decide. What refinement reaches does not depend on the grid that
it starts from, as long as the start lies on the peak.

The hypotheses that are kept at each stage are those within `MARGIN` deviations of the best: between
two hypotheses for one particle most of the noise is common, and what the coarse grid takes from a
score is some tenths of it at most. ``python -m bench adaptive`` measures what is lost.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import frequency_grid, radial_mean
from cryoalign.images.geometry import radius_grid, sample_at, sampling_places
from cryoalign.images.polar import Rings, normalised_spectra, reference_spectra, shifted_rings
from cryoalign.images.templates import templates_of
from cryoalign.operators.correlation import unravel_place
from cryoalign.operators.kernels import cpu
from cryoalign.operators.ring_products import RingFactors, hand_peaks, ring_factors
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.refine import refine_on

# Rings that a screen needs at least; fewer would not tell views apart.
LEAST_RINGS = 16
# Pixels to one of a screen's, coarsest first, and what it must see, as a share of what the
# exhaustive grid does. At SNR 0.005 a screen that saw 0.75 of white references lost 16 of the 463
# poses found exhaustively, 0.65 lost 49 of 443, 0.52 lost 166 of 439. Molecules have 0.86 to 0.95.
FACTORS, SEEN = (2.0, 1.5, 1.25), 0.85
# Of the power, what must be more than the last frequencies' to tell where structure is. White noise
# has 0 +- 0.03, averages of a single particle at SNR 0.02 have 0.35 and molecules more.
LEAST_STRUCTURE = 0.1
# Hypotheses that are refined at low resolution, and of those at full resolution: how many at most,
# and how far below the best, in deviations of a score without signal, 1 / sqrt(pixels).
SCREENED, SCREEN_MARGIN = 8, 1.5
FINAL, FINAL_MARGIN = 2, 1.0
LOW_STEPS, FINE_STEPS = 1, 1
# Particles at a time: in all, and in the screen, where they share sampling weights.
BATCH, CHUNK = 1024, 32
ROOM = 2**25  # bytes of the spectra of a chunk, at most
# Entries of the screen's correlation table at a time, and particles that share them.
BLOCK, TOGETHER = 2**20, 32


class Screen(NamedTuple):
    """References and grid at low resolution.

    Attributes:
        factor: pixels of the images to one of the screen.
        size: box in the screen's pixels.
        templates: `refine.templates_of` the low-passed and down-sampled references.
        spectra: (k, r, m) their ring spectra; factors: of these.
        rings: in the screen's pixels.
        shifts: (s, 2) trial shifts, in the screen's pixels.
        places: `sampling_places` of the rings about all of them.
        mirror: whether mirrored particles are tried.
    """

    factor: float
    size: int
    templates: Tensor
    spectra: Tensor
    factors: RingFactors
    rings: Rings
    shifts: Tensor
    places: Tensor
    mirror: bool


def prepare_screen(references: Tensor, rings: Rings, max_shift: float, mirror: bool) -> Screen:
    """The screen of references (k, size, size)."""
    size = references.shape[-1]
    small = math.ceil(size / screen_factor(references, rings))
    factor = size / small
    last = max(2, math.floor(rings.last_ring / factor))
    first = min(last, max(1, round(rings.first_ring / factor)))
    step = max(1, round(rings.ring_step / factor))
    low = Rings(first, last, step, angles=_angles(last))
    reduced = reduce(references, small)
    spectra = reference_spectra(reduced, low)
    shifts = coarse_shifts(max_shift / factor).to(references)
    places = sampling_places(shifted_rings(reduced, low, shifts), small, small)
    return Screen(
        factor, small, templates_of(reduced), spectra, ring_factors(spectra), low, shifts, places,
        mirror,
    )  # fmt: skip


def screen_factor(references: Tensor, rings: Rings) -> float:
    """How many pixels of references (k, size, size) one of their screen may be."""
    coarsest = rings.last_ring / LEAST_RINGS
    if coarsest <= 1:
        return 1.0
    # What is round and common to all tells no two hypotheses apart.
    common = radial_mean(references.mean(0))
    ring = radius_grid(references.shape[-1], references.device).round().long()
    spectrum = torch.fft.fft2(references - common[ring.clamp(max=len(common) - 1)])
    power = spectrum.abs().square().mean(0)  # (size, size)
    # Noise of averages is at all frequencies: by how much tell the last, where structure is rare.
    kx = torch.fft.fftfreq(len(power), device=power.device)
    structure = power - power[(torch.hypot(kx, kx[:, None]) - 0.45).abs() < 0.05].mean()
    most = _seen(structure, 1.0)
    if most < LEAST_STRUCTURE * _seen(power, 1.0):
        return 1.0  # as far as can be told, structure is everywhere
    factors = (min(factor, coarsest) for factor in FACTORS)
    return next((each for each in factors if _seen(structure, each) >= SEEN * most), 1.0)


def _seen(power: Tensor, factor: float) -> float:
    """What power (size, size) by frequency comes to in scores of a grid of ``factor`` pixels:
    shifts are off by up to half of one, sinc(k), and sampling is linear, sinc(k)^2."""
    k = factor * torch.fft.fftfreq(len(power), device=power.device)
    kept = torch.sinc(k) ** 3 * (k.abs() < 0.5)
    return float((power * kept * kept[:, None]).sum())


def coarse_shifts(reach: float) -> Tensor:
    """(s, 2) shifts of which one lies within half a pixel, along each axis, of any within
    ``reach``."""
    count = max(1, math.ceil(2 * reach - 1e-6))
    axis = (torch.arange(count) + 0.5) * (2 * reach / count) - reach
    return torch.cartesian_prod(axis, axis)


def reduce(images: Tensor, size: int) -> Tensor:
    """Images (n, h, w), square, cropped in Fourier space to ``size``; the centre stays the centre.

    As `filters.fourier_resize` but for the last frequency of an even size, which is left out:
    two transforms and nothing else.
    """
    old = images.shape[-1]
    if size == old:
        return images
    keep = (size - 1) // 2  # frequencies -keep ... keep
    spectrum = torch.fft.rfft2(images)[..., : keep + 1]
    kx, ky = frequency_grid(old, images.device)
    # The centre goes to pixel 0 and from there to the new one's.
    centre = old // 2 / old - size // 2 / size
    kx, ky = kx[:, : keep + 1] * old, ky * old
    turn = torch.polar(torch.ones_like(kx + ky), 2 * math.pi * centre * (kx + ky))
    turn = (turn * (size / old) ** 2).to(spectrum.dtype)
    cropped = spectrum.new_zeros(*images.shape[:-2], size, size // 2 + 1)
    upper, lower = slice(0, keep + 1), slice(-keep, None)
    for rows in (upper, lower) if keep else (upper,):
        cropped[..., rows, : keep + 1] = spectrum[..., rows, :] * turn[rows]
    return torch.fft.irfft2(cropped, s=(size, size))


def adaptive_poses(
    images: Tensor, templates: Tensor, screen: Screen, rings: Rings
) -> tuple[Tensor, Pose, Tensor]:
    """Best reference, pose and score of every particle.

    Args:
        images: (n, size, size), background zero.
        templates: `refine.templates_of` the references.
        screen: `prepare_screen` of the references.
        rings: of the full resolution.

    Returns:
        label (n,), pose (n,), score (n,) as `refine` gives it.
    """
    found = [_batch_poses(part, templates, screen, rings) for part in images.split(BATCH)]
    labels, poses, scores = zip(*found, strict=True)
    return torch.cat(labels), Pose.cat(poses), torch.cat(scores)


class _Hypotheses(NamedTuple):
    """What is still possible: h hypotheses, those of a particle side by side."""

    particle: Tensor  # (h,)
    label: Tensor  # (h,)
    pose: Pose  # (h,) shifts in pixels of the stage's images
    score: Tensor  # (h,)


def _batch_poses(
    images: Tensor, templates: Tensor, screen: Screen, rings: Rings
) -> tuple[Tensor, Pose, Tensor]:
    n = len(images)
    small = reduce(images, screen.size)
    deviation = 1 / (math.sqrt(math.pi) * screen.rings.last_ring)
    coarse = _screened(small, screen, SCREEN_MARGIN * deviation)
    low = _refined(small, screen.templates, coarse, screen.rings, LOW_STEPS)
    low = _best(low, low.score, n, FINAL, FINAL_MARGIN * deviation)
    pose = Pose(low.pose.angle, low.pose.shift * screen.factor, low.pose.mirror)
    fine = _refined(images, templates, low._replace(pose=pose), rings, FINE_STEPS)
    # References of few particles fit other noise the better the more of it they show: what both
    # resolutions see is a safer judge of two classes than full resolution alone.
    last = _best(fine, fine.score + low.score, n, 1, 0.0)
    return last.label, last.pose, last.score


def screen_all(images: Tensor, screen: Screen) -> tuple[Tensor, Pose]:
    """The screen's score (n, k) and pose (n, k) of every pair, in pixels of the images."""
    score, place = _peaks(reduce(images, screen.size), screen)
    score, hand = score.max(2)
    place = place.gather(2, hand.unsqueeze(2)).squeeze(2)
    pose = _pose_at(place, screen)
    return score, Pose(pose.angle, pose.shift * screen.factor, pose.mirror)


def refine_screened(
    images: Tensor, templates: Tensor, screen: Screen, rings: Rings, label: Tensor, pose: Pose
) -> tuple[Pose, Tensor]:
    """Poses (n,) that `screen_all` saw on chosen references (n,), refined at both resolutions;
    poses and scores as `refine.refine` gives them."""
    shift = pose.shift / screen.factor
    low, _ = refine_on(
        reduce(images, screen.size), screen.templates, label,
        Pose(pose.angle, shift, pose.mirror), screen.rings, LOW_STEPS,
    )  # fmt: skip
    pose = Pose(low.angle, low.shift * screen.factor, low.mirror)
    return refine_on(images, templates, label, pose, rings, FINE_STEPS)


def _pose_at(place: Tensor, screen: Screen) -> Pose:
    """Poses of the screen's places, shifts in its own pixels."""
    angles = screen.rings.n_angles
    found = unravel_place(place, angles, screen.mirror)
    angle = wrap_degrees(found.angle * (360.0 / angles)).to(screen.shifts.dtype)
    return Pose(angle, screen.shifts[found.shift], found.mirror.bool())


def _screened(small: Tensor, screen: Screen, margin: float) -> _Hypotheses:
    """The best few (reference, hand) of every particle."""
    score, place = _peaks(small, screen)
    hands = score.shape[2]
    best, which = score.flatten(1).topk(min(SCREENED, score[0].numel()), 1)
    near = best >= best[:, :1] - margin
    near[:, 0] = True  # whatever the numbers
    particle, rank = near.nonzero().unbind(1)
    which = which[particle, rank]
    pose = _pose_at(place.flatten(1)[particle, which], screen)
    return _Hypotheses(particle, which // hands, pose, best[particle, rank])


def _peaks(small: Tensor, screen: Screen) -> tuple[Tensor, Tensor]:
    """Best score and place of every particle, reference and hand, (n, k, hands) each."""
    found = cpu.image_peaks(small, screen.spectra, screen.rings, screen.shifts, screen.mirror)
    if found is not None:
        return found
    peaks = []
    each = 8 * len(screen.shifts) * len(screen.rings.radii()) * screen.rings.n_angles  # bytes
    for part in small.split(max(1, min(CHUNK, ROOM // each))):
        spectra = normalised_spectra(sample_at(part, screen.places), screen.rings)
        peaks.append(hand_peaks(spectra, screen.factors, screen.mirror, BLOCK, TOGETHER))
    score, place = (torch.cat(parts) for parts in zip(*peaks, strict=True))
    return score, place


def _refined(
    images: Tensor, templates: Tensor, these: _Hypotheses, rings: Rings, steps: int
) -> _Hypotheses:
    # Every particle has a hypothesis: as many as particles means one each.
    alone = len(these.particle) == len(images)
    chosen = images if alone else images.index_select(0, these.particle)
    pose, score = refine_on(chosen, templates, these.label, these.pose, rings, steps)
    return these._replace(pose=pose, score=score)


def _best(these: _Hypotheses, merit: Tensor, n: int, most: int, margin: float) -> _Hypotheses:
    """The best ``most`` of each particle by ``merit`` (h,), within ``margin`` of its best."""
    order = merit.argsort(descending=True, stable=True)
    order = order[these.particle[order].argsort(stable=True)]  # by particle, best first
    particle, merit = these.particle[order], merit[order]
    first = torch.searchsorted(particle, torch.arange(n, device=particle.device))
    rank = torch.arange(len(particle), device=particle.device) - first[particle]
    near = merit >= merit[first[particle]] - margin
    kept = order[(rank == 0) | ((rank < most) & near)]
    return _Hypotheses(these.particle[kept], these.label[kept], these.pose[kept], these.score[kept])


def _angles(last_ring: int) -> int:
    """A fast even number of angles, at most 1 px apart on the last ring, 3 degrees anywhere."""
    needed = max(120, math.ceil(2 * math.pi * last_ring))
    return min(16 * 2**i * f for i in range(10) for f in (1, 3, 5) if 16 * 2**i * f >= needed)
