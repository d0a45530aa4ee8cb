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
EMBEDDED = 1000  # largest number of particles in the t-SNE maps; limits the time


def write_results(
    folder: Path, config: RunConfig, stack: ParticleStack, alignment: Alignment,
    doing: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Write tables, averages, pictures and the report, each file completely or not at all.

    ``doing`` is called with a few words about each part of the work before it starts. Other threads
    draw and compute t-SNE maps while this one writes tables. No two of them use Matplotlib at the
    same time.
    """
    method = config.made()
    limit = method.max_shift(box_of(alignment)) * alignment.scale
    rows = _embedded_rows(config, alignment)
    with ThreadPoolExecutor(3) as beside:
        doing(f"writing tables of {len(stack):,} particles, and drawing pictures")
        drawn = beside.submit(draw, alignment, limit)
        maps = []
        if len(rows):
            doing(f"mapping {len(rows):,} particles by t-SNE")
            maps = [
                beside.submit(_embedded, config, stack, alignment, rows, aligned)
                for aligned in (None, alignment)
            ]
        _write_tables(folder, stack, alignment)
        _write_averages(folder, alignment)
        pictures = drawn.result()
        places = [each.result() for each in maps]
    if places:
        pictures.append(picture("tsne.png", _maps(places, alignment.class_number.numpy()[rows])))
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
        if all(_is_plain(table[column]) for column in table):
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


def _is_plain(column: pd.Series) -> bool:
    """Whether Arrow writes a column as pandas does: numbers, with a fraction if they are floats.

    Arrow writes 1.0 as 1, which would be read as a whole number."""
    types = pd.api.types
    if types.is_float_dtype(column):
        values = column.to_numpy()
        values = values[np.isfinite(values)]
        return bool((values % 1 != 0).any())
    return types.is_integer_dtype(column)


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


def _embedded_rows(config: RunConfig, alignment: Alignment) -> np.ndarray:
    """Rows of the particles in the t-SNE maps; none for fewer than four, or without maps."""
    used = (alignment.class_number > 0).nonzero().flatten().numpy()
    if not config.embedding or len(used) < 4:
        return np.zeros(0, np.int64)
    count = min(EMBEDDED, len(used))
    return np.sort(np.random.default_rng(config.seed).choice(used, count, replace=False))


def _embedded(
    config: RunConfig, stack: ParticleStack, alignment: Alignment, rows: np.ndarray,
    aligned: Alignment | None,
) -> np.ndarray:  # fmt: skip
    """(m, 2) t-SNE map of the particles in ``rows``, moved by their poses if ``aligned``."""
    radius = config.made().radius(box_of(alignment)) * alignment.scale
    return embed(features(stack, aligned, rows=rows, mask_radius=radius), config.seed)


def _maps(places: list[np.ndarray], labels: np.ndarray) -> Figure:
    """The t-SNE maps before and after alignment, coloured by class."""
    before, after = (neighbour_purity(each, labels) for each in places)
    return plot.embedding(places[0], places[1], labels, (before, after))
