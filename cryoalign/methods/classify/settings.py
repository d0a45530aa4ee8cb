"""The settings of a classification, and their values in pixels of the prepared images."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cryoalign.runtime.settings import settings


@settings
class Likelihood:
    """How classes are found by likelihood: the section ``likelihood`` of the settings."""

    start: Literal["singles", "stochastic", "invariants"] = Field(
        default="singles",
        description="first classes: singles: random particles; stochastic: averages of growing "
        "random subsets; invariants: groups with similar rotation-invariant features",
    )
    starts: int = Field(
        default=1,
        ge=1,
        description="independent starts; the one with the highest likelihood is used",
    )
    surplus: float = Field(
        default=1.5, ge=1, description="number of classes at the start, over n_classes"
    )
    split: int = Field(
        default=3, ge=2, description="number of classes into which every class is split"
    )
    cycles: int = Field(
        default=4,
        ge=0,
        description="largest number of cycles of splitting and merging; they end when the "
        "likelihood no longer rises",
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
                f"{self.start_detail:g}: use at least {self.start_detail:g}"
            )


@dataclass(frozen=True)
class Plan:
    """The settings in pixels of the prepared images.

    Attributes:
        likelihood: the settings.
        n_classes: number of classes of the result.
        radius: radius of the particle, pixels.
        max_shift: largest distance of a particle from the centre of its box, pixels.
        mirror: whether mirrored particles are tried.
        size: side of the box, pixels.
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
                f"{self.size} px: use a particle.radius of at most {room:g} px, and a box of at "
                "least 16 px"
            )

    def ring(self, detail: float) -> int:
        """The Fourier ring, in 1/box, with ``detail`` periods across the particle."""
        most = self.size // 2 - 1
        return min(max(3, round(detail * self.size / (2 * self.radius))), most)

    @property
    def levels(self) -> list[tuple[int, float, float]]:
        """Last ring (1/box), largest trial shift and shift step (pixels) of every resolution level.

        The first level has large and coarse shifts; the others have small and fine shifts about the
        shifts found before.
        """
        start, end = self.ring(self.likelihood.start_detail), self.ring(self.likelihood.end_detail)
        wide = 2.0 if self.max_shift >= 2 else 1.0
        middle = round((start + end) / 2)
        return [(start, self.max_shift, wide), (middle, 1.0, 1.0), (end, 1.0, 0.5)]
