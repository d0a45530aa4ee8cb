"""The operator that searches images against references: the best pose of every pair."""

from __future__ import annotations

import torch
from torch import Tensor

from cryoalign.images.geometry import sample_at, sampling_places
from cryoalign.images.polar import Rings, normalised_spectra, shifted_rings
from cryoalign.operators import kernels
from cryoalign.operators.correlation import (
    correlation_peaks,
    table_peaks,
)
from cryoalign.operators.kernels import cpu as cpu_kernels
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.ring_products import best_hand, ring_factors
from cryoalign.runtime.threads import keep_freed_memory

# Bytes of the spectra of one chunk of particles: what bounds the memory of a search.
CPU_CHUNK = 2**22


CUDA_CHUNK = 2**30


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
