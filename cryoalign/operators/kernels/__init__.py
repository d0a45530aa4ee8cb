"""The CUDA kernels: whether they are here, and loading them once. (`cpu` has the CPU's.)

They are optional. Without the library, without an NVIDIA GPU, or on a card before Ampere, every
operator runs its PyTorch body. ``cryoalign build-kernels`` makes the library.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import torch

# Tensor cores with fp16 inputs, fp32 accumulation and 16-deep products: Ampere and later.
NEEDED_CAPABILITY = (8, 0)
CRYOALIGN_NO_KERNELS = "CRYOALIGN_NO_KERNELS"


class Status(NamedTuple):
    """What `status` says.

    Attributes:
        loaded: the library is in use.
        message: what is loaded, or why not.
        advice: what would make it faster; empty if nothing.
    """

    loaded: bool
    message: str
    advice: str = ""


@functools.cache
def load() -> Status:
    """Load the library if this PyTorch has CUDA and the present sources' library is there."""
    if torch.version.cuda is None:
        return Status(
            False,
            "this PyTorch has no CUDA: everything runs on the CPU",
            "on a machine with an NVIDIA GPU, install a CUDA build of PyTorch",
        )
    from cryoalign.operators.kernels import build  # here, so that `python -m` can run it

    try:
        library = build.find_library()
        if library is None:
            return Status(
                False,
                "the CUDA kernels are not built: a GPU runs the operators in PyTorch",
                "run `cryoalign build-kernels`"
                + ("" if build.find_nvcc() else ", which needs the CUDA toolkit's nvcc"),
            )
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        message = f"the CUDA kernels do not load: {error}"
        advice = "rebuild them: `cryoalign build-kernels`"
        warnings.warn(f"{message}; a GPU runs the operators in PyTorch. {advice}", stacklevel=2)
        return Status(False, message, advice)
    return Status(True, f"CUDA kernels loaded from {library}")


def status() -> Status:
    """`load`'s outcome and what it means for the GPU at hand; for people to read."""
    found = load()
    if found.loaded and not torch.cuda.is_available():
        return Status(True, found.message + "; but no GPU is visible", "check nvidia-smi")
    if found.loaded:
        names = [
            (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        ]
        old = [name for name, capability in names if capability < NEEDED_CAPABILITY]
        if old:
            return Status(
                True,
                f"{found.message}; too old for them: {', '.join(old)}",
                "a card from Ampere (compute capability 8.0) on",
            )
    return found


def usable(device: torch.device) -> bool:
    """Whether the kernels serve this device; says so once when the card is too old."""
    if device.type != "cuda" or unwanted():
        return False
    return load().loaded and _new_enough(device.index or 0)


def unwanted() -> bool:
    """``CRYOALIGN_NO_KERNELS=1``: everything in PyTorch, on a GPU and on a CPU."""
    return os.environ.get(CRYOALIGN_NO_KERNELS) == "1"


def portable_only() -> bool:
    """``CRYOALIGN_PORTABLE=1``: use the kernel for every card even where a faster one is there."""
    return os.environ.get("CRYOALIGN_PORTABLE") == "1"


@functools.cache
def _new_enough(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    if capability >= NEEDED_CAPABILITY:
        return True
    warnings.warn(
        f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}."
        f"{capability[1]}) lacks the tensor cores that cryoalign's kernels need (8.0): it runs "
        "the PyTorch operators, which are slower",
        stacklevel=3,
    )
    return False
