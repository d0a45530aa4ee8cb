"""Several processes: what they save, what exact sums cost, and whether results are the same."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from bench.data import particles
from bench.result import Result, Row
from cryoalign.particles.prepare import prepare
from cryoalign.pose import Pose
from cryoalign.results import averages
from cryoalign.results.averages import class_sums
from cryoalign.runtime.processes import ExactSum

ROOT = Path(__file__).resolve().parents[1]
JOB = """
import json, sys, time
import torch
from bench.data import particles
from cryoalign.methods import METHODS
from cryoalign.methods.base import align_with
from cryoalign.runtime.processes import choose_device, process_group, rank

given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
torch.use_deterministic_algorithms(given["deterministic"])
with process_group(choose_device(given["device"])) as device:
    images, _ = particles(given["n"], given["k"], given["size"], 0.1, device)
    method = METHODS[given["method"]]
    settings = {} if given["method"] in ("isac", "rfa") else {"n_classes": given["k"]}
    if given["method"] in ("mra", "rfa"):
        settings["iterations"] = 4
    if given["method"] == "mra":
        settings["settle"] = -1.0
    start = time.perf_counter()
    found = align_with(method, images, device=str(device), seed=1, **settings)
    wall = time.perf_counter() - start
    if rank() == 0:
        results = [found.pose.angle, found.pose.shift, found.pose.mirror, found.class_number,
                   found.score, found.averages, found.frc]
        torch.save((wall, list(found.history["seconds"]), results), given["out"])
"""


def run(
    processes: Annotated[tuple[int, ...], "numbers of processes; the first is compared with"] = (
        1,
        2,
    ),
    method: Annotated[tuple[str, ...], "methods"] = ("mra", "classify"),
    n: Annotated[int, "particles"] = 2000,
    k: Annotated[int, "classes"] = 10,
    size: Annotated[int, "box, px"] = 64,
    threads_each: Annotated[int, "threads of each process"] = 1,
    deterministic: Annotated[bool, "PyTorch's deterministic algorithms, for a GPU"] = False,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Time of whole runs on several processes, and whether all results are equal bit for bit.

    The particles are simulated, in memory, and the same for every number of processes. Also: the
    CPU time (on a GPU, the time) of class sums with exact sums over parts (`ExactSum`), and with
    sums of floating-point numbers in their place.
    """
    rows: list[Row] = []
    for name in method:
        given = {"n": n, "k": k, "size": size, "threads": threads_each, "device": device}
        given |= {"method": name, "deterministic": deterministic}
        first = None
        for count in processes:
            wall, steps, results = _timed(given, count)
            first = first or (wall, results)
            rows.append(
                {
                    "case": name,
                    "processes": count,
                    "s": wall,
                    "s a step": statistics.median(steps[1:] or steps),
                    "x the first": first[0] / wall,
                    "same bits": _equal(results, first[1]),
                }
            )
    where = torch.device(device)
    images, _ = particles(n, k, size, 0.1, where)
    prepared = prepare(images, device=device)
    pose, label = Pose.identity(n), torch.arange(n) % k
    costs = {}
    for case, kind in {"class sums, float": _FloatSum, "class sums, exact": ExactSum}.items():
        with _summed_by(kind):
            costs[case] = min(_seconds(prepared, pose, label, k, where) for _ in range(5))
        base = costs["class sums, float"]
        rows.append(
            {
                "case": case,
                "processes": 1,
                "s": costs[case],
                "s a step": costs[case],
                "x the first": base / costs[case],
                "same bits": True,
            }
        )
    told = f"{n} particles of {size} px, {k} classes, {threads_each} threads a process; {device}"
    return Result(rows, [told + (", deterministic" if deterministic else "")])


def _timed(given: dict[str, object], count: int) -> tuple[float, list[float], list[Tensor]]:
    """Seconds of a run and of its steps, and its results."""
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "job.py"), Path(folder, "out.pt")
        script.write_text(JOB)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(given["threads"]),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic products need it
        }
        argument = json.dumps(given | {"out": str(out)})
        command = [sys.executable, *(launch if count > 1 else []), str(script), argument]
        subprocess.run(command, check=True, env=environment)
        wall, steps, results = torch.load(out, weights_only=True)
        return wall, steps, results


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all results are equal; NaN, for unknown values, equals NaN."""
    return all(
        torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


class _FloatSum(ExactSum):
    """Sums of float64, whose last digits depend on the order."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.sums = torch.zeros(rows, columns, dtype=torch.float64, device=device)

    def add(self, values: Tensor, rows: Tensor | None = None) -> None:
        assert rows is not None
        self.sums.index_add_(0, rows, values)

    def total(self) -> Tensor:
        return self.sums


@contextmanager
def _summed_by(kind: type[ExactSum]) -> Iterator[None]:
    """Class sums are made with this class."""
    averages.ExactSum = kind  # type: ignore[misc]
    try:
        yield
    finally:
        averages.ExactSum = ExactSum  # type: ignore[misc]


def _seconds(
    prepared: averages.PreparedParticles, pose: Pose, label: Tensor, k: int, device: torch.device
) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    class_sums(prepared, pose, label, k).total.cpu()
    return clock() - start
