"""The settings of ISAC, and the size of its shrunk images."""

import math
from typing import Literal, NamedTuple

from pydantic import Field

from cryoalign.particles.settings import Box, Particle
from cryoalign.runtime.settings import settings


@settings
class Isac:
    """What a stable class is, and how it is found: the section ``isac`` of the settings."""

    images_per_group: int = Field(
        default=200,
        ge=4,
        description="particles per class before the unstable ones are left out; this sets the "
        "number of classes",
    )
    min_group_size: int | None = Field(
        default=None,
        ge=2,
        description="stable members a class needs; null: 0.3 of images_per_group",
    )
    threshold: float = Field(
        default=0.7, gt=0, description="pixel error of stable particles is below this, px (shrunk)"
    )
    core: float | None = Field(
        default=3.0,
        gt=0,
        description="leave out stable particles whose score is this many standard deviations below "
        "the median of the class; null: keep all",
    )
    runs: int = Field(default=5, ge=2, description="independent realignments of every class")
    passes: int = Field(default=4, ge=1, description="largest number of passes of a generation")
    target_radius: int = Field(
        default=29, ge=8, description="radius to which larger particles are shrunk, px (shrunk)"
    )
    prealign: int = Field(
        default=14, ge=0, description="largest number of iterations of centring; 0: no centring"
    )
    start: Literal["random", "likelihood"] = Field(
        default="random",
        description="first references of a generation: random particles, or classes by likelihood",
    )
    slack: float = Field(
        default=0.5, ge=0, description="deviation of class sizes from their mean, as a share"
    )
    repeats: int = Field(
        default=1,
        ge=1,
        description="independent runs: the first gives the result, the others show how much of it "
        "is found again",
    )

    def __post_init__(self) -> None:
        if self.least > self.images_per_group * (1 + self.slack):
            raise ValueError(
                f"isac.min_group_size {self.least} is above isac.images_per_group "
                f"{self.images_per_group}, so that no class could be accepted: use a smaller "
                "isac.min_group_size"
            )

    @property
    def least(self) -> int:
        """Number of stable members that a class needs."""
        return self.min_group_size or max(2, math.ceil(0.3 * self.images_per_group))


class Scale(NamedTuple):
    """The shrunk images; lengths are in their pixels."""

    size: int  # side
    factor: float  # side of the prepared images over that of the shrunk images
    last_ring: int  # radius of the particle
    max_shift: float  # largest shift


def scale_of(isac: Isac, particle: Particle, box: Box) -> Scale:
    """The size of the shrunk images for prepared images of size ``box``.

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
    small = min(size, max(16, math.ceil(size * min(1.0, isac.target_radius / radius))))
    factor = size / small
    last = min(round(radius / factor), (small - 1) // 2 - math.ceil(reach / factor))
    return Scale(small, factor, last, reach / factor)
