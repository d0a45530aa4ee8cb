"""Report the hardware and kernels that this installation uses, and what would make it faster."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from cryoalign.operators import kernels
from cryoalign.operators.kernels import build, cpu


class Finding(NamedTuple):
    """One line of the report; ``advice`` is empty where nothing needs to change."""

    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Examine Python, PyTorch, processor, GPUs, compilers and kernels without changing them."""
    try:
        ours = version("cryoalign")
    except PackageNotFoundError:
        ours = "(not installed)"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    states = {"CPU kernels": cpu.status(), "CUDA kernels": kernels.status()}
    return [
        Finding("cryoalign", f"{ours}, Python {platform.python_version()}"),
        Finding("PyTorch", f"{torch.__version__}, {built}"),
        _processor(),
        *_gpus(),
        Finding("C++ compiler", build.find_compiler() or "none"),
        Finding("nvcc", build.find_nvcc() or "none"),
        *(Finding(what, state.message, state.advice) for what, state in states.items()),
    ]


def _processor() -> Finding:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    advice = ""
    if threads < cores // 2:
        advice = f"threads={cores} in the settings, or unset OMP_NUM_THREADS, uses all cores"
    elif "AVX" not in capability and platform.machine() in ("x86_64", "AMD64"):
        advice = "a processor with AVX2 or AVX-512 is several times faster"
    return Finding("processor", f"{cores} cores, {threads} threads, {capability}", advice)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        advice = "check nvidia-smi and the driver" if torch.version.cuda else ""
        return [Finding("GPU", "none that PyTorch sees", advice)]
    findings = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        major, minor = torch.cuda.get_device_capability(i)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        findings.append(Finding(f"GPU {i}", f"{card.name}, {memory}, capability {major}.{minor}"))
        if kernels.usable(torch.device("cuda", i)):
            findings.append(_served(i))
    return findings


def _served(index: int) -> Finding:
    """Which searches run in PyTorch on a GPU, although the kernels are loaded."""
    memory = torch.ops.cryoalign_cuda.shared_limit(index) // 1024
    return Finding(
        f"GPU {index}, in PyTorch",
        "searches whose first stage has a last ring above 48 px, or images that do not fit the "
        f"{memory} KB of shared memory of a block",
    )
