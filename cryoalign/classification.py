"""Classification from nothing: particles and a number of classes in, classes out.

Expectation maximisation with the full likelihood (classes, hands, angles and shifts weighted, CTF
and noise spectrum in the model; `expectation`) finds most views from random single particles if
it starts with more classes than asked, at a resolution where the table is small. What it leaves
is of two kinds, views that have several classes and classes that hold several views, and both are
mended by moves that need no luck: *merging* the classes that explain their members as well
together (`merge`), and *splitting* every class by an expectation maximisation of its own members
alone, which costs no more than a class each. Merging back to the number asked then keeps what
splitting found. Cycles of these, then ever more rings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Any, NamedTuple

import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign import frc
from cryoalign.alignment import Alignment, over_all_rows
from cryoalign.average import Averaging, class_sums, filtered_averages, masked
from cryoalign.ctf import Optics, optics_from_relion, phase_flip
from cryoalign.expectation import (
    Features,
    Posterior,
    Sums,
    add_sums,
    expect,
    extend,
    features,
    join_classes,
    maximise,
)
from cryoalign.filters import soft_mask
from cryoalign.fourier_rings import FourierRings
from cryoalign.merge import merge_classes
from cryoalign.observations import Observations, observe
from cryoalign.particles import Images, PreparedParticles, Stack, TensorStack, choose_device
from cryoalign.polar import Rings
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.refine import refine
from cryoalign.settings import FORBID

Progress = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all) now and then."""

START_STEPS, RELAX_STEPS, SPLIT_STEPS = 4, 8, 4  # of expectation maximisation, at most
SETTLED = 1e-3  # gain of log-evidence in a step, as a share of it, below which it is at rest
KEEP = 2**30  # bytes of features that are kept between iterations rather than made again
CHUNK = 2048  # particles whose features are made at a time (even: half-sets go by parity)


@dataclass(frozen=True, config=FORBID)
class Likelihood:
    """What the likelihood knows and how it is climbed.

    Attributes:
        mask_radius: of the particle, pixels of the prepared images; None is 0.4 of the box.
        max_shift: how far off centre particles may be, pixels.
        mirror: whether mirrored particles are of one class.
        ctf: `auto` uses the CTF where the STAR file has a defocus; `none` never.
        starts: independent starts, of which the likeliest goes on.
        surplus: classes to start with, per class asked.
        split: children that every class is split into.
        cycles: of splitting, merging and relaxing at a resolution, at most: the first that does
            not gain is the last.
        start_detail, end_detail: resolution of the start and the end, periods across the
            particle's diameter.
    """

    mask_radius: float | None = Field(
        default=None, gt=0, description="radius of the particle, px; null: 0.4 of the box"
    )
    max_shift: float = Field(default=3.0, ge=0, description="how far off centre, px")
    mirror: bool = Field(default=True, description="mirrored particles are of one class")
    ctf: bool = Field(default=True, description="use the CTF where the STAR file has a defocus")
    starts: int = Field(default=1, ge=1, description="independent starts; the likeliest goes on")
    surplus: float = Field(default=1.5, ge=1, description="classes to start with per class asked")
    split: int = Field(default=3, ge=2, description="children every class is split into")
    cycles: int = Field(
        default=4, ge=0, description="of splitting, merging and relaxing, while they gain"
    )
    start_detail: float = Field(
        default=8.0, gt=1, description="resolution at the start, periods across the particle"
    )
    end_detail: float = Field(
        default=11.2, gt=1, description="resolution at the end, periods across the particle"
    )


def classify(
    particles: Stack | Tensor,
    n_classes: int,
    *,
    optics: Optics | None = None,
    likelihood: Likelihood | None = None,
    images: Images | None = None,
    averaging: Averaging | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    max_rejected: float = 0.1,
    progress: Progress | None = None,
) -> Alignment:
    """Classify particles without references.

    Args:
        particles: a stack (`io.read_particles`) or a tensor (n, size, size).
        n_classes: how many.
        optics: the CTFs of a tensor's particles; a stack's come from its STAR file.
        likelihood: see `Likelihood`.
        images: how particles are prepared.
        averaging: how averages become the references of the last refinement.
        seed: of the random choices.
        device: auto, cpu or cuda.
        batch_size: particles at a time; None chooses.
        max_rejected: largest share of unusable particles (NaN, constant) that is set aside.
        progress: called now and then.

    Returns:
        The `Alignment`; its averages are of phase-flipped particles where there is a CTF.

    Raises:
        ValueError: anything that does not fit, before work starts.
    """
    likelihood, averaging = likelihood or Likelihood(), averaging or Averaging()
    stack = TensorStack(particles) if isinstance(particles, Tensor) else particles
    if optics is None and likelihood.ctf:
        optics = optics_of(stack)
    where = choose_device(device)
    prepared = PreparedParticles(stack, images or Images(), where, max_rejected, batch_size)
    if not 1 <= n_classes <= len(prepared) // 2:
        raise ValueError(
            f"n_classes must be from 1 to half of the {len(prepared)} usable particles, not "
            f"{n_classes}"
        )
    radius = likelihood.mask_radius or 0.4 * prepared.size
    settings = _Settings(likelihood, n_classes, radius, prepared.size)
    climb = _Climb(settings, _observations(prepared, optics, settings), seed, progress)
    label, pose = climb.run()
    flipped = prepared
    if optics is not None:
        flipped = PreparedParticles(
            PhaseFlipped(stack, optics), images or Images(), where, max_rejected, batch_size
        )
    return _finish(flipped, settings, averaging, label, pose, climb.history)


class PhaseFlipped:
    """A stack whose images come phase-flipped."""

    def __init__(self, stack: Stack, optics: Optics) -> None:
        if len(optics) != len(stack):
            raise ValueError(f"{len(optics)} CTFs do not fit {len(stack)} particles")
        self.stack, self.optics = stack, optics
        self.shape, self.pixel_size = stack.shape, stack.pixel_size

    def __len__(self) -> int:
        return len(self.stack)

    def read(self, rows: Tensor) -> Tensor:
        """(b, h, w) float32 images."""
        return phase_flip(self.stack.read(rows), self.optics[rows])


def optics_of(stack: Stack) -> Optics | None:
    """The optics that a stack's STAR file tells, or None."""
    table = getattr(stack, "table", None)
    if table is None or stack.pixel_size is None:
        return None
    return optics_from_relion(table, getattr(stack, "optics", None), stack.pixel_size)


@plain_dataclass(frozen=True)
class _Settings:
    """The settings in the units of the prepared images."""

    likelihood: Likelihood
    n_classes: int
    radius: float
    size: int

    def ring(self, detail: float) -> int:
        """The Fourier ring of so many periods across the particle."""
        most = self.size // 2 - 1
        return min(max(3, round(detail * self.size / (2 * self.radius))), most)


def _observations(
    prepared: PreparedParticles, optics: Optics | None, settings: _Settings
) -> Observations:
    if optics is not None:
        if len(optics) != len(prepared.stack):
            raise ValueError(f"{len(optics)} CTFs do not fit {len(prepared.stack)} particles")
        optics = optics[prepared.rows].scaled(prepared.scale)
    return observe(
        prepared.read, len(prepared), prepared.size, optics,
        settings.ring(settings.likelihood.end_detail), settings.radius,
        settings.likelihood.max_shift,
    )  # fmt: skip


def shift_grid(max_shift: float, step: float, device: torch.device | str | None = None) -> Tensor:
    """(s, 2) trial shifts: a square grid within ``max_shift``, symmetric about zero."""
    reach = math.floor(max_shift / step + 1e-6)
    axis = torch.arange(-reach, reach + 1, device=device) * step
    return torch.cartesian_prod(axis, axis).float()


@plain_dataclass(frozen=True, eq=False)
class _Band:
    """Particles on some rings about their own centres, with trial shifts: what iterates."""

    observations: Observations
    own: Tensor  # (n, 2) pixels
    shifts: Tensor  # (s, 2)
    rings: FourierRings
    mirror: bool
    cache: list[Features] = field(default_factory=list)

    def of(self, rows: Tensor) -> Features:
        """Features of some particles."""
        polar, weight = self.observations.polar[rows], self.observations.weight[rows]
        return features(polar, weight, self.own[rows], self.shifts, self.rings)

    def chunks(self) -> Iterator[Features]:
        if self.cache:
            yield from self.cache
            return
        n = len(self.observations)
        each = 8 * len(self.shifts) * self.rings.last * self.rings.n_frequencies
        for rows in torch.arange(n).split(CHUNK):
            made = self.of(rows)
            if each * n <= KEEP:
                self.cache.append(made)
            yield made

    def expect(self, classes: Tensor) -> tuple[Posterior, Sums]:
        """An E-step of all particles."""
        found = [expect(made, classes, mirror=self.mirror) for made in self.chunks()]
        posterior = Posterior(*(torch.cat(of) for of in zip(*(f[0] for f in found), strict=True)))
        return posterior, add_sums([sums for _, sums in found])


class _State(NamedTuple):
    """Where a climb is."""

    evidence: float  # mean log-evidence of a particle
    classes: Tensor  # (k, r, m)
    posterior: Posterior
    sums: Sums


class _Climb:
    """The climb from random particles to classes."""

    def __init__(
        self,
        settings: _Settings,
        observations: Observations,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.settings, self.observations = settings, observations
        self.generator = torch.Generator().manual_seed(seed)
        self.progress, self.history = progress, list[dict[str, Any]]()
        self.clock = time.perf_counter()
        likelihood = settings.likelihood
        start, end = settings.ring(likelihood.start_detail), settings.ring(likelihood.end_detail)
        middle = round((start + end) / 2)
        # Shifts: wide and coarse, then narrow and fine about what was found.
        wide = 2.0 if likelihood.max_shift >= 2 else 1.0
        self.levels = [(start, likelihood.max_shift, wide), (middle, 1.0, 1.0), (end, 1.0, 0.5)]

    def run(self) -> tuple[Tensor, Pose]:
        """Label (n,) and pose (n,) of every particle, on the CPU."""
        band = self.band(torch.zeros(len(self.observations), 2), *self.levels[0])
        found = [self.start(band) for _ in range(self.settings.likelihood.starts)]
        state = max(found, key=lambda each: each.evidence)
        for level in self.levels[1:]:
            own = band.own + best_shift(state.posterior, band)
            old, band = band.rings, self.band(own, *level)
            state = self.relax(band, extend(state.classes, old, band.rings), RELAX_STEPS)
            if level is not self.levels[-1]:
                state = self.cycle(band, state)
        return best_of(state.posterior, band)

    def band(self, own: Tensor, last: int, reach: float, step: float) -> _Band:
        device = self.observations.polar.device
        shifts = shift_grid(reach, step, device)
        rings = self.observations.rings.to(last)
        mirror = self.settings.likelihood.mirror
        return _Band(self.observations, own.to(device), shifts, rings, mirror)

    def start(self, band: _Band) -> _State:
        """One climb at the start's resolution."""
        n, k = len(self.observations), self.settings.n_classes
        many = min(math.ceil(self.settings.likelihood.surplus * k), n // 2)
        chosen = torch.randperm(n, generator=self.generator)[:many]
        classes = single_particles(band.of(chosen), signal_power(band))
        state = self.relax(band, classes, START_STEPS, "start")
        return self.cycle(band, self.merge(band, state.sums))

    def cycle(self, band: _Band, state: _State) -> _State:
        """Split and merge while that finds something likelier."""
        prior = signal_power(band)
        for _ in range(self.settings.likelihood.cycles):
            trial = self.merge(band, self.split(band, state.posterior.share.argmax(1), prior))
            if trial.evidence <= state.evidence:
                break
            state = trial
        return state

    def merge(self, band: _Band, sums: Sums) -> _State:
        """Merged to the number of classes asked, and relaxed."""
        apart = shift_grid(self.settings.likelihood.max_shift + 1, 1.0, band.shifts.device)
        sums, _ = merge_classes(sums, band.rings, apart, self.settings.n_classes, band.mirror)
        return self.relax(band, maximise(sums, band.rings), RELAX_STEPS, "cycle")

    def relax(self, band: _Band, classes: Tensor, steps: int, step: str = "relax") -> _State:
        """Plain expectation maximisation, until it rests or for so many steps."""
        evidence = -math.inf
        for _ in range(steps):
            posterior, sums = band.expect(classes)
            classes = maximise(sums, band.rings)
            self.note(step, band, posterior)
            before, evidence = evidence, float(posterior.log_evidence.mean())
            if evidence - before < SETTLED * abs(evidence):
                break
        return _State(evidence, classes, posterior, sums)

    def split(self, band: _Band, label: Tensor, prior: Tensor) -> Sums:
        """Children of every class: an expectation maximisation of its members alone."""
        parts = []
        for c in range(int(label.max()) + 1):
            members = (label == c).nonzero().squeeze(1)
            children = min(self.settings.likelihood.split, len(members) // 8)
            if len(members) == 0:
                continue
            made = band.of(members)
            order = torch.randperm(len(members), generator=self.generator)
            seeds = order[: max(1, children)].sort().values
            classes = single_particles(made.take(seeds), prior)
            for _ in range(SPLIT_STEPS):
                _, sums = expect(made, classes, mirror=band.mirror)
                classes = maximise(sums, band.rings)
            parts.append(sums)
        return join_classes(parts)

    def note(self, step: str, band: _Band, posterior: Posterior) -> None:
        """A row of the history."""
        sizes = torch.bincount(posterior.share.argmax(1), minlength=posterior.share.shape[1])
        self.history.append(
            {
                "iteration": len(self.history) + 1,
                "step": step,
                "rings": band.rings.last,
                "classes": posterior.share.shape[1],
                "log_evidence": float(posterior.log_evidence.mean()),
                "certainty": float(posterior.share.amax(1).mean()),
                "smallest_class": int(sizes.min()),
                "largest_class": int(sizes.max()),
                "empty_classes": int((sizes == 0).sum()),
                "seconds": round(time.perf_counter() - self.clock, 3),
            }
        )
        self.clock = time.perf_counter()
        if self.progress is not None:
            self.progress(step, len(self.history), 0)


def signal_power(band: _Band) -> Tensor:
    """(r,) variance of a feature of class images, from what the particles have beyond noise."""
    rows = torch.arange(0, len(band.observations), max(1, len(band.observations) // 2000))
    made = _Band(
        band.observations, band.own, torch.zeros(1, 2, device=band.shifts.device), band.rings, False
    ).of(rows)
    spectra = torch.view_as_complex(made.rows[:, :, 0].unflatten(-1, (-1, 2)).contiguous())
    frequency = torch.arange(len(spectra), device=spectra.device)
    first = torch.tensor([band.rings.first_ring(m) for m in frequency.tolist()])
    ring = torch.arange(1, band.rings.last + 1)
    twice = torch.where(frequency == 0, 1.0, 2.0)[:, None]
    there = (first[:, None] <= ring).to(spectra.device) * twice  # (m, r)
    power = (spectra.abs().square() * twice[:, None]).sum(0)  # (n, r)
    free = there.sum(0)
    noise = band.rings.n_angles * made.weight * free
    signal = (power - noise).mean(0) / made.weight.square().mean(0) / free
    # At least a trace: a ring without signal here would stay without forever.
    return signal.clamp(min=1e-3 * float(signal.max()) + 1e-12)


def single_particles(made: Features, prior: Tensor) -> Tensor:
    """(n, r, m) class images from one particle each, shrunk by the prior (r,) of the signal."""
    centre = len(made.shifts) // 2
    rows = made.rows[:, :, centre].unflatten(-1, (-1, 2)).contiguous()
    spectra = torch.view_as_complex(rows).permute(1, 2, 0)
    return spectra / (made.weight + made.rings.n_angles / prior)[..., None]


def best_shift(posterior: Posterior, band: _Band) -> Tensor:
    """(n, 2) the trial shift of every particle's best class."""
    label = posterior.share.argmax(1, keepdim=True)
    return band.shifts[posterior.shift.gather(1, label).squeeze(1)]


def best_of(posterior: Posterior, band: _Band) -> tuple[Tensor, Pose]:
    """Label (n,) and pose (n,) of the likeliest class, on the CPU."""
    label = posterior.share.argmax(1)
    angle = posterior.angle.gather(1, label[:, None]).squeeze(1)
    degrees = wrap_degrees(angle.float() * (360.0 / band.rings.n_angles))
    hand = posterior.hand.gather(1, label[:, None]).squeeze(1).bool()
    shift = band.own + best_shift(posterior, band)
    return label.cpu(), Pose(degrees.cpu(), shift.cpu(), hand.cpu())


def _finish(
    particles: PreparedParticles,
    settings: _Settings,
    averaging: Averaging,
    label: Tensor,
    pose: Pose,
    history: list[dict[str, Any]],
) -> Alignment:
    """Poses refined against the averages, and everything the result tells."""
    k, size = settings.n_classes, particles.size
    half = particles.rows % 2
    radius = averaging.mask_radius or settings.radius
    last_ring = min(round(settings.radius), (size - 1) // 2)
    mask = soft_mask(size, radius, averaging.mask_edge, particles.device)
    sums = class_sums(
        particles.parts(), particles.take, pose, label, half, k, size, particles.device
    )
    references = masked(filtered_averages(sums, averaging, mask), mask)
    poses, scores = [], []
    for members, images in particles.batches():
        found, score = refine(
            images, references, label[members].to(images.device), pose[members].to(images.device),
            Rings(last_ring=last_ring),
        )  # fmt: skip
        poses.append(found.to("cpu"))
        scores.append(score.cpu())
    pose, score = Pose.cat(poses), torch.cat(scores)
    sums = class_sums(
        particles.parts(), particles.take, pose, label, half, k, size, particles.device
    )
    curves = sums.frc(mask)
    resolution = frc.resolution(curves, size, particles.pixel_size or particles.scale)
    pose, class_number, score = over_all_rows(
        len(particles.stack), particles.rows, label, pose, score, particles.scale
    )
    return Alignment(
        pose=pose,
        class_number=class_number,
        score=score,
        averages=sums.averages().cpu(),
        frc=curves.cpu(),
        resolution=resolution.cpu(),
        class_sizes=sums.sizes.cpu(),
        history=pd.DataFrame(history),
        rejected=particles.rejected,
        pixel_size=particles.pixel_size,
        scale=particles.scale,
    )
