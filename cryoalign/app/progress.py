"""What a run shows while it works: a bar on a terminal, a line for every step."""

from __future__ import annotations

from types import TracebackType

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

from cryoalign.methods.base import Method
from cryoalign.methods.state import State
from cryoalign.runtime.processes import world_size


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} particles/s")


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        known = task.time_remaining is not None and not task.finished
        return Text.assemble("at most ", super().render(task), " left") if known else Text()


class Watch:
    """Shows how far a run is; a context manager.

    The time left is until the last step allowed: a run that settles earlier is quicker.
    """

    def __init__(self, console: Console, method: Method, done: int = 0) -> None:
        """Of a method, with ``done`` steps before this run."""
        self.console, self.method, self.done = console, method, done
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
        """Take a method's report of what it does, how much of it is done and how much there is."""
        if doing not in ("read", "align", "average"):  # steps whose number may not be known
            self.bar.update(self.task, description=f"{doing}, step {done}", total=None)
            return
        particles = min(done * world_size(), total)  # of this process; the others are as far
        steps = self.method.most_steps
        if doing == "read" or steps is None:
            words = "reading" if doing == "read" else doing
            self.bar.update(self.task, description=words, completed=particles, total=total)
            return
        # Averaging counts as part of its iteration.
        whole = self.done * total + (particles if doing == "align" else total)
        self.bar.update(
            self.task,
            description=f"iteration {self.done + 1}: {doing}",
            completed=min(whole, steps * total),
            total=steps * total,
        )

    def step(self, state: State) -> None:
        """Print a line about the step just done, or those that were made at once."""
        rows = state.history[-1:]
        if self.method.most_steps is not None:  # every row of the history is a step
            rows = state.history[self.done :]
        for row in rows:
            self.console.print(self.method.line(row), highlight=False, soft_wrap=True)
        self.done = state.iteration

    def finishing(self) -> None:
        """The iterations are over; files are being written."""
        self.bar.update(self.task, description="writing results", total=None)
