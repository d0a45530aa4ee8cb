"""Image files of every format, seen alike: a header now, a memory map for each read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cryoalign.io.problems import Problem, input_error


@dataclass(frozen=True)
class ImageFile:
    """What a header says of a file of n images: enough to map it into memory.

    Attributes:
        path: the file.
        shape: (n, h, w).
        dtype: type of the stored pixels, byte order included.
        offset: bytes before the first pixel.
        order: memory order of the stored array, "C" or "F".
        pixel_size: ångström, None where the file does not say.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    order: Literal["C", "F"] = "C"
    pixel_size: float | None = None

    @property
    def nbytes(self) -> int:
        """Size of the pixels on disk."""
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def open(self) -> np.memmap:
        """(n, h, w) read-only memory map; its pages leave this process when it is dropped.

        Raises InputError if the file was removed or shortened since its header was read.
        """
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)
        except (OSError, ValueError) as error:
            what = f"cannot be mapped into memory ({error})"
            remedy = "was it moved or rewritten during the run? Restore it and start again"
            raise input_error([Problem(self.path, None, what, remedy)]) from error
