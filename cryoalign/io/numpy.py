"""NumPy arrays of images (.npy); pickled arrays are refused because they can run code."""

from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from cryoalign.io.images import ImageFile
from cryoalign.io.problems import Problem, input_error
from cryoalign.runtime.files import replacing


def read_header(path: Path) -> ImageFile:
    """The header of a .npy file of (n, h, w) images, or of one (h, w) image.

    Raises InputError (a ValueError) with the file and the remedy.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises many types for damaged headers
        what = f"not a readable .npy file ({error or type(error).__name__})"
        remedy = "copy it again, or save it with numpy.save(path, images, allow_pickle=False)"
        raise input_error([Problem(path, None, what, remedy)]) from error
    shape, size, expected = array.shape, path.stat().st_size, array.offset + array.nbytes
    if array.dtype.kind not in "iufb":
        what, remedy = f"contains {array.dtype}, not real numbers", "save it as float32"
    elif len(shape) not in (2, 3) or 0 in shape:
        what, remedy = f"shape {shape} is not (n, h, w)", "save images as (n, h, w)"
    elif size != expected:
        what = f"shape {shape} of {array.dtype} needs {expected} bytes, but the file has {size}"
        remedy = "copy or save it again"
    else:
        n, h, w = shape if len(shape) == 3 else (1, *shape)
        order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
        return ImageFile(path, (n, h, w), array.dtype, array.offset, order)
    raise input_error([Problem(path, None, what, remedy)])


def write(path: Path, images: Tensor) -> None:
    """Write (n, h, w) images as a float32 .npy file."""
    with replacing(path) as temporary:
        np.save(temporary, images.detach().cpu().float().numpy(), allow_pickle=False)
