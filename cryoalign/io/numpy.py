"""NumPy arrays of images (.npy), never unpickled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from cryoalign.io.images import ImageFile
from cryoalign.io.problems import Problem, input_error
from cryoalign.runtime.files import replacing


def read_header(path: Path) -> ImageFile:
    """What a .npy header says of (n, h, w) images, or of one (h, w) image.

    Raises InputError (a ValueError) naming the file and the remedy.
    """
    shape, fortran, dtype, offset = _parse(path)
    size, expected = path.stat().st_size, offset + math.prod(shape) * dtype.itemsize
    what = None
    if dtype.kind not in "iufb":
        what, remedy = f"holds {dtype}, not real numbers", "save it as float32 with numpy.save"
    elif len(shape) not in (2, 3) or min(shape) < 1:
        what, remedy = f"shape {shape} is not (n, h, w)", "save images as (n, h, w)"
    elif size != expected:
        what = f"shape {shape} of {dtype} needs {expected} bytes, the file has {size}"
        remedy = "copy or save it again"
    if what is not None:
        raise input_error([Problem(path, None, what, remedy)])
    order: Literal["C", "F"] = "F" if fortran else "C"
    if len(shape) == 2:
        # A leading axis of one changes nothing in either memory order.
        shape = (1, *shape)
    return ImageFile(path, (shape[0], shape[1], shape[2]), dtype, offset, order)


def write(path: Path, images: Tensor) -> None:
    """Write (n, h, w) images as a float32 .npy file."""
    with replacing(path) as temporary:
        np.save(temporary, images.detach().cpu().float().numpy(), allow_pickle=False)


def _parse(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, type and bytes before the data of a .npy file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"format version {version}")
            shape, fortran, dtype = readers[version](file)
            return shape, fortran, dtype, file.tell()
    except Exception as error:  # a damaged header's text makes numpy raise almost anything
        what = f"no .npy file that can be read ({error or type(error).__name__})"
        remedy = "save the images with numpy.save(path, images, allow_pickle=False)"
        raise input_error([Problem(path, None, what, remedy)]) from error
