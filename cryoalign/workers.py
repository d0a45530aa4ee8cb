"""Batches on all cores: one thread a batch, each with a core of its own.

PyTorch's own threads share out every operation, and meet after each: on the small operations of a
search they wait more than they work, the more so on a busy machine. Whole batches need not meet.
Results do not depend on the number of workers, since no batch's arithmetic does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def map_in_order(
    function: Callable[[Item], Outcome], items: Iterable[Item], workers: int
) -> Iterator[Outcome]:
    """What ``function`` makes of each item, in their order, ``workers`` at a time.

    Each worker computes with one thread of PyTorch's. At most one item more than there are workers
    is taken ahead, so memory stays bounded. An error ends the rest.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    # PyTorch counts threads per thread for OpenMP, but per process for some libraries.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Outcome]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)
        torch.set_num_threads(before)


def workers_for(device: torch.device) -> int:
    """As many as PyTorch would use threads on a CPU; a GPU needs one."""
    return torch.get_num_threads() if device.type == "cpu" else 1
