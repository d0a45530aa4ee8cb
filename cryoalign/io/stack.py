"""Particles in files: read a few at a time, in any order, without keeping pages in memory."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Particle images that stay on disk, one row each, in the order of the input's rows.

    ``stack[i]`` is one image, ``stack.read(rows)`` a batch. A file is mapped for the length of one
    read, in the order of its images, and let go: memory does not grow with the number of particles
    read, any number of files will do, and the stack pickles (for ``DataLoader`` workers).

    Attributes:
        path: the STAR file or stack it came from.
        star: all blocks of the STAR file; None for a plain stack.
        files: the stacks' headers.
        pixel_size: ångström, None if the input does not say.
        shape: (h, w) of every image.
    """

    def __init__(self, found: Survey) -> None:
        """Use a survey that found no problems; ``read_particles`` makes one from a path."""
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
        """One row per particle with the STAR file's columns; no columns for a plain stack."""
        if self.star is None:
            return pd.DataFrame(index=range(len(self)))
        return self.star.particles

    @property
    def optics(self) -> pd.DataFrame | None:
        """One row per optics group, None if the input has none."""
        return None if self.star is None else self.star.optics

    def __getitem__(self, row: int) -> Tensor:
        """(h, w) float32 image of one 0-based row."""
        return self.read([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Tensor]:
        """Images of several rows: how ``DataLoader`` asks for a batch."""
        return list(self.read(rows))

    def read(self, rows: Sequence[int] | slice | np.ndarray | Tensor) -> Tensor:
        """(b, h, w) float32 images of 0-based rows, in the order asked, repeats allowed.

        Raises IndexError for a row that is not there, InputError if a file changed meanwhile.
        """
        wanted = self._rows(rows)
        out = np.empty((len(wanted), *self.shape), np.float32)
        file_of, image_of = self._file_of[wanted], self._image_of[wanted]
        order = np.lexsort((image_of, file_of))
        starts = np.flatnonzero(np.diff(file_of[order], prepend=-1))
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, for `screen`
            for run in np.split(order, starts[1:]) if len(order) else ():
                source = self.files[file_of[run[0]]].open()
                for place in run:
                    out[place] = source[image_of[place]]
        return torch.from_numpy(out)

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
            raise IndexError(f"row {wrong[0]} of {self.path}: it has rows 0 to {len(self) - 1}")
        return wanted % len(self)


def read_particles(
    path: str | PathLike[str],
    *,
    root: str | PathLike[str] | None = None,
    allow_outside: bool = False,
) -> ParticleStack:
    """Particles of a RELION STAR file (3.0, 3.1, 5), a .mrcs or .mrc stack, or a .npy array.

    Every row and every stack's header is verified first; no pixel is read yet. Stacks named by a
    STAR file are looked for in ``root`` if given, the STAR file's folder, the folders above it
    (RELION names files from its project's folder), and the current folder. Absolute names, and
    names that climb out by ``..``, must lead into ``root`` or the STAR file's folder unless
    ``allow_outside``.

    Raises FileNotFoundError if ``path`` is missing; InputError (a ValueError) that tells the first
    few problems with file, row and remedy and holds all of them in ``problems``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    found = survey(path, root=None if root is None else Path(root), allow_outside=allow_outside)
    if found.problems:
        raise input_error(found.problems)
    return ParticleStack(found)
