"""Classification from nothing: particles and a number of classes in, classes out.

The classes are found on Fourier rings (`climb`); poses are then refined against the averages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Integral

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.ctf import Optics
from cryoalign.images.masks import masked, soft_mask
from cryoalign.images.polar import Rings
from cryoalign.methods.classify.split_and_merge import Climb, Likelihood, Plan, Progress
from cryoalign.methods.classify.whitening import Observations, observe
from cryoalign.methods.state import ClimbState
from cryoalign.particles.prepare import Images, PreparedParticles
from cryoalign.particles.stack import PhaseFlipped, Stack, as_stack, optics_of
from cryoalign.pose import Pose
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging, ClassSums, class_sums, filtered_averages
from cryoalign.results.evidence import Aligned, Scope, trials_of
from cryoalign.results.quality import Quality, conclude, posterior_and_margin
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import choose_device, gather_over_ranks, shard, world_size
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.refine import refine


def classify(
    particles: Stack | Array,
    n_classes: int,
    *,
    optics: Optics | None = None,
    likelihood: Likelihood | None = None,
    images: Images | None = None,
    averaging: Averaging | None = None,
    quality: Quality | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    max_rejected: float = 0.1,
    resume: ClimbState | None = None,
    on_iteration: Callable[[ClimbState], None] | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Classify particles without references.

    Args:
        particles: a stack (`io.read_particles`) or an array (n, size, size), a tensor or another
            (`interop.Array`).
        n_classes: how many.
        optics: the CTFs of an array's particles; a stack's come from its STAR file.
        likelihood: see `Likelihood`.
        images: how particles are prepared.
        averaging: how averages become the references of the last refinement.
        quality: what becomes of junk.
        seed: of the random choices.
        device: auto, cpu or cuda.
        batch_size: particles at a time; None chooses.
        max_rejected: largest share of unusable particles (NaN, constant) that is set aside.
        resume: go on from this state, with the same particles and settings.
        on_iteration: called with the state after the start, every cycle and every change of rings.
        progress: called now and then.

    Returns:
        The `Alignment`, of the whole input on every process; its averages are of phase-flipped
        particles where there is a CTF. Class 1 is the largest
        (before junk is set aside).

    Raises:
        ValueError: anything that does not fit, before work starts.
    """
    likelihood, averaging = likelihood or Likelihood(), averaging or Averaging()
    stack = as_stack(particles)
    if optics is None and likelihood.ctf:
        optics = optics_of(stack)
    where = choose_device(device)
    prepared = PreparedParticles(stack, images or Images(), where, max_rejected, batch_size)
    if not isinstance(n_classes, Integral) or not 1 <= n_classes <= len(prepared) // 2:
        raise ValueError(
            f"n_classes must be a whole number from 1 to half of the {len(prepared)} usable "
            f"particles, not {n_classes}"
        )
    if len(prepared) < world_size():
        raise ValueError(
            f"{len(prepared)} usable particles are fewer than {world_size()} processes: start fewer"
        )
    if resume is not None:
        _refuse_other_particles(resume, prepared, n_classes)
    radius = likelihood.mask_radius or 0.4 * prepared.size
    plan = Plan(likelihood, n_classes, radius, prepared.size)
    observations = _observations(prepared, optics, plan)
    climb = Climb(plan, observations, len(prepared), seed, progress)
    state = resume
    while state is None or not state.done:
        state = climb.begin() if state is None else climb.advance(state)
        state = replace(state, fingerprint=prepared.fingerprint)
        if on_iteration is not None:
            on_iteration(state)
    flipped = prepared
    if optics is not None:
        flipped = prepared.over(PhaseFlipped(stack, optics))
    return _finish(flipped, plan, averaging, state, quality)


def _observations(prepared: PreparedParticles, optics: Optics | None, plan: Plan) -> Observations:
    if optics is not None:
        if len(optics) != len(prepared.stack):
            raise ValueError(f"{len(optics)} CTFs do not fit {len(prepared.stack)} particles")
        optics = optics[prepared.rows].scaled(prepared.scale)
    return observe(
        prepared.read, len(prepared), prepared.size, optics,
        plan.ring(plan.likelihood.end_detail), plan.radius, plan.likelihood.max_shift,
        shard(len(prepared)),
    )  # fmt: skip


def _refuse_other_particles(state: ClimbState, prepared: PreparedParticles, n_classes: int) -> None:
    if len(state.own) != len(prepared) or state.fingerprint != prepared.fingerprint:
        raise ValueError(
            f"the checkpoint is of {len(state.own)} other particles: resume with the same input, "
            "or start another run"
        )
    if len(state.classes) != n_classes:
        raise ValueError(
            f"the checkpoint has {len(state.classes)} classes, not {n_classes}: resume with the "
            "same settings, or start another run"
        )


def _finish(
    particles: PreparedParticles,
    plan: Plan,
    averaging: Averaging,
    state: ClimbState,
    quality: Quality | None,
) -> Alignment:
    """Poses refined against the averages, and everything the result tells."""
    k, size, device = plan.n_classes, particles.size, particles.device
    by_size = torch.bincount(state.found.label, minlength=k).argsort(descending=True, stable=True)
    label, half = by_size.argsort()[state.found.label], particles.rows % 2
    mask = soft_mask(size, averaging.mask_radius or plan.radius, averaging.mask_edge, device)
    rings = Rings(last_ring=min(round(plan.radius), (size - 1) // 2))

    def sums_of(pose: Pose) -> ClassSums:
        return class_sums(particles.parts(), particles.take, pose, label, half, k, size, device)

    references = masked(filtered_averages(sums_of(state.found.pose), averaging, mask), mask)

    def refined(rows: Tensor) -> Tensor:
        pose, score = refine(
            particles.take(rows), references, label[rows].to(device),
            state.found.pose[rows].to(device), rings,
        )  # fmt: skip
        found = [pose.angle, pose.shift[:, 0], pose.shift[:, 1], pose.mirror, score]
        return torch.stack([column.double() for column in found], 1).cpu()  # (b, 5)

    found = [torch.zeros(0, 5, dtype=torch.float64)]
    found += map_in_order(refined, particles.parts(), workers_for(device))
    table = gather_over_ranks(torch.cat(found))
    pose = Pose(table[:, 0].float(), table[:, 1:3].float(), table[:, 3] > 0.5)
    likelihood, seen = plan.likelihood, state.found
    trials = trials_of(k, likelihood.max_shift, rings.last_ring, likelihood.mirror)
    known = posterior_and_margin(seen.share, seen.runner_up)
    return conclude(
        particles,
        Aligned(label, pose, table[:, 4].float(), known),
        sums_of(pose),
        Scope(mask, rings, trials),
        pd.DataFrame(state.history),
        quality,
    )
