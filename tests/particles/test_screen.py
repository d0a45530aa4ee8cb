"""Unusable images are found, named, and counted against a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from cryoalign.io.formats import write_images
from cryoalign.io.stack import read_particles
from cryoalign.particles.screen import LARGEST, faults, refuse_above, screen


def _spoilt() -> Tensor:
    images = torch.randn(20, 8, 9, generator=torch.Generator().manual_seed(1))
    images[3, 2, 2] = torch.nan
    images[4, :, 0] = torch.inf
    images[4, 0, 1] = -torch.inf
    images[7] = 2.5
    images[11, 0, 0] = -1e20
    images[19] = torch.nan
    return images


REASONS = {
    3: "1 of 72 pixels are NaN or infinite",
    4: "9 of 72 pixels are NaN or infinite",
    7: "constant: every pixel is 2.5",
    11: "pixels as large as 1e+20",
    19: "72 of 72 pixels are NaN or infinite",
}


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_bad_images_are_found_in_a_file(tmp_path: Path, batch_size: int) -> None:
    write_images(tmp_path / "x.npy", _spoilt())
    done: list[int] = []
    stack = read_particles(tmp_path / "x.npy")
    table = screen(stack, batch_size=batch_size, progress=done.append)
    assert dict(zip(table["index"], table["reason"], strict=True)) == REASONS
    assert table["index"].is_monotonic_increasing
    assert table["index"].dtype == np.int64
    assert sum(done) == 20
    assert max(done) <= batch_size
    share = screen(stack, rows=torch.arange(4, 12))
    assert share["index"].tolist() == [4, 7, 11]


def test_good_images_are_left_alone(tmp_path: Path, make_stack: Callable[..., np.ndarray]) -> None:
    make_stack("x.mrcs", n=30)
    table = screen(read_particles(tmp_path / "x.mrcs"))
    assert list(table.columns) == ["index", "reason"]
    assert len(table) == 0
    barely = torch.full((1, 4, 4), 1.0)
    barely[0, 0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert faults(barely) == {}
    # What passes can be normalised: squares of the largest pixels still add up.
    largest = torch.full((1, 1024, 1024), LARGEST)
    assert torch.isfinite(largest.square().sum())


def test_float64_beyond_float32_is_set_aside(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 4, 4))
    images[1, 0, 0] = 1e300
    np.save(tmp_path / "x.npy", images)
    assert screen(read_particles(tmp_path / "x.npy"))["index"].tolist() == [1]


@pytest.mark.parametrize(
    ("count", "n", "limit", "refused"),
    [
        (0, 10, 0.0, False),
        (1, 10, 0.1, False),
        (2, 10, 0.1, True),
        (1, 10, 0.0, True),
        (9, 10, 1.0, False),
    ],
)
def test_too_many_are_refused(count: int, n: int, limit: float, refused: bool) -> None:
    table = pd.DataFrame({"index": range(count), "reason": ["constant"] * count})
    if not refused:
        refuse_above(table, n, limit)
        return
    with pytest.raises(ValueError, match=rf"{count} of {n} .*0 \(constant\).*raise max_rejected"):
        refuse_above(table, n, limit)


def test_not_one_left_is_refused_whatever_the_limit() -> None:
    table = pd.DataFrame({"index": range(10), "reason": ["constant"] * 10})
    with pytest.raises(ValueError, match=r"none of the 10 particles is usable.*0 \(constant\)"):
        refuse_above(table, 10, 1.0)
    with pytest.raises(ValueError, match="the stack is empty"):
        refuse_above(table[:0], 0, 1.0)
