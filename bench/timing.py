"""Times of several ways to do something, taken in turn so that a drifting machine is fair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Median seconds of one call: on the clock, and of CPU over all threads."""

    wall: float
    cpu: float


def measure(
    stages: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Times]:
    """Run every stage once to warm up, then all in turn ``repeats`` times; medians of each."""
    for stage in stages.values():
        stage()
    taken: dict[str, list[Times]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, stage in stages.items():
            _wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            stage()
            _wait(device)
            taken[name].append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Times(*(statistics.median(column) for column in zip(*times, strict=True)))
        for name, times in taken.items()
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
