"""Particles made ready for alignment: set aside, normalised, resized, in batches on a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.distributed import shard
from cryoalign.filters import background, fourier_resize, normalise
from cryoalign.screen import refuse_above, screen
from cryoalign.settings import FORBID

CPU_BATCH = 64
CUDA_BATCH = 2048


class Stack(Protocol):
    """Anything particles can be read from; `io.ParticleStack` is one."""

    shape: tuple[int, int]
    pixel_size: float | None

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Tensor:
        """(b, h, w) float32 images."""
        ...


class TensorStack:
    """Particles (n, h, w) in memory, read as from a file."""

    def __init__(self, images: Tensor, pixel_size: float | None = None) -> None:
        if images.ndim != 3:
            raise ValueError(f"particles must be (n, h, w), got {tuple(images.shape)}")
        self.images, self.pixel_size = images, pixel_size
        self.shape: tuple[int, int] = (images.shape[1], images.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Tensor | slice) -> Tensor:
        """(b, h, w) float32 images."""
        return self.images[rows].float()


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
    """The usable particles of a stack, prepared batch by batch; nothing is kept.

    Attributes:
        rows: (n,) rows of the stack that are used.
        rejected: table (index, reason) of those that are not.
        size: box of the prepared images, pixels.
        scale: pixels of the input per pixel of the prepared images.
        pixel_size: Å of the prepared images, or None.
    """

    def __init__(
        self,
        stack: Stack,
        images: Images,
        device: torch.device,
        max_rejected: float = 0.1,
        batch_size: int | None = None,
    ) -> None:
        """Screen the stack.

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
        self.batch_size = batch_size or (CPU_BATCH if device.type == "cpu" else CUDA_BATCH)
        self.rejected: pd.DataFrame = screen(stack)
        refuse_above(self.rejected, len(stack), max_rejected)
        good = torch.ones(len(stack), dtype=torch.bool)
        good[torch.tensor(self.rejected["index"].tolist(), dtype=torch.int64)] = False
        self.rows = good.nonzero().squeeze(1)
        self.size = images.box or width
        self.scale = width / self.size
        self.pixel_size = None if stack.pixel_size is None else stack.pixel_size * self.scale

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, members: Tensor) -> Tensor:
        """(b, size, size) prepared images of some of the usable particles (indices into rows)."""
        images = self.stack.read(self.rows[members]).to(self.device)
        images = normalise(-images if self.images.invert else images, self.background_radius)
        return fourier_resize(images, self.size)

    def batches(self, members: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (members (b,), images (b, size, size)): this process's share of ``members``, or
        of all particles, in order."""
        if members is None:
            members = torch.arange(len(self))
        for part in members[shard(len(members))].split(self.batch_size):
            if len(part):
                yield part, self.read(part)


def choose_device(device: str) -> torch.device:
    """``auto`` is the GPU if PyTorch sees one, else the CPU.

    Raises:
        ValueError: CUDA was asked for and there is none, or the name is unknown.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch finds no CUDA GPU here: use device=cpu")
    return chosen
