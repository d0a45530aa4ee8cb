"""Whole runs of `classify`, from a tensor and from a file, and how fast their E-step is."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.geometry import transform
from cryoalign.io.formats import write_images
from cryoalign.io.stack import read_particles
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.resolution_level import ResolutionLevel
from cryoalign.methods.state import State
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import Stack, TensorStack
from cryoalign.pose import Pose

PART = 4096  # particles that are simulated at a time


def run(
    n: Annotated[tuple[int, ...], "numbers of particles"] = (20_000, 100_000),
    k: Annotated[tuple[int, ...], "numbers of classes, one for each number of particles"] = (50,),
    size: Annotated[int, "box, px"] = 90,
    snr: Annotated[float, "of the particles"] = 0.1,
    sources: Annotated[tuple[str, ...], "tensor, file or both"] = ("tensor", "file"),
    repeats: Annotated[int, "timings of the E-step, of which the median counts"] = 5,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Seconds of whole runs of `classify` with its defaults, without the files of a result, and the
    speed of the last E-step, with its shares of the measured ceilings.

    As many views as classes, equally often; shifts of up to 3 px, mirrored particles. From a file:
    .mrcs, float32, in the page cache. Finding: seconds until the start and the cycles of splitting
    and merging are done; all: of the steps that all particles take part in.
    """
    where = torch.device(device)
    rows: list[Row] = []
    product, copy = _product_rate(where, repeats), _copy_rate(where, repeats)
    pairs = zip(n, k if len(k) == len(n) else k * len(n), strict=True)
    for count, classes in pairs:
        images, view = _simulated(count, classes, size, snr, where)
        with tempfile.TemporaryDirectory() as folder:
            for source in sources:
                stack: Stack = TensorStack(images, 3.0)
                if source == "file":
                    path = Path(folder, "particles.mrcs")
                    write_images(path, images, 3.0)
                    stack = read_particles(path)
                rows.append(_row(source, stack, view, classes, where, repeats, product, copy))
    return Result(
        rows,
        [
            f"ceilings measured in this run: float32 product {product / 1e12:.3g} TFLOP/s, copy "
            f"{copy / 1e12:.3g} TB/s",
            "E-step: the last one, of all particles, features included unless they are kept; of "
            "product: its products of spectra and transforms to angles; of copy: their results "
            "written and read once",
        ],
    )


def _row(
    source: str, stack: Stack, view: Tensor, k: int, device: torch.device, repeats: int,
    product: float, copy: float,
) -> Row:  # fmt: skip
    states: list[State] = []
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = classify(stack, k, device=str(device), on_step=states.append)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    # The work of the last state still has its level, with the features that it keeps.
    state, n = states[-1], len(stack)
    level = state.unsaved["work"].level(int(state["level"]), state["own_shift"], whole=True)
    images = state["classes"].to(device)
    times = measure({"E-step": lambda: level.expect(images)}, device, repeats)["E-step"]
    each = (times.wall if cuda else times.cpu) / n
    flops, moved = _work(level, k)
    whole = [row["seconds"] for row in state.history if row["step"] == "all"]
    last = [row["seconds"] for row in state.history if row["rings"] == level.rings.last]
    steps = sum(row["seconds"] for row in state.history)
    return {
        "particles": source,
        "n": n,
        "K": k,
        "seconds": seconds,
        "particles/s": n / seconds,
        "finding s": steps - sum(whole) - sum(last),
        "all s": sum(whole) + sum(last),
        "ARI": adjusted_rand_score(view, found.class_number),
        "GPU GB": peak / 1e9 if cuda else None,
        "E-step particles/s": 1 / each,
        "TFLOP/s": flops / each / 1e12,
        "of product": flops / each / product,
        "TB/s": moved / each / 1e12,
        "of copy": moved / each / copy,
    }


def _work(level: ResolutionLevel, k: int) -> tuple[float, float]:
    """Floating point operations and bytes of the logits of a particle."""
    rings, columns = level.rings, len(level.shifts) * k * (1 + level.mirror)
    m, a = rings.n_frequencies, rings.n_angles
    ring_numbers = 2 * (rings.last - torch.tensor([rings.first_ring(f) for f in range(m)]) + 1)
    products, transforms = 4.0 * float(ring_numbers.sum()), 2.0 * a * m
    return columns * (products + transforms), columns * 8.0 * (2 * m + a)


def _simulated(
    n: int, k: int, size: int, snr: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(n, size, size) particles on the CPU and their views (n,)."""
    views = simulate(1, k, size=size, snr=snr, seed=0).views.to(device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.Generator(device).manual_seed(0)
    view = torch.arange(n)[torch.randperm(n, generator=generator)] % k
    pose = Pose(
        360 * torch.rand(n, generator=generator) - 180,
        6 * torch.rand(n, 2, generator=generator) - 3,
        torch.rand(n, generator=generator) < 0.5,
    )
    images = torch.empty(n, size, size)
    for part in torch.arange(n).split(PART):
        moved = transform(views[view[part].to(device)], pose[part].to(device))
        moved += torch.randn(moved.shape, generator=noise, device=device)
        images[part[0] : part[-1] + 1] = moved.cpu()
    return images, view


def _product_rate(device: torch.device, repeats: int) -> float:
    """FLOP/s of a large float32 product (of a CPU: of its CPU time)."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    times = measure({"product": lambda: a @ b}, device, repeats)["product"]
    return 2 * side**3 / (times.wall if device.type == "cuda" else times.cpu)


def _copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes/s of a large copy, read and written."""
    source = torch.zeros(
        2**32 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * source.numel() / (times.wall if device.type == "cuda" else times.cpu)
