"""The settings of a classification, and what they are in pixels of the images."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cryoalign.runtime.settings import settings


@settings
class Likelihood:
    """How classes are found by likelihood: the section ``likelihood`` of the settings."""

    start: Literal["singles", "stochastic", "invariants"] = Field(
        default="singles",
        description="singles: from random particles; stochastic: by growing random subsets; "
        "invariants: from groups by rotation-invariant features",
    )
    starts: int = Field(default=1, ge=1, description="independent starts; the likeliest goes on")
    surplus: float = Field(default=1.5, ge=1, description="classes to start with per class asked")
    split: int = Field(default=3, ge=2, description="parts that every class is split into")
    cycles: int = Field(
        default=4, ge=0, description="cycles of splitting and merging, at most, while they gain"
    )
    start_detail: float = Field(
        default=8.0, gt=1, description="resolution at the start, periods across the particle"
    )
    end_detail: float = Field(
        default=11.2, gt=1, description="resolution at the end, periods across the particle"
    )

    def __post_init__(self) -> None:
        if self.end_detail < self.start_detail:
            raise ValueError(
                f"likelihood.end_detail {self.end_detail:g} is coarser than start_detail "
                f"{self.start_detail:g}: make it as large at least"
            )


@dataclass(frozen=True)
class Plan:
    """The settings in the units of the prepared images.

    Attributes:
        likelihood: the settings.
        n_classes: number of classes asked.
        radius: of the particle, pixels.
        max_shift: how far off centre a particle may be, pixels.
        mirror: whether mirrored particles are tried.
        size: box, pixels.
    """

    likelihood: Likelihood
    n_classes: int
    radius: float
    max_shift: float
    mirror: bool
    size: int

    def __post_init__(self) -> None:
        room = self.size / 2 - 1
        if self.size < 16 or self.radius > room:
            raise ValueError(
                f"a particle of radius {self.radius:g} px leaves no background in a box of "
                f"{self.size} px: particle.radius can be at most {room:g} px, of a box of 16 px "
                "at least"
            )

    def ring(self, detail: float) -> int:
        """The Fourier ring of so many periods across the particle."""
        most = self.size // 2 - 1
        return min(max(3, round(detail * self.size / (2 * self.radius))), most)

    @property
    def levels(self) -> list[tuple[int, float, float]]:
        """Last ring, largest shift and step of the trial shifts of every level: wide and coarse,
        then narrow and fine about what was found."""
        start, end = self.ring(self.likelihood.start_detail), self.ring(self.likelihood.end_detail)
        wide = 2.0 if self.max_shift >= 2 else 1.0
        middle = round((start + end) / 2)
        return [(start, self.max_shift, wide), (middle, 1.0, 1.0), (end, 1.0, 0.5)]
