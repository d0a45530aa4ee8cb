"""Finding the images that nothing can be learnt from, before they reach anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pandas as pd
import torch
from torch import Tensor

BATCH = 256  # images in memory at a time
LARGEST = 1e15  # beyond it, sums of squares over an image overflow single precision


class Readable(Protocol):
    """Anything images can be read from by row."""

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
    """Images with NaN, infinite or overflowing pixels, or the same value everywhere.

    Reads batch by batch; memory does not grow with the number of images.

    Args:
        stack: where the images are.
        batch_size: images in memory at a time.
        progress: called with the number of images of every batch done.
        rows: 0-based rows to look at, e.g. one process's share; None is all.

    Returns:
        Columns index (0-based row) and reason, one row per image to set aside, in order.
    """
    rows = torch.arange(len(stack)) if rows is None else rows
    found: list[tuple[int, str]] = []
    for part in rows.split(batch_size) if len(rows) else ():
        reasons = faults(stack.read(part))
        found.extend((int(part[i]), reason) for i, reason in reasons.items())
        if progress is not None:
            progress(len(part))
    table = pd.DataFrame(found, columns=["index", "reason"])
    return table.astype({"index": "int64"})


def faults(images: Tensor) -> dict[int, str]:
    """Why images of a batch (b, h, w) cannot be used, by their place in it; the good are absent."""
    low, high = images.flatten(1).aminmax(dim=1)  # NaN where a pixel is
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
    """Set a few images aside, but refuse to go on when too many are unusable.

    Args:
        rejected: what ``screen`` found.
        n_particles: images looked at.
        max_rejected: largest tolerable share, 0 to 1.

    Raises ValueError if the share is larger, or nothing is left.
    """
    count = len(rejected)
    if count <= max_rejected * n_particles and count < n_particles:
        return
    first = rejected.head(3)
    shown = ", ".join(
        f"{i} ({why})" for i, why in zip(first["index"], first["reason"], strict=True)
    )
    raise ValueError(
        f"{count} of {n_particles} particles are unusable, more than max_rejected = "
        f"{max_rejected:g} allows; rows (from 0) {shown}, ...: restore the stack, or raise "
        "max_rejected to go on without them"
    )
