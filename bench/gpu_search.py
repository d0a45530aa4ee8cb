"""Speed of the GPU's fused search alone, packed spectra resident, and what bounds it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from bench import plain
from bench.result import Result, Row
from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.operators.kernels import peaks, status
from cryoalign.operators.kernels.peaks import Layout, Packed
from cryoalign.particles.simulate import simulate
from cryoalign.search.settings import Search

# Entries of the plain formulation's table at a time.
PLAIN_TABLE = 2**28
# Particles whose complex64 spectra are held, 1.8 MB each.
FEW = 2048


def run(
    k: Annotated[tuple[int, ...], "numbers of references"] = (1, 10, 50, 200),
    n: Annotated[int, "particles"] = 16384,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    candidates: Annotated[int, "references rescored in the operator's row"] = 4,
    repeats: Annotated[int, "timings, of which the median counts"] = 5,
) -> Result:
    """Particles per second of the fused search on a GPU, against plain PyTorch and the ceilings.

    Rows: the kernels on packed spectra ("fused" as the card is served, "portable" the one for every
    card, "own band" with no more rings and frequencies than the references have power in),
    rescoring, the whole operator from complex64 spectra, and the plain formulation's search.
    """
    found = status()
    if not found.loaded or not torch.cuda.is_available():
        raise RuntimeError(f"{found.message}; {found.advice}")
    search = Search(max_shift=max_shift, last_ring=last_ring)
    rings, shifts = search.rings(size), search.shifts("cuda")
    layout = Layout.of_rings(rings)
    data = simulate(FEW, max(k), size=size, snr=0.1, max_shift=max_shift)
    images, views = data.images.cuda(), data.views.cuda()
    particles = _packed_particles(images, n, layout, rings, shifts)
    ceilings = matrix_rate(repeats), copy_rate(repeats)
    some = ring_spectra(images, rings, shifts)
    rows: list[Row] = []
    for classes in k:
        references = ring_spectra(views[:classes], rings)[:, 0]
        own = Layout.of_references(references)
        narrow = _packed_particles(images, n, own, rings, shifts)
        rows += _rows(
            (particles, narrow), some, references, (layout, own), n, candidates, repeats,
            ceilings,
        )  # fmt: skip
        del narrow
    return Result(
        rows,
        [
            f"{n} particles of {size} px, {layout.rings} rings, {len(shifts)} shifts, 2 hands, "
            f"{layout.angles} angles, steps {layout.steps}, on {torch.cuda.get_device_name()}; "
            f"median of {repeats}",
            f"ceilings measured in this run: fp16 product {ceilings[0] / 1e12:.0f} TFLOP/s, copy "
            f"{ceilings[1] / 1e12:.2f} TB/s",
            "tensor: executed on the tensor cores, references filled up to eights included; "
            "stream: packed particles read, once per 8 references, mostly from L2",
            f"operator and plain start from complex64 spectra of {FEW} particles",
        ],
    )


def _rows(
    particles: tuple[Packed, Packed],
    some: Tensor,
    references: Tensor,
    layouts: tuple[Layout, Layout],
    n: int,
    candidates: int,
    repeats: int,
    ceilings: tuple[float, float],
) -> list[Row]:
    """The rows of one set of references; particles in the rings' and in the references' layout."""
    k, few = len(references), len(some)
    layout = layouts[0]
    part = max(1, PLAIN_TABLE // (k * some.shape[1] * 2 * layout.angles))
    packed = [peaks.pack_references(references, each) for each in layouts]

    def fused(which: int, portable: bool = False) -> Callable[[], object]:
        return lambda: peaks.search_packed(
            particles[which], packed[which], layouts[which], n, k, portable=portable
        )

    coarse, shift = peaks.search_two(
        peaks.pack_particles(some, layout), packed[0], layout, few, k, portable=False
    )
    score = coarse.new_empty(few, k)
    place = torch.empty(few, k, dtype=torch.int64, device=score.device)
    stages: dict[str, tuple[int, Callable[[], object]]] = {
        "fused": (n, fused(0)),
        "portable": (n, fused(0, portable=True)),
        "own band": (n, fused(1)),
        "rescore": (
            few,
            lambda: peaks.rescore(some, references, coarse, shift, candidates, score, place),
        ),
        "operator": (few, lambda: peaks.fused_peaks(some, references, True, candidates)),
        "plain": (few, lambda: [plain.peaks(x, references) for x in some.split(part)]),
    }
    times = {name: seconds(call, repeats) / count for name, (count, call) in stages.items()}
    used = {"fused": layouts[0], "portable": layouts[0], "own band": layouts[1]}
    tiles = some.shape[1] * -(-k // 8) / 8  # of one particle
    rows: list[Row] = []
    for name, each in times.items():
        flops, stream = tile_work(used[name]) if name in used else (0.0, 0.0)
        rows.append(
            {
                "k": k,
                "stage": name,
                "steps": " ".join(map(str, used[name].steps)) if name in used else "",
                "particles/s": 1 / each,
                "us/particle": 1e6 * each,
                "x plain": times["plain"] / each,
                "tensor TFLOP/s": tiles * flops / each / 1e12 or None,
                "of product": tiles * flops / each / ceilings[0] or None,
                "stream TB/s": tiles * stream / each / 1e12 or None,
                "of copy": tiles * stream / each / ceilings[1] or None,
            }
        )
    return rows


def tile_work(layout: Layout) -> tuple[float, float]:
    """Of one tile: operations executed on the tensor cores, and bytes of particles streamed."""
    rows, depth = 64 * -(-layout.angles // 256), 16 * -(-len(layout.steps) // 2)
    transform = 2.0 * 4 * rows * depth * 128
    return transform + 2.0 * 2 * 16 * 8 * 16 * layout.fragments, 512.0 * layout.fragments


def _packed_particles(
    images: Tensor, n: int, layout: Layout, rings: Rings, shifts: Tensor
) -> Packed:
    """n particles' packed spectra: the images again and again, each time with fresh noise."""
    blocks = -(-n // 8)
    packed = Packed(
        torch.empty(
            blocks, len(shifts), layout.fragments, 32, 8, dtype=torch.half, device=images.device
        ),
        torch.empty(8 * blocks, len(shifts), device=images.device),
    )
    generator = torch.Generator(images.device).manual_seed(1)
    for start in range(0, n, len(images)):
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        spectra = ring_spectra(images + 0.3 * noise, rings, shifts)[: n - start]
        part = peaks.pack_particles(spectra, layout)
        packed.spectra[start // 8 : start // 8 + len(part.spectra)] = part.spectra
        packed.scale[start : start + len(part.scale)] = part.scale
    return packed


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call on the GPU."""
    call()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)


def matrix_rate(repeats: int) -> float:
    """FLOP/s of a large fp16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.half) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, repeats)


def copy_rate(repeats: int) -> float:
    """Bytes/s of a large copy, read and written."""
    source = torch.empty(2**32, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), repeats)
