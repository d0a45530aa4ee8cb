"""The optional CUDA kernels: whether they can be used, and loading them. (`cpu` is for the CPU.)

Without the library, without an NVIDIA GPU, or on a card older than Ampere, every operator runs in
PyTorch. ``cryoalign build-kernels`` builds the library.
"""

import functools
import os
import warnings
from typing import NamedTuple

import torch

# The kernels need tensor cores with fp16 inputs, fp32 sums and products of depth 16, which cards
# have from this compute capability on (Ampere).
NEEDED_CAPABILITY = (8, 0)
CRYOALIGN_NO_KERNELS = "CRYOALIGN_NO_KERNELS"


class Status(NamedTuple):
    """Whether a library is in use.

    Attributes:
        loaded: whether the library is in use.
        message: which library is loaded, or why none is.
        advice: what the user can do to make it faster; empty if nothing.
    """

    loaded: bool
    message: str
    advice: str = ""


def load_failed(kernels: str, error: Exception, instead: str) -> Status:
    """The status of a library that does not load, after a warning that says what runs instead."""
    message, advice = (
        f"the {kernels} do not load: {error}",
        "rebuild them: `cryoalign build-kernels`",
    )
    warnings.warn(f"{message}; {instead}. {advice}", stacklevel=3)
    return Status(False, message, advice)


@functools.cache
def load() -> Status:
    """Load the CUDA library if it is built from the present sources and PyTorch supports CUDA."""
    if torch.version.cuda is None:
        advice = "on a machine with an NVIDIA GPU, install a CUDA build of PyTorch"
        return Status(False, "this PyTorch has no CUDA: everything runs on the CPU", advice)
    from cryoalign.operators.kernels import build  # here, so that `python -m` can run it

    instead = "a GPU runs the operators in PyTorch"
    try:
        library = build.find_library()
        if library is not None:
            torch.ops.load_library(str(library))
            return Status(True, f"CUDA kernels loaded from {library}")
    except (OSError, RuntimeError) as error:
        return load_failed("CUDA kernels", error, instead)
    needs = "" if build.find_nvcc() else ", which needs the CUDA toolkit's nvcc"
    advice = f"run `cryoalign build-kernels`{needs}"
    return Status(False, f"the CUDA kernels are not built: {instead}", advice)


def status() -> Status:
    """Whether the CUDA kernels are loaded and suit the GPUs of this machine, for messages."""
    found = load()
    if not found.loaded:
        return found
    if not torch.cuda.is_available():
        return Status(True, found.message + "; but no GPU is visible", "check nvidia-smi")
    cards = range(torch.cuda.device_count())
    old = [i for i in cards if torch.cuda.get_device_capability(i) < NEEDED_CAPABILITY]
    if not old:
        return found
    names = ", ".join(map(torch.cuda.get_device_name, old))
    advice = "use a card from Ampere (compute capability 8.0) or later"
    return Status(True, f"{found.message}; too old for them: {names}", advice)


def usable(device: torch.device) -> bool:
    """Whether the kernels can run on this device; warns once if the card is too old."""
    if device.type != "cuda" or unwanted():
        return False
    return load().loaded and _new_enough(device.index or 0)


def unwanted() -> bool:
    """Whether ``CRYOALIGN_NO_KERNELS=1`` is set: everything runs in PyTorch, on GPU and CPU."""
    return os.environ.get(CRYOALIGN_NO_KERNELS) == "1"


def portable_only() -> bool:
    """Whether ``CRYOALIGN_PORTABLE=1`` is set: use the kernel that runs on every card, even where
    there is a faster one."""
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
