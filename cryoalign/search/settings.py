"""The settings of a search for poses, and the schedule of reference-free alignment."""

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

    shift_step: float = Field(default=1.0, gt=0, description="distance of trial shifts, px")
    first_ring: int = Field(default=1, ge=1, description="innermost ring, px")
    ring_step: int = Field(default=1, ge=1, description="distance of rings, px")
    refine: bool = Field(default=True, description="refine poses to below the steps of the grid")
    mode: Literal["exhaustive", "adaptive"] | None = Field(
        default=None,
        description="exhaustive: search the whole grid; adaptive: search a coarse grid on smaller "
        "images and refine the best few poses; null: adaptive if refine is true, else exhaustive",
    )

    def __post_init__(self) -> None:
        if self.mode == "adaptive" and not self.refine:
            raise ValueError(
                "search.mode=adaptive requires search.refine=true, because its coarse poses are "
                "not exact: set that, or use search.mode=exhaustive"
            )

    def on(self, particle: Particle, box: Box) -> Search:
        """The search for a particle in prepared images of size ``box``.

        Raises:
            ValueError: radius and shifts of the particle do not fit the box.
        """
        if isinstance(self, Search):
            raise ValueError(
                "a method takes SearchSettings as search, not Search: give largest shift, radius "
                "and mirror as particle=Particle(radius=..., max_shift=..., mirror=...)"
            )
        radius = particle.radius_in(box)
        if radius is not None and round(radius) < 2:
            raise ValueError(f"particle.radius is {radius:.3g} px: it must be 2 px or more")
        own = {name: getattr(self, name) for name in SearchSettings.__dataclass_fields__}
        search = Search(
            **own,
            max_shift=particle.max_shift_in(box),
            last_ring=None if radius is None else round(radius),
            mirror=particle.mirror,
        )
        search.rings(box.size)
        if 0 < search.max_shift < search.shift_step:
            raise ValueError(
                f"search.shift_step {search.shift_step:g} px is larger than the largest shift "
                f"{search.max_shift:g} px, so that no shift would be tried: make it smaller, or "
                "particle.max_shift 0 px"
            )
        return search


@settings
class Search(SearchSettings):
    """All poses that are tried: `SearchSettings`, and the limits that follow from the particle."""

    max_shift: float = Field(default=3.0, ge=0, description="largest trial shift in x and y, px")
    last_ring: int | None = Field(
        default=None, ge=2, description="outermost ring, px; null: the largest that fits the box"
    )
    mirror: bool = Field(default=True, description="try mirrored particles too")

    @property
    def is_adaptive(self) -> bool:
        """Whether the search is adaptive."""
        return self.mode == "adaptive" or (self.mode is None and self.refine)

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
                f"last_ring {self.last_ring} px lies inside first_ring {self.first_ring} px: use a "
                "larger particle.radius, or a smaller search.first_ring"
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
        """(s, 2) trial shifts, pixels."""
        return shift_grid(self.max_shift, self.shift_step, device)


def shift_grid(max_shift: float, step: float, device: torch.device | str | None = None) -> Tensor:
    """(s, 2) trial shifts in pixels: a square grid within ``max_shift``, symmetric about zero."""
    reach = math.floor(max_shift / step + 1e-6)
    axis = torch.arange(-reach, reach + 1, device=device) * step
    return torch.cartesian_prod(axis, axis).float()


def _numbers(value: Any) -> Any:
    """Make a tuple of a list, of one number, or of text like ``"4 2 1 1"``, as SPARX has it."""
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
        "about zero, then about each particle's present shift",
    )
    shift_step: Numbers = Field(
        default=(2.0, 1.0, 0.5, 0.25),
        description="distance of the trial shifts of each step, px; not used by an adaptive search",
    )
    settle: float = Field(
        default=0.1,
        ge=0,
        description="a step ends when the median change of the poses is at most this, px at the "
        "last ring, and at most 1 % of the hands change",
    )
    kicks: int = Field(
        default=0,
        ge=0,
        description="number of kicks: iterations before the last step that rotate particles only "
        "by multiples of kick_angle, so that they can leave wrong poses",
    )
    kick_every: int = Field(
        default=4, ge=2, description="number of iterations from one kick to the next"
    )
    kick_angle: float = Field(
        default=90.0, ge=1, le=180, description="a kick tries multiples of this angle, degrees"
    )
    starts: int = Field(
        default=1,
        ge=1,
        description="number of alignments of the first step, of which the one with the best mean "
        "score is continued; all but the first start from random angles",
    )

    def __post_init__(self) -> None:
        reach, steps = self.max_shift, self.shift_step
        if not reach or len(reach) != len(steps):
            raise ValueError(
                f"schedule.max_shift has {len(reach)} steps, schedule.shift_step {len(steps)}: "
                "give both the same number of steps"
            )
        if self.kicks and len(reach) == 1:
            raise ValueError(
                "schedule.kicks has no effect in a schedule of one step, because the last step has "
                "no kicks: give schedule.max_shift and schedule.shift_step more steps, or leave "
                "kicks out"
            )
        for widest, step in zip(reach, steps, strict=True):
            if not (math.isfinite(widest) and widest >= 0 and math.isfinite(step) and step > 0):
                raise ValueError(
                    f"schedule.max_shift must be 0 or more and shift_step above 0; got {widest:g} "
                    f"and {step:g}"
                )
            if 0 < widest < step:
                raise ValueError(
                    f"schedule.shift_step {step:g} px is larger than schedule.max_shift "
                    f"{widest:g} px of its step, so that no shift would be tried: use a smaller "
                    "shift_step"
                )

    def __len__(self) -> int:
        return len(self.max_shift)

    def widest(self, search: Search) -> Search:
        """A search with the shifts of the step with the largest shifts."""
        reach = max(self.max_shift)
        return replace(
            search, max_shift=reach, shift_step=self.shift_step[self.max_shift.index(reach)]
        )
