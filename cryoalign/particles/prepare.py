"""Particles made ready for alignment: set aside, normalised, resized, in batches on a device."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.images.fourier import fourier_resize
from cryoalign.images.masks import background, normalise
from cryoalign.particles.screen import refuse_above, screen
from cryoalign.particles.stack import Stack, TensorStack
from cryoalign.runtime.processes import gather_over_ranks, shard
from cryoalign.runtime.settings import FORBID

CPU_BATCH = 64
# A GPU wants many particles at a time: bytes of their images.
CUDA_BATCH_BYTES = 2**29


@dataclass(frozen=True, config=FORBID)
class Images:
    """How particles are prepared. Every other length is in pixels of the images so prepared.

    Attributes:
        box: side to crop to in Fourier space, pixels; None keeps the input's.
        background_radius: particles are normalised by the pixels beyond it, in pixels of the
            input; None is half the box.
        invert: turn the contrast round (density should be bright).
    """

    box: int | None = Field(
        default=None, ge=8, description="down-sample to this box (Fourier crop), px; null: keep"
    )
    background_radius: float | None = Field(
        default=None, gt=0, description="normalise by the pixels beyond it, px; null: half the box"
    )
    invert: bool = Field(default=False, description="turn the contrast round")


class PreparedParticles:
    """The usable particles of a stack, prepared batch by batch.

    Nothing is kept, except of a tensor that is on the GPU already: its images are prepared once if
    they take no more than a quarter of the memory that is free.

    Attributes:
        rows: (n,) rows of the stack that are used.
        rejected: table (index, reason) of those that are not.
        size: box of the prepared images, pixels.
        scale: pixels of the input per pixel of the prepared images.
        pixel_size: Å of the prepared images, or None.
        fingerprint: of the stack's pixels, by a few of its images.
    """

    def __init__(
        self,
        stack: Stack,
        images: Images,
        device: torch.device,
        max_rejected: float = 0.1,
        batch_size: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Screen the stack, each process its share; ``progress`` is told.

        Raises:
            ValueError: images not square; ``box`` above theirs; no background beyond
                ``background_radius``; more than a share of ``max_rejected`` unusable.
        """
        height, width = stack.shape
        if height != width:
            raise ValueError(f"particles of {height} x {width} px: alignment needs square images")
        if images.box is not None and images.box > width:
            raise ValueError(f"images.box {images.box} px is larger than the particles ({width})")
        self.background_radius = images.background_radius or width / 2
        background(width, self.background_radius)  # refused before any image is read
        self.stack, self.images, self.device = stack, images, device
        self.rejected = _screened(stack, progress)
        refuse_above(self.rejected, len(stack), max_rejected)
        good = torch.ones(len(stack), dtype=torch.bool)
        good[torch.tensor(self.rejected["index"].tolist(), dtype=torch.int64)] = False
        self.rows = good.nonzero().squeeze(1)
        self.size = images.box or width
        self.scale = width / self.size
        self.pixel_size = None if stack.pixel_size is None else stack.pixel_size * self.scale
        self.fingerprint = _fingerprint(stack)
        bytes_each = 4 * self.size**2
        few = CPU_BATCH if device.type == "cpu" else max(64, CUDA_BATCH_BYTES // bytes_each)
        self.batch_size = batch_size or few
        self._kept: Tensor | None = None
        if len(self) and isinstance(stack, TensorStack) and _fits(stack, device, bytes_each):
            members = torch.arange(len(self)).split(few)
            self._kept = torch.cat([self.read(part) for part in members])

    def __len__(self) -> int:
        return len(self.rows)

    def over(self, stack: Stack) -> PreparedParticles:
        """The same particles, read from a stack made of theirs, which is not screened again."""
        other = copy.copy(self)
        other.stack, other._kept = stack, None
        return other

    def read(self, members: Tensor) -> Tensor:
        """(b, size, size) prepared images of some of the usable particles (indices into rows)."""
        if self._kept is not None:
            return self._kept[members]
        images = self.stack.read(self.rows[members]).to(self.device)
        images = normalise(-images if self.images.invert else images, self.background_radius)
        return fourier_resize(images, self.size)

    def parts(self) -> Iterator[Tensor]:
        """Members (b,) of this process's batches, in order; `take` reads them."""
        members = torch.arange(len(self))
        yield from (part for part in members[shard(len(self))].split(self.batch_size) if len(part))

    def take(self, part: Tensor) -> Tensor:
        """`read` of one of `parts`; several threads may do so at a time."""
        if self._kept is not None:  # in order: no copy
            return self._kept[int(part[0]) : int(part[-1]) + 1]
        return self.read(part)

    def batches(self, members: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (members (b,), images (b, size, size)): this process's share of ``members``, or
        of all particles, in order."""
        if members is None:
            yield from ((part, self.take(part)) for part in self.parts())
            return
        for part in members[shard(len(members))].split(self.batch_size):
            if len(part):
                yield part, self.read(part)


def _screened(stack: Stack, progress: Callable[[str, int, int], None] | None) -> pd.DataFrame:
    """`screen.screen` of the whole stack, on every process."""
    rows = torch.arange(len(stack))[shard(len(stack))]
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("read", done, len(stack))

    found = screen(stack, progress=tell, rows=rows)
    bad = torch.tensor(found["index"].tolist(), dtype=torch.int64)
    everyone = gather_over_ranks(bad)
    # The few of other processes are looked at again, for their reasons.
    return found if len(everyone) == len(bad) else screen(stack, rows=everyone)


def _fingerprint(stack: Stack) -> str:
    rows = torch.linspace(0, len(stack) - 1, min(16, len(stack))).round().long()
    pixels = stack.read(rows).cpu().contiguous().numpy()
    return f"{len(stack)}-{zlib.crc32(pixels.tobytes()):08x}"


def _fits(stack: TensorStack, device: torch.device, bytes_each: int) -> bool:
    """Whether a tensor's particles are on the GPU and there is room to keep them prepared."""
    if device.type != "cuda" or stack.images.device.type != "cuda":
        return False
    return len(stack) * bytes_each <= torch.cuda.mem_get_info(stack.images.device)[0] // 4
