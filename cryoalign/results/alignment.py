"""`Alignment`: the one result type."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells
from cryoalign.pose import Pose
from cryoalign.results.averages import TRUSTED, class_filters
from cryoalign.runtime.arrays import to_numpy
from cryoalign.runtime.files import replacing


@dataclass(frozen=True, eq=False)
class Alignment:
    """Poses and classes of n input particles, and the class averages they make.

    Attributes:
        pose: (n,) particle onto its class average, pixels of the *input*; NaN where set aside.
        class_number: (n,) int64, from 1; 0 = set aside.
        score: (n,) correlation coefficient with the reference; NaN where set aside.
        averages: (k, size, size) plain means of the aligned, normalised members; zero if empty.
        frc: (k, shells) half-set Fourier ring correlation of the averages under the mask; shell
            i is i / size per pixel.
        resolution: (k,) where the FRC falls below 0.143, in Å (pixels if the size is unknown).
        class_sizes: (k,) members.
        history: one row per iteration.
        rejected: table of the particles set aside: index (0-based row), reason.
        pixel_size: Å of the averages' pixels, or None.
        scale: pixels of the input per pixel of the averages.
        particle_quality: n rows of what else is known of particles (`quality.conclude`); a column
            is missing where the method has nothing to say. NaN where set aside.
        class_quality: k rows of what else is known of classes, likewise.
        tables: further tables by name that the method makes; a run writes each as CSV.
        figures: further numbers by name, for the report.
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
        """(k, size, size) averages weighted by their own FRC, as references are (`average`)."""
        # Without members in one half the FRC is zero from shell 1 on.
        trusted = (self.class_sizes >= 2 * TRUSTED) & (self.frc[:, 1:] != 0).any(1)
        return filter_shells(self.averages, class_filters(self.frc, trusted))

    def to_numpy(self) -> dict[str, np.ndarray]:
        """The tensors by name (angle, shift, mirror; class_number … class_sizes) as arrays, which
        share their memory where it is the host's."""
        tensors = {
            "angle": self.pose.angle,
            "shift": self.pose.shift,
            "mirror": self.pose.mirror,
            "class_number": self.class_number,
            "score": self.score,
            "averages": self.averages,
            "frc": self.frc,
            "resolution": self.resolution,
            "class_sizes": self.class_sizes,
        }
        return {name: to_numpy(tensor) for name, tensor in tensors.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row per input particle: index, class_number, angle (degrees), shift_x, shift_y
        (input pixels), mirror (0/1), score, and the columns of `particle_quality`."""
        array = self.to_numpy()
        frame = pd.DataFrame(
            {
                "index": np.arange(len(self.pose)),
                "class_number": array["class_number"],
                "angle": array["angle"],
                "shift_x": array["shift"][:, 0],
                "shift_y": array["shift"][:, 1],
                "mirror": array["mirror"].astype(np.int64),
                "score": array["score"],
            }
        )
        return pd.concat([frame, self.particle_quality], axis=1)

    def class_frame(self) -> pd.DataFrame:
        """One row per class: class_number, size, resolution, mean_score, and the columns of
        `class_quality`."""
        k = len(self.averages)
        array = self.to_numpy()
        score = pd.Series(array["score"]).groupby(array["class_number"]).mean()
        frame = pd.DataFrame(
            {
                "class_number": np.arange(1, k + 1),
                "size": array["class_sizes"],
                "resolution": array["resolution"],
                "mean_score": score.reindex(range(1, k + 1)).to_numpy(),
            }
        )
        return pd.concat([frame, self.class_quality], axis=1)

    def save(self, path: str | Path) -> None:
        """Write everything to one ``.npz`` file (NumPy arrays, no pickles)."""
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(
                file,  # not a name: NumPy would add a suffix of its own to that
                allow_pickle=False,
                **self.to_numpy(),
                **_columns("history", self.history),
                **_columns("rejected", self.rejected),
                **_columns("particle_quality", self.particle_quality),
                **_columns("class_quality", self.class_quality),
                **{f"figure.{name}": value for name, value in self.figures.items()},
                **{
                    key: column
                    for name, table in self.tables.items()
                    for key, column in _columns(f"table.{name}", table).items()
                },
                pixel_size=np.nan if self.pixel_size is None else self.pixel_size,
                scale=self.scale,
            )

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such an archive.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                data = {name: archive[name] for name in archive.files}
            tensor = {
                name: torch.from_numpy(value) for name, value in data.items() if "." not in name
            }
            return cls(
                pose=Pose(tensor["angle"], tensor["shift"], tensor["mirror"]),
                **{
                    name: tensor[name]
                    for name in (
                        "class_number",
                        "score",
                        "averages",
                        "frc",
                        "resolution",
                        "class_sizes",
                    )
                },
                history=_table("history", data),
                rejected=_table("rejected", data),
                particle_quality=_table("particle_quality", data),
                class_quality=_table("class_quality", data),
                tables={
                    name: _table(f"table.{name}", data)
                    for name in sorted({k.split(".")[1] for k in data if k.startswith("table.")})
                },
                figures={
                    k.removeprefix("figure."): float(v)
                    for k, v in data.items()
                    if k.startswith("figure.")
                },
                pixel_size=None if np.isnan(data["pixel_size"]) else float(data["pixel_size"]),
                scale=float(data["scale"]),
            )
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: not an alignment that cryoalign saved ({error})") from error


def over_all_rows(
    n: int, rows: Tensor, label: Tensor, pose: Pose, score: Tensor, scale: float
) -> tuple[Pose, Tensor, Tensor]:
    """What was found for the usable particles, as an `Alignment` has it for all n of the input.

    Args:
        n: particles of the input; rows: (u,) the usable ones among them.
        label: (u,) class index; pose: (u,) in prepared pixels; score: (u,).
        scale: pixels of the input per prepared pixel.

    Returns:
        pose (n,), class_number (n,) and score (n,); NaN and 0 where a particle was set aside.
    """
    angle, scored = torch.full((n,), torch.nan), torch.full((n,), torch.nan)
    shift, mirror = torch.full((n, 2), torch.nan), torch.zeros(n, dtype=torch.bool)
    class_number = torch.zeros(n, dtype=torch.int64)
    angle[rows], scored[rows] = pose.angle, score
    shift[rows], mirror[rows] = pose.shift * scale, pose.mirror
    class_number[rows] = label + 1
    return Pose(angle, shift, mirror), class_number, scored


def _columns(name: str, table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of a table as arrays ``name.column``: unlike CSV, that keeps every bit and text."""
    texts = {column for column in table if pd.api.types.is_string_dtype(table[column])}
    return {
        f"{name}.{column}": table[column].to_numpy(np.str_ if column in texts else None)
        for column in table
    }


def _table(name: str, data: dict[str, np.ndarray]) -> pd.DataFrame:
    """The table of which ``_columns`` made arrays."""
    start = f"{name}."
    return pd.DataFrame({k.removeprefix(start): v for k, v in data.items() if k.startswith(start)})
