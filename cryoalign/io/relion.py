"""Write STAR files for RELION: particles with pose and class, statistics of class averages."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cryoalign.io.paths import plain, resolve
from cryoalign.io.stack import ParticleStack
from cryoalign.io.star import Block, StarTable, StarTables, as_texts, write_star
from cryoalign.pose import Pose, from_relion, to_relion

VERSION = 30001  # RELION 3.1 writes this number; its files have optics groups
POSE = (
    *("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginX", "rlnOriginY"),
    "rlnIsFlip",
)
SCORE = "cryoalignScore"
CLASS_SIZE = "cryoalignClassSize"
# RELION requires these columns in an optics table. It uses them only with defocus columns.
_PLACEHOLDERS = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}


def read_pose(stack: ParticleStack) -> Pose:
    """(n,) poses from the STAR file of a stack, in pixels and in the convention of `Pose`.

    Raises ValueError if the STAR file has no poses.
    """
    table = None if stack.star is None else stack.star.table
    if table is None or "rlnAnglePsi" not in table:
        raise ValueError(
            f"{stack.path}: no column rlnAnglePsi, so there are no poses; align the particles first"
        )
    columns = {label: table.numbers(label) for label in POSE if label in table}
    # `survey` refuses origins in Å without a pixel size.
    return from_relion(columns, stack.pixel_size or 1.0)


def write_particles_star(
    path: str | Path,
    stack: ParticleStack,
    pose: Pose,
    class_number: Tensor,
    keep: Tensor | np.ndarray | Sequence[int],
    score: Tensor,
) -> None:
    """Write the kept particles with pose, class and score as a STAR file.

    All blocks and columns of an input STAR file are kept, and cells that are not set stay as they
    were written. The columns of psi, class, ``rlnIsFlip`` (0 or 1) and the origins are set; origins
    are in Å, or in pixels in the layout of RELION 3.0. A plain stack gets the layout of RELION 3.1
    with one optics group, whose microscope values are placeholders. If its pixel size is not known,
    1 Å is written and a warning is given.

    Args:
        path: the .star file to write. If writing fails, an existing file stays as it was.
        stack: the input particles.
        pose: (n,) poses that move particles onto references, shifts in pixels of the stack.
        class_number: (n,) int, from 1.
        keep: (n,) bool, or the 0-based rows to write, in this order; others are left out.
        score: (n,) correlation with the class average, written as ``cryoalignScore``.

    Raises ValueError if the lengths differ or a kept pose is not finite.
    """
    path = Path(path)
    lengths = (len(pose), len(class_number), len(score))
    if set(lengths) != {len(stack)}:
        raise ValueError(f"{path}: {len(stack)} particles, but {lengths} poses, classes and scores")
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
    particles = tables.table.rows(rows).assign(**columns)
    blocks = {**tables.blocks, tables.particles_name: particles}
    write_star(path, StarTables(blocks, tables.particles_name, tables.version), comments)


def write_class_averages_star(
    path: str | Path,
    stack_name: str,
    class_sizes: Tensor,
    resolution: Tensor,
    pixel_size: float | None = None,
    note: str = "",
) -> None:
    """Write the statistics of class averages in the form of RELION's model file.

    Args:
        path: the .star file to write.
        stack_name: name of the stack of averages in the STAR file, e.g. class_averages.mrcs.
        class_sizes: (k,) number of particles in each class.
        resolution: (k,) in Å, or in pixels if ``pixel_size`` is None (a comment says so).
        pixel_size: Å per pixel of the averages.
        note: a line for the top of the file.
    """
    sizes = np.asarray(class_sizes, np.int64)
    classes = StarTable.of(
        {
            "rlnReferenceImage": _image_names(stack_name, len(sizes)),
            "rlnClassDistribution": (sizes / max(int(sizes.sum()), 1)).round(6),
            "rlnEstimatedResolution": np.asarray(resolution, np.float64).round(6),
            CLASS_SIZE: sizes,
        }
    )
    general: dict[str, float] = {"rlnReferenceDimensionality": 2, "rlnNrClasses": len(sizes)}
    if pixel_size is not None:
        general["rlnPixelSize"] = pixel_size
    blocks: dict[str, Block] = {"model_general": general, "model_classes": classes}
    notes = [note] if note else []
    if pixel_size is None:
        notes.append("the pixel size is not known: rlnEstimatedResolution is in pixels")
    write_star(Path(path), StarTables(blocks, "model_classes", VERSION), tuple(notes))


def _rows(path: Path, keep: Tensor | np.ndarray | Sequence[int], n: int) -> np.ndarray:
    """0-based rows to write."""
    rows = np.asarray(keep)
    if rows.dtype == bool:
        if rows.shape != (n,):
            raise ValueError(f"{path}: keep has shape {rows.shape}, but must have ({n},)")
        return np.flatnonzero(rows)
    if rows.size and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"{path}: keep must hold bools, or rows from 0 to {n - 1}")
    return rows.astype(np.int64)


def _pose_columns(
    tables: StarTables, pose: Pose, pixel_size: float | None
) -> dict[str, np.ndarray]:
    """Columns of the poses in the layout of the table, where all origin columns are replaced."""
    columns = to_relion(pose, pixel_size or 1.0)
    origins = {axis: columns.pop(f"rlnOrigin{axis}Angst") for axis in "XY"}
    for axis, origin in origins.items():
        if tables.optics is not None or f"rlnOrigin{axis}Angst" in tables.table:
            columns[f"rlnOrigin{axis}Angst"] = origin
        if tables.optics is None or f"rlnOrigin{axis}" in tables.table:
            columns[f"rlnOrigin{axis}"] = origin / (pixel_size or 1.0)
    return {label: values.round(6) for label, values in columns.items()}


def _tables_of_plain_stack(path: Path, stack: ParticleStack) -> tuple[StarTables, tuple[str, ...]]:
    """The tables of a stack without a STAR file, and comments on values that are placeholders."""
    comments = ["voltage, spherical aberration and amplitude contrast are placeholders"]
    if stack.pixel_size is None:
        comments.append("the pixel size is not known: 1 A stands for it, so origins are in pixels")
        warnings.warn(f"{path}: {comments[-1]}", stacklevel=3)
    name = _name_for(stack.path, path)
    tables = one_group_tables(name, len(stack), stack.shape[1], stack.pixel_size or 1.0)
    return tables, tuple(comments)


def one_group_tables(stack_name: str, n: int, size: int, pixel_size: float) -> StarTables:
    """Tables of RELION 3.1 for all n particles of one stack, in one optics group.

    Args:
        stack_name: name of the stack in the STAR file.
        n: number of particles.
        size: width of an image in px.
        pixel_size: Å per pixel.
    """
    optics = {"rlnOpticsGroup": 1, "rlnOpticsGroupName": "opticsGroup1", **_PLACEHOLDERS}
    optics |= {"rlnImagePixelSize": pixel_size, "rlnImageSize": size, "rlnImageDimensionality": 2}
    particles = {
        "rlnImageName": _image_names(stack_name, n),
        "rlnOpticsGroup": np.ones(n, np.int64),
    }
    blocks: dict[str, Block] = {
        "optics": StarTable.of({label: [value] for label, value in optics.items()}),
        "particles": StarTable.of(particles),
    }
    return StarTables(blocks, "particles", VERSION)


def _image_names(stack_name: str, n: int) -> pa.Array:
    """(n,) RELION's names of the images of a stack, from 000001@stack."""
    numbers = pc.utf8_lpad(as_texts(np.arange(1, n + 1)), 6, "0")
    return pc.binary_join_element_wise(numbers, stack_name, "@")


def _name_for(stack: Path, star: Path) -> str:
    """Name of a stack for a STAR file: from their common folder if that works, or absolute."""
    stack, folder = plain(stack), plain(star).parent
    try:
        name = stack.relative_to(os.path.commonpath([stack, folder])).as_posix()
        if resolve(name, star, None, False) == stack:
            return name
    except ValueError:  # no common folder, or not found there
        pass
    return str(stack)
