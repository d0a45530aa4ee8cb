"""Search: the best pose of every particle on every reference, and its refinement off the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass as plain_dataclass
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.images.geometry import sample_at, sampling_places
from cryoalign.images.polar import Rings, normalised_spectra, reference_spectra, shifted_rings
from cryoalign.operators import kernels
from cryoalign.operators.correlation import (
    correlation_logsumexp,
    correlation_peaks,
    table_peaks,
    unravel_place,
)
from cryoalign.operators.kernels import cpu as cpu_kernels
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.ring_products import best_hand, ring_factors
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.runtime.arrays import Array, as_tensor
from cryoalign.runtime.settings import FORBID
from cryoalign.runtime.threads import keep_freed_memory
from cryoalign.search.coarse_to_fine import (
    Screen,
    adaptive_poses,
    prepare_screen,
    reduce,
    refine_screened,
    screen_all,
)
from cryoalign.search.refine import refine_on, templates_of

# Bytes of the spectra of one chunk of particles: what bounds the memory of a search.
CPU_CHUNK = 2**22
CUDA_CHUNK = 2**30
# References of a particle that a GPU scores in full precision after its half-precision search,
# whose best four have the exact choice among them.
CANDIDATES = 4


@dataclass(frozen=True, config=FORBID)
class Search:
    """What poses are tried.

    Attributes:
        max_shift: largest shift tried along x and along y, pixels.
        shift_step: distance between trial shifts, pixels.
        first_ring: innermost ring, pixels.
        last_ring: outermost ring, pixels; None is the largest that stays in the box.
        ring_step: distance between rings, pixels.
        mirror: try mirrored particles too.
        refine: refine the best pose below the grid's steps.
        mode: ``exhaustive`` tries the whole grid; ``adaptive`` screens it at lower resolution and
            refines the best few (`adaptive`), whatever ``shift_step`` is. None is adaptive on a
            CPU where poses are refined, else exhaustive.
    """

    max_shift: float = Field(default=3.0, ge=0, description="largest trial shift in x and y, px")
    shift_step: float = Field(default=1.0, gt=0, description="distance between trial shifts, px")
    first_ring: int = Field(default=1, ge=1, description="innermost ring, px")
    last_ring: int | None = Field(
        default=None, ge=2, description="outermost ring, px; null: the largest that fits the box"
    )
    ring_step: int = Field(default=1, ge=1, description="distance between rings, px")
    mirror: bool = Field(default=True, description="try mirrored particles too")
    refine: bool = Field(default=True, description="refine poses below the grid's steps")
    mode: Literal["exhaustive", "adaptive"] | None = Field(
        default=None,
        description="exhaustive: the whole grid; adaptive: a screen, the best few refined; "
        "null: adaptive on a CPU, exhaustive on a GPU",
    )

    def __post_init__(self) -> None:
        if self.mode == "adaptive" and not self.refine:
            raise ValueError(
                "search.mode adaptive lives by refinement: use search.refine: true, or "
                "search.mode: exhaustive"
            )

    def is_adaptive(self, device: torch.device) -> bool:
        """Whether particles on this device are screened first."""
        return self.mode == "adaptive" or (
            self.mode is None and self.refine and device.type == "cpu"
        )

    def rings(self, size: int) -> Rings:
        """The rings in a box of ``size`` pixels.

        Raises:
            ValueError: ``last_ring`` + ``max_shift`` leave the box.
        """
        room = (size - 1) // 2 - math.ceil(self.max_shift)
        if self.last_ring is not None and self.last_ring > room:
            raise ValueError(
                f"last_ring {self.last_ring} px with max_shift {self.max_shift:g} px does not fit "
                f"a box of {size} px: use search.last_ring <= {room}, or a smaller "
                "search.max_shift"
            )
        if self.first_ring > room >= 2:
            raise ValueError(
                f"first_ring {self.first_ring} px lies outside the last ring that fits, {room} px: "
                f"use search.first_ring < {room}"
            )
        if room < 2:
            raise ValueError(
                f"a box of {size} px with max_shift {self.max_shift:g} px leaves no ring: use a "
                "smaller search.max_shift"
            )
        return Rings(self.first_ring, self.last_ring or room, self.ring_step)

    def shifts(self, device: torch.device | str | None = None) -> Tensor:
        """(s, 2) trial shifts: the square grid of ``shift_step`` within ``max_shift``, symmetric
        about zero."""
        reach = math.floor(self.max_shift / self.shift_step + 1e-6)
        axis = torch.arange(-reach, reach + 1, device=device) * self.shift_step
        return torch.cartesian_prod(axis, axis)


@plain_dataclass(frozen=True, eq=False)
class Match:
    """What a search found: for every particle and reference the best score and its pose.

    Attributes:
        score: (n, k) correlation coefficients.
        pose: (n, k) on the search's grid.
    """

    score: Tensor
    pose: Pose

    def best(self) -> tuple[Tensor, Tensor, Pose]:
        """Class index (n,), score (n,) and pose (n,) of every particle's best reference."""
        score, label = self.score.max(1)
        row = torch.arange(len(label), device=label.device)
        return label, score, self.pose[row, label]


def match(images: Array, references: Array, search: Search) -> Match:
    """Search all shifts, hands and angles of every particle against every reference.

    Args:
        images: (n, size, size), background zero; a tensor or another array (`interop.Array`).
        references: (k, size, size), likewise.
        search: the grid.

    Returns:
        A `Match` of (n, k).

    Raises:
        ValueError: no images or references; boxes, dtypes or devices that do not fit; rings and
            shifts that leave the box.
    """
    images, references = as_tensor(images), as_tensor(references)
    _check_references(references)
    _check_images(images, references)
    rings = search.rings(images.shape[-1])
    spectra = reference_spectra(references, rings)  # (k, r, m)
    return match_spectra(images, spectra, search, rings)


def match_spectra(images: Tensor, references: Tensor, search: Search, rings: Rings) -> Match:
    """`match` with the references' ring spectra (k, r, m) at hand."""
    score, place, shifts = _peaks(images, references, search, rings, None)
    return Match(score, _pose(place, score, shifts, search, rings))


def best_match(
    images: Tensor, references: Tensor, search: Search, rings: Rings
) -> tuple[Tensor, Tensor, Pose]:
    """What ``match_spectra(...).best()`` gives, for less: only `CANDIDATES` are looked at closely.

    Args:
        images, search, rings: as in `match`; references: (k, r, m) ring spectra.

    Returns:
        Class index (n,), score (n,) and pose (n,) of every particle's best reference.
    """
    score, place, shifts = _peaks(images, references, search, rings, CANDIDATES)
    score, label = score.max(1)
    place = place.gather(1, label.unsqueeze(1)).squeeze(1)
    return label, score, _pose(place, score, shifts, search, rings)


@plain_dataclass(frozen=True, eq=False)
class Target:
    """References made ready to be searched by any number of particles.

    Attributes:
        search: the grid; rings: in the references' box.
        templates: (k, 3, size, size) for refinement.
        spectra: (k, r, m) ring spectra of an exhaustive search.
        screen: of an adaptive one.
    """

    search: Search
    rings: Rings
    templates: Tensor
    spectra: Tensor | None
    screen: Screen | None


def prepare(references: Tensor, search: Search) -> Target:
    """Make references (k, size, size) ready for `best_poses`.

    Raises:
        ValueError: no references, or not square; rings and shifts that leave the box.
    """
    _check_references(references)
    references = references.detach()  # what is chosen has no gradient
    rings = search.rings(references.shape[-1])
    templates = templates_of(references)
    if search.is_adaptive(references.device):
        screen = prepare_screen(references, rings, search.max_shift, search.mirror)
        return Target(search, rings, templates, None, screen)
    return Target(search, rings, templates, reference_spectra(references, rings), None)


def best_poses(images: Tensor, target: Target) -> tuple[Tensor, Pose, Tensor]:
    """Search, and refine if the search says so: the one door of alignment.

    Args:
        images: (n, size, size), background zero.
        target: `prepare` of the references.

    Returns:
        Class index (n,), pose (n,) and score (n,) of every particle's best reference. The score
        is `refine`'s, or without refinement that of the grid.

    Raises:
        ValueError: no images; a box, dtype or device that is not the references'.
    """
    _check_images(images, target.templates[:, 0])
    keep_freed_memory()
    images = images.detach()
    if target.screen is not None:
        return adaptive_poses(images, target.templates, target.screen, target.rings)
    assert target.spectra is not None
    label, score, pose = best_match(images, target.spectra, target.search, target.rings)
    if target.search.refine:
        pose, score = refine_on(images, target.templates, label, pose, target.rings)
    return label, pose, score


def match_all(images: Tensor, target: Target) -> Match:
    """Scores and poses of every particle with every reference, as far as the search looks before
    it refines: the whole grid, or the screen of an adaptive search."""
    if target.screen is not None:
        return Match(*screen_all(images.detach(), target.screen))
    assert target.spectra is not None
    return match_spectra(images.detach(), target.spectra, target.search, target.rings)


def refine_match(images: Tensor, target: Target, label: Tensor, pose: Pose) -> tuple[Pose, Tensor]:
    """Refine what `match_all` found on chosen references.

    Args:
        images: (n, size, size).
        target: `prepare` of the references.
        label: (n,) the chosen reference; pose: (n,) `match_all`'s on it.

    Returns:
        Poses (n,) and scores (n,), the correlation coefficient as `refine` gives it, even where
        the search does not refine.
    """
    images = images.detach()
    if target.screen is not None:
        return refine_screened(images, target.templates, target.screen, target.rings, label, pose)
    steps = 2 if target.search.refine else 0
    return refine_on(images, target.templates, label, pose, target.rings, steps)


def log_evidence(images: Tensor, target: Target, temperature: float) -> Tensor:
    """(n, k) T log sum exp(score / T) over all poses that `match_all` looks at."""
    mirror, screen = target.search.mirror, target.screen
    if screen is not None:
        rings, shifts, spectra = screen.rings, screen.shifts, screen.spectra
        images = reduce(images, screen.size)
    else:
        assert target.spectra is not None
        rings, shifts, spectra = target.rings, target.search.shifts(images.device), target.spectra
    places = sampling_places(shifted_rings(images, rings, shifts), *images.shape[-2:])
    few = max(
        1,
        (CPU_CHUNK if images.device.type == "cpu" else CUDA_CHUNK)
        // (8 * len(shifts) * len(rings.radii()) * rings.n_angles // 2),
    )
    return torch.cat(
        [
            correlation_logsumexp(
                normalised_spectra(sample_at(part, places), rings), spectra, temperature, mirror
            )
            for part in images.split(few)
        ]
    )


def _check_references(references: Tensor) -> None:
    if references.ndim != 3 or references.shape[1] != references.shape[2]:
        raise ValueError(f"references must be (k, size, size), got {tuple(references.shape)}")
    if not len(references):
        raise ValueError("no references to match with")
    if references.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"references are {references.dtype}: use .float()")
    # On a GPU this would have to be waited for: there a reference with NaN takes all particles.
    if references.device.type == "cpu" and not references.isfinite().all():
        bad = (~references.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        raise ValueError(f"references {bad[:10]} hold NaN or infinity: leave them out")


def _check_images(images: Tensor, references: Tensor) -> None:
    if not len(images):
        raise ValueError("no images to match")
    size = references.shape[-1]
    if images.ndim != 3 or images.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"images {tuple(images.shape)} do not have the references' box of {size} px: give "
            f"(n, {size}, {size}), or resize one"
        )
    if (images.dtype, images.device) != (references.dtype, references.device):
        raise ValueError(
            f"images are {images.dtype} on {images.device}, references {references.dtype} on "
            f"{references.device}: use .to() on one"
        )


def _peaks(
    images: Tensor, references: Tensor, search: Search, rings: Rings, candidates: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not len(images):
        raise ValueError("no images to match")
    shifts = search.shifts()  # on the CPU: nothing waits to look at them
    score, place = image_peaks(
        images, references, shifts, rings.first_ring, rings.ring_step, rings.last_ring,
        rings.n_angles, search.mirror, candidates,
    )  # fmt: skip
    return score, place, shifts


def _pose(place: Tensor, score: Tensor, shifts: Tensor, search: Search, rings: Rings) -> Pose:
    at = unravel_place(place, rings.n_angles, search.mirror)
    angle = wrap_degrees(at.angle * (360.0 / rings.n_angles))
    return Pose(angle.to(score.dtype), shifts.to(place.device)[at.shift], at.mirror.bool())


@torch.library.custom_op("cryoalign::image_peaks", mutates_args=())
def image_peaks(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    first_ring: int,
    ring_step: int,
    last_ring: int,
    angles: int,
    mirror: bool,
    candidates: int | None,
) -> tuple[Tensor, Tensor]:
    """`correlation_peaks` straight from images; the GPU then never holds their fp32 spectra.

    Args:
        images: (n, h, w), background zero.
        references: (k, r, m) ring spectra.
        shifts: (s, 2) trial shifts.
        first_ring, ring_step, last_ring, angles: of `Rings`.
        mirror: whether to try the mirrored hand.
        candidates: None for the exact score and place of all pairs; a number allows scores of
            half precision, and places of -1, for all but so many best references of a particle.

    Returns:
        Score (n, k) and place (n, k) as `correlation_peaks`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; no shifts, or not finite; fewer
            than 1 candidate.
    """
    rings = Rings(first_ring, last_ring, ring_step, angles)
    _check_peaks(images, references, shifts, rings, candidates)
    return _peaks_in_torch(
        images, references, shifts, first_ring, ring_step, last_ring, angles, mirror, candidates
    )


@image_peaks.register_kernel("cuda")
def _(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    first_ring: int,
    ring_step: int,
    last_ring: int,
    angles: int,
    mirror: bool,
    candidates: int | None,
) -> tuple[Tensor, Tensor]:
    rings = Rings(first_ring, last_ring, ring_step, angles)
    _check_peaks(images, references, shifts, rings, candidates)
    found = None
    if kernels.usable(images.device) and images.dtype == torch.float32:
        found = kernel_images.image_peaks(images, references, shifts, rings, mirror, candidates)
    return found or _peaks_in_torch(
        images, references, shifts, first_ring, ring_step, last_ring, angles, mirror, candidates
    )


@image_peaks.register_fake
def _(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    first_ring: int,
    ring_step: int,
    last_ring: int,
    angles: int,
    mirror: bool,
    candidates: int | None,
) -> tuple[Tensor, Tensor]:
    shape = (images.shape[0], references.shape[0])
    return images.new_empty(shape), images.new_empty(shape, dtype=torch.int64)


def _check_peaks(
    images: Tensor, references: Tensor, shifts: Tensor, rings: Rings, candidates: int | None
) -> None:
    spectra = (len(rings.radii()), rings.n_angles // 2 + 1)
    if images.ndim != 3 or references.shape[1:] != spectra:
        raise ValueError(
            f"image_peaks takes images (n, h, w) and, of these rings, reference spectra (k, "
            f"{spectra[0]}, {spectra[1]}); got {tuple(images.shape)} and {tuple(references.shape)}"
        )
    if references.dtype != images.dtype.to_complex() or references.device != images.device:
        raise ValueError(
            f"images are {images.dtype} on {images.device}, reference spectra {references.dtype} "
            f"on {references.device}: make the spectra from images of the same kind"
        )
    if shifts.ndim != 2 or shifts.shape[1:] != (2,) or not len(shifts):
        raise ValueError(f"shifts must be (s, 2) and at least one, got {tuple(shifts.shape)}")
    # On a CPU only: a GPU would have to be waited for.
    if shifts.device.type == "cpu" and not shifts.isfinite().all():
        raise ValueError("shifts hold NaN or infinity: give finite pixels")
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")


def _peaks_in_torch(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    first_ring: int,
    ring_step: int,
    last_ring: int,
    angles: int,
    mirror: bool,
    candidates: int | None,
) -> tuple[Tensor, Tensor]:
    rings, shifts = Rings(first_ring, last_ring, ring_step, angles), shifts.to(images.device)
    found = cpu_kernels.image_peaks(images, references, rings, shifts, mirror)
    if found is not None:
        return best_hand(*found)
    keep_freed_memory()
    bytes_each = 8 * len(shifts) * len(rings.radii()) * rings.n_angles // 2
    cpu = images.device.type == "cpu"
    budget = CPU_CHUNK if cpu else CUDA_CHUNK
    # The operator's CPU body makes references ready at every call: here that is done once.
    factors = ring_factors(references) if cpu else None
    few = max(1, budget // bytes_each)
    shape = (len(images), len(references))
    score = images.new_empty(shape)
    place = images.new_empty(shape, dtype=torch.int64)
    places = sampling_places(shifted_rings(images, rings, shifts), *images.shape[-2:])
    # Sampling shares its weights among the images of a call, spectra want to stay in cache:
    # hence chunks of chunks.
    for start in range(0, len(images), 4 * few):
        polar = sample_at(images[start : start + 4 * few], places)
        for part in polar.split(few):
            rows = slice(start, start + len(part))
            spectra = normalised_spectra(part, rings)
            score[rows], place[rows] = (
                correlation_peaks(spectra, references, mirror, candidates)
                if factors is None
                else table_peaks(spectra, factors, mirror)
            )
            start += len(part)
    return score, place
