"""Process batches on all CPU cores, one thread and one core for each batch.

PyTorch's own threads divide every operation among themselves and wait for each other after each
one. The operations of a pose search are small, so they would mostly wait. Whole batches are
independent. Results do not depend on the number of workers.
"""

import contextlib
import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from cryoalign.runtime.processes import world_size

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class _OneThread(threading.local):
    """Limits PyTorch to one thread while at least one caller needs it, then restores the number.

    PyTorch keeps this number separately for each thread, and so does this class.
    """

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
    function: Callable[[Item], Outcome],
    items: Iterable[Item],
    workers: int,
    *,
    ahead: bool = False,
) -> Iterator[Outcome]:
    """Yield ``function(item)`` for each item, in their order.

    ``workers`` threads compute at the same time, each with one PyTorch thread. At most one more
    item than there are workers is taken in advance, which limits memory. An error stops the rest,
    and the threads have ended when the caller gets it. Items that come from a generator are
    closed at the end.

    Args:
        function: is called once for each item.
        items: any number of them.
        workers: number of threads; a single worker is the caller's own thread.
        ahead: True gives a single worker a thread too, which computes the next outcome while the
            caller uses the present one.
    """
    with contextlib.closing(items) if isinstance(items, Generator) else contextlib.nullcontext():
        if workers <= 1 and not ahead:
            yield from map(function, items)
        else:
            yield from _in_threads(function, items, max(1, workers))


def _in_threads(
    function: Callable[[Item], Outcome], items: Iterable[Item], workers: int
) -> Iterator[Outcome]:
    # Also in this thread, because some libraries have one number for the whole process.
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
    """Make glibc keep freed memory, about 60 MB per thread, for later allocations.

    By default glibc returns the memory of large tensors to the system, and every block of a search
    asks for it again page by page. Its limits grow to the largest block that was ever freed, up to
    32 MB (mallopt(3), M_MMAP_THRESHOLD), so this function allocates such a block and frees it. It
    changes nothing with another C library, or if the user has set the limits.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def workers_for(device: torch.device) -> int:
    """Number of workers for a device: PyTorch's number of threads on a CPU, 1 on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def readers() -> int:
    """Number of threads that read files for a GPU: PyTorch's number of threads, at most 8, which
    are enough to copy from the page cache as fast as a GPU takes it."""
    return min(8, torch.get_num_threads())


def available_memory(device: torch.device) -> int:
    """Bytes that are free for each process: on a GPU, or on this machine or in its job's limit."""
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
        sharing = -(-local // torch.cuda.device_count())  # 1, unless processes share GPUs
        return torch.cuda.mem_get_info(device)[0] // sharing
    return min(psutil.virtual_memory().available, _free_in_control_group()) // world_size()


def _free_in_control_group() -> int:
    """Bytes left to the control group of this process (SLURM, containers), where one limits it."""
    free = sys.maxsize
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in lines if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup", own.lstrip("/"))
        for group in (folder, *folder.parents[:-3]):  # down to /sys/fs/cgroup
            limit = group / "memory.max"
            if limit.exists() and limit.read_text().strip() != "max":
                used = int((group / "memory.current").read_text())
                # Pages of files that were read count as used, but are given back when needed.
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                used -= int(stat.get("inactive_file", 0))
                free = min(free, int(limit.read_text()) - used)
    return max(0, free)
