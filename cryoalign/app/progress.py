"""What a run says of itself while it works: a bar on a terminal, a line for every iteration."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cryoalign.methods.state import ClimbState, MraState
from cryoalign.runtime.processes import world_size


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} particles/s")


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        known = task.time_remaining is not None and not task.finished
        return Text.assemble("at most ", super().render(task), " left") if known else Text()


class Watch:
    """Shows how far an alignment is; a context manager.

    The time left is until the last iteration allowed: a run that settles earlier is quicker.
    """

    def __init__(self, console: Console, iterations: int, done: int = 0) -> None:
        """Of ``iterations`` in all, ``done`` before this run."""
        self.console, self.iterations, self.done = console, iterations, done
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Speed(),
            _Left(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=300,  # longer than an iteration's two passes, where it can be
        )
        self.task = self.bar.add_task("reading", total=None)

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def progress(self, doing: str, done: int, total: int) -> None:
        """Take `align_multi_reference`'s word; averaging counts as part of its iteration."""
        particles = min(done * world_size(), total)  # of this process; the others are as far
        if doing == "read":
            self.bar.update(self.task, description="reading", completed=particles, total=total)
            return
        whole = self.done * total + (particles if doing == "align" else total)
        self.bar.update(
            self.task,
            description=f"iteration {self.done + 1}: {doing}",
            completed=min(whole, self.iterations * total),
            total=self.iterations * total,
        )

    def steps(self, doing: str, done: int, total: int) -> None:
        """Take `classify`'s or `classify_stable`'s word: steps whose number may not be known."""
        self.bar.update(self.task, description=f"{doing}, step {done}", total=None)

    def iteration(self, state: MraState | ClimbState) -> None:
        """Print a line about the iteration just done."""
        self.done, row = state.iteration, state.history[-1]
        if isinstance(state, ClimbState):
            self.console.print(
                f"step {state.iteration:3d} ({row['step']}): resolution level {state.level + 1}, "
                f"log-likelihood {row['log_evidence']:.3f} a particle, certainty "
                f"{row['certainty']:.0%}, classes of {row['smallest_class']} to "
                f"{row['largest_class']}",
                highlight=False,
                soft_wrap=True,
            )
            return
        if "step" in row:
            self._aligned(row)
            return
        if "accounted" in row:
            self._generation(row)
            return
        notes = [f"{row['seconds']:.1f} s"]
        if row["empty_classes"]:
            notes.insert(0, f"{row['empty_classes']} empty")
        if row["split_classes"]:
            notes.insert(0, f"{row['split_classes']} re-seeded")
        self.console.print(
            f"iteration {state.iteration:3d} of {self.iterations}: score {row['mean_score']:.4f}, "
            f"{row['reassigned']:6.1%} changed class, classes of {row['smallest_class']} to "
            f"{row['largest_class']}, {', '.join(notes)}",
            highlight=False,
            soft_wrap=True,
        )

    def _aligned(self, row: dict[str, Any]) -> None:
        """The line of an iteration of reference-free alignment."""
        self.console.print(
            f"iteration {row['iteration']:3d}, step {row['step']} (±{row['max_shift']:g} px"
            f"{', kicked' if row['kicked'] else ''}): score {row['mean_score']:.4f}, poses moved "
            f"{row['pose_change_px']:.2f} px, {row['hand_changed']:.1%} changed hand, "
            f"{row['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    def _generation(self, row: dict[str, Any]) -> None:
        """The line of a generation of ISAC."""
        self.console.print(
            f"generation {row['iteration']:3d}: {row['accepted']} of {row['classes']} classes "
            f"accepted, {row['stable_share']:.1%} of {row['particles']} particles stable; "
            f"{row['accounted']} accounted for ({row['accounted_share']:.1%}), "
            f"{row['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    def finishing(self) -> None:
        """The iterations are over; files are being written."""
        self.bar.update(self.task, description="writing results", total=None)
