"""Where particles come from: files and arrays, read a few rows at a time."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from cryoalign.images.ctf import Optics, optics_from_relion
from cryoalign.runtime.arrays import Array, as_tensor


@runtime_checkable
class Stack(Protocol):
    """Anything particles can be read from; `io.ParticleStack` is one."""

    shape: tuple[int, int]
    pixel_size: float | None

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Tensor:
        """(b, h, w) float32 images."""
        ...


class TensorStack:
    """Particles (n, h, w) in memory, read as from a file.

    They stay where and as they are (`interop.as_tensor`), a batch at a time becomes float32.
    """

    def __init__(self, images: Array, pixel_size: float | None = None) -> None:
        images = as_tensor(images)
        if images.ndim != 3:
            raise ValueError(f"particles must be (n, h, w), got {tuple(images.shape)}")
        self.images, self.pixel_size = images.detach(), pixel_size
        self.shape: tuple[int, int] = (images.shape[1], images.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Tensor | slice) -> Tensor:
        """(b, h, w) float32 images."""
        return self.images[rows].float()


def as_stack(particles: Stack | Array) -> Stack:
    """A stack as it is; images in memory, of whatever library, as one.

    Raises:
        TypeError: neither; a path and a `ParticleDataset` are told what to give.
    """
    if isinstance(particles, str | Path):
        raise TypeError(
            f"particles are a path, {str(particles)!r}: give cryoalign.read_particles(path)"
        )
    if isinstance(getattr(particles, "stack", None), Stack):
        raise TypeError(
            f"particles are a {type(particles).__name__}: give the stack that it reads, "
            "dataset.stack (all its rows, without the dataset's transforms)"
        )
    return particles if isinstance(particles, Stack) else TensorStack(particles)


def optics_of(stack: Stack) -> Optics | None:
    """The optics that a stack's STAR file tells, or None."""
    table = getattr(stack, "table", None)
    if table is None or stack.pixel_size is None:
        return None
    return optics_from_relion(table, getattr(stack, "optics", None), stack.pixel_size)
