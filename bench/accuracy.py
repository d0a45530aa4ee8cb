"""How near poses come to the truth, and to the best that noise allows."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from bench.bound import draws, expected_medians, joint_covariance
from bench.data import KnownSet, enlarged_sets, known_sets, particle_of, reference_of
from bench.result import Result, Row
from cryoalign.images.ctf import phase_flip
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.settings import Particle
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.joint_refinement import Parameter, refine_jointly


def run(
    data: Annotated[
        tuple[Path, ...], "PREFIXes of .mrcs, _views.mrcs, _truth.npz; else simulate"
    ] = (),
    snr: Annotated[tuple[float, ...], "of the simulated sets"] = (0.1, 0.05),
    n: Annotated[int, "simulated particles"] = 2000,
    views: Annotated[int, "simulated views"] = 20,
    size: Annotated[int, "simulated box, px"] = 90,
    seed: Annotated[int, "of the simulation"] = 0,
    last_ring: Annotated[int | None, "outermost ring, px; else the largest that fits"] = None,
    max_shift: Annotated[float, "largest trial shift, px"] = 3.0,
    device: Annotated[str, "cpu or cuda"] = "cpu",
    joint: Annotated[bool, "go on from there to magnification and defocus, by likelihood"] = False,
) -> Result:
    """Errors with the true views as references, against the Cramér-Rao bound.

    One iteration of align_multi_reference. Errors are plain differences from the true poses, no
    class's mean is removed; angle and shift errors are those of particles with the right class
    and hand. The bound is for white noise over the whole box with an unknown amplitude.

    With ``joint`` refine_jointly starts from those poses (of phase-flipped particles), without
    priors: simulated particles have a magnification of their own, N(1, 1 %), and
    a CTF whose defocus is known to N(0, 300 Å); those of files have what their files say.
    """
    particle = particle_of(last_ring, max_shift)
    if joint:
        sets = (
            known_sets(data, snr, n, views, size, seed)
            if data
            else enlarged_sets(snr, n, views, size, seed)
        )
        return _joint_result(sets, particle, device)
    rows = [_row(known, particle, device) for known in known_sets(data, snr, n, views, size, seed)]
    notes = ["bound: the median error of an estimate that meets the Cramér-Rao bound"]
    return Result(rows, notes)


def _row(known: KnownSet, particle: Particle, device: str) -> Row:
    started = time.perf_counter()
    found = align_multi_reference(
        known.particles, known.views, iterations=1, particle=particle, device=device
    )
    seconds = time.perf_counter() - started
    right_class = reference_of(found) == known.view
    right = right_class & (found.pose.mirror == known.pose.mirror)
    angle = wrap_degrees(found.pose.angle - known.pose.angle).abs()[right].median()
    shift = (found.pose.shift - known.pose.shift).norm(dim=1)[right].median()
    bound = expected_medians(known.views, known.view)
    return {
        "set": known.name,
        "n": len(known.view),
        "class right %": 100 * float(right_class.double().mean()),
        "class and mirror right %": 100 * float(right.double().mean()),
        "mirror right %": 100 * float((found.pose.mirror == known.pose.mirror).double().mean()),
        "angle °": float(angle),
        "bound °": bound.angle,
        "angle / bound": float(angle) / bound.angle,
        "shift px": float(shift),
        "bound px": bound.shift,
        "shift / bound": float(shift) / bound.shift,
        "seconds": seconds,
    }


GROUPS = {"angle °": [0], "shift px": [1, 2], "magnification %": [3], "defocus Å": [4]}
"""Which columns a figure is made of."""


def _joint_result(sets: list[KnownSet], particle: Particle, device: str) -> Result:
    rows = [row for known in sets for row in _joint_rows(known, particle, device)]
    notes = [
        "bound: the median error of an estimate that meets the Cramér-Rao bound with all that the "
        "row refines unknown",
        "rms / bound: root mean square of errors, each over its particle's bound",
        "a row's particles: those of right class and hand",
    ]
    return Result(rows, notes)


def _joint_rows(known: KnownSet, particle: Particle, device: str) -> list[Row]:
    images = known.particles.read(torch.arange(len(known.view)))
    plain = images if known.optics is None else phase_flip(images, known.optics)
    stack = TensorStack(plain, known.particles.pixel_size)
    found = align_multi_reference(
        stack, known.views, iterations=1, particle=particle, device=device
    )
    label, start = reference_of(found), found.pose
    right = (label == known.view) & (start.mirror == known.pose.mirror)
    parameters: tuple[Parameter, ...] = ("angle", "shift", "magnification", "defocus")
    parameters = parameters if known.optics is not None else parameters[:3]
    columns = tuple(range(5 if known.optics is not None else 4))
    bound = joint_covariance(known.views, known.view, known.pose, _true_optics(known), columns)
    measure: dict[str, Any] = {"set": known.name, "right %": 100 * float(right.double().mean())}
    to = torch.device(device)
    on_device = (images.to(to), known.views.to(to), label.to(to), start.to(to))
    rows = [measure | {"method": "search", "ms": None} | _errors(known, start, None, bound, right)]
    started = time.perf_counter()
    refined = refine_jointly(*on_device, parameters=parameters, optics=known.optics)
    pose = refined.pose.to("cpu")  # waits for a GPU
    each = 1e3 * (time.perf_counter() - started) / len(images)
    others = torch.stack([refined.magnification, refined.defocus_offset], 1).cpu()
    errors = _errors(known, pose, others, bound, right)
    return [*rows, measure | {"method": "gauss-newton", "ms": each} | errors]


def _true_optics(known: KnownSet) -> Any:
    """The optics with what they lack."""
    optics, offset = known.optics, known.defocus_offset
    if optics is None or offset is None:
        return optics
    return replace(optics, defocus_u=optics.defocus_u + offset, defocus_v=optics.defocus_v + offset)


def _errors(
    known: KnownSet, pose: Pose, others: Tensor | None, bound: Tensor, right: Tensor
) -> Row:
    """Errors of the parameters that were refined, against their bounds (n, p, p)."""
    truth = known.pose
    turn = wrap_degrees(pose.angle.double() - truth.angle.double())
    error = torch.cat([turn[:, None], pose.shift.double() - truth.shift.double()], 1)
    if others is not None:
        n = len(right)
        growth = torch.ones(n) if known.magnification is None else known.magnification
        offset = torch.zeros(n) if known.defocus_offset is None else known.defocus_offset
        more = others.double() - torch.stack([growth.double(), offset.double()], 1)
        error = torch.cat([error, more], 1)[:, : bound.shape[1]]
    error, bound = error[right], bound[right]
    normal = error / bound.diagonal(dim1=1, dim2=2).sqrt()[:, : error.shape[1]]
    best = draws(bound)
    row: Row = {}
    for name, group in GROUPS.items():
        what, unit = name.split()
        scale = 100 if unit == "%" else 1
        median = rms = least = None
        if max(group) < bound.shape[1]:
            least = scale * float(best[:, group].norm(dim=1).median())
        if max(group) < error.shape[1]:
            median = scale * float(error[:, group].norm(dim=1).median())
            rms = float(normal[:, group].square().mean().sqrt())
        row[name], row[f"{what} bound {unit}"] = median, least
        row[f"{what} / bound"] = median / least if median is not None and least else None
        row[f"{what} rms / bound"] = rms
    return row
