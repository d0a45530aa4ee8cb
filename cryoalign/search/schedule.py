"""The steps of reference-free alignment, from wide and coarse shifts to narrow and fine ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from cryoalign.runtime.settings import FORBID
from cryoalign.search.match import Search


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


@dataclass(frozen=True, config=FORBID)
class Schedule:
    """The steps of reference-free alignment.

    Attributes:
        max_shift: of each step, the largest shift tried along x and y, pixels. In the first
            iteration about zero, then about each particle's own shift, to the whole pixel.
        shift_step: of each step, the distance between trial shifts, pixels. An adaptive search
            chooses its own.
        settle: a step ends when poses change by no more than this, pixels at the last ring
            (median), and no more than 1 % of the hands.
        kicks: how many iterations, every ``kick_every``-th but for the last step's, turn particles
            by multiples of ``kick_angle`` only, which shakes loose what has settled wrongly.
        kick_every, kick_angle: see above; degrees.
        starts: alignments of the first step, of which that with the best mean score goes on; all
            but the first begin from the average of particles turned at random.
    """

    max_shift: Numbers = Field(
        default=(4.0, 2.0, 1.0, 1.0), description="largest trial shift of each step, px"
    )
    shift_step: Numbers = Field(
        default=(2.0, 1.0, 0.5, 0.25), description="distance of trial shifts of each step, px"
    )
    settle: float = Field(
        default=0.1, ge=0, description="a step ends when poses change by no more, px"
    )
    kicks: int = Field(default=0, ge=0, description="iterations that try a few angles only")
    kick_every: int = Field(default=4, ge=2, description="iterations from kick to kick")
    kick_angle: float = Field(
        default=90.0, ge=1, le=180, description="the angles of a kick are its multiples, degrees"
    )
    starts: int = Field(default=1, ge=1, description="first steps, of which the best goes on")

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
