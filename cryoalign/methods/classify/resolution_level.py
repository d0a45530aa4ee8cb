"""The E-step of all particles at one level of resolution.

Each process has whole parts of the particles (`runtime.processes`), and every computation stays
within a part, so that results do not depend on the number of processes. The results for all
particles are on every process.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cryoalign.methods.classify.em_step import (
    Features,
    Posterior,
    Sums,
    expect,
    features,
    no_sums,
)
from cryoalign.methods.classify.fourier_rings import FourierRings
from cryoalign.methods.classify.whitening import Observations
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.runtime.processes import ExactSum, gather_over_ranks, part_length, shard
from cryoalign.runtime.threads import available_memory, map_in_order, workers_for

KEPT_SHARE = 0.125  # largest share of the free memory for features kept between iterations
CHUNK = {"cpu": 256, "cuda": 16384}  # most particles of an E-step at a time; a GPU needs more
# Parts are few and not small, because the members of a class are computed part by part.
LEAST, PARTS = {"cpu": 512, "cuda": 4096}, 24
POWER_SAMPLE = 2000  # particles on which the signal's power is measured

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def length_of(n: int, device: torch.device) -> int:
    """Number of particles of a part, if there are n in all: a multiple of `whitening.CHUNK`."""
    return part_length(n, LEAST[device.type], PARTS)


def own_of(n: int, device: torch.device) -> slice:
    """The particles of this process, if there are n in all."""
    return shard(n, length_of(n, device))


class Classified(NamedTuple):
    """The result of an E-step for n particles."""

    log_evidence: Tensor  # (n,) log-sum-exp over classes and poses
    share: Tensor  # (n,) posterior of the likeliest class
    runner_up: Tensor  # (n,) posterior of the second likeliest class
    label: Tensor  # (n,) index of the likeliest class
    angle: Tensor  # (n,) likeliest angle in that class, degrees
    shift: Tensor  # (n, 2) likeliest shift, pixels
    mirror: Tensor  # (n,) bool, likeliest hand

    @property
    def pose(self) -> Pose:
        """(n,) poses, particle onto class."""
        return Pose(self.angle, self.shift, self.mirror)


@dataclass(frozen=True, eq=False)
class ResolutionLevel:
    """The particles of this process, on the rings of a level, with its trial shifts.

    Attributes:
        observations: the b particles of this process.
        start: index of the first of these among all n particles.
        own: (n, 2) centre of each particle's trial shifts, pixels.
        shifts: (s, 2) trial shifts, added to ``own``, pixels.
        rings: the rings that are used.
        mirror: whether mirrored particles are tried.
        keep: whether features are kept in memory between iterations; None: if there is room.
        cache: features of batches by their first particle, as far as they are kept.
    """

    observations: Observations
    start: int
    own: Tensor
    shifts: Tensor
    rings: FourierRings
    mirror: bool
    keep: bool | None = None
    cache: dict[int, Features] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep is None:
            count = len(self.observations) * len(self.shifts)
            needed = 8 * count * self.rings.last * self.rings.n_frequencies
            room = KEPT_SHARE * available_memory(self.device)
            object.__setattr__(self, "keep", needed <= room)

    def __len__(self) -> int:
        return len(self.own)

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.observations.device

    @property
    def length(self) -> int:
        """Number of particles of a part."""
        return length_of(len(self), self.device)

    def evenly(self, most: int) -> int:
        """Size of batches of at most ``most`` particles which are equal in a whole part."""
        return math.ceil(self.length / math.ceil(self.length / most))

    def batches(self, rows: Tensor) -> list[Tensor]:
        """Batches of particles of one part, whose indices are ``rows`` (b,)."""
        return list(rows.split(self.evenly(CHUNK[self.device.type])))

    def in_parts(self, rows: Tensor) -> dict[int, Tensor]:
        """Places among ``rows`` (b,) of the particles of each part of this process, by the part's
        number; only of parts that have some, in ascending order."""
        here = self.is_here(rows).nonzero().squeeze(1)
        part = rows[here] // self.length
        return {int(number): here[part == number] for number in part.unique()}

    def is_here(self, rows: Tensor) -> Tensor:
        """(b,) bool: whether the particles with indices ``rows`` (b,) are on this process."""
        return (rows >= self.start) & (rows < self.start + len(self.observations))

    def of(self, rows: Tensor) -> Features:
        """Features of the particles with indices ``rows``, all of this process."""
        polar, weight = self.observations.take(rows - self.start)
        own = self.own[rows].to(self.device)
        return features(polar, weight, own, self.shifts, self.rings)

    def over(self, function: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[Outcome]:
        """Results of ``function`` for each item, in order, computed on all cores."""
        return map_in_order(function, items, workers_for(self.device))

    def expect(self, classes: Tensor) -> tuple[Classified, Sums]:
        """An E-step of all particles, whose results are on every process.

        Args:
            classes: (k, r, m) features of the class images.
        """

        def step(rows: Tensor) -> tuple[Classified, Sums]:
            made = self.cache.get(int(rows[0])) or self.of(rows)
            if self.keep:
                self.cache[int(rows[0])] = made
            posterior, sums = expect(made, classes, half=rows % 2, mirror=self.mirror)
            return self.classified(rows, posterior), sums

        rows = torch.arange(self.start, self.start + len(self.observations))
        batches = [batch for part in rows.split(self.length) for batch in self.batches(part)]
        # In the order of half-sets, in which the E-step needs them.
        batches = [batch[(batch % 2).argsort(stable=True)] for batch in batches if len(batch)]
        place = torch.cat([rows[:0], *batches]).argsort()
        steps = self.over(step, batches)
        each = [self.classified(rows[:0], no_posterior(classes))]

        def sums() -> Iterator[Sums]:
            for found, of_batch in steps:
                each.append(found)
                yield of_batch

        total = sums_over_ranks(sums(), classes)
        whole = (torch.cat(column).cpu()[place] for column in zip(*each, strict=True))
        return Classified(*(gather_over_ranks(column) for column in whole)), total

    def sums_of(self, rows: Tensor, classes: Tensor) -> tuple[float, Sums]:
        """Mean log-evidence and sums of an E-step of the particles with indices ``rows`` (b,)."""

        def step(part: Tensor) -> tuple[Tensor, Sums]:
            posterior, sums = expect(self.of(part), classes, half=part % 2, mirror=self.mirror)
            return posterior.log_evidence.sum(), sums

        evidence = ExactSum(1, 1, self.device)
        batches = (self.batches(rows[places]) for places in self.in_parts(rows).values())
        steps = self.over(step, (batch for part in batches for batch in part))

        def sums() -> Iterator[Sums]:
            for of_particles, of_batch in steps:
                evidence.add(of_particles.view(1, 1))
                yield of_batch

        total = sums_over_ranks(sums(), classes)
        return float(evidence.total()) / len(rows), total

    def classified(self, rows: Tensor, posterior: Posterior) -> Classified:
        """The likeliest class and pose of the particles with indices ``rows`` (b,)."""
        two = torch.nn.functional.pad(posterior.share, (0, 1)).topk(2, dim=1)
        label = two.indices[:, :1]
        angle, shift, hand = (
            each.gather(1, label).squeeze(1)
            for each in (posterior.angle, posterior.shift, posterior.hand)
        )
        own = self.own[rows].to(label.device, non_blocking=True)
        return Classified(
            log_evidence=posterior.log_evidence,
            share=two.values[:, 0],
            runner_up=two.values[:, 1],
            label=label.squeeze(1),
            angle=wrap_degrees(angle.float() * (360.0 / self.rings.n_angles)),
            shift=own + self.shifts[shift],
            mirror=hand.bool(),
        )

    def signal_power(self) -> Tensor:
        """(r,) variance of a feature of class images: the variance of particles minus noise."""
        n = len(self)
        rows = torch.arange(0, n, max(1, n // POWER_SAMPLE))
        first = torch.tensor([self.rings.first_ring(m) for m in range(self.rings.n_frequencies)])
        ring = torch.arange(1, self.rings.last + 1)
        twice = torch.full((self.rings.n_frequencies,), 2.0)
        twice[0] = 1.0
        free = (twice[:, None] * (first[:, None] <= ring)).sum(0).to(self.device)  # (r,)
        total = ExactSum(2 * self.rings.last, 1, self.device)
        for places in self.in_parts(rows).values():
            spectra, weight = self.centred(rows[places])
            power = spectra.abs().square() @ twice.to(self.device)  # (b, r)
            noise = self.rings.n_angles * weight * free
            total.add(torch.cat([(power - noise).sum(0), weight.square().sum(0)])[:, None])
        signal, scale = total.total().float().view(2, -1)
        signal = signal / scale / free
        # Above zero, because class images could never get signal on a ring without it.
        return signal.clamp(min=1e-3 * float(signal.max()) + 1e-12)

    def centred(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, r, m) of particles moved by their own shifts, and their weights (b, r)."""
        centre = torch.zeros(1, 2, device=self.device)
        made = replace(self, shifts=centre, cache={}).of(rows)
        return made.spectra[:, 0], made.weight

    def single_particles(self, rows: Tensor, prior: Tensor) -> Tensor:
        """(b, r, m) class images from one particle each, Wiener-filtered with the signal's power
        ``prior`` (r,)."""
        here = self.in_parts(rows)
        found = [torch.zeros(0, self.rings.last, self.rings.n_frequencies, 2, device=self.device)]
        for places in here.values():
            spectra, weight = self.centred(rows[places])
            shrunk = spectra / (weight + self.rings.n_angles / prior)[..., None]
            found.append(torch.view_as_real(shrunk.contiguous()))
        places = gather_over_ranks(torch.cat([rows[:0], *here.values()]))
        return torch.view_as_complex(gather_over_ranks(torch.cat(found))[places.argsort()])


def no_posterior(classes: Tensor) -> Posterior:
    """The posterior of no particles over classes (k, r, m)."""
    share = classes.real.new_zeros(0, len(classes))
    return Posterior(share[:, 0], share, share, share.long(), share.long(), share.long())


def sums_over_ranks(parts: Iterable[Sums], classes: Tensor) -> Sums:
    """The sums over batches of all processes, which no order of the batches changes.

    Args:
        parts: sums of each batch of this process.
        classes: (k, r, m) classes of the sums.
    """

    def rows(sums: Sums) -> list[Tensor]:
        # Numbers of one half, class and ring are of one magnitude.
        signal = torch.view_as_real(sums.signal).flatten(0, 2).flatten(1)
        return [signal, sums.weight.reshape(-1, 1), sums.size.reshape(-1, 1)]

    none = no_sums(classes)
    totals = [ExactSum(len(each), each.shape[1], classes.device) for each in rows(none)]
    for sums in parts:
        for total, values in zip(totals, rows(sums), strict=True):
            total.add(values)
    signal, weight, size = (total.total().float() for total in totals)
    signal = torch.view_as_complex(signal.view(*none.signal.shape, 2))
    return Sums(signal, weight.view(none.weight.shape), size.view(none.size.shape))
