"""Memory and speed of streaming a stack that memory need not hold."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import mrcfile
import numpy as np

from bench.result import Result, Row

MEGA = 1e6
JOB = """
import json, resource, sys, time
import torch
from torch.utils.data import DataLoader
from cryoalign.learn.dataset import Normalise, ParticleDataset
from cryoalign.io.stack import read_particles
from cryoalign.learn.stream import ParticleStream

path, how, block, window = json.loads(sys.argv[1])
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
stack = read_particles(path)
dataset = ParticleDataset(stack, Normalise(0.45 * stack.shape[0]))
dataset.read(range(64))
before = peak()
if how == "stream":
    loader = DataLoader(ParticleStream(dataset, block=block, window=window), 64)
else:
    loader = DataLoader(dataset, 64, shuffle=True)
start, seen = time.perf_counter(), 0
for batch in loader:
    seen += len(batch["index"])
print(json.dumps([before, peak(), seen, time.perf_counter() - start]))
"""


def run(
    n: Annotated[tuple[int, ...], "particles"] = (2000, 8000, 32000),
    size: Annotated[int, "box, px"] = 256,
    block: Annotated[int, "rows read in one go"] = 256,
    window: Annotated[int, "blocks held"] = 4,
) -> Result:
    """Peak resident memory above what it is after one batch, and particles a second, without
    workers; each case a process of its own. The stack is a sparse file: no disk is measured."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in n:
            path = Path(folder) / "particles.mrcs"
            sparse_stack(path, count, size)
            for how in ("stream", "shuffled dataset"):
                job = json.dumps([str(path), how, block, window])
                done = subprocess.run(
                    [sys.executable, "-c", JOB, job], capture_output=True, text=True, check=True
                )
                before, peak, seen, seconds = json.loads(done.stdout)
                rows.append(
                    {
                        "read by": how,
                        "n": seen,
                        "file MB": path.stat().st_size / MEGA,
                        "window MB": 4 * block * window * size**2 / MEGA,
                        "before MB": before / MEGA,
                        "peak above MB": (peak - before) / MEGA,
                        "particles/s": seen / seconds,
                    }
                )
    return Result(rows)


def sparse_stack(path: Path, n: int, size: int) -> None:
    """A stack of zeros that takes no room on the disk."""
    path.unlink(missing_ok=True)
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.zeros((1, size, size), np.float32))
        mrc.set_image_stack()
        mrc.header.nz = n
    with path.open("r+b") as file:
        file.truncate(1024 + 4 * n * size**2)
