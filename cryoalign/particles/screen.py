"""Find the images that cannot be used: with invalid pixels, or without any contrast."""

from collections.abc import Callable, Mapping
from typing import Protocol

import pandas as pd
import torch
from torch import Tensor

BATCH = 256  # images in memory at a time: 64 MB for 256 px
LARGEST = 1e15  # larger pixels make sums of squares over an image overflow float32


class Readable(Protocol):
    """Anything from which images can be read by row."""

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Tensor:
        """(b, h, w) images of these 0-based rows."""
        ...


def screen(
    stack: Readable,
    batch_size: int = BATCH,
    progress: Callable[[int], object] | None = None,
    rows: Tensor | None = None,
) -> pd.DataFrame:
    """List the images with NaN, infinite or too large pixels, or with the same value everywhere.

    Args:
        stack: the images.
        batch_size: number of images in memory at a time.
        progress: called after each batch with its number of images.
        rows: 0-based rows to check, e.g. those of one process; None checks all.

    Returns:
        Columns index (0-based row) and reason, with one row for each unusable image, in order.
    """
    rows = torch.arange(len(stack)) if rows is None else rows
    found: dict[int, str] = {}
    for part in rows.split(batch_size) if len(rows) else ():
        reasons = faults(stack.read(part))
        found |= {int(part[i]): reason for i, reason in reasons.items()}
        if progress is not None:
            progress(len(part))
    return table_of(found)


def table_of(found: Mapping[int, str]) -> pd.DataFrame:
    """The table of `screen` from reasons by row, in their order."""
    table = pd.DataFrame(list(found.items()), columns=["index", "reason"])
    return table.astype({"index": "int64"})


def faults(images: Tensor) -> dict[int, str]:
    """Why images of a batch (b, h, w) cannot be used, by index; usable images are left out."""
    low, high = images.flatten(1).aminmax(dim=1)  # NaN if a pixel is NaN
    largest = torch.maximum(low.abs(), high.abs())
    reasons: dict[int, str] = {}
    for i in (~(largest <= LARGEST) | (low == high)).nonzero().flatten().tolist():
        lost = int((~torch.isfinite(images[i])).sum())
        if lost:
            reasons[i] = f"{lost} of {images[i].numel()} pixels are NaN or infinite"
        elif low[i] == high[i]:
            reasons[i] = f"constant: every pixel is {low[i]:g}"
        else:
            reasons[i] = f"pixels as large as {largest[i]:g}"
    return reasons


def refuse_above(rejected: pd.DataFrame, n_particles: int, max_rejected: float) -> None:
    """Raise an error if too many images are unusable.

    Args:
        rejected: the table from `screen`.
        n_particles: number of images that were checked.
        max_rejected: largest acceptable share of unusable images, from 0 to 1.

    Raises ValueError if the share is larger, or if no image is usable.
    """
    count = len(rejected)
    if not n_particles:
        raise ValueError("there are no particles: the stack is empty")
    if count <= max_rejected * n_particles and count < n_particles:
        return
    first = rejected.head(3)
    shown = ", ".join(
        f"{i} ({why})" for i, why in zip(first["index"], first["reason"], strict=True)
    )
    if count == n_particles:
        raise ValueError(
            f"none of the {n_particles} particles is usable; rows (from 0) {shown}, ...: restore "
            "the stack"
        )
    raise ValueError(
        f"{count} of {n_particles} particles are unusable, more than max_rejected = "
        f"{max_rejected:g} allows; rows (from 0) {shown}, ...: restore the stack, or raise "
        "max_rejected to continue without them"
    )
