"""Results as RELION reads them: particles with pose and class, class averages with statistics."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryoalign.io.paths import plain, resolve
from cryoalign.io.stack import ParticleStack
from cryoalign.io.star import Block, StarTables, write_star
from cryoalign.pose import Pose, from_relion, to_relion

VERSION = 30001  # of the layout with optics groups, RELION 3.1's
SCORE = "cryoalignScore"
CLASS_SIZE = "cryoalignClassSize"
# RELION refuses an optics table without these; without defocus columns it does not use them.
_PLACEHOLDERS = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}


def read_pose(stack: ParticleStack) -> Pose:
    """(n,) poses that the STAR file of a stack holds, in pixels and this package's convention.

    Raises ValueError if it holds none.
    """
    if "rlnAnglePsi" not in stack.table:
        raise ValueError(f"{stack.path}: no column rlnAnglePsi, so no poses; align it first")
    columns = {str(label): values.to_numpy() for label, values in stack.table.items()}
    # Without a pixel size there are no origins in ångström: `survey` refuses that.
    return from_relion(columns, stack.pixel_size or 1.0)


def write_particles_star(
    path: str | Path,
    stack: ParticleStack,
    pose: Pose,
    class_number: Tensor,
    keep: Tensor | np.ndarray | Sequence[int],
    score: Tensor,
) -> None:
    """Write the kept particles with pose, class and score, whole or not at all.

    Every block and column of an input STAR file stays, in its layout; set are psi, class,
    ``rlnIsFlip`` (0 or 1), and the origins: in ångström, or in pixels in RELION 3.0's layout. A
    plain stack gets RELION 3.1's layout with one optics group, microscope values there being
    placeholders, and a pixel size of 1 with a warning if it is not known.

    Args:
        path: the .star file to write.
        stack: the input particles.
        pose: (n,) particle onto reference, shifts in the stack's pixels.
        class_number: (n,) int, from 1.
        keep: (n,) bool, or 0-based rows in the order to write; the others are left out.
        score: (n,) correlation with the class, written as ``cryoalignScore``.

    Raises ValueError if the lengths differ or a kept pose is not finite.
    """
    path = Path(path)
    lengths = (len(pose), len(class_number), len(score))
    if set(lengths) != {len(stack)}:
        raise ValueError(f"{path}: {len(stack)} particles, but poses, classes, scores {lengths}")
    rows = _rows(path, keep, len(stack))
    kept = pose[torch.as_tensor(rows)]
    wrong = ~(torch.isfinite(kept.angle) & torch.isfinite(kept.shift).all(-1))
    if wrong.any():
        row = rows[int(wrong.nonzero()[0])]
        raise ValueError(f"{path}: the pose of row {row} is not finite; leave it out of keep")
    comments: tuple[str, ...] = ()
    tables = stack.star
    if tables is None:
        tables, comments = _tables_of_plain_stack(path, stack)
    columns = _pose_columns(tables, kept, stack.pixel_size)
    columns["rlnClassNumber"] = np.asarray(class_number)[rows]
    columns[SCORE] = np.asarray(score, np.float64)[rows].round(6)
    particles = tables.particles.iloc[rows].reset_index(drop=True).assign(**columns)
    blocks = {**tables.blocks, tables.particles_name: particles}
    write_star(path, StarTables(blocks, tables.particles_name, tables.version), comments)


def write_class_averages_star(
    path: str | Path,
    stack_name: str,
    class_sizes: Tensor,
    resolution: Tensor,
    pixel_size: float | None = None,
) -> None:
    """Write the statistics of class averages in the form of RELION's model file.

    Args:
        path: the .star file to write.
        stack_name: the stack of averages as the STAR file names it, e.g. class_averages.mrcs.
        class_sizes: (k,) particles in each class.
        resolution: (k,) ångström, or pixels if ``pixel_size`` is None (a comment says so).
        pixel_size: ångström per pixel of the averages.
    """
    sizes = np.asarray(class_sizes, np.int64)
    classes = pd.DataFrame(
        {
            "rlnReferenceImage": [f"{i:06d}@{stack_name}" for i in range(1, len(sizes) + 1)],
            "rlnClassDistribution": (sizes / max(int(sizes.sum()), 1)).round(6),
            "rlnEstimatedResolution": np.asarray(resolution, np.float64).round(6),
            CLASS_SIZE: sizes,
        }
    )
    general: dict[str, float] = {"rlnReferenceDimensionality": 2, "rlnNrClasses": len(sizes)}
    if pixel_size is not None:
        general["rlnPixelSize"] = pixel_size
    blocks: dict[str, Block] = {"model_general": general, "model_classes": classes}
    note = () if pixel_size else ("pixel size not known: rlnEstimatedResolution is in pixels",)
    write_star(Path(path), StarTables(blocks, "model_classes", VERSION), note)


def _rows(path: Path, keep: Tensor | np.ndarray | Sequence[int], n: int) -> np.ndarray:
    """0-based rows to write."""
    rows = np.asarray(keep)
    if rows.dtype == bool:
        if rows.shape != (n,):
            raise ValueError(f"{path}: keep has shape {rows.shape}, should be ({n},)")
        return np.flatnonzero(rows)
    if rows.size and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"{path}: keep should be bools, or rows from 0 to {n - 1}")
    return rows.astype(np.int64)


def _pose_columns(
    tables: StarTables, pose: Pose, pixel_size: float | None
) -> dict[str, np.ndarray]:
    """RELION's columns in the table's layout; all origins it has are set, so none goes stale."""
    columns = to_relion(pose, pixel_size or 1.0)
    origins = {axis: columns.pop(f"rlnOrigin{axis}Angst") for axis in "XY"}
    for axis, origin in origins.items():
        if tables.optics is not None or f"rlnOrigin{axis}Angst" in tables.particles:
            columns[f"rlnOrigin{axis}Angst"] = origin
        if tables.optics is None or f"rlnOrigin{axis}" in tables.particles:
            columns[f"rlnOrigin{axis}"] = origin / (pixel_size or 1.0)
    return {label: values.round(6) for label, values in columns.items()}


def _tables_of_plain_stack(path: Path, stack: ParticleStack) -> tuple[StarTables, tuple[str, ...]]:
    """RELION 3.1's layout for a stack that came without a STAR file, and what to say of it."""
    comments = ["voltage, spherical aberration and amplitude contrast are placeholders"]
    if stack.pixel_size is None:
        comments.append("the pixel size is not known: 1 A stands for it, so origins are in pixels")
        warnings.warn(f"{path}: {comments[-1]}", stacklevel=3)
    optics = {"rlnOpticsGroup": 1, "rlnOpticsGroupName": "opticsGroup1", **_PLACEHOLDERS}
    optics["rlnImagePixelSize"] = stack.pixel_size or 1.0
    optics |= {"rlnImageSize": stack.shape[1], "rlnImageDimensionality": 2}
    name = _name_for(stack.path, path)
    names = [f"{i:06d}@{name}" for i in range(1, len(stack) + 1)]
    particles = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1})
    blocks: dict[str, Block] = {"optics": pd.DataFrame([optics]), "particles": particles}
    return StarTables(blocks, "particles", VERSION), tuple(comments)


def _name_for(stack: Path, star: Path) -> str:
    """How a STAR file names a stack: from their common folder if that finds it, else absolute."""
    stack, folder = plain(stack), plain(star).parent
    try:
        name = stack.relative_to(os.path.commonpath([stack, folder])).as_posix()
        if resolve(name, star, None, False) == stack:
            return name
    except ValueError:  # no common folder, or not found there
        pass
    return str(stack)
