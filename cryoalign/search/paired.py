"""Particles that each have a reference of their own: particle i on reference i."""

import torch
from torch import Tensor

from cryoalign.images.polar import Rings, inverse_deviation, ring_spectra, to_polar
from cryoalign.pose import Pose
from cryoalign.search.refine import grid_pose, refine
from cryoalign.search.settings import Search

# Samples on rings, at all shifts, of the pairs of a chunk: few enough for a core's cache, or for a
# GPU's memory.
CPU_CHUNK = 2**22
CUDA_CHUNK = 2**27


def pairs_at_a_time(samples: int, shifts: Tensor, rings: Rings) -> int:
    """How many pairs have at most ``samples`` samples on their rings, at all shifts; at least 1."""
    return max(1, samples // (len(shifts) * len(rings.radii()) * rings.n_angles))


def pair_table(
    particles: Tensor, references: Tensor, hand: Tensor, shifts: Tensor, rings: Rings
) -> Tensor:
    """Scores of particle i with reference i at every shift and angle, in the given hands.

    These are the entries of `correlation.correlation_table` for the pairs. Differentiable in
    particles, references and shifts. Particles are not normalised before the product: the
    reference's mean is zero, so that the particle's mean has no effect, and the scores are divided
    by the particle's standard deviation. This saves passes over the spectra.

    Args:
        particles, references: (n, h, w).
        hand: (n, hands) bool, mirrored or not.
        shifts: (s, 2) pixels.
        rings: on which pairs are compared.

    Returns:
        (n, s, hands, a) correlation coefficients.
    """
    polar = to_polar(particles, rings, shifts)  # (n, s, r, a)
    a = polar.shape[-1]
    weights = rings.weights(polar.device).to(polar.dtype)
    y = ring_spectra(references, rings) * (weights / a).sqrt()[:, None]  # (n, 1, r, m)
    sign = 1 - 2 * (torch.arange(y.shape[-1], device=y.device) % 2)
    # The conjugate of the reference that fits the particle in its hand: mirrored, sign conj(y).
    y = torch.where(hand[:, :, None, None], sign * y, y.conj_physical())  # (n, hands, r, m)
    x = torch.fft.rfft(polar)
    products = [(x * each[:, None]).sum(2) for each in y.unbind(1)]  # (n, s, m) each
    scale = inverse_deviation(polar, (polar.mean(-1) * weights).sum(-1), weights)
    return torch.fft.irfft(torch.stack(products, 2).conj_physical(), n=a) * scale[..., None, None]


@torch.no_grad()
def best_pairs(images: Tensor, references: Tensor, search: Search) -> tuple[Pose, Tensor]:
    """The best pose of every particle on its own reference, by an exhaustive search.

    Args:
        images: (n, size, size), background zero.
        references: (n, size, size).
        search: the grid, and whether to refine its best pose.

    Returns:
        Poses (n,) and scores (n,), of `refine` or, without refinement, of the grid.

    Raises:
        ValueError: references and images that differ in number, box, dtype or device; no images;
            rings and shifts that leave the box.
    """
    _check(images, references)
    rings = search.rings(images.shape[-1])
    shifts = search.shifts(images.device).to(images.dtype)
    hand = torch.tensor([False, True][: 1 + search.mirror], device=images.device)
    samples = CPU_CHUNK if images.device.type == "cpu" else CUDA_CHUNK
    chunk = pairs_at_a_time(samples, shifts, rings)
    best = [
        pair_table(some, theirs, hand.expand(len(some), -1), shifts, rings).flatten(1).max(1)
        for some, theirs in zip(images.split(chunk), references.split(chunk), strict=True)
    ]
    score, place = (torch.cat(of) for of in zip(*best, strict=True))
    pose = grid_pose(place, shifts, rings, search.mirror)
    if search.refine:
        label = torch.arange(len(images), device=images.device)
        pose, score = refine(images, references, label, pose, rings)
    return pose, score


def _check(images: Tensor, references: Tensor) -> None:
    if images.ndim != 3 or not len(images) or images.shape != references.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and references {tuple(references.shape)} are not pairs: "
            "give (n, size, size) of both, a reference for each image"
        )
    if (images.dtype, images.device) != (references.dtype, references.device):
        raise ValueError(
            f"images are {images.dtype} on {images.device}, references {references.dtype} on "
            f"{references.device}: use .to() on one"
        )
