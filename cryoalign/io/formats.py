"""Read and write images; the suffix of a file gives its format."""

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
    """The header of an image file; the suffix gives the format.

    Raises FileNotFoundError if the file does not exist, and InputError (a ValueError) if its format
    is unknown or its header does not fit its size.
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
    """All images of a .mrcs, .mrc or .npy file as (n, h, w) float32 in memory, e.g. references.

    Raises the errors of `read_header`.
    """
    images = read_header(Path(path)).open()
    with np.errstate(over="ignore"):  # too large for float32: infinite, as in a stack
        return torch.from_numpy(np.array(images, dtype=np.float32, order="C"))


def image_pixel_size(path: str | Path) -> float | None:
    """Ångström per pixel from the header of an image file; None if it is not given there."""
    return read_header(Path(path)).pixel_size


def write_images(path: str | Path, images: Array, pixel_size: float | None = None) -> None:
    """Write images as float32 to a .mrcs, .mrc or .npy file.

    If writing fails, an existing file stays as it was.

    Args:
        path: the file; its folder must exist.
        images: (n, h, w).
        pixel_size: Å per pixel for the header of an MRC file; None leaves it unset.

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
