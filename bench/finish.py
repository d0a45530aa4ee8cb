"""What a run spends before and after its iterations: tables, quality, pictures, embedding."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bench.result import Result, Row
from bench.stream import sparse_stack
from cryoalign.app.run_folder import EMBEDDED, particle_table, write_csv
from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.io.relion import one_group_tables, write_particles_star
from cryoalign.io.stack import read_particles
from cryoalign.io.star import StarTables, write_star
from cryoalign.particles.prepare import prepare
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Found, Pose
from cryoalign.report.embedding import embed, features
from cryoalign.report.page import write_report
from cryoalign.report.pictures import draw
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import class_sums
from cryoalign.results.evidence import Scope, trials_of
from cryoalign.results.quality import conclude

MEGA = 1e6
COLUMNS = 30  # of the STAR file
DIFFERENT = 4000  # simulated particles, which are repeated


class _Repeated:
    """A stack of n particles that are few particles, repeated."""

    pixel_size: float | None

    def __init__(self, made: Simulation, n: int) -> None:
        self.images, self.n, self.pixel_size = made.images, n, made.pixel_size
        self.shape: tuple[int, int] = (made.images.shape[1], made.images.shape[2])

    def __len__(self) -> int:
        return self.n

    def read(self, rows: Tensor) -> Tensor:
        return self.images[rows % len(self.images)]


def run(
    n: Annotated[tuple[int, ...], "particles"] = (10_000, 100_000, 1_000_000),
    k: Annotated[int, "classes"] = 10,
    size: Annotated[int, "box, px"] = 32,
    judged: Annotated[int, "particles whose quality is computed, at most"] = 100_000,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Seconds and peak memory of each part of a run that is not an iteration.

    The STAR file has 30 columns in RELION's layout, of a sparse stack. A few thousand simulated
    particles with their true poses are repeated. Quality is computed of no more particles than
    ``judged``, and its columns are repeated for the tables and pictures. Seconds are on the clock;
    CPU seconds are of all threads. Peak is the resident memory, above what it was before the part.
    """
    rows: list[Row] = []
    made = simulate(min(DIFFERENT, *n), k, size=size, snr=0.2)
    with tempfile.TemporaryDirectory() as name:
        for count in n:
            rows += _measure(Path(name), made, count, min(count, judged), device)
    return Result(rows, [f"quality: of at most {judged:,} particles"])


def _measure(folder: Path, made: Simulation, n: int, judged: int, device: str) -> Iterator[Row]:
    star, size = folder / "particles.star", made.images.shape[-1]
    sparse_stack(folder / "particles.mrcs", n, size)
    write_star(star, _tables(n, size))

    def row(part: str, count: int = n) -> Row:
        return {"n": n, "part": part, "of": count}

    with _measured(row("read STAR")) as now:
        stack = read_particles(star)
    yield now
    particles = prepare(_Repeated(made, judged), device=device)
    rings, mask = Rings(last_ring=round(0.4 * size)), soft_mask(size, 0.4 * size, 4, device)
    chosen = torch.arange(judged) % len(made.images)
    label, k = made.class_number[chosen] - 1, len(made.views)
    pose, score = made.pose[chosen], torch.full((judged,), 0.5)
    with _measured(row("averages", judged)) as now:
        sums = class_sums(particles, pose, label, k)
    yield now
    scope = Scope(mask, rings, trials_of(k, 3, 0.4 * size, True))
    history = [{"iteration": i, "mean_score": 0.5, "reassigned": 0.1} for i in range(20)]
    with _measured(row("quality", judged)) as now:
        found = Found(label, pose, score)
        alignment = _repeated(conclude(particles, found, sums, scope, history), n)
    yield now
    with _measured(row("write STAR")) as now:
        write_particles_star(
            folder / "out.star", stack, alignment.pose, alignment.class_number,
            alignment.class_number > 0, alignment.score,
        )  # fmt: skip
    yield now
    with _measured(row("tables")) as now:
        table = particle_table(alignment)
        write_csv(folder / "particles.csv", table)
        table.to_parquet(folder / "particles.parquet", index=False)
        alignment.save(folder / "alignment.npz")
    yield now
    with _measured(row("pictures")) as now:
        pictures = draw(alignment, 3.0)
    yield now
    few = np.linspace(0, n - 1, min(EMBEDDED, n)).astype(int)
    with _measured(row("embedding", len(few))) as now:
        for aligned in (None, alignment):
            embed(features(_Repeated(made, n), aligned, rows=few))
    yield now
    with _measured(row("report")) as now:
        write_report(alignment, folder, None, pictures)
    yield now


@contextmanager
def _measured(row: Row) -> Iterator[Row]:
    """Add the cost of the ``with`` block to a row."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak becomes what is resident now
    before = _resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    yield row
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    row["seconds"] = time.perf_counter() - wall
    row["CPU seconds"] = time.process_time() - cpu
    peak = _resident("VmHWM")
    row["peak above MB"] = None if before is None or peak is None else (peak - before) / MEGA


def _resident(what: str) -> float | None:
    """Bytes of VmRSS (now) or VmHWM (peak); None where Linux does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(each for each in status.read_text().splitlines() if each.startswith(what))
    return 1024.0 * int(line.split()[1])


def _tables(n: int, size: int) -> StarTables:
    """A particle STAR of `COLUMNS` columns: names, whole numbers, and numbers with six decimals."""
    tables = one_group_tables("particles.mrcs", n, size, 3.0)
    rng = np.random.default_rng(0)
    micrographs = np.char.mod(
        "MotionCorr/job002/Micrographs/FoilHole_%08d.mrc", np.arange(n) // 250
    )
    columns = {"rlnMicrographName": micrographs, "rlnGroupNumber": np.arange(n) // 250 + 1}
    for name in ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnDefocusU", "rlnDefocusV"):
        columns[name] = rng.uniform(0, 180, n).round(6)
    for i in range(COLUMNS - len(columns) - 2):
        columns[f"benchColumn{i}"] = rng.uniform(0, 1000, n).round(6) if i % 2 else np.zeros(n)
    particles = tables.table.assign(**columns)
    return replace(tables, blocks=tables.blocks | {"particles": particles})


def _repeated(alignment: Alignment, n: int) -> Alignment:
    """The same classes, with the rows repeated until there are n."""
    rows = torch.arange(n) % len(alignment.pose)
    pose = alignment.pose
    return replace(
        alignment,
        pose=Pose(pose.angle[rows], pose.shift[rows], pose.mirror[rows]),
        class_number=alignment.class_number[rows],
        score=alignment.score[rows],
        particle_quality=pd.DataFrame(alignment.particle_quality)
        .iloc[rows.numpy()]
        .reset_index(drop=True),
    )
