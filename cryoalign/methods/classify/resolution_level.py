"""The E-step of all particles at one level of resolution.

Each process has a shard of the particles; the results for all particles are on every process.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cryoalign.methods.classify.em_step import (
    Features,
    Posterior,
    Sums,
    add_sums,
    expect,
    features,
    no_sums,
)
from cryoalign.methods.classify.fourier_rings import FourierRings
from cryoalign.methods.classify.whitening import Observations
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.runtime.processes import gather_over_ranks, sum_over_ranks
from cryoalign.runtime.threads import available_memory, map_in_order, workers_for

KEPT_SHARE = 0.125  # largest share of the free memory for features kept between iterations
CHUNK = {"cpu": 256, "cuda": 4096}  # particles of an E-step at a time; a GPU needs more
POWER_SAMPLE = 2000  # particles on which the signal's power is measured

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


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
        steps = list(self.over(step, rows.split(CHUNK[self.device.type])))
        found = Classified(
            *(torch.cat(of).cpu() for of in zip(*(each for each, _ in steps), strict=True))
        )
        found = Classified(*(gather_over_ranks(each) for each in found))
        return found, sums_over_ranks(add_sums([sums for _, sums in steps]))

    def sums_of(self, rows: Tensor, classes: Tensor) -> tuple[float, Sums]:
        """Mean log-evidence and sums of an E-step of the particles with indices ``rows`` (b,)."""

        def step(part: Tensor) -> tuple[Tensor, Sums]:
            posterior, sums = expect(self.of(part), classes, half=part % 2, mirror=self.mirror)
            return posterior.log_evidence.sum(), sums

        here = rows[self.is_here(rows)].split(CHUNK[self.device.type])
        steps = list(self.over(step, [part for part in here if len(part)]))
        evidence = sum_over_ranks(sum((e for e, _ in steps), classes.real.new_zeros(())))
        sums = add_sums([no_sums(classes), *(sums for _, sums in steps)])
        return float(evidence) / len(rows), sums_over_ranks(sums)

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
        spectra, weight = self.centred(rows[self.is_here(rows)])
        first = torch.tensor([self.rings.first_ring(m) for m in range(self.rings.n_frequencies)])
        ring = torch.arange(1, self.rings.last + 1)
        twice = torch.full((self.rings.n_frequencies,), 2.0)
        twice[0] = 1.0
        free = (twice[:, None] * (first[:, None] <= ring)).sum(0).to(self.device)  # (r,)
        power = spectra.abs().square() @ twice.to(self.device)  # (b, r)
        noise = self.rings.n_angles * weight * free
        signal, scale = sum_over_ranks(
            torch.stack([(power - noise).sum(0), weight.square().sum(0)])
        )
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
        images = torch.zeros(
            len(rows), self.rings.last, self.rings.n_frequencies, 2, device=self.device
        )
        here = self.is_here(rows)
        spectra, weight = self.centred(rows[here])
        shrunk = spectra / (weight + self.rings.n_angles / prior)[..., None]
        images[here.to(self.device)] = torch.view_as_real(shrunk.contiguous())
        return torch.view_as_complex(sum_over_ranks(images))


def sums_over_ranks(sums: Sums) -> Sums:
    """The sums over every process's particles."""
    signal = torch.view_as_complex(sum_over_ranks(torch.view_as_real(sums.signal)))
    return Sums(signal, sum_over_ranks(sums.weight), sum_over_ranks(sums.size))
