"""Two sections of the settings: properties of the particle, and how images are prepared."""

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from cryoalign.images.masks import Background
from cryoalign.runtime.settings import settings


class Box(NamedTuple):
    """Size of the prepared images."""

    size: int  # side, pixels
    pixel_size: float | None  # Å; None if not known


def _length(value: object) -> str:
    """Check a length with its unit, like ``36 px`` or ``130 A``."""
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
        length: a `Length`.
        box: size of the prepared images.
        name: key of the setting, for the error.

    Raises:
        ValueError: the length is in Å, and the pixel size is not known.
    """
    number, unit = length.split()
    if unit == "px":
        return float(number)
    if box.pixel_size is None:
        raise ValueError(
            f"{name} is {length}, but the pixel size of the input is not known: give {name} in "
            "pixels, for example 36 px"
        )
    return float(number) / box.pixel_size


Ctf = Literal["auto", "flip", "model", "none"]


def _ctf(value: object) -> object:
    """Refuse the values of earlier versions, and say what they are called now."""
    if isinstance(value, bool):
        raise ValueError("should be auto (which was true), flip, model or none (which was false)")
    return value


@settings
class Particle:
    """Properties of the particle in its box. Lengths have a unit: ``36 px`` or ``130 A``."""

    radius: Length | None = Field(
        default=None,
        description="radius of the particle, px or A: references are masked beyond it, and only "
        "pixels inside are compared; null: for mra and rfa the largest disc that stays in the box "
        "at every shift, for classify and isac 0.4 of the box",
    )
    max_shift: Length = Field(
        default="3 px",
        description="largest distance of a particle from the centre of its box in x and y, px or A",
    )
    mirror: bool = Field(default=True, description="mirrored particles belong to the same class")
    ctf: Annotated[Ctf, BeforeValidator(_ctf)] = Field(
        default="auto",
        description="what is done with the CTF, if the STAR file has a defocus: flip: phases are "
        "flipped and averages weighted by CTF^2; model: also part of the likelihood (classify); "
        "none: nothing; auto: model for classify, flip for the other methods",
    )

    def __post_init__(self) -> None:
        if self.radius is not None and float(self.radius.split()[0]) == 0:
            raise ValueError(f"particle.radius is {self.radius}: it must be above zero")

    def radius_in(self, box: Box) -> float | None:
        """The radius in pixels of the prepared images; None if it is not set."""
        return None if self.radius is None else in_pixels(self.radius, box, "particle.radius")

    def radius_or_part(self, box: Box) -> float:
        """The radius in pixels of the prepared images; 0.4 of the box if it is not set."""
        return self.radius_in(box) or 0.4 * box.size

    def max_shift_in(self, box: Box) -> float:
        """The largest shift in pixels of the prepared images."""
        return in_pixels(self.max_shift, box, "particle.max_shift")


@settings
class Images:
    """How images are prepared. Other sections have lengths in pixels of the prepared images."""

    box: int | None = Field(
        default=None,
        ge=8,
        description="side after cropping in Fourier space, px; null: not cropped",
    )
    background_radius: float | None = Field(
        default=None,
        gt=0,
        description="particles are normalised by the pixels beyond this radius, px of the input; "
        "null: half the box",
    )
    background: Background = Field(
        default="ramp",
        description="what is subtracted: ramp: the plane that fits the pixels beyond "
        "background_radius; constant: their mean; none: nothing",
    )
    invert: bool = Field(default=False, description="invert the contrast; density should be bright")
    hot_pixels: Literal["mend", "keep"] = Field(
        default="mend",
        description="mend: single pixels far from all around them get the median of their "
        "neighbours; keep: they stay",
    )
    cache: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: prepared images stay in memory, in up to a quarter of what is free (of "
        "the GPU, then of the host), and the others are read again; none: all are read again",
    )

    def box_of(self, size: int, pixel_size: float | None) -> Box:
        """Size of the prepared images, for images of ``size`` pixels of ``pixel_size`` Å."""
        small = self.box or size
        return Box(small, None if pixel_size is None else pixel_size * size / small)
