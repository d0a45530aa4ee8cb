"""An image file of any format: its header is kept, its pixels are mapped for each read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cryoalign.io.problems import Problem, input_error


@dataclass(frozen=True)
class ImageFile:
    """The header of a file of n images, with all that is needed to map it into memory.

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
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def open(self) -> np.memmap:
        """(n, h, w) read-only memory map; its memory is free again when it is deleted.

        Raises InputError if the file was removed or shortened after its header was read.
        """
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)
        except (OSError, ValueError) as error:
            what = f"cannot be mapped into memory ({error})"
            remedy = (
                "it may have been moved or rewritten during the run: restore it and start again"
            )
            raise input_error([Problem(self.path, None, what, remedy)]) from error
