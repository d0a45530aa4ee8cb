"""Peak memory of a whole iteration, as particles, references and shifts grow."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.data import particle_of
from bench.result import Result, Row
from cryoalign.io.formats import write_images
from cryoalign.io.stack import read_particles
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.simulate import simulate

MEGA = 1e6


def run(
    n: Annotated[tuple[int, ...], "particles; K and shifts as the first of theirs"] = (
        500,
        2000,
        8000,
    ),
    k: Annotated[tuple[int, ...], "references; shifts as the first of theirs"] = (5, 50, 200),
    max_shift: Annotated[tuple[int, ...], "largest shifts, px; K as the first of its"] = (1, 3, 5),
    few: Annotated[int, "particles where K or the shifts grow"] = 128,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Peak memory of one MRA iteration, particles read from a file.

    Resident memory on a CPU, allocated memory on a GPU.

    Each case is a process of its own: its peak above what was resident after importing and a
    tiny alignment. Particles and references are images of one simulated set, repeated. The
    largest K goes with the largest shifts too.
    """
    cases = [(count, k[0], max_shift[0]) for count in n]
    cases += [(few, classes, max_shift[0]) for classes in k]
    cases += [(few, k[0], reach) for reach in max_shift[1:]]
    cases += [(few, k[-1], max_shift[-1])]
    threads = torch.get_num_threads()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count, classes, reach in cases:
            _write(folder, count, classes, size)
            job: dict[str, Any] = {"max_shift": reach, "last_ring": last_ring, "threads": threads}
            job |= {"device": device}
            before, peak = _in_new_process(folder, job)
            rows.append(
                {
                    "n": count,
                    "k": classes,
                    "shifts": (2 * reach + 1) ** 2,
                    "particles MB": 4 * count * size**2 / MEGA,
                    "references MB": 4 * classes * size**2 / MEGA,
                    "before MB": before / MEGA,
                    "peak above MB": (peak - before) / MEGA,
                    "table MB": 16 * count * classes * (2 * reach + 1) ** 2 * 128 / MEGA,
                }
            )
    notes = [
        "before: resident after importing and a tiny alignment, with which libraries set up",
        "table: the whole correlation table, had it been made (256 angles)",
    ]
    return Result(rows, notes)


def _write(folder: Path, n: int, k: int, size: int) -> None:
    data = simulate(min(n, 256), min(k, 50), size=size)
    images = data.images.repeat(-(-n // len(data.images)), 1, 1)[:n]
    views = data.views.repeat(-(-k // len(data.views)), 1, 1)[:k]
    write_images(folder / "particles.mrcs", images, data.pixel_size)
    write_images(folder / "views.mrcs", views, data.pixel_size)


def _in_new_process(folder: Path, job: dict[str, Any]) -> tuple[float, float]:
    """Bytes resident before, and at the peak of, one iteration in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", str(folder), json.dumps(job)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr}")
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return before, peak


def _iterate(folder: Path, job: dict[str, Any]) -> None:
    """The measured process: print what was resident before, and at the peak."""
    torch.set_num_threads(job["threads"])
    tiny = simulate(8, 1, size=48)  # libraries load and plan much when first used
    align_multi_reference(tiny.images, tiny.views, iterations=1, device=job["device"])
    cuda = job["device"] == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    align_multi_reference(
        read_particles(folder / "particles.mrcs"),
        folder / "views.mrcs",
        iterations=1,
        particle=particle_of(job["last_ring"], job["max_shift"]),
        device=job["device"],
    )
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    print(json.dumps([before, peak]))


def resident(what: str) -> float:
    """Bytes of VmRSS (now) or VmHWM (peak).

    Linux' own account of this program comes first: ``getrusage`` also counts what the process held
    before it became this program, which is its parent's memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        found = next(line for line in lines if line.startswith(what + ":"))
        return 1024.0 * int(found.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    _iterate(Path(sys.argv[1]), json.loads(sys.argv[2]))
