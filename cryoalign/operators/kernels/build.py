"""Compile the sources of this folder into libraries: ``cryoalign build-kernels``.

The CUDA sources become one library if nvcc is installed, and the C++ sources another if a C++
compiler is. The first uses only PyTorch's stable ABI, the second nothing of PyTorch, so one build
serves PyTorch 2.10 and later. File names contain a hash of the sources and the compiler flags, so
that a library of other sources or for another kind of processor is never loaded.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
# Ampere and Ada cards run the code of sm_80, Hopper cards that of sm_90a. For newer cards the
# driver compiles the PTX of compute_80 when the library is loaded.
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
# This environment variable adds compiler flags for work on the kernels, such as -lineinfo or
# -DCRYOALIGN_RACECHECK (see hopper.cu).
EXTRA = "CRYOALIGN_NVCC_FLAGS"
LINK = ("-shared", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu")
# Not -march=native, because machines of several kinds often share a home directory.
CPU_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
CPU_LEVELS = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}


class BuildError(RuntimeError):
    """The library cannot be built on this machine; the message says why and what to do."""


class NoCompilerError(BuildError):
    """The compiler is not installed."""


def sources() -> list[Path]:
    """The CUDA sources, in a fixed order."""
    return sorted(SOURCES.glob("*.cu"))


def cpu_sources() -> list[Path]:
    """The C++ sources, in a fixed order."""
    return sorted(SOURCES.glob("*.cpp"))


def _flags() -> list[str]:
    return [*FLAGS, *os.environ.get(EXTRA, "").split()]


def library_name() -> str:
    """File name of the CUDA library of the present sources, headers and flags."""
    digest = _digest((*_flags(), *LINK), sorted(SOURCES.glob("*.cu*")))
    return f"_cuda_{digest}.so"


def cpu_library_name() -> str:
    """File name of the CPU library of the present sources, for this kind of processor."""
    prefix, flags = _cpu_target()
    return f"{prefix}{_digest(flags, [*cpu_sources(), *sorted(SOURCES.glob('*.h'))])}.so"


def _digest(flags: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_target() -> tuple[str, tuple[str, ...]]:
    """How library names start and the compiler flags, for this kind of processor."""
    import torch

    machine, level = platform.machine(), torch.backends.cpu.get_cpu_capability()
    flags = CPU_LEVELS.get(level, ()) if machine in ("x86_64", "AMD64") else ()
    level = level.replace(" ", "-").lower()
    return f"_cpu_{sys.platform}_{machine}_{level}_", (*CPU_FLAGS, *flags)


def cache_folder() -> Path:
    """Where the library is stored if the package's own folder is not writable."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cryoalign"


def find_library() -> Path | None:
    """The CUDA library of the present sources, if it is built."""
    return _find(library_name())


def find_cpu_library() -> Path | None:
    """The CPU library of the present sources, if it is built."""
    return _find(cpu_library_name())


def _find(name: str) -> Path | None:
    for folder in (SOURCES, cache_folder()):
        if (folder / name).is_file():
            return folder / name
    return None


def _loads(library: Path) -> bool:
    """Whether the library is complete and made for this system, not copied from another one."""
    import torch  # noqa: F401  (the CUDA library needs PyTorch's libraries)

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
    """Compile the CUDA library, unless that of the present sources is built already and loads.

    Args:
        verbose: print the compiler's commands and its report of registers and shared memory.

    Returns:
        The library's path: next to the sources, or in `cache_folder`.

    Raises:
        BuildError: there is no compiler, there are no sources, or the compiler failed.
    """
    existing = find_library()
    if existing is not None and _loads(existing):
        return existing
    nvcc = _needed(
        find_nvcc(),
        "the CUDA kernels need NVIDIA's compiler: install the CUDA toolkit (12.8 or later) so "
        "that nvcc is on the PATH, or set CUDA_HOME",
    )
    if not sources():
        raise BuildError(f"no CUDA sources in {SOURCES}: reinstall cryoalign")
    with tempfile.TemporaryDirectory(prefix="cryoalign-build-") as scratch:
        objects = _compile(nvcc, Path(scratch), verbose)
        command = [nvcc, *objects, f"-L{_torch_folder() / 'lib'}", *LINK]
        return _link(command, library_name(), "_cuda_*.so", verbose)


def build_cpu(verbose: bool = False) -> Path:
    """`build` for the CPU, with a C++ compiler: GCC 11, Clang 12 or later."""
    existing = find_cpu_library()
    if existing is not None and _loads(existing):
        return existing
    compiler = _needed(
        find_compiler(),
        "the CPU kernels need a C++ compiler: install g++ or clang++ so that it is on the PATH, or "
        "set CXX",
    )
    prefix, flags = _cpu_target()
    command = [compiler, *flags, *map(str, cpu_sources())]
    return _link(command, cpu_library_name(), f"{prefix}*.so", verbose)


def _needed(compiler: str | None, message: str) -> str:
    if compiler is None:
        raise NoCompilerError(f"{message}; without it cryoalign works in PyTorch")
    return compiler


def _link(command: list[str], name: str, stale: str, verbose: bool) -> Path:
    """Run a compiler that makes a library, put the library in place, and remove old ones next to
    the sources."""
    folder = SOURCES if os.access(SOURCES, os.W_OK) else cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    # It is written under another name and then renamed, so that no process loads half a library.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as beside:
        linked = Path(beside.name)
    try:
        _run([*command, "-o", str(linked)], verbose)
        linked.chmod(0o755)
        linked.replace(target)
    finally:
        linked.unlink(missing_ok=True)
    if folder == SOURCES:  # other installations may use the libraries in the cache
        for other in folder.glob(stale):
            if other != target:
                other.unlink(missing_ok=True)
    return target


def _compile(nvcc: str, scratch: Path, verbose: bool) -> list[str]:
    """Compile all sources in parallel and return the object files."""
    report = ["-Xptxas=-v"] if verbose else []
    flags = [*_flags(), *report, f"-I{_torch_folder() / 'include'}"]

    def one(source: Path) -> str:
        out = scratch / f"{source.stem}.o"
        _run([nvcc, *flags, "-c", str(source), "-o", str(out)], verbose)
        return str(out)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(one, sources()))


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


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
    """Build the libraries for which there are compilers, and print their paths.

    Returns:
        The exit status: 1 if no library was built or if one failed, else 0.
    """
    import torch  # here, so that looking for a library does not need it

    built, status = 0, 0
    for make in (build_cpu, build):
        if make is build and torch.version.cuda is None:
            print("not built: the CUDA kernels, which this PyTorch cannot use", file=sys.stderr)
            continue
        print("compiling ...", file=sys.stderr, flush=True)
        try:
            print(make(verbose))
            built += 1
        except NoCompilerError as error:
            print(f"not built: {error}", file=sys.stderr)
        except BuildError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status if built else 1
