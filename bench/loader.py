"""Particles a second out of a ``DataLoader``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
from torch.utils.data import DataLoader

from bench.result import Result, Row
from cryoalign.io.stack import read_particles
from cryoalign.learn.dataset import Mask, Normalise, ParticleDataset
from cryoalign.particles.simulate import simulate, write_simulation


def run(
    data: Annotated[Path | None, "a STAR file or stack; else a simulated one"] = None,
    n: Annotated[int, "simulated particles"] = 4000,
    size: Annotated[int, "simulated box, px"] = 90,
    workers: Annotated[tuple[int, ...], "worker processes"] = (0, 1, 2, 3, 4),
    batch_size: Annotated[int, "particles a batch"] = 256,
) -> Result:
    """Read, normalise, mask and collate: one shuffled epoch after one that starts the workers."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = write_simulation(folder, simulate(n, 10, size=size, seed=0))
        stack = read_particles(data)
        radius = 0.4 * stack.shape[0]
        dataset = ParticleDataset(stack, Normalise(radius + 4), Mask(radius))
        rows: list[Row] = []
        for count in workers:
            loader = DataLoader(
                dataset, batch_size, shuffle=True, num_workers=count,
                persistent_workers=count > 0, generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            for _ in loader:  # workers are there, files in the page cache
                pass
            start = time.perf_counter()
            seen = sum(len(batch["index"]) for batch in loader)
            seconds = time.perf_counter() - start
            rows.append({"workers": count, "particles": seen, "particles/s": seen / seconds})
    return Result(rows)
