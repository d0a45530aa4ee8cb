"""Stacks from which particles are read, a few rows at a time: files and arrays."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from cryoalign.images.ctf import CTF_COLUMNS, Optics, optics_from_relion
from cryoalign.runtime.arrays import Array, as_tensor


@runtime_checkable
class Stack(Protocol):
    """Anything that particles can be read from, for example `io.stack.ParticleStack`."""

    shape: tuple[int, int]
    pixel_size: float | None

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Tensor:
        """(b, h, w) float32 images of the rows (b,)."""
        ...


class TensorStack:
    """Particles (n, h, w) in memory as a stack.

    The array is neither copied nor converted (`runtime.arrays.as_tensor`); what is read becomes
    float32.
    """

    def __init__(self, images: Array, pixel_size: float | None = None) -> None:
        images = as_tensor(images)
        if images.ndim != 3:
            raise ValueError(f"particles must be an array (n, h, w), got {tuple(images.shape)}")
        self.images, self.pixel_size = images.detach(), pixel_size
        self.shape: tuple[int, int] = (images.shape[1], images.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Tensor | slice) -> Tensor:
        return self.images[rows].float()


def as_stack(particles: Stack | Array) -> Stack:
    """Return a stack unchanged; make a stack of an array of any library.

    Raises:
        TypeError: neither a stack nor an array.
    """
    if isinstance(particles, str | Path):
        raise TypeError(
            f"particles are a path, {str(particles)!r}: give cryoalign.read_particles(path)"
        )
    if isinstance(getattr(particles, "stack", None), Stack):
        raise TypeError(
            f"particles are a {type(particles).__name__}: give the stack that it reads, "
            "dataset.stack (with all rows, without the dataset's transforms)"
        )
    return particles if isinstance(particles, Stack) else TensorStack(particles)


def optics_of(stack: Stack) -> Optics | None:
    """The CTFs in a stack's STAR file, or None if it has no defocus.

    Raises:
        ValueError: a defocus, but no pixel size; or values that are missing or impossible.
    """
    star = getattr(stack, "star", None)
    if star is None:
        table = getattr(stack, "table", None)
    else:  # of a million rows only the columns that are needed
        table = star.table.frame([label for label in star.table.labels if label in CTF_COLUMNS])
    if table is None or "rlnDefocusU" not in table:
        return None
    if stack.pixel_size is None:
        raise ValueError(
            "particles have rlnDefocusU, but neither the STAR file nor the header of the stack has "
            "a pixel size: add the column rlnPixelSize (A), or set particle.ctf=none"
        )
    return optics_from_relion(table, getattr(stack, "optics", None), stack.pixel_size)
