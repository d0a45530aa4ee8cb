"""Which module reads and writes which image format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoalign.io import mrc
from cryoalign.io import numpy as npy
from cryoalign.io.images import ImageFile
from cryoalign.io.problems import Problem, input_error
from cryoalign.runtime.arrays import Array, as_tensor

_HEADERS = {".mrc": mrc.read_header, ".mrcs": mrc.read_header, ".npy": npy.read_header}


def read_header(path: Path) -> ImageFile:
    """The header of an image file, its format told by its suffix.

    Raises FileNotFoundError if there is no such file, InputError (a ValueError) if its format is
    not known or its header and its size do not agree.
    """
    if path.suffix.lower() not in _HEADERS:
        what = f"images in the format '{path.suffix}' cannot be read"
        remedy = f"convert them to one of {', '.join(_HEADERS)}"
        raise input_error([Problem(path, None, what, remedy)])
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise input_error([Problem(path, None, "not a file", "name a file of images")])
    return _HEADERS[path.suffix.lower()](path)


def read_images(path: str | Path) -> Tensor:
    """All images of a .mrcs, .mrc or .npy file as (n, h, w) float32, in memory: references.

    Raises FileNotFoundError or InputError (a ValueError) as ``read_header``.
    """
    images = read_header(Path(path)).open()
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, as in a stack
        return torch.from_numpy(np.array(images, dtype=np.float32, order="C"))


def image_pixel_size(path: str | Path) -> float | None:
    """Ångström per pixel by an image file's header; None where it does not say."""
    return read_header(Path(path)).pixel_size


def write_images(path: str | Path, images: Array, pixel_size: float | None = None) -> None:
    """Write (n, h, w) images as float32 to a .mrcs, .mrc or .npy file, whole or not at all.

    ``pixel_size`` (ångström) goes into an MRC header; None leaves it unset there.

    Raises ValueError for another shape or suffix, FileNotFoundError if the folder is missing.
    """
    path, images = Path(path), as_tensor(images)
    if images.ndim != 3 or 0 in images.shape:
        raise ValueError(f"{path}: images must be (n, h, w), not {tuple(images.shape)}")
    match path.suffix.lower():
        case ".mrc" | ".mrcs":
            mrc.write(path, images, pixel_size)
        case ".npy":
            npy.write(path, images)
        case suffix:
            raise ValueError(f"{path}: cannot write the format '{suffix}'; use .mrcs or .npy")
