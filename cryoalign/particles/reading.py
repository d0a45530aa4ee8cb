"""Read images while others are worked on: chunks of a pass, and the batch that follows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.particles.stack import Stack, TensorStack
from cryoalign.runtime.threads import map_in_order, readers

CUDA_CHUNK_BYTES = 2**25  # bytes that a thread reads for a GPU at a time


def read_chunks(
    stack: Stack, rows: Tensor, device: torch.device, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (b,) and their images (b, h, w) on a device, a chunk at a time, in order.

    The next chunks are read by other threads while the caller uses one. Chunks for a GPU are read
    into pinned memory by several threads and copied on a stream of their own.

    Args:
        stack: the images.
        rows: (n,) their rows.
        device: where the images are wanted.
        chunk: rows of a chunk; on a GPU as many as `CUDA_CHUNK_BYTES` hold.
    """
    height, width = stack.shape
    if device.type == "cuda":
        chunk = max(1, CUDA_CHUNK_BYTES // (4 * height * width))
    parts = [part for part in rows.split(chunk) if len(part)]
    on_gpu = isinstance(stack, TensorStack) and stack.images.is_cuda
    if device.type != "cuda" or on_gpu:
        ahead = len(parts) > 1 and not on_gpu  # another thread would use another stream
        yield from map_in_order(
            lambda part: (part, stack.read(part).to(device)), parts, 1, ahead=ahead
        )
        return
    copies = torch.cuda.Stream(device)

    def copied(part: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        with torch.cuda.stream(copies):  # and on its device, which a new thread does not know
            host = torch.empty(len(part), height, width, pin_memory=True)
            if hasattr(stack, "read_into"):
                stack.read_into(host, part)
            else:
                host.copy_(stack.read(part))
            images = host.to(copies.device, non_blocking=True)
            return part, images, copies.record_event()

    for part, images, done in map_in_order(copied, parts, readers(), ahead=True):
        present = torch.cuda.current_stream(device)
        present.wait_event(done)
        images.record_stream(present)
        yield part, images


class Made(NamedTuple):
    """Prepared images of a batch.

    Attributes:
        images: (b, size, size).
        new: whether they were made from the stack, and are not in memory yet.
        done: reached when another stream of the GPU has made them; None: the present one did.
    """

    images: Tensor
    new: bool
    done: torch.cuda.Event | None = None


class ReadAhead:
    """Makes batches in another thread, on a GPU also in another stream, while one is used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reader = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Of a caller who does not want its batches, no more than these are kept in memory.
        self._batches: deque[tuple[Tensor, Future[Made]]] = deque(maxlen=2)

    def start(self, members: Tensor, make: Callable[[], Made]) -> None:
        """Start to make the batch of particles with indices ``members`` (b,)."""
        stream = self._stream
        if stream is None:
            self._batches.append((members, self._reader.submit(make)))
            return
        before = torch.cuda.current_stream(self.device).record_event()

        def on_stream() -> Made:
            with torch.cuda.stream(stream):  # and on its device, which a new thread does not know
                stream.wait_event(before)
                return make()._replace(done=stream.record_event())

        self._batches.append((members, self._reader.submit(on_stream)))

    def take(self, members: Tensor) -> Made | None:
        """The batch of these particles, or None if it was not started. Raises its error."""
        for each in list(self._batches):
            if torch.equal(each[0], members):
                with suppress(ValueError):  # another thread has taken it
                    self._batches.remove(each)
                made = each[1].result()
                if made.done is not None:
                    present = torch.cuda.current_stream(self.device)
                    present.wait_event(made.done)
                    made.images.record_stream(present)
                return made
        return None

    def close(self) -> None:
        """Wait for the thread to end."""
        self._batches.clear()
        self._reader.shutdown(cancel_futures=True)
