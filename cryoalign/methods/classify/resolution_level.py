"""A level of resolution: particles on some Fourier rings about their own centres, and trial shifts.

Each process keeps its shard of the particles; what is found of them is known to all.
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
    add_sums,
    expect,
    features,
    no_sums,
)
from cryoalign.methods.classify.fourier_rings import FourierRings
from cryoalign.methods.classify.whitening import Observations
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.runtime.processes import gather_over_ranks, sum_over_ranks
from cryoalign.runtime.threads import map_in_order, workers_for

KEEP = 2**30  # bytes of features that are kept between iterations rather than made again
CHUNK = {"cpu": 256, "cuda": 4096}  # particles of an E-step at a time
POWER_SAMPLE = 2000  # particles that the signal's power is measured on

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Classified(NamedTuple):
    """What an E-step found of n particles, on the CPU.

    Attributes:
        log_evidence: (n,) log-sum-exp over classes and poses.
        share: (n,) posterior of the likeliest class.
        runner_up: (n,) posterior of the second class.
        label: (n,) the likeliest class.
        angle: (n,) degrees; shift: (n, 2) pixels; mirror: (n,) bool: its likeliest pose.
    """

    log_evidence: Tensor
    share: Tensor
    runner_up: Tensor
    label: Tensor
    angle: Tensor
    shift: Tensor
    mirror: Tensor

    @property
    def pose(self) -> Pose:
        """(n,) poses, particle onto class."""
        return Pose(self.angle, self.shift, self.mirror)


@dataclass(frozen=True, eq=False)
class ResolutionLevel:
    """This process's particles, some rings of them, and trial shifts.

    Attributes:
        observations: of this process's particles, (b,) of the n.
        start: row of the first of them among all n.
        own: (n, 2) pixels, the shift about which each particle is tried.
        shifts: (s, 2) pixels, trial shifts beyond that.
        rings: the rings used.
        mirror: whether mirrored particles are tried.
    """

    observations: Observations
    start: int
    own: Tensor
    shifts: Tensor
    rings: FourierRings
    mirror: bool
    cache: dict[int, Features] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.own)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.observations.polar.device

    def is_here(self, rows: Tensor) -> Tensor:
        """(b,) bool: which of all particles' rows (b,) are of this process."""
        return (rows >= self.start) & (rows < self.start + len(self.observations))

    def of(self, rows: Tensor) -> Features:
        """Features of some of this process's particles."""
        here = (rows - self.start).to(self.device)
        polar, weight = self.observations.polar[here], self.observations.weight[here]
        own = self.own[rows].to(self.device)
        return features(polar, weight, own, self.shifts, self.rings)

    def fits(self, n: int) -> bool:
        """Whether the features of n particles may be kept."""
        return n * 8 * len(self.shifts) * self.rings.last * self.rings.n_frequencies <= KEEP

    def over(self, function: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[Outcome]:
        """``function`` of each item, in order, on all cores."""
        return map_in_order(function, items, workers_for(self.device))

    def expect(self, classes: Tensor) -> tuple[Classified, Sums]:
        """An E-step of all particles, on every process.

        Args:
            classes: (k, r, m) features of the class images.
        """
        keep = self.fits(len(self.observations))

        def step(rows: Tensor) -> tuple[Classified, Sums]:
            made = self.cache.get(int(rows[0])) or self.of(rows)
            if keep:
                self.cache[int(rows[0])] = made
            posterior, sums = expect(made, classes, half=rows % 2, mirror=self.mirror)
            return self.classified(rows, posterior), sums

        rows = torch.arange(self.start, self.start + len(self.observations))
        steps = list(self.over(step, rows.split(CHUNK[self.device.type])))
        found = Classified(
            *(torch.cat(of) for of in zip(*(each for each, _ in steps), strict=True))
        )
        found = Classified(*(gather_over_ranks(each) for each in found))
        return found, sums_over_ranks(add_sums([sums for _, sums in steps]))

    def sums_of(self, rows: Tensor, classes: Tensor) -> tuple[float, Sums]:
        """An E-step of some particles, rows (b,) of all: their mean log-evidence and sums."""

        def step(part: Tensor) -> tuple[Tensor, Sums]:
            posterior, sums = expect(self.of(part), classes, half=part % 2, mirror=self.mirror)
            return posterior.log_evidence.sum(), sums

        here = rows[self.is_here(rows)].split(CHUNK[self.device.type])
        steps = list(self.over(step, [part for part in here if len(part)]))
        evidence = sum_over_ranks(sum((e for e, _ in steps), classes.real.new_zeros(())))
        sums = add_sums([no_sums(classes), *(sums for _, sums in steps)])
        return float(evidence) / len(rows), sums_over_ranks(sums)

    def classified(self, rows: Tensor, posterior: Posterior) -> Classified:
        """The likeliest class and pose of particles (b,)."""
        two = torch.nn.functional.pad(posterior.share, (0, 1)).topk(2, dim=1)
        label = two.indices[:, :1]
        angle, shift, hand = (
            each.gather(1, label).squeeze(1)
            for each in (posterior.angle, posterior.shift, posterior.hand)
        )
        return Classified(
            posterior.log_evidence.cpu(),
            two.values[:, 0].cpu(),
            two.values[:, 1].cpu(),
            label.squeeze(1).cpu(),
            wrap_degrees(angle.float() * (360.0 / self.rings.n_angles)).cpu(),
            self.own[rows] + self.shifts[shift].cpu(),
            hand.bool().cpu(),
        )

    def signal_power(self) -> Tensor:
        """(r,) variance of a feature of class images: what particles have beyond their noise."""
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
        # At least a trace: a ring without signal here would stay without forever.
        return signal.clamp(min=1e-3 * float(signal.max()) + 1e-12)

    def centred(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, r, m) of particles about their own shifts, and their weights (b, r)."""
        centre = torch.zeros(1, 2, device=self.device)
        made = replace(self, shifts=centre, cache={}).of(rows)
        spectra = torch.view_as_complex(made.rows[:, :, 0].unflatten(-1, (-1, 2)).contiguous())
        return spectra.permute(1, 2, 0), made.weight

    def single_particles(self, rows: Tensor, prior: Tensor) -> Tensor:
        """(b, r, m) class images from one particle each, shrunk by the signal's power (r,)."""
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


def shift_grid(max_shift: float, step: float, device: torch.device | str | None = None) -> Tensor:
    """(s, 2) trial shifts: a square grid within ``max_shift``, symmetric about zero."""
    reach = math.floor(max_shift / step + 1e-6)
    axis = torch.arange(-reach, reach + 1, device=device) * step
    return torch.cartesian_prod(axis, axis).float()
