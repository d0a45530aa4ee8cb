"""Progress of a run: a bar on a terminal, and a line for every step."""

from __future__ import annotations

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
from cryoalign.results.evidence import JUDGE
from cryoalign.runtime.processes import world_size


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} particles/s")


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        known = task.time_remaining is not None and not task.finished
        return Text.assemble("at most ", super().render(task), " left") if known else Text()


class Watch:
    """Context manager that shows the progress of a run.

    The time left is an upper limit: it counts all steps that the settings allow, and a run may
    settle earlier.
    """

    def __init__(self, console: Console, method: Method, done: int = 0) -> None:
        """Show the progress of a method that has done ``done`` steps before this run."""
        self.console, self.method, self.done = console, method, done
        self.doing = ""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Speed(),
            _Left(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=300,  # seconds; usually includes both passes of an iteration
        )
        self.task = self.bar.add_task("reading", total=None)

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def progress(self, doing: str, done: int, total: int) -> None:
        """Update the bar; the arguments are those of `particles.prepare.Progress`."""
        if doing == JUDGE:
            if self.doing != JUDGE:
                self.say(f"judging {total:,} particles: junk, error bars, classes")
            self.doing = doing
            particles = min(done * world_size(), total)
            self.bar.update(
                self.task, description="judging particles", completed=particles, total=total
            )
            return
        self.doing = doing
        if doing not in ("read", "align", "average"):  # the number of these steps is not known
            self.bar.update(self.task, description=f"{doing}, step {done}", total=None)
            return
        particles = min(done * world_size(), total)  # if all processes are equally fast
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
        """Print a line for the step just done, or for several steps that were done together."""
        rows = state.history[-1:]
        if self.method.most_steps is not None:  # then every row of the history is a step
            rows = state.history[self.done :]
        for row in rows:
            self.console.print(self.method.line(row), highlight=False, soft_wrap=True)
        self.done = state.iteration

    def finishing(self, doing: str) -> None:
        """Print a line about work after the iterations, before it starts."""
        self.say(doing)
        self.bar.update(self.task, description=doing, total=None)

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, soft_wrap=True)
