"""Both modes of the search on one core: their cost, and whether the adaptive one loses anything."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.geometry import transform
from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.match import best_poses, match, prepare_target
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search

SPARX = {
    (1, 1.0): 0.54,
    (1, 2.0): 1.4,
    (1, 3.0): 2.6,
    (1, 4.0): 4.3,
    (10, 3.0): 5.0,
    (50, 3.0): 16.4,
    (100, 3.0): 31.0,
}
"""CPU ms per particle by (references, max shift), 90 px, last ring 36: EMAN2/SPARX compiled with
-march=native, same kind of machine. One reference is its reference-free alignment."""

MODES = ("exhaustive", "adaptive")
TIE = 0.25
"""Scores of two classes that differ by less than so many 1 / sqrt(pixels) are nearly a tie."""


def run(
    k: Annotated[tuple[int, ...], "numbers of references, at max shift 3"] = (10, 50, 100),
    rfa_shift: Annotated[tuple[float, ...], "max shifts of the case of one reference, px"] = (
        1.0, 2.0, 3.0, 4.0,
    ),
    n: Annotated[int, "particles"] = 256,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    snr: Annotated[float, "of the simulated particles"] = 0.1,
    repeats: Annotated[int, "timings of each, of which the median counts"] = 5,
) -> Result:  # fmt: skip
    """CPU ms per particle of both modes, images in, refined poses out, against SPARX's.

    References are made ready beforehand, once for all particles, as in an iteration.
    """
    rows: list[Row] = []
    for classes, reach in [*((1, r) for r in rfa_shift), *((c, 3.0) for c in k)]:
        data = simulate(n, classes, size=size, snr=snr, max_shift=reach)
        searches = {m: Search(max_shift=reach, last_ring=last_ring, mode=m) for m in MODES}
        targets = {mode: prepare_target(data.views, search) for mode, search in searches.items()}
        stages = {m: partial(best_poses, data.images, target) for m, target in targets.items()}
        times = measure(stages, torch.device("cpu"), repeats)
        sparx = SPARX.get((classes, reach)) if (size, last_ring) == (90, 36) else None
        row: Row = {"k": classes, "max shift": reach, "SPARX ms": sparx}
        for mode in MODES:
            cost = 1e3 * times[mode].cpu / n
            row[f"{mode} ms"] = cost
            row[f"{mode}, x SPARX"] = None if sparx is None else sparx / cost
        rows.append(row)
    notes = [
        f"CPU ms per particle; {n} particles of {size} px at SNR {snr:g}; median of {repeats}",
        "SPARX: constants, EMAN2/SPARX compiled with -march=native, measured on the same kind of "
        "machine",
    ]
    return Result(rows, notes)


def accuracy(
    snr: Annotated[tuple[float, ...], "of the simulated sets"] = (0.1, 0.05, 0.02),
    k: Annotated[int, "views"] = 50,
    n: Annotated[int, "particles"] = 1000,
    members: Annotated[int, "particles in a noisy reference, on average"] = 50,
    size: Annotated[int, "box, px"] = 90,
    last_ring: Annotated[int, "outermost ring, px"] = 36,
    seed: Annotated[int, "of the simulation"] = 0,
) -> Result:
    """Adaptive against exhaustive search: the same classes, and poses against the truth.

    Clean references are the true views; noisy ones average other particles, at poses off by about
    1 degree and 0.4 px. Errors are medians over the particles with the right class and hand.
    """
    rows: list[Row] = []
    mask = soft_mask(size, last_ring)
    for each in snr:
        data = simulate(n + members * k, k, size=size, snr=each, seed=seed)
        averages = noisy_averages(data, n, seed)
        for kind, references in (("clean", data.views), ("noisy", averages)):
            rows.append(_compare(data, n, references * mask, f"SNR {each:g}, {kind}", last_ring))
    notes = [
        f"{n} particles, {k} views; near tie: the refined scores of the exhaustive search's two "
        f"best classes differ by less than {TIE:g} / sqrt(pixels)"
    ]
    return Result(rows, notes)


def noisy_averages(data: Simulation, first: int, seed: int) -> Tensor:
    """(k, size, size) averages of the particles from ``first`` on, at poses slightly off."""
    generator = torch.Generator().manual_seed(seed)
    pose, label = data.pose[first:], data.class_number[first:] - 1
    off = Pose(
        pose.angle + torch.randn(len(label), generator=generator),
        pose.shift + 0.4 * torch.randn(len(label), 2, generator=generator),
        pose.mirror,
    )
    sums = torch.zeros_like(data.views).index_add_(0, label, transform(data.images[first:], off))
    return sums / torch.bincount(label, minlength=len(sums)).clamp(min=1)[:, None, None]


def _compare(data: Simulation, n: int, references: Tensor, name: str, last_ring: int) -> Row:
    images, truth, view = data.images[:n], data.pose[:n], data.class_number[:n] - 1
    row: Row = {"set": name}
    labels = {}
    for mode in MODES:
        search = Search(last_ring=last_ring, mode=mode)
        label, pose, _ = best_poses(images, prepare_target(references, search))
        right = (label == view) & (pose.mirror == truth.mirror)
        turn = wrap_degrees(pose.angle - truth.angle).abs()[right].median()
        off = (pose.shift - truth.shift).norm(dim=1)[right].median()
        labels[mode] = label
        row[f"{mode}: class right %"] = 100 * float((label == view).double().mean())
        row[f"{mode}: angle °"], row[f"{mode}: shift px"] = float(turn), float(off)
    same = labels["adaptive"] == labels["exhaustive"]
    decided = ~_near_ties(images, references, search, search.rings(images.shape[-1]))
    row["same class %"] = 100 * float(same.double().mean())
    row["near ties"] = int((~decided).sum())
    row["same class %, no near tie"] = 100 * float(same[decided].double().mean())
    return row


def _near_ties(images: Tensor, references: Tensor, search: Search, rings: Rings) -> Tensor:
    """(n,) whether the two best classes of an exhaustive search score nearly the same, refined."""
    found = match(images, references, search)
    row, scores = torch.arange(len(images)), []
    for label in found.score.topk(2, 1).indices.unbind(1):
        scores.append(refine(images, references, label, found.pose[row, label], rings)[1])
    return (scores[0] - scores[1]).abs() < TIE / (math.sqrt(math.pi) * rings.last_ring)
