"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryoalign.operators.kernels import CRYOALIGN_NO_KERNELS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data that other programs made, kept beside the repository; a clone may not have it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data in {SHARED}, which are not part of the repository")
    return SHARED


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels, whether or not they are built."""
    monkeypatch.setenv(CRYOALIGN_NO_KERNELS, "1")


@pytest.fixture
def make_stack(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Write an MRC stack of random images with ``mrcfile`` alone; returns its images."""

    def make(
        name: str, n: int = 4, size: tuple[int, int] = (16, 16), dtype: str = "f4", seed: int = 0
    ) -> np.ndarray:
        images = np.random.default_rng(seed).normal(0, 40, (n, *size)).round().astype(dtype)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with mrcfile.new(path, overwrite=True) as mrc:
            mrc.set_data(images)
            mrc.set_image_stack()
            mrc.voxel_size = (2.5, 2.5, 1.0)
        return images

    return make
