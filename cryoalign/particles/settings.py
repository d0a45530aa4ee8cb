"""What is known of the particle, and how its images are prepared: two sections of the settings."""

import re
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field

from cryoalign.runtime.settings import settings


class Box(NamedTuple):
    """The prepared images' side in pixels, and the size of a pixel in Å (None: not known)."""

    size: int
    pixel_size: float | None


def _length(value: object) -> str:
    """A length with its unit, as ``36 px`` or ``130 A``."""
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?\d+)?)\s*(px|A|Å)\s*", str(value))
    try:
        number = float(found[1]) if found else None
    except ValueError:
        number = None
    if found is None or number is None:
        raise ValueError('should be a length with its unit, like "36 px" or "130 A"')
    return f"{number:g} {found[2].replace('Å', 'A')}"


Length = Annotated[str, BeforeValidator(_length)]
"""A length with its unit: ``36 px`` (pixels of the prepared images) or ``130 A`` (Å)."""


def in_pixels(length: str, box: Box, name: str) -> float:
    """A length in pixels of the prepared images.

    Args:
        length: as `Length` has it.
        box: of the prepared images.
        name: what the length is of, for the error.

    Raises:
        ValueError: the length is in Å and the pixel size is not known.
    """
    number, unit = length.split()
    if unit == "px":
        return float(number)
    if box.pixel_size is None:
        raise ValueError(
            f"{name} is {length}, but the input does not say its pixel size: give {name} in "
            "pixels, as in 36 px"
        )
    return float(number) / box.pixel_size


@settings
class Particle:
    """What is known of the particle in its box. Lengths have a unit: ``36 px`` or ``130 A``."""

    radius: Length | None = Field(
        default=None,
        description="radius of the particle, px or A: references are masked there, and only what "
        "lies inside is compared; null: for mra and rfa the largest disc that stays in the box at "
        "every shift, for classify and isac 0.4 of the box",
    )
    max_shift: Length = Field(
        default="3 px", description="how far off centre a particle may be in x and y, px or A"
    )
    mirror: bool = Field(default=True, description="mirrored particles belong to the same class")
    ctf: bool = Field(default=True, description="use the CTF where the STAR file has a defocus")

    def radius_in(self, box: Box) -> float | None:
        """The radius in pixels of the prepared images; None where it is not set."""
        return None if self.radius is None else in_pixels(self.radius, box, "particle.radius")

    def radius_or_part(self, box: Box) -> float:
        """The radius in pixels, 0.4 of the box where it is not set."""
        return self.radius_in(box) or 0.4 * box.size

    def max_shift_in(self, box: Box) -> float:
        """The largest shift in pixels of the prepared images."""
        return in_pixels(self.max_shift, box, "particle.max_shift")


@settings
class Images:
    """How particles are prepared. Every other length in px is in pixels of the prepared images."""

    box: int | None = Field(
        default=None, ge=8, description="side to crop to in Fourier space, px; null: the input's"
    )
    background_radius: float | None = Field(
        default=None,
        gt=0,
        description="particles are normalised by the pixels beyond this radius, px of the input; "
        "null: half the box",
    )
    invert: bool = Field(
        default=False, description="turn the contrast round: density should be bright"
    )

    def box_of(self, size: int, pixel_size: float | None) -> Box:
        """The prepared images of particles of ``size`` pixels of ``pixel_size`` Å."""
        small = self.box or size
        return Box(small, None if pixel_size is None else pixel_size * size / small)
