"""`Alignment`: the result of every method, and how arrays are saved."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells
from cryoalign.pose import Pose
from cryoalign.results.averages import TRUSTED, class_filters
from cryoalign.runtime.arrays import to_numpy
from cryoalign.runtime.files import replacing

TENSORS = ("class_number", "score", "averages", "frc", "resolution", "class_sizes")
TABLES = ("history", "rejected", "particle_quality", "class_quality")


@dataclass(frozen=True, eq=False)
class Alignment:
    """Poses and classes of the n input particles, and the averages of the k classes.

    Attributes:
        pose: (n,) particle onto its class average, pixels of the *input*; NaN where set aside.
        class_number: (n,) int64, from 1; 0 = set aside.
        score: (n,) correlation coefficient with the reference; NaN where set aside.
        averages: (k, size, size) means of the aligned, normalised members, weighted by CTF^2 if
            the CTF is used; zero if empty.
        frc: (k, shells) Fourier ring correlation of the half-set averages under the mask; shell i
            is the frequency i / size per pixel.
        resolution: (k,) where the FRC falls below 0.143, in Å (pixels if their size is unknown).
        class_sizes: (k,) numbers of members.
        history: a row per iteration.
        rejected: table of the particles set aside: index (row of the input, from 0), reason.
        pixel_size: pixel size of the averages in Å, or None.
        scale: pixels of the input per pixel of the averages.
        particle_quality: n rows of further columns about the particles (`quality.conclude`), which
            depend on the method; NaN where set aside.
        class_quality: k rows of further columns about the classes.
        tables: further tables by name that the method makes; a run writes each as CSV.
        figures: further numbers by name, for the report.
        ctf: one line that says what was done with the CTF, and why.
    """

    pose: Pose
    class_number: Tensor
    score: Tensor
    averages: Tensor
    frc: Tensor
    resolution: Tensor
    class_sizes: Tensor
    history: pd.DataFrame
    rejected: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            {"index": np.zeros(0, np.int64), "reason": np.zeros(0, np.str_)}
        )
    )
    pixel_size: float | None = None
    scale: float = 1.0
    particle_quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    class_quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    ctf: str = ""

    def __post_init__(self) -> None:
        n, k = len(self.pose), len(self.averages)
        per_particle = {len(self.class_number), len(self.score)}
        per_class = {len(self.frc), len(self.resolution), len(self.class_sizes)}
        if per_particle != {n} or per_class != {k}:
            raise ValueError(
                f"an Alignment of {n} poses and {k} averages needs a class number and a score for "
                f"each pose (got {len(self.class_number)}, {len(self.score)}), an FRC, a "
                f"resolution and a size for each average (got {len(self.frc)}, "
                f"{len(self.resolution)}, {len(self.class_sizes)})"
            )
        tables = len(self.particle_quality), len(self.class_quality)
        if tables[0] not in (0, n) or tables[1] not in (0, k):
            raise ValueError(
                f"an Alignment of {n} particles in {k} classes needs as many rows of "
                f"particle_quality and class_quality, or none; got {tables[0]} and {tables[1]}"
            )

    def filtered_averages(self) -> Tensor:
        """(k, size, size) averages filtered as `averages.filtered_averages` does."""
        # The FRC is zero from shell 1 on if one half has no members.
        trusted = (self.class_sizes >= 2 * TRUSTED) & (self.frc[:, 1:] != 0).any(1)
        return filter_shells(self.averages, class_filters(self.frc, trusted))

    def to_numpy(self) -> dict[str, np.ndarray]:
        """The tensors by name (angle, shift, mirror; class_number … class_sizes) as arrays. Arrays
        of tensors on the CPU share their memory."""
        pose = {"angle": self.pose.angle, "shift": self.pose.shift, "mirror": self.pose.mirror}
        tensors = pose | {name: getattr(self, name) for name in TENSORS}
        return {name: to_numpy(tensor) for name, tensor in tensors.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row per input particle: index, class_number, angle (degrees), shift_x, shift_y
        (input pixels), mirror (0/1), score, and the columns of `particle_quality`."""
        array = self.to_numpy()
        columns = {
            "index": np.arange(len(self.pose)),
            "class_number": array["class_number"],
            "angle": array["angle"],
            "shift_x": array["shift"][:, 0],
            "shift_y": array["shift"][:, 1],
            "mirror": array["mirror"].astype(np.int64),
            "score": array["score"],
        }
        return pd.concat([pd.DataFrame(columns), self.particle_quality], axis=1)

    def class_frame(self) -> pd.DataFrame:
        """One row per class: class_number, size, resolution, mean_score, and the columns of
        `class_quality`."""
        k = len(self.averages)
        array = self.to_numpy()
        score = pd.Series(array["score"]).groupby(array["class_number"]).mean()
        columns = {
            "class_number": np.arange(1, k + 1),
            "size": array["class_sizes"],
            "resolution": array["resolution"],
            "mean_score": score.reindex(range(1, k + 1)).to_numpy(),
        }
        return pd.concat([pd.DataFrame(columns), self.class_quality], axis=1)

    def save(self, path: str | Path) -> None:
        """Write the alignment to one ``.npz`` file, without pickles."""
        tables = {name: getattr(self, name) for name in TABLES}
        tables |= {f"table.{name}": table for name, table in self.tables.items()}
        arrays = self.to_numpy()
        for name, table in tables.items():
            arrays |= _columns(name, table)
        numbers = {f"figure.{name}": value for name, value in self.figures.items()}
        numbers["pixel_size"] = np.nan if self.pixel_size is None else self.pixel_size
        write_arrays(path, arrays | numbers | {"scale": self.scale, "ctf": self.ctf})

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read an alignment that `save` wrote.

        Raises:
            ValueError: the file is not such an alignment.
        """
        with read_arrays(path, "an alignment that cryoalign saved") as data:
            pose = [torch.from_numpy(data[name]) for name in ("angle", "shift", "mirror")]
            further = sorted({key.split(".")[0] for key in part_of(data, "table.")})
            named: dict[str, Any] = {name: torch.from_numpy(data[name]) for name in TENSORS}
            named |= {name: pd.DataFrame(part_of(data, f"{name}.")) for name in TABLES}
            return cls(
                pose=Pose(*pose),
                **named,
                tables={name: pd.DataFrame(part_of(data, f"table.{name}.")) for name in further},
                figures={name: float(value) for name, value in part_of(data, "figure.").items()},
                pixel_size=None if np.isnan(data["pixel_size"]) else float(data["pixel_size"]),
                scale=float(data["scale"]),
                ctf=str(data.get("ctf", "")),
            )


def over_all_rows(
    n: int, rows: Tensor, label: Tensor, pose: Pose, score: Tensor, scale: float
) -> tuple[Pose, Tensor, Tensor]:
    """Extend the results for the u usable particles to all n particles of the input.

    Args:
        n: number of particles of the input.
        rows: (u,) rows of the usable particles.
        label: (u,) class index, from 0.
        pose: (u,) poses, in prepared pixels.
        score: (u,).
        scale: pixels of the input per prepared pixel.

    Returns:
        pose (n,) in pixels of the input, class_number (n,) from 1 and score (n,). Particles that
        are set aside have NaN, class number 0 and NaN.
    """
    angle, scored = torch.full((n,), torch.nan), torch.full((n,), torch.nan)
    shift, mirror = torch.full((n, 2), torch.nan), torch.zeros(n, dtype=torch.bool)
    class_number = torch.zeros(n, dtype=torch.int64)
    angle[rows], scored[rows] = pose.angle, score
    shift[rows], mirror[rows] = pose.shift * scale, pose.mirror
    class_number[rows] = label + 1
    return Pose(angle, shift, mirror), class_number, scored


def _columns(name: str, table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of a table as arrays ``name.column``, which unlike CSV keep every bit and type."""
    texts = {column for column in table if pd.api.types.is_string_dtype(table[column])}
    return {
        f"{name}.{column}": table[column].to_numpy(np.str_ if column in texts else None)
        for column in table
    }


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays, numbers and texts to one ``.npz`` file, completely or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        # An open file, because NumPy would add a suffix to a name.
        np.savez(file, allow_pickle=False, **arrays)


@contextmanager
def read_arrays(path: str | Path, what: str) -> Iterator[dict[str, np.ndarray]]:
    """Read the arrays that `write_arrays` wrote.

    Errors of reading, and those of the ``with`` block that uses the arrays, become a ValueError
    which says that the file is not ``what``.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        yield arrays
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not {what} ({error})") from error


def part_of(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with ``prefix``, by the rest of their names."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
