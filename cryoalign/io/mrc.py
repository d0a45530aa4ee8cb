"""MRC images and stacks (.mrc, .mrcs): checked headers; ``mrcfile`` writes the stacks."""

from pathlib import Path
from typing import NoReturn

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import byte_order_from_machine_stamp, dtype_from_mode
from torch import Tensor

from cryoalign.io.images import ImageFile
from cryoalign.io.problems import Problem, input_error
from cryoalign.runtime.files import replacing

MODES = (0, 1, 2, 6, 12)  # int8, int16, float32, uint16, float16; 3 and 4 are Fourier transforms
_IMOD_STAMP = 1146047817  # "IMOD" as a number: the flags say if bytes are signed or unsigned
_COPY_AGAIN = "copy or export it again"


def read_header(path: Path) -> ImageFile:
    """The header of an MRC file, checked against the size of the file.

    The nz sections are nz images, whether the header marks a volume or a stack. Headers of the
    first version of the format (no ``MAP`` tag, no machine stamp) and headers with an unknown
    machine stamp are accepted in the byte order that fits the file size. No memory is allocated
    before the header is checked.

    Raises InputError (a ValueError) with the file and the remedy. Source: Cheng et al. 2015,
    MRC2014, doi:10.1016/j.jsb.2015.04.002.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(HEADER_DTYPE.itemsize)
    if len(raw) < HEADER_DTYPE.itemsize:
        _refuse(path, f"its {len(raw)} bytes are fewer than an MRC header has (1024)", _COPY_AGAIN)
    header = np.frombuffer(raw, HEADER_DTYPE)[0]
    if bytes(header["map"])[:3].strip() not in (b"MAP", b""):
        _refuse(path, "not an MRC file (the tag 'MAP' is not at byte 208)", "give an MRC file")
    faults = []
    for order in _byte_orders(header):
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        fault = _fault(header, size)
        if fault is None:
            return _image_file(path, header)
        faults.append(fault)
    _refuse(path, *faults[0])


def write(path: Path, images: Tensor, pixel_size: float | None) -> None:
    """Write (n, h, w) images as a float32 MRC stack (mode 2); pixel size in Å."""
    with replacing(path) as temporary, mrcfile.new(temporary) as mrc:
        mrc.set_data(images.detach().cpu().float().contiguous().numpy())
        mrc.set_image_stack()
        if pixel_size is not None:
            mrc.voxel_size = (pixel_size, pixel_size, 1.0)


def _refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise input_error([Problem(path, None, what, remedy)])


def _byte_orders(header: np.void) -> str:
    try:
        return str(byte_order_from_machine_stamp(header["machst"]))
    except ValueError:
        return "<>"


def _fault(header: np.void, size: int) -> tuple[str, str] | None:
    """The problem and its remedy, or None if the header fits a file of ``size`` bytes."""
    shape = [int(header[key]) for key in ("nz", "ny", "nx")]
    mode, extended = int(header["mode"]), int(header["nsymbt"])
    axes = tuple(int(header[key]) for key in ("mapc", "mapr", "maps"))
    if mode not in MODES:
        return f"MRC mode {mode} is not one of {MODES}", "convert the file to mode 2 (float32)"
    if min(shape) < 1 or extended < 0:
        text = f"absurd header: {shape[0]} images of {shape[1]} x {shape[2]} pixels"
        return f"{text}, extended header of {extended} bytes", _COPY_AGAIN
    if axes not in ((1, 2, 3), (0, 0, 0)):
        return f"axes are stored in the order {axes}", "rewrite it in the order (1, 2, 3)"
    pixels = shape[0] * shape[1] * shape[2] * dtype_from_mode(mode).itemsize
    expected = HEADER_DTYPE.itemsize + extended + pixels
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        text = f"{state}: {shape[0]} images of {shape[1]} x {shape[2]} in mode {mode} need "
        return f"{text}{expected} bytes, the file has {size}", _COPY_AGAIN
    cell = np.array([header["cella"][axis] for axis in "xyz"])
    if not np.isfinite(cell).all() or (cell < 0).any():
        return f"cell size {cell.tolist()} in the header", "set the voxel size with mrcfile"
    return None


def _image_file(path: Path, header: np.void) -> ImageFile:
    shape = (int(header["nz"]), int(header["ny"]), int(header["nx"]))
    dtype = dtype_from_mode(int(header["mode"])).newbyteorder(header.dtype["mode"].byteorder)
    if dtype == np.int8 and _has_unsigned_bytes(header):
        dtype = np.dtype(np.uint8)
    offset = HEADER_DTYPE.itemsize + int(header["nsymbt"])
    return ImageFile(path, shape, dtype, offset, pixel_size=_pixel_size(header))


def _has_unsigned_bytes(header: np.void) -> bool:
    """Whether IMOD wrote bytes from 0 to 255, while mode 0 of the standard is signed."""
    stamp, flags = np.frombuffer(header["extra2"].tobytes(), header.dtype["mode"])[10:12]
    return int(stamp) == _IMOD_STAMP and not int(flags) & 1


def _pixel_size(header: np.void) -> float | None:
    """Å per pixel along x; None if the header gives none, or another value along y."""
    if int(header["mx"]) < 1 or int(header["my"]) < 1:
        return None
    x = float(header["cella"]["x"]) / int(header["mx"])
    y = float(header["cella"]["y"]) / int(header["my"])
    return x if x > 0 and abs(x - y) <= 0.01 * x else None
