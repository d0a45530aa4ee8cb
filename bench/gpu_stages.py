"""Every stage of images in, poses out on a GPU, alone, and which share of the card it uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from bench.data import particles
from bench.gpu_search import copy_rate, matrix_rate, seconds, tile_work
from bench.result import Result, Row
from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.images.templates import templates_of
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.kernels import peaks, status
from cryoalign.operators.kernels.peaks import Layout
from cryoalign.results.averages import sum_parts
from cryoalign.search.match import CANDIDATES, best_match
from cryoalign.search.refine import refine_on
from cryoalign.search.settings import Search


class Stage(NamedTuple):
    """What is timed, and what one particle of it costs.

    Attributes:
        call: the stage, on all particles.
        flops: executed on the tensor cores.
        bytes: that have to move: inputs of the particle read once, results written once.
    """

    call: Callable[[], object]
    flops: float
    bytes: float


def run(
    k: Annotated[tuple[int, ...], "numbers of references"] = (1, 10, 50, 200),
    n: Annotated[int, "particles"] = 16384,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    repeats: Annotated[int, "timings, of which the median counts"] = 5,
) -> Result:
    """Microseconds of each stage of the search on a GPU, and its share of the measured ceilings.

    Rows: features (images to packed ring spectra at all
    shifts), search of packed spectra, rescoring from the images, refinement, class sums with what
    goes before them, and the whole from images to poses.
    """
    found = status()
    if not found.loaded or not torch.cuda.is_available():
        raise RuntimeError(f"{found.message}; {found.advice}")
    search = Search(max_shift=max_shift, last_ring=last_ring)
    rings = search.rings(size)
    product, copy = matrix_rate(repeats), copy_rate(repeats)
    rows: list[Row] = []
    for classes in k:
        images, views = particles(n, classes, size, 0.1, torch.device("cuda"))
        for name, stage in _stages(images, views, search, rings):
            each = seconds(stage.call, repeats) / n
            rows.append(
                {
                    "k": classes,
                    "stage": name,
                    "particles/s": 1 / each,
                    "us/particle": 1e6 * each,
                    "tensor TFLOP/s": stage.flops / each / 1e12 or None,
                    "of product": stage.flops / each / product or None,
                    "memory TB/s": stage.bytes / each / 1e12,
                    "of copy": stage.bytes / each / copy,
                }
            )
    return Result(
        rows,
        [
            f"{n} particles of {size} px, {len(rings.radii())} rings, {len(search.shifts())} "
            f"shifts, 2 hands, on {torch.cuda.get_device_name()}; median of {repeats}",
            f"ceilings measured in this run: fp16 product {product / 1e12:.0f} TFLOP/s, copy "
            f"{copy / 1e12:.2f} TB/s",
            "tensor: executed on the tensor cores; memory: each input read once, each result "
            "written once (a block of references reads packed spectra again, mostly from L2)",
        ],
    )


def _stages(
    images: Tensor, views: Tensor, search: Search, rings: Rings
) -> Iterator[tuple[str, Stage]]:
    """The stages by name, each with its inputs made beforehand."""
    references = ring_spectra(views, rings)[:, 0].contiguous()
    image = 4.0 * images[0].numel()
    yield from _search_stages(images, references, search, rings)
    label, pose, _ = best_match(images, references, search, rings)
    templates = templates_of(views)
    yield (
        "refine",
        Stage(lambda: refine_on(images, templates, label, pose, rings), 0.0, image + 37),
    )
    rows = torch.arange(len(images), device=images.device)

    def averaged() -> None:
        sum_parts(
            rows.split(2048), images.__getitem__, pose, label, rows % 2, len(views),
            images.shape[-1], images.device,
        )  # fmt: skip

    # A chunk of 16 members becomes one partial sum of doubles, written and read.
    yield "class sums", Stage(averaged, 0.0, image * (1 + 2 * 2 / 16))

    def whole() -> None:
        label, pose, _ = best_match(images, references, search, rings)
        refine_on(images, templates, label, pose, rings)

    yield "images to poses", Stage(whole, 0.0, image + 37)


def _search_stages(
    images: Tensor, references: Tensor, search: Search, rings: Rings
) -> Iterator[tuple[str, Stage]]:
    """What `best_match` does, in the layout of the references."""
    n, k = len(images), len(references)
    shifts = search.shifts("cuda")
    reach = rings.last_ring + math.ceil(search.max_shift)
    layout = Layout.of_references(references)
    packed = peaks.pack_references(references, layout)
    image, spectra = 4.0 * images[0].numel(), len(shifts) * (64.0 * layout.fragments + 4)
    pairs = 2.0 * k  # of a particle: references and hands

    def features() -> peaks.Packed:
        return kernel_images.pack_images(images, rings, shifts, layout, reach)

    yield "features", Stage(features, _features_work(layout, len(shifts)), image + spectra)
    made = features()

    def searched() -> tuple[Tensor, Tensor]:
        return peaks.search_packed(made, packed, layout, n, k)

    flops = len(shifts) * -(-k // 8) / 8 * tile_work(layout)[0]
    yield "search", Stage(searched, flops, spectra + 16 * pairs)
    coarse, shift = searched()
    score = coarse.new_empty(n, k)
    place = torch.empty(n, k, dtype=torch.int64, device=score.device)

    def rescored() -> None:
        kernel_images.rescore(
            images, references, shifts, rings, reach, coarse, shift, CANDIDATES, score, place
        )

    yield "rescore", Stage(rescored, 0.0, image + 8 * pairs + 12 * k)


def _features_work(layout: Layout, shifts: int) -> float:
    """Operations of a particle's features on the tensor cores: 64 angles of 16 rings become 16
    frequencies of one parity, where the layout keeps some of them."""
    steps = [max(layout.steps[q : q + 2]) for q in range(0, len(layout.steps), 2)]
    return 2.0 * 2 * 2 * 16 * 64 * 16 * sum(steps) * shifts
