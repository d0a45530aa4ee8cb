"""Batches on all cores: one thread a batch, each with a core of its own.

PyTorch's own threads share out every operation, and meet after each: on the small operations of a
search they wait more than they work, the more so on a busy machine. Whole batches need not meet.
Results do not depend on the number of workers, since no batch's arithmetic does.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

from cryoalign.runtime.processes import world_size

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class _OneThread(threading.local):
    """PyTorch at one thread for this one while anything here wants it so; the last out of it
    restores its number. PyTorch counts thread by thread: nobody else can do it."""

    inside, before = 0, 1

    def enter(self) -> None:
        if self.inside == 0:
            self.before = torch.get_num_threads()
        self.inside += 1
        torch.set_num_threads(1)

    def leave(self) -> None:
        self.inside -= 1
        if self.inside == 0:
            torch.set_num_threads(self.before)


_one_thread = _OneThread()


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
    # Here too: for some libraries the number is the process's.
    _one_thread.enter()
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
        _one_thread.leave()


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed, some 60 MB an arena, for what comes next.

    An arena is what a thread allocates from: so it is as much for every worker, and kept for no
    other thread's use.

    By itself it gives that of large tensors back to the system, to get it again page by page at
    the next block of a search. Its limits rise to the largest block that was ever freed, 32 MB at
    most (mallopt(3), M_MMAP_THRESHOLD): hence one is taken, not written to, and freed. With another
    C library, or where the user has set the limits, nothing changes.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def workers_for(device: torch.device) -> int:
    """As many as PyTorch would use threads on a CPU; a GPU needs one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in this machine for each of its processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // world_size()
