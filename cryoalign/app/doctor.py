"""What this installation runs on, and what would make it faster."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from cryoalign.operators import kernels
from cryoalign.operators.kernels import build, cpu


class Finding(NamedTuple):
    """One line of the doctor's report; ``advice`` is empty where all is well."""

    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at Python, PyTorch, processor, GPUs and kernels; changes nothing."""
    return [_python(), _torch(), _processor(), *_gpus(), *_compilers(), *_kernels()]


def _python() -> Finding:
    try:
        ours = version("cryoalign")
    except PackageNotFoundError:
        ours = "(not installed)"
    return Finding("cryoalign", f"{ours}, Python {platform.python_version()}")


def _torch() -> Finding:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("PyTorch", f"{torch.__version__}, {built}")


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
        capability = torch.cuda.get_device_capability(i)
        text = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, capability {capability[0]}."
        findings.append(Finding(f"GPU {i}", f"{text}{capability[1]}"))
    return findings


def _compilers() -> list[Finding]:
    return [
        Finding("C++ compiler", build.find_compiler() or "none"),
        Finding("nvcc", build.find_nvcc() or "none"),
    ]


def _kernels() -> list[Finding]:
    states = {"CPU kernels": cpu.status(), "CUDA kernels": kernels.status()}
    return [Finding(what, state.message, state.advice) for what, state in states.items()]
