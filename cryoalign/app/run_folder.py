"""The files of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from cryoalign.app.settings import RunConfig, as_mapping, used_mapping
from cryoalign.io.formats import read_images, write_images
from cryoalign.io.relion import write_class_averages_star, write_particles_star
from cryoalign.io.stack import ParticleStack
from cryoalign.methods.isac.isac import StableClasses
from cryoalign.methods.state import MraState
from cryoalign.report import figures as plot
from cryoalign.report.embedding import embed, features, neighbour_purity
from cryoalign.report.page import shift_limit, write_report
from cryoalign.report.pictures import draw, picture
from cryoalign.results.alignment import Alignment
from cryoalign.runtime.files import replacing

CONFIG, CHECKPOINT, HISTORY = "config.yaml", "checkpoint.npz", "history.csv"
STABILITY, REPRODUCIBILITY = "stability.csv", "reproducibility.csv"  # of ISAC
AVERAGES = "class_averages.mrcs"
# Of reference-free alignment only: the average and its FRC after every iteration.
ITERATIONS, ITERATIONS_FRC = "average_iterations.mrcs", "frc_iterations.csv"
RUN_FILES = (
    CONFIG,
    CHECKPOINT,
    HISTORY,
    AVERAGES,
    "class_averages.star",
    "class_averages_unfiltered.mrcs",
    "class_averages.png",
    ITERATIONS,
    ITERATIONS_FRC,
    "particles.star",
    "particles.csv",
    "particles.parquet",
    "classes.csv",
    "rejected.csv",
    STABILITY,
    REPRODUCIBILITY,
    "alignment.npz",
    "histograms.png",
    "frc.png",
    "history.png",
    "quality.png",
    "tsne.png",
    "report.html",
)
"""All that a run writes, and all that ``overwrite`` removes."""
EMBEDDED = 2000
"""Particles in the t-SNE maps, at most."""


def write_results(
    folder: Path,
    config: RunConfig,
    stack: ParticleStack,
    alignment: Alignment,
    numbers: Sequence[tuple[str, str]] = (),
) -> None:
    """Write tables, averages, pictures and the report, each file whole or not at all.

    Args:
        numbers: more headline figures of the report, each with its name.
    """
    _write_tables(folder, stack, alignment)
    write_images(folder / AVERAGES, alignment.filtered_averages(), alignment.pixel_size)
    write_images(
        folder / "class_averages_unfiltered.mrcs", alignment.averages, alignment.pixel_size
    )
    write_class_averages_star(
        folder / "class_averages.star",
        AVERAGES,
        alignment.class_sizes,
        alignment.resolution,
        alignment.pixel_size,
    )
    alignment.save(folder / "alignment.npz")
    limit = shift_limit(alignment, as_mapping(config))
    pictures = draw(alignment, limit, largest_first=config.method != "isac")
    maps = _embedding(config, stack, alignment) if config.embedding else None
    if maps is not None:
        pictures.append(picture("tsne.png", maps))
    for each in pictures:
        with replacing(folder / each.name) as beside:
            beside.write_bytes(each.png)
    write_report(alignment, folder, used_mapping(config), pictures, numbers)


def write_stable_classes(
    folder: Path, config: RunConfig, stack: ParticleStack, found: StableClasses
) -> None:
    """`write_results` of ISAC, and its tables of particles and of matched classes."""
    write_csv(folder / STABILITY, found.to_frame())
    numbers = []
    if config.isac.repeats > 1:
        write_csv(folder / REPRODUCIBILITY, found.matched)
        numbers.append(("reproduced", f"{found.reproduced:.1%}"))
    write_results(folder, config, stack, found.alignment, numbers)


def write_iteration(folder: Path, state: MraState, pixel_size: float | None) -> None:
    """Add an iteration's average and FRC to the stack and the table of all of them."""
    if state.sums is None or state.frc is None:
        return
    averages, curves = state.sums.averages().cpu(), pd.DataFrame()
    before = state.iteration - 1
    if before:
        averages = torch.cat([read_images(folder / ITERATIONS)[:before], averages])
        curves = pd.read_csv(folder / ITERATIONS_FRC)
        curves = curves[curves["iteration"] <= before]
    shells = state.frc[0].cpu().numpy()
    new = pd.DataFrame(
        {
            "iteration": state.iteration,
            "frequency": np.arange(len(shells)) / averages.shape[-1],  # 1/px
            "frc": shells,
        }
    )
    write_images(folder / ITERATIONS, averages, pixel_size)
    write_csv(folder / ITERATIONS_FRC, pd.concat([curves, new], ignore_index=True))


def particle_table(alignment: Alignment) -> pd.DataFrame:
    """``Alignment.to_frame`` with the pose cells of particles set aside (class 0) empty."""
    frame = alignment.to_frame()
    # Int64 has a place for "no value".
    frame["mirror"] = frame["mirror"].astype("Int64").mask(frame["class_number"] == 0)
    return frame


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """A table as CSV, whole or not at all."""
    with replacing(path) as beside:
        table.to_csv(beside, index=False)


def _write_tables(folder: Path, stack: ParticleStack, alignment: Alignment) -> None:
    frame = particle_table(alignment)
    write_csv(folder / "particles.csv", frame)
    with replacing(folder / "particles.parquet") as beside:
        frame.to_parquet(beside, index=False)
    write_csv(folder / "classes.csv", alignment.class_frame())
    write_csv(folder / HISTORY, alignment.history)
    write_csv(folder / "rejected.csv", alignment.rejected)
    write_particles_star(
        folder / "particles.star",
        stack,
        alignment.pose,
        alignment.class_number,
        alignment.class_number > 0,
        alignment.score,
    )


def _embedding(config: RunConfig, stack: ParticleStack, alignment: Alignment) -> Figure | None:
    """t-SNE maps of some of the particles, coloured by class; None for fewer than four."""
    used = (alignment.class_number > 0).nonzero().flatten().numpy()
    if len(used) < 4:
        return None
    chosen = np.random.default_rng(config.seed).choice(
        used, min(EMBEDDED, len(used)), replace=False
    )
    rows = np.sort(chosen)
    radius = config.particle_radius(alignment.averages.shape[-1]) * alignment.scale
    labels = alignment.class_number.numpy()[rows]
    maps = [
        embed(features(stack, aligned, rows=rows, mask_radius=radius), config.seed)
        for aligned in (None, alignment)
    ]
    before, after = (neighbour_purity(places, labels) for places in maps)
    return plot.embedding(maps[0], maps[1], labels, (before, after))
