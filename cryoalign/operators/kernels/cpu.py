"""The compiled search on a CPU (peaks.cpp): loading its library, and calling it.

It is optional, as the CUDA kernels are; ``cryoalign build-kernels`` makes it. It computes
what `products.hand_peaks` does, in single precision, and agrees with it to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cryoalign.images.polar import Rings, ring_points
from cryoalign.operators.kernels import Status, unwanted

# Particles are the lanes of a vector, 16 at most: work is shared out in multiples of that.
LANES = 16


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    from cryoalign.operators.kernels import build  # here, so that `python -m` can run it

    try:
        library = build.find_cpu_library()
        if library is None:
            needs = "" if build.find_compiler() else ", which needs a C++ compiler"
            return None, Status(
                False,
                "the CPU kernels are not built: the search runs in PyTorch",
                f"run `cryoalign build-kernels`{needs}: it searches several times faster",
            )
        return ctypes.CDLL(str(library)), Status(True, f"CPU kernels loaded from {library}")
    except OSError as error:
        message = f"the CPU kernels do not load: {error}"
        advice = "rebuild them: `cryoalign build-kernels`"
        warnings.warn(f"{message}; the search runs in PyTorch. {advice}", stacklevel=2)
        return None, Status(False, message, advice)


def status() -> Status:
    """What is loaded, or why not; for people to read."""
    return _load()[1]


def usable() -> bool:
    """Whether the library is there and wanted."""
    return not unwanted() and _load()[1].loaded


def image_peaks(
    images: Tensor, references: Tensor, rings: Rings, shifts: Tensor, mirror: bool
) -> tuple[Tensor, Tensor] | None:
    """`products.hand_peaks` straight from images: spectra are made a shift at a time.

    Args:
        images: (n, h, w), background zero.
        references: (k, r, m) ring spectra.
        rings: the rings.
        shifts: (s, 2) trial shifts, pixels.
        mirror: whether to try the mirrored hand.

    Returns:
        Scores and places (n, k, hands), or None where the kernels do not serve these inputs.
    """
    library = _library_for(images, references)
    if library is None:
        return None
    points = ring_points(rings, images).contiguous()  # (r, a, 2)
    weights = rings.weights().to(images.dtype)
    references = references.resolve_conj().contiguous()
    shifts = shifts.to(images.dtype).contiguous()
    height, width = images.shape[1:]

    def call(some: Tensor, score: Tensor, place: Tensor) -> int:
        return library.cryoalign_image_peaks(
            _at(some), ctypes.c_int64(len(some)), height, width, _at(points), _at(weights),
            _at(shifts), len(shifts), _at(references), *references.shape, int(mirror), _at(score),
            _at(place),
        )  # fmt: skip

    return _shared_out(call, images, len(references), mirror)


def spectra_peaks(
    particles: Tensor, references: Tensor, mirror: bool
) -> tuple[Tensor, Tensor] | None:
    """`products.hand_peaks` of spectra (n, s, r, m) and (k, r, m), or None as `image_peaks`."""
    library = _library_for(particles, references)
    if library is None:
        return None
    references = references.resolve_conj().contiguous()
    shifts = particles.shape[1]

    def call(some: Tensor, score: Tensor, place: Tensor) -> int:
        return library.cryoalign_spectra_peaks(
            _at(some), ctypes.c_int64(len(some)), shifts, _at(references), *references.shape,
            int(mirror), _at(score), _at(place),
        )  # fmt: skip

    return _shared_out(call, particles.resolve_conj(), len(references), mirror)


def _library_for(particles: Tensor, references: Tensor) -> ctypes.CDLL | None:
    if (
        particles.device.type != "cpu"
        or references.dtype != torch.complex64
        or particles.dtype not in (torch.float32, torch.complex64)
        or not usable()
    ):
        return None
    library = _load()[0]
    angles = 2 * (references.shape[-1] - 1)
    return library if library is not None and library.cryoalign_serves(angles) else None


def _shared_out(
    call: Callable[[Tensor, Tensor, Tensor], int], particles: Tensor, k: int, mirror: bool
) -> tuple[Tensor, Tensor]:
    """Scores and places (n, k, hands) of `call`, by as many threads as PyTorch would use.

    No particle's arithmetic depends on the others: nor on who is together with whom.
    """
    n, threads = len(particles), torch.get_num_threads()
    particles = particles.contiguous()
    score = torch.empty(n, k, 1 + mirror)
    place = torch.empty(n, k, 1 + mirror, dtype=torch.int64)
    if not n or not k:
        return score, place
    each = max(1, -(-n // (threads * LANES))) * LANES
    parts = [t.split(each) for t in (particles, score, place)]
    if threads == 1:
        failed = any(map(call, *parts))
    else:  # nothing of PyTorch's runs inside: its threads are left alone
        with ThreadPoolExecutor(threads) as pool:
            failed = any(pool.map(call, *parts))
    if failed:
        raise MemoryError("no memory for the search of one block of particles")
    return score, place


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
