"""The optional compiled operators on a CPU: loading their library, and calling it.

They compute what the operators do in PyTorch, in single precision, and agree with it up to
rounding: the search (peaks.cpp) with `ring_products.hand_peaks`, the refinement (refine.cpp) with
`pose_refinement.refine_poses`. ``cryoalign build-kernels`` builds the library.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cryoalign.images.polar import Rings, ring_points
from cryoalign.images.templates import check_labels
from cryoalign.operators.kernels import Status, load_failed, unwanted

# A vector register holds one number of each of up to 16 particles. Each thread gets a multiple of
# this many particles, which fills whole registers.
LANES = 16


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    from cryoalign.operators.kernels import build  # here, so that `python -m` can run it

    instead = "search and refinement run in PyTorch"
    try:
        library = build.find_cpu_library()
        if library is not None:
            return ctypes.CDLL(str(library)), Status(True, f"CPU kernels loaded from {library}")
    except OSError as error:
        return None, load_failed("CPU kernels", error, instead)
    needs = "" if build.find_compiler() else ", which needs a C++ compiler"
    advice = f"run `cryoalign build-kernels`{needs}: search and refinement are several times faster"
    return None, Status(False, f"the CPU kernels are not built: {instead}", advice)


def status() -> Status:
    """Whether the CPU kernels are loaded, or why not, for messages."""
    return _load()[1]


def usable() -> bool:
    """Whether the library is loaded and the user has not switched it off."""
    return not unwanted() and _load()[1].loaded


def image_peaks(
    images: Tensor, references: Tensor, rings: Rings, shifts: Tensor, mirror: bool
) -> tuple[Tensor, Tensor] | None:
    """`ring_products.hand_peaks` from images; the spectra of one shift at a time are in memory.

    Args:
        images: (n, h, w) float32, with a background of zero.
        references: (k, r, m) complex64 ring spectra.
        rings: the rings.
        shifts: (s, 2) trial shifts in x and y, pixels.
        mirror: whether to search the mirrored hand too.

    Returns:
        Scores and places (n, k, hands), or None for inputs that the library does not serve.
    """
    points = ring_points(rings, images).contiguous()  # (r, a, 2)
    weights = rings.weights().to(images.dtype)
    shifts = shifts.to(images.dtype).contiguous()
    between = (*images.shape[1:], points, weights, shifts, len(shifts))
    return _search("cryoalign_image_peaks", images, between, references, mirror)


def spectra_peaks(
    particles: Tensor, references: Tensor, mirror: bool
) -> tuple[Tensor, Tensor] | None:
    """`ring_products.hand_peaks` of spectra (n, s, r, m) and (k, r, m); None as `image_peaks`."""
    shifts = particles.shape[1]
    return _search("cryoalign_spectra_peaks", particles, (shifts,), references, mirror)


def _search(
    name: str, particles: Tensor, between: tuple, references: Tensor, mirror: bool
) -> tuple[Tensor, Tensor] | None:
    """Call a function of the library in as many threads as PyTorch would use.

    ``between`` are the function's arguments between particles and references. The result for a
    particle does not depend on which particles share a thread.
    """
    n, k, threads = len(particles), len(references), torch.get_num_threads()
    library = _load()[0] if _serves(particles, references) else None
    if library is None or not library.cryoalign_serves(2 * (references.shape[-1] - 1)):
        return None
    particles = particles.resolve_conj().contiguous()
    references = references.resolve_conj().contiguous()
    score = torch.empty(n, k, 1 + mirror)
    place = torch.empty(n, k, 1 + mirror, dtype=torch.int64)
    if not n or not k:
        return score, place

    def call(some: Tensor, score: Tensor, place: Tensor) -> int:
        arguments = (*between, references, *references.shape, int(mirror), score, place)
        pointers = [_pointer(a) if isinstance(a, Tensor) else a for a in arguments]
        return library[name](_pointer(some), ctypes.c_int64(len(some)), *pointers)

    each = max(1, -(-n // (threads * LANES))) * LANES
    parts = [t.split(each) for t in (particles, score, place)]
    if _in_threads(call, *parts):
        raise MemoryError("no memory for the search of one block of particles")
    return score, place


def refine_poses(
    images: Tensor, templates: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The operator `pose_refinement.refine_poses`; None for inputs that are not served."""
    label, angle, shift, mirror, *options = others
    library = _load()[0] if images.dtype == torch.float32 and usable() else None
    if library is None or not len(images):
        return None
    check_labels(label, len(templates))
    images, templates = images.contiguous(), templates.contiguous()
    label, mirror = label.contiguous(), mirror.contiguous()
    # Changed in place; `contiguous` would keep the caller's tensors.
    angle, shift = (t.clone(memory_format=torch.contiguous_format) for t in (angle, shift))
    score = torch.empty_like(angle)
    order = label.argsort(stable=True)
    size = images.shape[1:]
    arguments = (images, *size, templates, label, *options, angle, shift, mirror, score)
    pointers = [_pointer(a) if isinstance(a, Tensor) else a for a in arguments]

    def call(rows: Tensor) -> int:
        return library.cryoalign_refine_poses(_pointer(rows), ctypes.c_int64(len(rows)), *pointers)

    threads = torch.get_num_threads()
    if _in_threads(call, order.split(-(-len(order) // threads))):
        raise MemoryError("no memory for the refinement of one particle")
    return angle, shift, score


def _in_threads(call: Callable[..., int], *parts: Sequence[Tensor]) -> bool:
    """Call a function of the library for each part, in as many threads as PyTorch would use.

    Returns:
        Whether any call failed.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return any(map(call, *parts))
    with ThreadPoolExecutor(threads) as pool:  # no PyTorch operation runs in these threads
        return any(pool.map(call, *parts))


def _serves(particles: Tensor, references: Tensor) -> bool:
    return (
        particles.device.type == "cpu"
        and references.dtype == torch.complex64
        and particles.dtype in (torch.float32, torch.complex64)
        and usable()
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
