"""Compile the CUDA sources of this folder into one library: ``python -m cryoalign.kernels.build``.

The library uses PyTorch's stable ABI only, so one build serves PyTorch 2.10 and later. Its
name carries a hash of the sources and of the way they are built: a library that is not made of
these very sources is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
# Ampere and Ada run sm_80, Hopper its own sm_90a; newer cards compile the PTX when they load it.
TARGETS = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
)
FLAGS = (
    "-O3",
    "-std=c++20",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Xcompiler=-fPIC",
    "--expt-relaxed-constexpr",
    *TARGETS,
)
# More flags, for whoever works on the kernels: -lineinfo, or -DCRYOALIGN_RACECHECK (see hopper.cu).
EXTRA = "CRYOALIGN_NVCC_FLAGS"
LINK = ("-shared", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu")


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why and what to do."""


def sources() -> list[Path]:
    """The CUDA sources, in a fixed order."""
    return sorted(SOURCES.glob("*.cu"))


def source_hash() -> str:
    """What the library is made of: sources, headers and flags."""
    digest = hashlib.sha256(" ".join((*_flags(), *LINK)).encode())
    for path in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _flags() -> list[str]:
    return [*FLAGS, *os.environ.get(EXTRA, "").split()]


def library_name() -> str:
    """File name of the library of the present sources."""
    return f"_cuda_{source_hash()}.so"


def cache_folder() -> Path:
    """Where the library goes when the package's own folder cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cryoalign"


def find_library() -> Path | None:
    """The built library of the present sources, if there is one."""
    name = library_name()
    for folder in (SOURCES, cache_folder()):
        if (folder / name).is_file():
            return folder / name
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler: ``$CUDA_HOME/bin/nvcc``, on the PATH, or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(p) for p in places if p.is_file()), None)


def build(verbose: bool = False) -> Path:
    """Compile the library, unless the present sources' library is there already.

    Args:
        verbose: print the compiler's commands and its report of registers and shared memory.

    Returns:
        The library's path: beside the sources, or in `cache_folder`.

    Raises:
        BuildError: no compiler, no sources, or the compiler's own complaint.
    """
    existing = find_library()
    if existing is not None:
        return existing
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "the CUDA kernels need NVIDIA's compiler: install the CUDA toolkit (12.8 or later) so "
            "that nvcc is on the PATH, or set CUDA_HOME; without it cryoalign works in PyTorch"
        )
    if not sources():
        raise BuildError(f"no CUDA sources in {SOURCES}: reinstall cryoalign")
    folder = SOURCES if os.access(SOURCES, os.W_OK) else cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name()
    with tempfile.TemporaryDirectory(prefix="cryoalign-build-") as scratch:
        objects = _compile(nvcc, Path(scratch), verbose)
        # Linked beside its place and renamed: nobody ever loads half a library.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as beside:
            linked = Path(beside.name)
        try:
            _run([nvcc, *objects, "-o", str(linked), *_torch_flags()[1], *LINK], verbose)
            linked.chmod(0o755)
            linked.replace(target)
        finally:
            linked.unlink(missing_ok=True)
    for stale in folder.glob("_cuda_*.so"):
        if stale != target:
            stale.unlink(missing_ok=True)
    return target


def _compile(nvcc: str, scratch: Path, verbose: bool) -> list[str]:
    """Object files of all sources, made side by side."""
    report = ["-Xptxas=-v"] if verbose else []
    flags = [*_flags(), *report, *_torch_flags()[0]]

    def one(source: Path) -> str:
        out = scratch / f"{source.stem}.o"
        _run([nvcc, *flags, "-c", str(source), "-o", str(out)], verbose)
        return str(out)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(one, sources()))


def _torch_flags() -> tuple[list[str], list[str]]:
    """Compiler's and linker's flags that find PyTorch's headers and libraries."""
    import torch

    root = Path(torch.__file__).parent
    return [f"-I{root / 'include'}"], [f"-L{root / 'lib'}"]


def _run(command: list[str], verbose: bool) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if verbose:
        print(" ".join(command), done.stdout, done.stderr, sep="\n")
    if done.returncode:
        raise BuildError(
            f"{' '.join(command)}\nfailed:\n{done.stderr or done.stdout}\ncryoalign works "
            "without the library, in PyTorch"
        )


if __name__ == "__main__":
    import sys

    try:
        print(build(verbose="-v" in sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"error: {error}")
