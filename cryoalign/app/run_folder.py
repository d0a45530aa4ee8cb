"""The files of a run folder."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from matplotlib.figure import Figure
from pyarrow import csv

from cryoalign.app.settings import RunConfig, used_mapping
from cryoalign.io.formats import write_images
from cryoalign.io.relion import write_class_averages_star, write_particles_star
from cryoalign.io.stack import ParticleStack
from cryoalign.methods.base import Method
from cryoalign.methods.state import State
from cryoalign.particles.settings import Box
from cryoalign.report import figures as plot
from cryoalign.report.embedding import embed, features, neighbour_purity
from cryoalign.report.page import write_report
from cryoalign.report.pictures import draw, picture
from cryoalign.results.alignment import Alignment
from cryoalign.runtime.files import replacing

CONFIG, CHECKPOINT, HISTORY = "config.yaml", "checkpoint.npz", "history.csv"
AVERAGES = "class_averages.mrcs"
RUN_FILES = (
    *(CONFIG, CHECKPOINT, HISTORY, AVERAGES, "class_averages.star", "class_averages.png"),
    *("class_averages_unfiltered.mrcs", "average_iterations.mrcs", "frc_iterations.csv"),
    *("particles.star", "particles.csv", "particles.parquet", "classes.csv", "rejected.csv"),
    *("stability.csv", "reproducibility.csv", "alignment.npz", "report.html"),
    *("histograms.png", "frc.png", "history.png", "quality.png", "tsne.png"),
)
"""All files that a run writes and that ``overwrite`` removes."""
BATCH = 2**14  # rows of a CSV file that are made into text at a time
EMBEDDED = 2000  # largest number of particles in the t-SNE maps; limits the time


def write_results(
    folder: Path, config: RunConfig, stack: ParticleStack, alignment: Alignment,
    doing: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Write tables, averages, pictures and the report, each file completely or not at all.

    ``doing`` is called with a few words about each part of the work before it starts. A second
    thread, the only one that uses Matplotlib, draws while this one writes tables.
    """
    method = config.made()
    limit = method.max_shift(box_of(alignment)) * alignment.scale
    with ThreadPoolExecutor(1) as artist:
        drawn = artist.submit(draw, alignment, limit)
        doing(f"writing tables of {len(stack):,} particles, and drawing pictures")
        _write_tables(folder, stack, alignment)
        _write_averages(folder, alignment)
        maps = None
        if config.embedding:
            doing(f"mapping particles by t-SNE, at most {EMBEDDED:,} of them")
            maps = _embedding(config, stack, alignment)
        pictures = drawn.result()
    if maps is not None:
        pictures.append(picture("tsne.png", maps))
    for each in pictures:
        with replacing(folder / each.name) as temporary:
            temporary.write_bytes(each.png)
    doing("writing the report")
    write_report(
        alignment, folder, used_mapping(config), pictures, max_shift=limit,
        shift_key=method.shift_key,
    )  # fmt: skip


def _write_averages(folder: Path, alignment: Alignment) -> None:
    write_images(folder / AVERAGES, alignment.filtered_averages(), alignment.pixel_size)
    write_images(
        folder / "class_averages_unfiltered.mrcs", alignment.averages, alignment.pixel_size
    )
    write_class_averages_star(
        folder / "class_averages.star", AVERAGES, alignment.class_sizes, alignment.resolution,
        alignment.pixel_size, alignment.ctf,
    )  # fmt: skip
    alignment.save(folder / "alignment.npz")


def write_step(folder: Path, method: Method, state: State, box: Box) -> None:
    """Write the files of a step: the history, and the further files of the method."""
    stacks, tables = method.step_files(state, box)
    for name, images in stacks.items():
        write_images(folder / name, images, box.pixel_size)
    for name, table in tables.items():
        write_csv(folder / name, table)
    write_csv(folder / HISTORY, pd.DataFrame(state.history))


def particle_table(alignment: Alignment) -> pd.DataFrame:
    """``Alignment.to_frame`` with empty pose cells for particles that are set aside (class 0)."""
    frame = alignment.to_frame()
    # Unlike int64, Int64 has missing values.
    frame["mirror"] = frame["mirror"].astype("Int64").mask(frame["class_number"] == 0)
    return frame


def box_of(alignment: Alignment) -> Box:
    """The box of the prepared images from which an alignment was made."""
    return Box(alignment.averages.shape[-1], alignment.pixel_size)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as a CSV file, completely or not at all; cells that are not known are empty."""
    with replacing(path) as temporary:
        types = pd.api.types
        if all(types.is_numeric_dtype(k) and not types.is_bool_dtype(k) for k in table.dtypes):
            # Only numbers: many times faster than by pandas.
            columns = pa.Table.from_pandas(table, preserve_index=False)
            with temporary.open("wb") as file:
                file.write((",".join(table.columns) + "\n").encode())
                options = csv.WriteOptions(
                    include_header=False, quoting_style="none", batch_size=BATCH
                )
                csv.write_csv(columns, file, options)
        else:
            table.to_csv(temporary, index=False)


def _write_tables(folder: Path, stack: ParticleStack, alignment: Alignment) -> None:
    frame = particle_table(alignment)
    write_csv(folder / "particles.csv", frame)
    with replacing(folder / "particles.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    write_csv(folder / "classes.csv", alignment.class_frame())
    write_csv(folder / HISTORY, alignment.history)
    write_csv(folder / "rejected.csv", alignment.rejected)
    for name, table in alignment.tables.items():
        write_csv(folder / f"{name}.csv", table)
    write_particles_star(
        folder / "particles.star", stack, alignment.pose, alignment.class_number,
        alignment.class_number > 0, alignment.score,
    )  # fmt: skip


def _embedding(config: RunConfig, stack: ParticleStack, alignment: Alignment) -> Figure | None:
    """t-SNE maps of some of the particles, coloured by class; None for fewer than four."""
    used = (alignment.class_number > 0).nonzero().flatten().numpy()
    if len(used) < 4:
        return None
    chosen = np.random.default_rng(config.seed).choice(
        used, min(EMBEDDED, len(used)), replace=False
    )
    rows = np.sort(chosen)
    radius = config.made().radius(box_of(alignment)) * alignment.scale
    labels = alignment.class_number.numpy()[rows]
    maps = [
        embed(features(stack, aligned, rows=rows, mask_radius=radius), config.seed)
        for aligned in (None, alignment)
    ]
    before, after = (neighbour_purity(places, labels) for places in maps)
    return plot.embedding(maps[0], maps[1], labels, (before, after))
