"""Search for the best pose of every particle on every reference, and its refinement."""

from dataclasses import dataclass as plain_dataclass

import torch
from torch import Tensor

from cryoalign.images.fourier import fourier_shrink
from cryoalign.images.geometry import sample_at, sampling_places
from cryoalign.images.polar import Rings, normalised_spectra, reference_spectra, shifted_rings
from cryoalign.images.templates import templates_of
from cryoalign.operators.correlation import correlation_logsumexp, unravel_place
from cryoalign.operators.image_search import CPU_CHUNK, CUDA_CHUNK, image_peaks
from cryoalign.pose import Found, Pose, wrap_degrees
from cryoalign.runtime.arrays import Array, as_tensor
from cryoalign.runtime.threads import keep_freed_memory
from cryoalign.search.coarse_to_fine import (
    CoarseReferences,
    adaptive_poses,
    coarse_poses,
    prepare_coarse,
    refine_coarse,
)
from cryoalign.search.kernel_search import (
    KernelSearch,
    kernel_log_evidence,
    kernel_match,
    kernel_poses,
    prepare_kernel_search,
)
from cryoalign.search.refine import refine_on
from cryoalign.search.settings import Search

# Number of references per particle that a GPU scores in full precision after its half-precision
# search; the best reference is always among the best four.
CANDIDATES = 4


@plain_dataclass(frozen=True, eq=False)
class Match:
    """The best score and its pose for every particle and reference.

    Attributes:
        score: (n, k) correlation coefficients.
        pose: (n, k) poses on the grid of the search.
    """

    score: Tensor
    pose: Pose

    def best(self) -> Found:
        """The best reference (n,) of every particle, with pose and score."""
        score, label = self.score.max(1)
        row = torch.arange(len(label), device=label.device)
        return Found(label, self.pose[row, label], score)


def match(images: Array, references: Array, search: Search) -> Match:
    """Search all shifts, hands and angles of every particle against every reference.

    Args:
        images: (n, size, size), background zero; a tensor or another array (`runtime.arrays`).
        references: (k, size, size), likewise.
        search: the poses that are tried.

    Returns:
        A `Match` of (n, k).

    Raises:
        ValueError: no images or references; boxes, dtypes or devices that differ; rings and shifts
            that do not fit the box.
    """
    images, references = as_tensor(images), as_tensor(references)
    _check_references(references)
    _check_images(images, references)
    rings = search.rings(images.shape[-1])
    spectra = reference_spectra(references, rings)  # (k, r, m)
    return match_spectra(images, spectra, search, rings)


def match_spectra(images: Tensor, references: Tensor, search: Search, rings: Rings) -> Match:
    """`match` for references that are given by their ring spectra (k, r, m)."""
    score, place, shifts = _peaks(images, references, search, rings, None)
    return Match(score, _pose(place, score, shifts, search, rings))


def best_match(images: Tensor, references: Tensor, search: Search, rings: Rings) -> Found:
    """The same as ``match_spectra(...).best()``, but faster: only the `CANDIDATES` best references
    of a particle are scored exactly.

    Args:
        images: (n, size, size), background zero.
        references: (k, r, m) ring spectra.
        search: the poses that are tried.
        rings: rings of the search.
    """
    score, place, shifts = _peaks(images, references, search, rings, CANDIDATES)
    score, label = score.max(1)
    place = place.gather(1, label.unsqueeze(1)).squeeze(1)
    return Found(label, _pose(place, score, shifts, search, rings), score)


@plain_dataclass(frozen=True, eq=False)
class Target:
    """References prepared for the search with any number of particles.

    Attributes:
        search: the poses that are tried.
        rings: rings of the search in the references' box.
        templates: (k, 3, size, size) images and derivatives, for refinement.
        spectra: (k, r, m) ring spectra, for an exhaustive search; otherwise None.
        screen: coarse references, for an adaptive search; otherwise None.
        kernels: the same for the GPU's kernels, where they serve the search; otherwise None.
    """

    search: Search
    rings: Rings
    templates: Tensor
    spectra: Tensor | None
    screen: CoarseReferences | None
    kernels: KernelSearch | None = None


def prepare_target(references: Tensor, search: Search) -> Target:
    """Prepare references (k, size, size) for `best_poses`.

    Raises:
        ValueError: no references, or not square; rings and shifts that do not fit the box.
    """
    _check_references(references)
    references = references.detach()  # the choice of a pose has no gradient
    rings = search.rings(references.shape[-1])
    templates = templates_of(references)
    if search.is_adaptive:
        screen = prepare_coarse(references, rings, search.max_shift, search.mirror)
        kernels = prepare_kernel_search(templates, screen, rings)
        return Target(search, rings, templates, None, screen, kernels)
    return Target(search, rings, templates, reference_spectra(references, rings), None)


def best_poses(images: Tensor, target: Target) -> Found:
    """The best reference, pose and score of every particle.

    Args:
        images: (n, size, size), background zero.
        target: `prepare_target` of the references.

    Returns:
        A `Found` of (n,). Scores are those of `search.refine.refine`, or those on the grid if the
        search does not refine.

    Raises:
        ValueError: no images; a box, dtype or device other than that of the references.
    """
    _check_images(images, target.templates[:, 0])
    keep_freed_memory()
    images = images.detach()
    if target.kernels is not None:
        return kernel_poses(images, target.kernels)
    if target.screen is not None:
        return Found(*adaptive_poses(images, target.templates, target.screen, target.rings))
    assert target.spectra is not None
    found = best_match(images, target.spectra, target.search, target.rings)
    if not target.search.refine:
        return found
    pose, score = refine_on(images, target.templates, found.label, found.pose, target.rings)
    return Found(found.label, pose, score)


def match_all(images: Tensor, target: Target) -> Match:
    """Scores and poses of every particle with every reference before refinement: on the whole grid,
    or on the coarse grid of an adaptive search."""
    if target.kernels is not None:
        return Match(*kernel_match(images.detach(), target.kernels))
    if target.screen is not None:
        return Match(*coarse_poses(images.detach(), target.screen))
    assert target.spectra is not None
    return match_spectra(images.detach(), target.spectra, target.search, target.rings)


def refine_match(images: Tensor, target: Target, label: Tensor, pose: Pose) -> tuple[Pose, Tensor]:
    """Refine the poses that `match_all` found, each on a chosen reference.

    Args:
        images: (n, size, size).
        target: `prepare_target` of the references.
        label: (n,) index of the chosen reference.
        pose: (n,) pose on it from `match_all`.

    Returns:
        Poses (n,) and scores (n,) of `search.refine.refine`. If the search does not refine, poses
        are unchanged and scores are computed in the same way.
    """
    images = images.detach()
    if target.screen is not None:
        return refine_coarse(images, target.templates, target.screen, target.rings, label, pose)
    steps = 2 if target.search.refine else 0
    return refine_on(images, target.templates, label, pose, target.rings, steps)


def log_evidence(images: Tensor, target: Target, temperature: float) -> Tensor:
    """(n, k) T log sum exp(score / T) over all poses that `match_all` tries, T the temperature."""
    if target.kernels is not None:
        return kernel_log_evidence(images.detach(), target.kernels, temperature)
    mirror, screen = target.search.mirror, target.screen
    if screen is not None:
        rings, shifts, spectra = screen.rings, screen.shifts, screen.spectra
        images = fourier_shrink(images, screen.size)
    else:
        assert target.spectra is not None
        rings, shifts, spectra = target.rings, target.search.shifts(images.device), target.spectra
    places = sampling_places(shifted_rings(images, rings, shifts), *images.shape[-2:])
    chunk = CPU_CHUNK if images.device.type == "cpu" else CUDA_CHUNK  # bytes
    few = max(1, chunk // (8 * len(shifts) * len(rings.radii()) * rings.n_angles // 2))
    parts = (normalised_spectra(sample_at(part, places), rings) for part in images.split(few))
    return torch.cat([correlation_logsumexp(x, spectra, temperature, mirror) for x in parts])


def _check_references(references: Tensor) -> None:
    if references.ndim != 3 or references.shape[1] != references.shape[2]:
        raise ValueError(f"references must be (k, size, size), got {tuple(references.shape)}")
    if not len(references):
        raise ValueError("no references to match with")
    if references.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"references are {references.dtype}: use .float()")
    # On a GPU the check would have to wait for the device, and is left out.
    if references.device.type == "cpu" and not references.isfinite().all():
        bad = (~references.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        raise ValueError(f"references {bad[:10]} contain NaN or infinity: leave them out")


def _check_images(images: Tensor, references: Tensor) -> None:
    if not len(images):
        raise ValueError("no images to match")
    size = references.shape[-1]
    if images.ndim != 3 or images.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"images {tuple(images.shape)} do not have the references' box of {size} px: give "
            f"(n, {size}, {size}), or resize images or references"
        )
    if (images.dtype, images.device) != (references.dtype, references.device):
        raise ValueError(
            f"images are {images.dtype} on {images.device}, references {references.dtype} on "
            f"{references.device}: convert one of them with .to()"
        )


def _peaks(
    images: Tensor, references: Tensor, search: Search, rings: Rings, candidates: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not len(images):
        raise ValueError("no images to match")
    shifts = search.shifts()  # on the CPU, where reading them does not wait for a GPU
    score, place = image_peaks(
        images, references, shifts, rings.first_ring, rings.ring_step, rings.last_ring,
        rings.n_angles, search.mirror, candidates,
    )  # fmt: skip
    return score, place, shifts


def _pose(place: Tensor, score: Tensor, shifts: Tensor, search: Search, rings: Rings) -> Pose:
    at = unravel_place(place, rings.n_angles, search.mirror)
    angle = wrap_degrees(at.angle * (360.0 / rings.n_angles))
    return Pose(angle.to(score.dtype), shifts.to(place.device)[at.shift], at.mirror.bool())
