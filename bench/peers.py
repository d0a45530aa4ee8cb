"""kornia's and ASPIRE's 2D aligners next to cryoalign's, on the same particles.

The references are the true views. Peers align images to one image, so they are told which view a
particle shows and its hand, and have angle and shift to find. Their conventions were found by
test, and every run tests them again on noise-free particles.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from bench.aligners import ALIGNERS, Aligner
from bench.bound import expected_medians
from bench.data import KnownSet, known_sets
from bench.result import Result, Row
from cryoalign.images.geometry import transform
from cryoalign.images.masks import normalise
from cryoalign.pose import Pose, compose, wrap_degrees
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.settings import Search

INSTALL = "pip install --constraint constraints.txt '.[peers]'"


class Task(NamedTuple):
    """Particles of known view and pose, none of them mirrored."""

    images: Tensor  # (n, size, size)
    views: Tensor  # (k, size, size)
    view: Tensor  # (n,)
    truth: Pose  # (n,)

    def first(self, n: int) -> Task:
        """The first n particles."""
        return Task(self.images[:n], self.views, self.view[:n], self.truth[:n])


Find = Callable[[Task], tuple[Tensor, Pose]]  # view (n,) and pose (n,) onto it


def run(
    data: Annotated[Path | None, "PREFIX of .mrcs, _views.mrcs, _truth.npz; else simulate"] = None,
    snr: Annotated[tuple[float, ...], "of the simulated sets"] = (0.1,),
    n: Annotated[int, "particles, the first of the set; slow aligners have a share"] = 1000,
    clean: Annotated[int, "noise-free particles that every aligner is tested on"] = 10,
    views: Annotated[int, "simulated views"] = 10,
    size: Annotated[int, "simulated box, px"] = 90,
    seed: Annotated[int, "of the simulation"] = 0,
    max_shift: Annotated[float, "largest shift along an axis, px"] = 3.0,
) -> Result:
    """Pose errors and times of kornia's ImageRegistrator and ASPIRE's 2D aligners.

    References are the true views. The view and the hand of every particle are given, except in
    the row where cryoalign searches all views and both hands. Times are on the clock, preparing
    references included, after a first call on the noise-free particles.
    """
    rows: list[Row] = []
    notes = ["right: view and hand, within 10° and 2 px; errors: medians of those that are right"]
    installed = {name for name in ("kornia", "aspire") if importlib.util.find_spec(name)}
    for known in known_sets(data, snr, n, views, size, seed):
        task = _task(known, min(n, len(known.view)))
        pure = _without_noise(task.first(clean))
        named: Row = {"set": known.name, "aligner": f"cryoalign, K = {len(known.views)}"}
        _, ours = _on_own_view(ALIGNERS[0], max_shift)(task)
        row = _measure(_anywhere(max_shift), task, pure, ours)
        rows.append(named | {"given": "nothing"} | row)
        for aligner in ALIGNERS:
            named = {"set": known.name, "aligner": aligner.name}
            if aligner.package not in installed | {"cryoalign"}:
                named["given"] = f"{aligner.package} is not installed"
                rows.append(dict.fromkeys(rows[0]) | named)
                continue
            some = task.first(-(-len(task.view) // aligner.share))
            row = _measure(_on_own_view(aligner, max_shift), some, pure, ours)
            _check(aligner, row, max_shift)
            rows.append(named | {"given": "view, hand"} | row)
        bound = expected_medians(known.views, task.view)
        notes.append(f"{known.name}: Cramér-Rao bound {bound.angle:.3g}°, {bound.shift:.3g} px")
    notes += [f"{name} {version(name)}" for name in sorted(installed)]
    if len(installed) < 2:
        notes.append(f"for all rows: {INSTALL}")
    return Result(rows, notes)


def _task(known: KnownSet, n: int) -> Task:
    """The first n particles, normalised; those that are mirrored turned to their view's hand."""
    images, pose = known.particles.read(torch.arange(n)), known.pose[:n].to(torch.float64)
    hand = Pose(torch.zeros(n), torch.zeros(n, 2), pose.mirror)
    images = transform(normalise(images, images.shape[-1] / 2), hand)
    return Task(images, known.views, known.view[:n], compose(hand.to(torch.float64), pose))


def _without_noise(task: Task) -> Task:
    pose = task.truth.inverse().to(torch.float32)
    return task._replace(images=transform(task.views[task.view], pose))


def _anywhere(max_shift: float) -> Find:
    """cryoalign on all views and both hands."""

    def find(task: Task) -> tuple[Tensor, Pose]:
        target = prepare_target(task.views, Search(max_shift=max_shift))
        label, pose, _ = best_poses(task.images, target)
        return label, pose

    return find


def _on_own_view(aligner: Aligner, max_shift: float) -> Find:
    """An aligner, given the particles of each view together."""

    def find(task: Task) -> tuple[Tensor, Pose]:
        n = len(task.view)
        angle, shift = torch.zeros(n, dtype=torch.float64), torch.zeros(n, 2, dtype=torch.float64)
        for view in task.view.unique():
            rows = (task.view == view).nonzero().squeeze(1)
            pose = aligner.align(task.images[rows], task.views[view], max_shift)
            angle[rows], shift[rows] = pose.angle.double(), pose.shift.double()
        return task.view, Pose(angle, shift, torch.zeros(n, dtype=torch.bool))

    return find


def _measure(find: Find, task: Task, pure: Task, ours: Pose) -> Row:
    """A row without its names; ``ours``: cryoalign's poses (K = 1), of these particles and more."""
    clean = _scores(pure, *find(pure))
    with threadpool_limits(torch.get_num_threads()):  # NumPy's and ASPIRE's threads too
        started = time.perf_counter()
        found = find(task)
        seconds = time.perf_counter() - started
    row: Row = {"n": len(task.view)} | _scores(task, *found)
    same = _scores(task, task.view, ours[: len(task.view)])
    row |= {f"cryoalign's {name} of these n": same[name] for name in ("angle °", "shift px")}
    row["ms / particle"] = 1e3 * seconds / len(task.view)
    return row | {f"noise-free {name}": value for name, value in clean.items()}


def _scores(task: Task, label: Tensor, pose: Pose) -> Row:
    angle = wrap_degrees(pose.angle.double() - task.truth.angle).abs()
    shift = (pose.shift.double() - task.truth.shift).norm(dim=1)
    right = (label == task.view) & (pose.mirror == task.truth.mirror) & (angle < 10) & (shift < 2)
    some = bool(right.any())
    return {
        "right %": 100 * float(right.double().mean()),
        "angle °": float(angle[right].median()) if some else None,
        "shift px": float(shift[right].median()) if some else None,
    }


def _check(aligner: Aligner, row: Row, max_shift: float) -> None:
    """An aligner that searches all angles finds poses without noise, or is misunderstood here."""
    if aligner.wide and not row["noise-free right %"] > 75:
        raise RuntimeError(
            f"{aligner.name} finds {row['noise-free right %']:.0f} % of the noise-free poses: "
            "its convention is another than bench/aligners.py takes it for, or shifts are "
            f"larger than max_shift {max_shift:g} px"
        )
