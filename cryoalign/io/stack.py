"""Particles in files, read in any order, a few at a time."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cryoalign.io.problems import input_error
from cryoalign.io.star import StarTables
from cryoalign.io.survey import Survey, survey


class ParticleStack(Dataset[Tensor]):
    """Particle images that stay on disk, in the order of the rows of the input.

    ``stack[i]`` is one image and ``stack.read(rows)`` is a batch. A file is open only
    for the duration of a read, so memory does not grow with the number of particles, any number of
    files can be used, and the stack can be pickled (for the workers of a ``DataLoader``). Several
    threads can read at the same time.

    Attributes:
        path: the STAR file or the stack.
        star: all blocks of the STAR file; None for a plain stack.
        files: headers of the stacks.
        pixel_size: Å per pixel; None if the input does not give it.
        shape: (h, w) of every image.
    """

    def __init__(self, found: Survey) -> None:
        """Use a survey without problems; `read_particles` makes the stack from a path."""
        if found.problems or found.shape is None:
            raise input_error(found.problems)
        self.path: Path = found.path
        self.star: StarTables | None = found.star
        self.files = found.files
        self.pixel_size: float | None = found.pixel_size
        self.shape: tuple[int, int] = found.shape
        self._file_of = found.file_of
        self._image_of = found.image_of

    def __len__(self) -> int:
        return len(self._file_of)

    def __repr__(self) -> str:
        size = "unknown pixel size" if self.pixel_size is None else f"{self.pixel_size:.4g} A"
        return (
            f"ParticleStack({self.path}: {len(self)} x {self.shape[0]} x {self.shape[1]}, {size})"
        )

    @property
    def table(self) -> pd.DataFrame:
        """The STAR file's columns, one row per particle; no columns for a plain stack.

        A new DataFrame at each call, in which a column is numbers if all its cells are numbers.
        ``star.table`` has single columns, and every cell as it is written.
        """
        if self.star is None:
            return pd.DataFrame(index=range(len(self)))
        return self.star.particles

    @property
    def optics(self) -> pd.DataFrame | None:
        """One row per optics group; None if the input has none."""
        return None if self.star is None else self.star.optics

    def __getitem__(self, row: int | slice | Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """(h, w) float32 image of a 0-based row, or (b, h, w) images of several."""
        if isinstance(row, int | np.integer):
            return self.read([int(row)])[0]
        return self.read(row)

    def __getitems__(self, rows: Sequence[int]) -> list[Tensor]:
        """Images of several rows; ``DataLoader`` calls this for a batch."""
        return list(self.read(rows))

    def read(self, rows: Sequence[int] | slice | np.ndarray | Tensor) -> Tensor:
        """(b, h, w) float32 images of 0-based rows, in this order; rows can be repeated.

        Raises IndexError for a row that does not exist, InputError if a file has changed.
        """
        wanted = self._rows(rows)
        return self._read_into(torch.empty(len(wanted), *self.shape), wanted)

    def read_into(self, out: Tensor, rows: Sequence[int] | slice | np.ndarray | Tensor) -> Tensor:
        """As `read`, into a tensor (b, h, w) float32 in the host's memory; returns it.

        The memory may be pinned, from which copies to a GPU are fastest.

        Raises ValueError if ``out`` is another kind of tensor.
        """
        wanted = self._rows(rows)
        shape = (len(wanted), *self.shape)
        if (
            tuple(out.shape) != shape
            or out.dtype != torch.float32
            or out.is_cuda
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"read_into fills a contiguous float32 tensor {shape} in the host's memory, not "
                f"{out.dtype} {tuple(out.shape)} on {out.device}: make it with torch.empty{shape}"
            )
        return self._read_into(out, wanted)

    def _read_into(self, out: Tensor, wanted: np.ndarray) -> Tensor:
        file_of, image_of, there = self._file_of[wanted], self._image_of[wanted], out.numpy()
        places = np.arange(len(wanted))
        if (file_of[1:] != file_of[:-1]).any() or (image_of[1:] < image_of[:-1]).any():
            places = np.lexsort((image_of, file_of))
            file_of, image_of = file_of[places], image_of[places]
        starts = [0, *(np.flatnonzero(file_of[1:] != file_of[:-1]) + 1).tolist(), len(places)]
        for start, end in pairwise(starts if len(places) else []):
            file = self.files[file_of[start]]
            file.read_into(there, image_of[start:end], places[start:end])
        return out

    def _rows(self, rows: Sequence[int] | slice | np.ndarray | Tensor) -> np.ndarray:
        if isinstance(rows, slice):
            return np.arange(len(self))[rows]
        wanted: np.ndarray = np.asarray(rows)
        if wanted.size == 0:
            return np.zeros(0, np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise IndexError(f"rows must be a list of whole numbers, not {wanted.dtype} values")
        wrong = wanted[(wanted < -len(self)) | (wanted >= len(self))]
        if len(wrong):
            raise IndexError(f"no row {wrong[0]} in {self.path}: rows are 0 to {len(self) - 1}")
        return wanted % len(self)


def read_particles(
    path: str | PathLike[str],
    *,
    root: str | PathLike[str] | None = None,
    allow_outside: bool = False,
) -> ParticleStack:
    """Open the particles of a RELION STAR file (3.0, 3.1, 5), an MRC stack or a .npy array.

    Every row and the header of every stack are checked first; no pixel is read.

    Args:
        path: the .star, .mrcs, .mrc or .npy file.
        root: first folder in which stacks of a STAR file are searched. Then follow the folder of
            the STAR file, the folders above it (RELION's names start at the project folder), and
            the current folder.
        allow_outside: True also accepts stacks with absolute names, or names with ``..``, that are
            outside ``root`` and the folder of the STAR file.

    Raises FileNotFoundError if ``path`` is missing, and InputError (a ValueError) whose message
    lists the first few problems with file, row and remedy; ``problems`` has all of them.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    found = survey(path, root=None if root is None else Path(root), allow_outside=allow_outside)
    if found.problems:
        raise input_error(found.problems)
    for each in found.warnings:
        warnings.warn(str(each), stacklevel=2)
    return ParticleStack(found)
