"""From file to prepared particles: speed beside one image at a time, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import mrcfile
import numpy as np
import torch

from bench.memory import resident
from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.masks import normalise
from cryoalign.io.formats import read_header
from cryoalign.io.stack import ParticleStack, read_particles
from cryoalign.io.survey import Survey
from cryoalign.particles import cache
from cryoalign.particles.prepare import CPU_BATCH, prepare
from cryoalign.particles.reading import CUDA_CHUNK_BYTES
from cryoalign.particles.settings import Images
from cryoalign.pose import Pose
from cryoalign.results.averages import class_sums
from cryoalign.runtime.threads import map_in_order, readers

MEGA = 1e6


def run(
    sizes: Annotated[tuple[int, ...], "boxes, px"] = (64, 90, 256),
    dtypes: Annotated[tuple[str, ...], "of the pixels on disk"] = ("float32", "float16"),
    megabytes: Annotated[int, "of the images of a file, as float32"] = 128,
    plain: Annotated[int, "images that the plain formulation reads"] = 500,
    repeats: Annotated[int, "of every measurement; the median counts"] = 5,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Images per second from files in the page cache: the bytes alone, the stack's read, and read
    and prepared, beside the plain formulation, which maps the file and takes one image at a time.

    On a CPU per second of CPU time of one thread, on a GPU per second on the clock, with the rates
    of copies: from pinned memory to the GPU, and from the file to the GPU, which is the most that
    the first pass can reach.
    """
    where = torch.device(device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            for dtype in dtypes:
                path = Path(folder, "particles.mrcs")
                n = max(plain, int(megabytes * MEGA / (4 * size**2)))
                _write(path, n, size, dtype)
                rows.append(_measured(path, plain, repeats, where))
    notes = ["x plain: of read and prepared; x plain read: of the stack's read"]
    if where.type == "cuda":
        notes.append("share: of the first pass, of the rate from the file to the GPU")
    return Result(rows, notes)


def _measured(path: Path, plain: int, repeats: int, device: torch.device) -> Row:
    stack = read_particles(path)
    n, size, file = len(stack), stack.shape[0], read_header(path)
    chunk = CPU_BATCH if device.type == "cpu" else CUDA_CHUNK_BYTES // (4 * size**2)
    parts = [part.numpy() for part in torch.arange(n).split(chunk)]
    room = torch.empty(chunk, size, size)
    again = prepare(stack, Images(cache="none"), device=str(device))
    stages: dict[str, Callable[[], object]] = {
        "bytes": lambda: _bytes(path, chunk * file.image_bytes),
        "read": lambda: [stack.read_into(room[: len(part)], part) for part in parts],
        "prepared": lambda: (
            [again.read(torch.from_numpy(part)) for part in parts]
            if device.type == "cpu"
            else prepare(stack, device=str(device))
        ),
        "plain read": lambda: list(_one_by_one(path, plain)),
        "plain": lambda: [
            normalise(each[None].to(device), size / 2) for each in _one_by_one(path, plain)
        ],
    }
    if device.type == "cuda":
        pinned = torch.empty(CUDA_CHUNK_BYTES // 4, pin_memory=True)
        stages["copy"] = lambda: [pinned.to(device, non_blocking=True) for _ in range(32)]
        stages["file to GPU"] = lambda: _to_gpu(path, device)
    times = measure(stages, device, repeats)
    seconds = {
        name: time.cpu if device.type == "cpu" else time.wall for name, time in times.items()
    }
    row: Row = {
        "box": size,
        "dtype": str(file.dtype),
        "n": n,
        "bytes, images/s": n / seconds["bytes"],
        "bytes GB/s": file.nbytes / seconds["bytes"] / 1e9,
        "read, images/s": n / seconds["read"],
        "x plain read": n / seconds["read"] * seconds["plain read"] / plain,
        "particles/s": n / seconds["prepared"],
        "x plain": n / seconds["prepared"] * seconds["plain"] / plain,
    }
    if device.type == "cuda":
        row["pinned to GPU GB/s"] = 32 * CUDA_CHUNK_BYTES / seconds["copy"] / 1e9
        row["file to GPU GB/s"] = file.nbytes / seconds["file to GPU"] / 1e9
        row["share"] = seconds["file to GPU"] / seconds["prepared"]
    return row


def _write(path: Path, n: int, size: int, dtype: str) -> None:
    """Noise, in pieces that repeat."""
    some = np.random.default_rng(0).normal(size=(min(n, 256), size, size)).astype(dtype)
    mode = {"float32": 2, "float16": 12}[dtype]
    with mrcfile.new_mmap(path, (n, size, size), mode, overwrite=True) as mrc:
        mrc.set_image_stack()
        for start in range(0, n, len(some)):
            mrc.data[start : start + len(some)] = some[: n - start]


def _bytes(path: Path, length: int) -> None:
    """Read a file from its beginning to its end, into the same memory."""
    room = memoryview(bytearray(length))
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass


def _one_by_one(path: Path, n: int) -> Iterator[torch.Tensor]:
    """The plain formulation: each image from a memory map, as float32."""
    with mrcfile.mmap(path) as mrc:
        for i in range(n):
            yield torch.from_numpy(mrc.data[i].astype(np.float32))


def _to_gpu(path: Path, device: torch.device) -> None:
    """Copy the bytes of a file to the GPU, by as many threads as the reading of particles has."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def copied(start: int) -> torch.Tensor:
            room = torch.empty(CUDA_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
            os.preadv(file.fileno(), [room.numpy().data], start)
            return room.to(device, non_blocking=True)

        for _ in map_in_order(copied, range(0, size, CUDA_CHUNK_BYTES), readers(), ahead=True):
            pass
    torch.cuda.synchronize(device)


def memory(
    n: Annotated[tuple[int, ...], "rows of the stack"] = (10_000, 100_000, 1_000_000),
    size: Annotated[int, "box, px"] = 32,
    budget: Annotated[int, "megabytes that prepared images may take"] = 100,
    k: Annotated[int, "classes"] = 10,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Peak memory of preparing n particles and averaging them, with room for some of them.

    Each case is a process of its own; resident memory on a CPU, allocated memory on a GPU, above
    what it is after 1000 particles. The rows repeat the images of a small file, so that they cost
    no disk; they are read as those of a long file are.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "few.mrcs")
        _write(path, 1000, size, "float32")
        for count in n:
            job = {"n": count, "budget": budget * MEGA, "k": k, "device": device}
            command = [sys.executable, "-m", "bench.input", str(path), json.dumps(job)]
            done = subprocess.run(
                command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"the measured process failed:\n{done.stderr}")
            before, peak, kept = json.loads(done.stdout.splitlines()[-1])
            rows.append(
                {
                    "n": count,
                    "particles MB": 4 * count * size**2 / MEGA,
                    "kept MB": kept / MEGA,
                    "before MB": before / MEGA,
                    "peak above MB": (peak - before) / MEGA,
                    "not kept, bytes a particle": (peak - before - kept) / count,
                }
            )
    return Result(rows, ["bytes a particle: of rows, poses and classes, and of batches"])


def _averaged(path: Path, job: dict[str, Any]) -> None:
    """The measured process: print bytes before, at the peak, and of the images kept."""
    torch.set_num_threads(1)
    cuda = job["device"] == "cuda"

    def average(n: int, budget: float) -> float:
        file = read_header(path)
        image = np.arange(n) % file.shape[0]
        stack = ParticleStack(
            Survey(path, files=(file,), file_of=np.zeros(n, np.int32), image_of=image)
        )
        device = torch.device(job["device"])
        cache.SHARE = budget / cache.available_memory(device)
        particles = prepare(stack, device=job["device"])
        label = torch.arange(n) % job["k"]
        class_sums(particles, Pose.identity(n), label, job["k"])
        kept = particles._cache.kept()
        return sum(
            count * place.dtype.itemsize * particles.size**2
            for place, count in kept.items()
            if place.device.type == device.type
        )

    average(1000, 0.0)  # libraries load and plan much when first used
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    kept = average(job["n"], job["budget"])
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    print(json.dumps([before, peak, kept]))


if __name__ == "__main__":
    _averaged(Path(sys.argv[1]), json.loads(sys.argv[2]))
