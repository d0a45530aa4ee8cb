"""An image file of any format: its header is kept, its pixels are read when they are needed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch

from cryoalign.io.problems import Problem, input_error

PART = 2**20  # bytes that are read before they are converted; they stay in a CPU's cache
BUFFERS = 1024  # most buffers of a system call (IOV_MAX on Linux and macOS)


@dataclass(frozen=True)
class ImageFile:
    """The header of a file of n images, with all that is needed to read them.

    Attributes:
        path: the file.
        shape: (n, h, w).
        dtype: type of the stored pixels, including the byte order.
        offset: number of bytes before the first pixel.
        order: memory order of the stored array, "C" or "F".
        pixel_size: Å per pixel; None if the file does not give it.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    order: Literal["C", "F"] = "C"
    pixel_size: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels on disk."""
        return self.shape[0] * self.image_bytes

    @property
    def image_bytes(self) -> int:
        """Bytes of an image on disk."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def open(self) -> np.memmap:
        """(n, h, w) read-only memory map; its memory is free again when it is deleted.

        Raises InputError if the file was removed or shortened after its header was read.
        """
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)
        except (OSError, ValueError) as error:
            self._refuse(f"cannot be mapped into memory ({error})", error)

    def read_into(self, out: np.ndarray, images: np.ndarray, places: np.ndarray) -> None:
        """Read some of the images as float32. Runs of consecutive images are read at once.

        Args:
            out: (m, h, w) float32, in C order; filled here.
            images: (b,) numbers of the images, from 0; fastest in ascending order.
            places: (b,) index into ``out`` of each of them.

        Raises InputError if the file was removed or shortened after its header was read.
        """
        if self.order == "F" or not hasattr(os, "preadv"):
            _convert(self.open()[images], out, places)
            return
        try:
            with self.path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size < self.offset + self.nbytes:
                    self._refuse(f"has {size} bytes, {self.offset + self.nbytes} are needed")
                if self.dtype == np.float32 and self.dtype.isnative:
                    self._fill(file.fileno(), out, images, places)
                    return
                length = max(1, PART // self.image_bytes)
                raw = np.empty((min(length, len(images)), *self.shape[1:]), self.dtype)
                for start in range(0, len(images), length):
                    part = images[start : start + length]
                    self._fill(file.fileno(), raw, part, np.arange(len(part)))
                    _convert(raw[: len(part)], out, places[start : start + length])
        except OSError as error:
            self._refuse(f"cannot be read ({error})", error)

    def _fill(self, file: int, out: np.ndarray, images: np.ndarray, places: np.ndarray) -> None:
        """Read images of an open file, of its own dtype, to their places in ``out``."""
        length = self.image_bytes
        target = out.reshape(-1).view(np.uint8).data
        apart = (images[1:] - images[:-1] != 1) | (places[1:] - places[:-1] != 1)
        starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
        sizes = np.diff(starts, append=len(images)) * length  # of each run, bytes
        first, place = self.offset + images[starts] * length, places[starts] * length
        buffers: list[memoryview] = []
        begin = end = 0
        for at, to, size in zip(first.tolist(), place.tolist(), sizes.tolist(), strict=True):
            if at != end or len(buffers) == BUFFERS:
                self._read(file, buffers, begin)
                buffers, begin = [], at
            buffers.append(target[to : to + size])
            end = at + size
        self._read(file, buffers, begin)

    def _read(self, file: int, buffers: list[memoryview], offset: int) -> None:
        """Fill buffers with consecutive bytes of an open file, from an offset."""
        missing = sum(map(len, buffers))
        while missing:
            got = os.preadv(file, buffers, offset)
            if not got:
                self._refuse(f"ends at byte {offset}, {missing} bytes too early")
            missing, offset = missing - got, offset + got
            if missing:  # a system call may read less than was asked, 2 GB at most
                buffers = list(_after(buffers, got))

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        remedy = "it may have been moved or rewritten during the run: restore it and start again"
        raise input_error([Problem(self.path, None, what, remedy)]) from cause


def _after(buffers: list[memoryview], skipped: int) -> Iterator[memoryview]:
    """What is left of buffers after their first bytes."""
    for buffer in buffers:
        if skipped < len(buffer):
            yield buffer[skipped:]
        skipped = max(0, skipped - len(buffer))


def _convert(raw: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
    """Write images (b, h, w) of any dtype to their places in ``out``, as float32."""
    adjacent = (places[1:] - places[:-1] == 1).all()
    target = out[places[0] : places[0] + len(raw)] if adjacent else np.empty(raw.shape, out.dtype)
    if raw.dtype == np.float16 and raw.dtype.isnative:  # several times faster than NumPy
        torch.from_numpy(target).copy_(torch.from_numpy(raw))
    else:
        with np.errstate(over="ignore"):  # too large for float32: infinite, which `screen` finds
            np.copyto(target, raw, casting="unsafe")
    if not adjacent:
        out[places] = target
