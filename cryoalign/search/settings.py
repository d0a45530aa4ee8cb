"""What poses a search tries: its settings, and the schedule of reference-free alignment."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.particles.settings import Box, Particle
from cryoalign.runtime.settings import settings


@settings
class SearchSettings:
    """How poses are searched: the section ``search`` of the settings."""

    shift_step: float = Field(default=1.0, gt=0, description="distance between trial shifts, px")
    first_ring: int = Field(default=1, ge=1, description="innermost ring, px")
    ring_step: int = Field(default=1, ge=1, description="distance between rings, px")
    refine: bool = Field(default=True, description="refine poses below the grid's steps")
    mode: Literal["exhaustive", "adaptive"] | None = Field(
        default=None,
        description="exhaustive: the whole grid; adaptive: a coarse grid on smaller images, the "
        "best few poses refined; null: adaptive on a CPU where poses are refined, else exhaustive",
    )

    def __post_init__(self) -> None:
        if self.mode == "adaptive" and not self.refine:
            raise ValueError(
                "search.mode=adaptive requires search.refine=true: its coarse poses are not exact; "
                "or use search.mode=exhaustive"
            )

    def on(self, particle: Particle, box: Box) -> Search:
        """The search for a particle in prepared images.

        Raises:
            ValueError: particle and shifts do not fit the box.
        """
        if isinstance(self, Search):
            raise ValueError(
                "a method takes SearchSettings as search: give largest shift, radius and mirror "
                "by particle=Particle(radius=..., max_shift=..., mirror=...)"
            )
        radius = particle.radius_in(box)
        own = {name: getattr(self, name) for name in SearchSettings.__dataclass_fields__}
        search = Search(
            **own,
            max_shift=particle.max_shift_in(box),
            last_ring=None if radius is None else round(radius),
            mirror=particle.mirror,
        )
        search.rings(box.size)
        return search


@settings
class Search(SearchSettings):
    """All poses that are tried: `SearchSettings` and what the particle and its box allow."""

    max_shift: float = Field(default=3.0, ge=0, description="largest trial shift in x and y, px")
    last_ring: int | None = Field(
        default=None, ge=2, description="outermost ring, px; null: the largest that fits the box"
    )
    mirror: bool = Field(default=True, description="try mirrored particles too")

    def is_adaptive(self, device: torch.device) -> bool:
        """Whether particles on this device are screened first."""
        return self.mode == "adaptive" or (
            self.mode is None and self.refine and device.type == "cpu"
        )

    def rings(self, size: int) -> Rings:
        """The rings in a box of ``size`` pixels.

        Raises:
            ValueError: ``last_ring`` + ``max_shift`` leave the box.
        """
        room = (size - 1) // 2 - math.ceil(self.max_shift)
        if self.last_ring is not None and self.last_ring > room:
            raise ValueError(
                f"last_ring {self.last_ring} px with max_shift {self.max_shift:g} px does not fit "
                f"a box of {size} px: use a last ring (particle.radius) of at most {room} px, or a "
                "smaller max_shift"
            )
        if self.last_ring is not None and self.last_ring < self.first_ring:
            raise ValueError(
                f"last_ring {self.last_ring} px lies inside first_ring {self.first_ring} px: make "
                "the radius larger, or search.first_ring smaller"
            )
        if self.first_ring > room >= 2:
            raise ValueError(
                f"first_ring {self.first_ring} px lies outside the last ring that fits, {room} px: "
                f"use search.first_ring < {room}"
            )
        if room < 2:
            raise ValueError(
                f"a box of {size} px with max_shift {self.max_shift:g} px leaves no ring: use a "
                "smaller max_shift"
            )
        return Rings(self.first_ring, self.last_ring or room, self.ring_step)

    def shifts(self, device: torch.device | str | None = None) -> Tensor:
        """(s, 2) trial shifts: the square grid of ``shift_step`` within ``max_shift``, symmetric
        about zero."""
        reach = math.floor(self.max_shift / self.shift_step + 1e-6)
        axis = torch.arange(-reach, reach + 1, device=device) * self.shift_step
        return torch.cartesian_prod(axis, axis)


def _numbers(value: Any) -> Any:
    """``"4 2 1 1"``, as SPARX has it, a list or one number, as a tuple."""
    if isinstance(value, int | float):
        return (value,)
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(word) for word in value.replace(",", " ").split())
    except ValueError:
        raise ValueError('should be numbers, like [4, 2, 1] or "4 2 1"') from None


Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]


@settings
class Schedule:
    """The steps of reference-free alignment."""

    max_shift: Numbers = Field(
        default=(4.0, 2.0, 1.0, 1.0),
        description="largest trial shift of each step along x and y, px: in the first iteration "
        "about zero, then about each particle's own shift",
    )
    shift_step: Numbers = Field(
        default=(2.0, 1.0, 0.5, 0.25),
        description="distance between trial shifts of each step, px; an adaptive search chooses "
        "its own",
    )
    settle: float = Field(
        default=0.1,
        ge=0,
        description="a step ends when the median change of the poses is no larger, px at the last "
        "ring, and no more than 1 % of the hands change",
    )
    kicks: int = Field(
        default=0,
        ge=0,
        description="number of iterations, but for the last step's, that turn particles by "
        "multiples of kick_angle only, so that wrong poses come loose",
    )
    kick_every: int = Field(default=4, ge=2, description="iterations from kick to kick")
    kick_angle: float = Field(
        default=90.0, ge=1, le=180, description="the angles of a kick are its multiples, degrees"
    )
    starts: int = Field(
        default=1,
        ge=1,
        description="alignments of the first step, of which that with the best mean score goes on; "
        "all but the first begin from particles turned at random",
    )

    def __post_init__(self) -> None:
        reach, steps = self.max_shift, self.shift_step
        if not reach or len(reach) != len(steps):
            raise ValueError(
                f"schedule.max_shift has {len(reach)} steps, schedule.shift_step {len(steps)}: "
                "give a number of each for every step"
            )
        if self.kicks and len(reach) == 1:
            raise ValueError(
                "schedule.kicks never happen in a schedule of one step, which is its last: give "
                "schedule.max_shift and schedule.shift_step more steps, or leave kicks out"
            )
        for widest, step in zip(reach, steps, strict=True):
            if not (math.isfinite(widest) and widest >= 0 and math.isfinite(step) and step > 0):
                raise ValueError("schedule.max_shift must be 0 or more, shift_step above 0")
            if 0 < widest < step:
                raise ValueError(
                    f"schedule.shift_step {step:g} px is larger than schedule.max_shift "
                    f"{widest:g} px of its step, so that no shift would be tried: make it smaller"
                )

    def __len__(self) -> int:
        return len(self.max_shift)

    def widest(self, search: Search) -> Search:
        """The search with the largest shifts of any step, which rings and box must allow."""
        reach = max(self.max_shift)
        return replace(
            search, max_shift=reach, shift_step=self.shift_step[self.max_shift.index(reach)]
        )
