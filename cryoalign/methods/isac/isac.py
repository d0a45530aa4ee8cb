"""Iterative stable alignment and clustering (ISAC): the classes that come out again.

Yang, Fang, Chittuluri, Asturias & Penczek 2012. Particles are shrunk and centred, classified in
generations until what is left is not stable (`generations`), and the averages of stable members
are made at full size and put into an order in which neighbours look alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.ctf import Optics
from cryoalign.images.masks import masked, soft_mask
from cryoalign.images.polar import Rings
from cryoalign.methods.isac.generations import Isac, Job, Progress, generations, scale_of
from cryoalign.methods.isac.ordering import order_averages
from cryoalign.methods.isac.realignment import scaled
from cryoalign.methods.isac.stability import match_classes, reproducibility
from cryoalign.methods.state import MraState
from cryoalign.particles.prepare import Images, PreparedParticles
from cryoalign.particles.stack import PhaseFlipped, Stack, as_stack, optics_of
from cryoalign.pose import Pose, compose
from cryoalign.results.alignment import Alignment, over_all_rows
from cryoalign.results.averages import Averaging, ClassSums, class_sums, filtered_averages
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import choose_device, world_size
from cryoalign.runtime.threads import map_in_order, workers_for
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search

UNSTABLE = "in no stable class"


@dataclass(frozen=True, eq=False)
class StableClasses:
    """What ISAC found.

    Attributes:
        alignment: stable members of accepted classes, neighbours alike, with each class's
            ``pixel_error``, the mean of its members', in ``class_quality``; all other particles are
            set aside (class number 0) and listed in ``rejected``, with the reason.
        pixel_error: (n,) between realignments, pixels of the shrunk images, of every particle of
            the input when it was last measured; NaN where unusable, infinite where hands differ.
        generation: (n,) in which a particle was accounted for; 0 = it was not.
        matched: a row per pair of a class and the one that it is in a repeated run (`repeat`;
            `stability.match_classes`); empty without repeats.
        reproduced: share of the particles accounted for in the first run or a repeat that both
            have in matched classes, the mean over repeats; NaN without.
    """

    alignment: Alignment
    pixel_error: Tensor
    generation: Tensor
    matched: pd.DataFrame
    reproduced: float = math.nan

    def to_frame(self) -> pd.DataFrame:
        """A row per input particle: index, class_number, generation, pixel_error."""
        return pd.DataFrame(
            {
                "index": range(len(self.generation)),
                "class_number": self.alignment.class_number.numpy(),
                "generation": self.generation.numpy(),
                "pixel_error": self.pixel_error.numpy(),
            }
        )


def classify_stable(
    particles: Stack | Array,
    *,
    optics: Optics | None = None,
    isac: Isac | None = None,
    images: Images | None = None,
    averaging: Averaging | None = None,
    iterations: int = 20,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    max_rejected: float = 0.1,
    resume: MraState | None = None,
    on_iteration: Callable[[MraState], None] | None = None,
    progress: Progress | None = None,
) -> StableClasses:
    """Find classes whose members' poses come out alike whenever they are aligned anew.

    The shrunk images are kept in memory, those of a generation twice: about 60 kB a particle.

    Args:
        particles: a stack (`io.read_particles`) or an array (n, size, size), a tensor or another
            (`interop.Array`).
        optics: the CTFs of an array's particles; a stack's come from its STAR file.
        isac: see `Isac`.
        images: how particles are prepared.
        averaging: how averages become references.
        iterations: generations, at most.
        seed: of the random choices.
        device: auto, cpu or cuda.
        batch_size: particles read at a time; None chooses.
        max_rejected: largest share of unusable particles (NaN, constant) that is set aside.
        resume: go on from this state, with the same particles and settings.
        on_iteration: called with the state after every generation (of the first run).
        progress: called now and then.

    Returns:
        The `StableClasses`.

    Raises:
        ValueError: anything that does not fit, or several processes, before work starts; or no
            class is stable.
    """
    if world_size() > 1:
        raise ValueError("ISAC (method=isac) runs in one process: start it without torchrun")
    isac, averaging = isac or Isac(), averaging or Averaging()
    stack = as_stack(particles)
    if optics is None and isac.ctf:
        optics = optics_of(stack)
    scale = scale_of(isac, (images or Images()).box or stack.shape[0])
    prepared = PreparedParticles(
        stack, images or Images(), choose_device(device), max_rejected, batch_size, progress
    )
    if optics is not None:
        prepared = prepared.over(PhaseFlipped(stack, optics))
    if len(prepared) < isac.images_per_group:
        raise ValueError(
            f"{len(prepared)} usable particles make no group of isac.images_per_group "
            f"{isac.images_per_group}: make it smaller; a class is one group"
        )
    job = Job(prepared, isac, averaging, scale, progress)
    state = generations(job, resume, iterations, seed, on_iteration)
    matched, shares = list[pd.DataFrame](), list[float]()
    first = _finish(job, state)
    for again in range(1, isac.repeats):
        other = generations(job, None, iterations, seed + again, None)
        numbers = torch.zeros_like(first.alignment.class_number)
        numbers[prepared.rows] = other.label + 1
        pairs = match_classes(first.alignment.class_number, numbers)
        matched.append(pairs.assign(repeat=again))
        shares.append(reproducibility(first.alignment.class_number, numbers))
    share = sum(shares) / len(shares) if shares else math.nan
    return replace(
        first, matched=pd.concat(matched or [first.matched], ignore_index=True), reproduced=share
    )


_NO_MATCH = pd.DataFrame(
    {name: pd.Series(dtype="int64") for name in ("class_a", "class_b", "size_a", "size_b")}
    | {"common": pd.Series(dtype="int64"), "jaccard": pd.Series(dtype="float64")}
    | {"repeat": pd.Series(dtype="int64")}
)


class _Averaged(NamedTuple):
    """Members (n,) of stable classes, on averages that stand in order."""

    label: Tensor
    pose: Pose  # pixels of the prepared images
    score: Tensor
    sums: ClassSums
    frc: Tensor  # (k, shells)


def _finish(job: Job, state: MraState) -> StableClasses:
    """Everything that the result tells, for all particles of the input."""
    members = (state.label >= 0).nonzero().squeeze(1)
    if not len(members):
        raise ValueError(
            f"no class has {job.isac.least} stable members: allow a larger isac.threshold, a "
            "smaller isac.min_group_size, or a smaller isac.images_per_group "
            f"(now {job.isac.images_per_group}, of {len(job.particles)} particles)"
        )
    particles = job.particles
    pose = scaled(state.pose[members], job.scale.factor)
    made = _average(job, members, state.label[members], pose)
    rows = particles.rows[members]
    all_pose, class_number, score = over_all_rows(
        len(particles.stack), rows, made.label, made.pose, made.score, particles.scale
    )
    pixel = particles.pixel_size or particles.scale
    alignment = Alignment(
        pose=all_pose,
        class_number=class_number,
        score=score,
        averages=made.sums.averages().cpu(),
        frc=made.frc.cpu(),
        resolution=frc.resolution(made.frc, particles.size, pixel).cpu(),
        class_sizes=made.sums.sizes.cpu(),
        history=pd.DataFrame(state.history),
        rejected=_set_aside(particles, state),
        pixel_size=particles.pixel_size,
        scale=particles.scale,
        class_quality=_mean_error(state.score[members], made.label, len(made.frc)),
    )
    error = torch.full((len(class_number),), torch.nan)
    error[particles.rows] = state.score
    born = torch.tensor([row["iteration"] for row in state.history for _ in range(row["accepted"])])
    generation = torch.zeros_like(class_number)
    generation[rows] = born[state.label[members]]
    return StableClasses(alignment, error, generation, _NO_MATCH)


def _mean_error(error: Tensor, label: Tensor, k: int) -> pd.DataFrame:
    """Of members (n,) of k classes, none empty: their mean pixel error."""
    total = torch.bincount(label, error.double(), minlength=k)
    mean = total / torch.bincount(label, minlength=k)
    return pd.DataFrame({"pixel_error": mean.float().numpy()})


def _average(job: Job, members: Tensor, label: Tensor, pose: Pose) -> _Averaged:
    """Averages at full size, neighbours alike and turned onto each other; poses refined on them."""
    particles, size, k = job.particles, job.particles.size, int(label.max()) + 1
    radius = job.scale.last_ring * job.scale.factor
    edge = job.averaging.mask_edge
    mask = soft_mask(size, job.averaging.mask_radius or radius, edge, particles.device)
    rings = Rings(last_ring=min(round(radius), (size - 1) // 2 - 1))  # room for a shift
    parts = torch.arange(len(members)).split(particles.batch_size)

    def read(rows: Tensor) -> Tensor:
        return particles.read(members[rows])

    def sums() -> ClassSums:
        half = particles.rows[members] % 2
        return class_sums(parts, read, pose, label, half, k, size, particles.device)

    references = masked(filtered_averages(sums(), job.averaging, mask), mask)

    def refined(rows: Tensor) -> tuple[Pose, Tensor]:
        images = read(rows)
        where = images.device
        found, score = refine(
            images, references, label[rows].to(where), pose[rows].to(where), rings
        )
        return found.to("cpu"), score.cpu()

    found = list(map_in_order(refined, parts, workers_for(particles.device)))
    search = Search(max_shift=1, last_ring=rings.last_ring, mirror=job.isac.mirror)
    order, turn = order_averages(references, search)
    pose = compose(Pose.cat([p for p, _ in found]), turn[label])
    label = order.argsort()[label]
    done = sums()
    return _Averaged(label, pose, torch.cat([s for _, s in found]), done, done.frc(mask))


def _set_aside(particles: PreparedParticles, state: MraState) -> pd.DataFrame:
    """Unusable particles, and those not accounted for, in the order of the input."""
    left = particles.rows[state.label < 0].numpy()
    unstable = pd.DataFrame({"index": left, "reason": [UNSTABLE] * len(left)})
    table = pd.concat([particles.rejected, unstable]) if len(particles.rejected) else unstable
    return table.sort_values("index", ignore_index=True)
