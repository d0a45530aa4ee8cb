"""Search: the best pose of every particle on every reference, and its refinement off the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass as plain_dataclass

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.correlate import correlation_peaks, peaks_of, ring_factors, unravel_place
from cryoalign.polar import Rings, normalised_spectra, reference_spectra, to_polar
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.settings import FORBID

# Bytes of the spectra of one chunk of particles: what bounds the memory of a search.
CPU_CHUNK = 2**23
CUDA_CHUNK = 2**30


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
        if room < max(2, self.first_ring):
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


def match(images: Tensor, references: Tensor, search: Search) -> Match:
    """Search all shifts, hands and angles of every particle against every reference.

    Args:
        images: (n, size, size), background zero.
        references: (k, size, size).
        search: the grid.

    Returns:
        A `Match` of (n, k).
    """
    rings = search.rings(images.shape[-1])
    spectra = reference_spectra(references, rings)  # (k, r, m)
    return match_spectra(images, spectra, search, rings)


def match_spectra(images: Tensor, references: Tensor, search: Search, rings: Rings) -> Match:
    """`match` with the references' ring spectra (k, r, m) at hand."""
    shifts = search.shifts(images.device)
    bytes_each = 8 * len(shifts) * len(rings.radii()) * rings.n_angles // 2
    cpu = images.device.type == "cpu"
    budget = CPU_CHUNK if cpu else CUDA_CHUNK
    # The operator's CPU body makes references ready at every call: here that is done once.
    factors = ring_factors(references) if cpu else None
    few = max(1, budget // bytes_each)
    scores, places = [], []
    # Sampling shares its weights among the images of a call, spectra want to stay in cache:
    # hence chunks of chunks.
    for start in range(0, len(images), 4 * few):
        polar = to_polar(images[start : start + 4 * few], rings, shifts)
        for part in polar.split(few):
            spectra = normalised_spectra(part, rings)
            score, place = (
                correlation_peaks(spectra, references, search.mirror)
                if factors is None
                else peaks_of(spectra, factors, search.mirror)
            )
            scores.append(score)
            places.append(place)
    if not scores:
        raise ValueError("no images to match")
    score, flat = torch.cat(scores), torch.cat(places)
    place = unravel_place(flat, rings.n_angles, search.mirror)
    angle = wrap_degrees(place.angle * (360.0 / rings.n_angles))
    return Match(score, Pose(angle.to(score.dtype), shifts[place.shift], place.mirror.bool()))
