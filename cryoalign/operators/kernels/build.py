"""Compile the sources of this folder into libraries: ``cryoalign build-kernels``.

One library of the CUDA sources where there is nvcc, one for the CPU where there is a C++ compiler.
The first uses PyTorch's stable ABI only, the second nothing of PyTorch's, so one build serves
PyTorch 2.10 and later. Names carry a hash of the sources and of the way they are built: a library
that is not made of these very sources, for this kind of processor, is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
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
CPU_SOURCE = "peaks.cpp"
# No -march=native: a home directory is often shared by machines of several kinds.
CPU_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
CPU_LEVELS = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why and what to do."""


class NoCompilerError(BuildError):
    """There is nothing to build it with."""


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


def cpu_library_name() -> str:
    """File name of the CPU's library of the present source, for this kind of processor."""
    digest = hashlib.sha256(" ".join(_cpu_flags()).encode())
    digest.update((SOURCES / CPU_SOURCE).read_bytes())
    return f"{_cpu_prefix()}{digest.hexdigest()[:16]}.so"


def _cpu_prefix() -> str:
    import torch

    level = torch.backends.cpu.get_cpu_capability().replace(" ", "-").lower()
    return f"_cpu_{sys.platform}_{platform.machine()}_{level}_"


def _cpu_flags() -> tuple[str, ...]:
    import torch

    x86 = platform.machine() in ("x86_64", "AMD64")
    level = CPU_LEVELS.get(torch.backends.cpu.get_cpu_capability(), ()) if x86 else ()
    return (*CPU_FLAGS, *level)


def cache_folder() -> Path:
    """Where the library goes when the package's own folder cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cryoalign"


def find_library() -> Path | None:
    """The built library of the present sources, if there is one."""
    return _find(library_name())


def find_cpu_library() -> Path | None:
    """`find_library` for the CPU."""
    return _find(cpu_library_name())


def _find(name: str) -> Path | None:
    for folder in (SOURCES, cache_folder()):
        if (folder / name).is_file():
            return folder / name
    return None


def _loads(library: Path) -> bool:
    """Whether it is whole, and made for this system: a copied home directory may hold others."""
    import torch  # noqa: F401  (whose libraries the CUDA one needs)

    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def find_nvcc() -> str | None:
    """The CUDA compiler: ``$CUDA_HOME/bin/nvcc``, on the PATH, or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(p) for p in places if p.is_file()), None)


def find_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else c++, g++ or clang++ on the PATH."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build(verbose: bool = False) -> Path:
    """Compile the CUDA library, unless the present sources' library is there already and loads.

    Args:
        verbose: print the compiler's commands and its report of registers and shared memory.

    Returns:
        The library's path: beside the sources, or in `cache_folder`.

    Raises:
        BuildError: no compiler, no sources, or the compiler's own complaint.
    """
    existing = find_library()
    if existing is not None and _loads(existing):
        return existing
    nvcc = find_nvcc()
    if nvcc is None:
        raise NoCompilerError(
            "the CUDA kernels need NVIDIA's compiler: install the CUDA toolkit (12.8 or later) so "
            "that nvcc is on the PATH, or set CUDA_HOME; without it cryoalign works in PyTorch"
        )
    if not sources():
        raise BuildError(f"no CUDA sources in {SOURCES}: reinstall cryoalign")
    with tempfile.TemporaryDirectory(prefix="cryoalign-build-") as scratch:
        objects = _compile(nvcc, Path(scratch), verbose)
        command = [nvcc, *objects, *_torch_flags()[1], *LINK]
        return _link(command, library_name(), "_cuda_*.so", verbose)


def build_cpu(verbose: bool = False) -> Path:
    """`build` for the CPU, with a C++ compiler (GCC 11, Clang 12 or later).

    Raises:
        BuildError: no compiler, or its own complaint.
    """
    existing = find_cpu_library()
    if existing is not None and _loads(existing):
        return existing
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            "the CPU kernels need a C++ compiler: install g++ or clang++ so that it is on the "
            "PATH, or set CXX; without it cryoalign works in PyTorch"
        )
    command = [compiler, *_cpu_flags(), str(SOURCES / CPU_SOURCE)]
    return _link(command, cpu_library_name(), f"{_cpu_prefix()}*.so", verbose)


def _link(command: list[str], name: str, stale: str, verbose: bool) -> Path:
    """Run a compiler whose outcome is a library; put it in its place; remove stale ones
    beside the sources."""
    folder = SOURCES if os.access(SOURCES, os.W_OK) else cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    # Linked beside its place and renamed: nobody ever loads half a library.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as beside:
        linked = Path(beside.name)
    try:
        _run([*command, "-o", str(linked)], verbose)
        linked.chmod(0o755)
        linked.replace(target)
    finally:
        linked.unlink(missing_ok=True)
    if folder == SOURCES:  # a cache may serve other installations, of other sources
        for other in folder.glob(stale):
            if other != target:
                other.unlink(missing_ok=True)
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


def main(verbose: bool) -> int:
    """Build what there are compilers for and say so. The exit status is 1 if that is nothing, or
    if one fails."""
    built, status = 0, 0
    for make in (build_cpu, build):
        try:
            print(make(verbose))
            built += 1
        except NoCompilerError as error:
            print(f"not built: {error}", file=sys.stderr)
        except BuildError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status if built else 1
