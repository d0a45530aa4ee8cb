"""The settings of ISAC, and the size of the shrunk images."""

import math
from typing import Literal, NamedTuple

from pydantic import Field

from cryoalign.particles.settings import Box, Particle
from cryoalign.runtime.settings import settings


@settings
class Isac:
    """What a stable class is, and how it is looked for: the section ``isac`` of the settings."""

    images_per_group: int = Field(
        default=200, ge=4, description="particles that a class is given, which sets their number"
    )
    min_group_size: int | None = Field(
        default=None, ge=2, description="stable members a class needs; null: 0.3 of the group"
    )
    threshold: float = Field(
        default=0.7, gt=0, description="pixel error below which a particle is stable, px (shrunk)"
    )
    core: float | None = Field(
        default=3.0,
        gt=0,
        description="deviations below its class's median score at which a "
        "stable particle is left out; null: none is",
    )
    runs: int = Field(default=5, ge=2, description="independent realignments of every class")
    passes: int = Field(default=4, ge=1, description="passes of a generation, at most")
    target_radius: int = Field(
        default=29, ge=8, description="radius that particles are shrunk to, px; smaller ones stay"
    )
    prealign: int = Field(default=14, ge=0, description="iterations of centring, at most; 0: none")
    start: Literal["random", "likelihood"] = Field(
        default="random",
        description="first references of a generation: random particles, or classes by likelihood",
    )
    slack: float = Field(
        default=0.5, ge=0, description="how far from equal size classes may be, a share of it"
    )
    repeats: int = Field(
        default=1,
        ge=1,
        description="independent runs; the first is the result, others show what is found again",
    )

    def __post_init__(self) -> None:
        if self.least > self.images_per_group * (1 + self.slack):
            raise ValueError(
                f"isac.min_group_size {self.least} is above isac.images_per_group "
                f"{self.images_per_group}, so that no class could be accepted: make it smaller"
            )

    @property
    def least(self) -> int:
        """Stable members that a class needs."""
        return self.min_group_size or max(2, math.ceil(0.3 * self.images_per_group))


class Scale(NamedTuple):
    """Lengths in pixels of the shrunk images."""

    size: int
    factor: float  # prepared pixels to one of these
    last_ring: int
    max_shift: float


def scale_of(isac: Isac, particle: Particle, box: Box) -> Scale:
    """The shrunk images of the prepared ones.

    Raises:
        ValueError: the particle and its shifts do not fit the box.
    """
    size, reach = box.size, particle.max_shift_in(box)
    room = (size - 1) // 2 - math.ceil(reach)
    radius = particle.radius_in(box) or min(0.4 * size, room)
    if not 4 <= radius <= room:
        raise ValueError(
            f"a particle of radius {radius:g} px that may be {reach:g} px off centre does not fit "
            f"a box of {size} px: use a particle.radius from 4 to {room} px, or a smaller "
            "particle.max_shift"
        )
    small = max(16, math.ceil(size * min(1.0, isac.target_radius / radius)))
    small = min(small, size)
    factor = size / small
    last = min(round(radius / factor), (small - 1) // 2 - math.ceil(reach / factor))
    return Scale(small, factor, last, reach / factor)
