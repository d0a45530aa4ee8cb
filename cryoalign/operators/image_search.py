"""The operator that compares images with references: the best pose of every pair."""

from typing import Any

import torch
from torch import Tensor

from cryoalign.images.geometry import sample_at, sampling_places
from cryoalign.images.polar import Rings, normalised_spectra, shifted_rings
from cryoalign.operators.correlation import correlation_peaks, table_peaks
from cryoalign.operators.kernels import cpu as cpu_kernels
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.registration import operator
from cryoalign.operators.ring_products import best_hand, ring_factors
from cryoalign.runtime.threads import keep_freed_memory

# Bytes of ring spectra that are in memory at a time. They bound the memory of a search.
CPU_CHUNK = 2**22
CUDA_CHUNK = 2**30


def _check(images: Tensor, references: Tensor, shifts: Tensor, *options: Any) -> None:
    rings, _, candidates = kernel_images.unpack_options(*options)
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
    # Only on a CPU: reading values from a GPU would make the program wait for it.
    if shifts.device.type == "cpu" and not shifts.isfinite().all():
        raise ValueError("shifts hold NaN or infinity: give finite pixels")
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")


def _fake(images: Tensor, references: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (images.shape[0], references.shape[0])
    return images.new_empty(shape), images.new_empty(shape, dtype=torch.int64)


def _compiled(
    images: Tensor, references: Tensor, shifts: Tensor, *options: Any
) -> tuple[Tensor, Tensor] | None:
    rings, mirror, _ = kernel_images.unpack_options(*options)
    found = cpu_kernels.image_peaks(images, references, rings, shifts, mirror)
    return None if found is None else best_hand(*found)


@operator(check=_check, fake=_fake, cpu=_compiled, cuda=kernel_images.image_peaks)
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
    """The best pose of every (image, reference) pair: `correlation_peaks`, but from images.

    The compiled kernels never hold the ring spectra of all images in single precision.

    Args:
        images: (n, h, w) real, with a background of zero.
        references: (k, r, m) complex ring spectra.
        shifts: (s, 2) trial shifts in x and y, pixels.
        first_ring, ring_step, last_ring: radii of the rings, pixels. See `Rings`.
        angles: number of angles on a ring.
        mirror: whether to search the mirrored hand too.
        candidates: for how many references per particle, the best ones, the exact score and the
            place are needed. The others may come with scores in half precision and place -1. None
            means all references.

    Returns:
        Scores (n, k) and places (n, k), as from `correlation_peaks`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; no shifts, or shifts that are not
            finite; fewer than 1 candidate.
    """
    rings = Rings(first_ring, last_ring, ring_step, angles)
    shifts = shifts.to(images.device)
    keep_freed_memory()
    bytes_each = 8 * len(shifts) * len(rings.radii()) * rings.n_angles // 2
    cpu = images.device.type == "cpu"
    few = max(1, (CPU_CHUNK if cpu else CUDA_CHUNK) // bytes_each)
    # On a CPU `correlation_peaks` would prepare the references at every call; this does it once.
    factors = ring_factors(references) if cpu else None
    shape = (len(images), len(references))
    score = images.new_empty(shape)
    place = images.new_empty(shape, dtype=torch.int64)
    places = sampling_places(shifted_rings(images, rings, shifts), *images.shape[-2:])
    # Images that are sampled in one call share the interpolation weights, which favours large
    # chunks. Spectra should stay in the cache, which favours small ones: hence chunks of chunks.
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
