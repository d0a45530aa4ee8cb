"""The report of a run: one HTML page with the numbers, the pictures and warnings.

The page contains everything, pictures included, and loads nothing from the network, so it can be
sent by mail as one file.
"""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from cryoalign.report.montage import thumbnail
from cryoalign.report.pictures import Picture, draw
from cryoalign.results.alignment import Alignment
from cryoalign.results.quality import effective_classes
from cryoalign.runtime.files import replacing

CLASS_COLUMNS = (
    ("compactness", "compactness", 3),
    ("pixel_error", "pixel error", 2),
    ("junk_share", "junk", 3),
    ("rank", "rank", 0),
)
"""Columns of ``Alignment.class_quality`` on the page: name, heading, digits after the point."""
COLUMN_NOTES = {
    "compactness": "Compactness is the part of a particle's variance that all particles of the "
    "class have in common, from 0 to 1; in a class of low compactness, particles differ or are "
    "noisy.",
    "pixel_error": "Pixel error is the mean difference between repeated alignments of a particle, "
    "in pixels of the averages; a large value means that the poses are not reproducible. "
    "Neighbours in the table look alike.",
    "junk_share": "Junk is the share of the class's particles that are marked as junk.",
    "rank": "Rank sorts the classes from good (1) to bad, by compactness times the share of "
    "particles that are not junk.",
}
LISTED = 20
"""Number of particles set aside that the page lists; ``rejected.csv`` lists all of them."""


def write_report(
    alignment: Alignment,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    pictures: Sequence[Picture] | None = None,
    *,
    max_shift: float | None = None,
    shift_key: str = "particle.max_shift",
) -> Path:
    """Write ``report.html`` into ``folder``, which is made if it is missing; return its path.

    Args:
        alignment: the result of the run.
        folder: where to write the report.
        config: the settings of the run, nested as in the YAML file. The page lists them.
            ``particles`` is the name of the input.
        pictures: the run's pictures, the montage first; None draws them (`pictures.draw`).
        max_shift: the largest shift that the method tried, in pixels of the input.
        shift_key: the setting that allows larger shifts.
    """
    config = config or {}
    if pictures is None:
        pictures = draw(alignment, max_shift)
    table = class_table(alignment)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("cryoalign.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html")
    page = template.render(
        title="Class averages by cryoalign",
        subtitle=str(config.get("particles", "")),
        numbers=_numbers(alignment, table),
        flags=flags(alignment, max_shift, shift_key),
        unit=_unit(alignment),
        montage=pictures[0],
        pictures=pictures[1:],
        data_uri=_data_uri,
        classes=table.to_dict("records"),
        thumbnails=_thumbnails(alignment, table),
        columns=[column for column in CLASS_COLUMNS if column[0] in table],
        number=_number,
        largest_first="order" not in table,
        column_notes=" ".join(note for key, note in COLUMN_NOTES.items() if key in table),
        n_particles=len(alignment.pose),
        n_rejected=len(alignment.rejected),
        rejected=alignment.rejected.head(LISTED).to_dict("records"),
        settings=list(_flat(config)),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    return folder / "report.html"


def class_table(alignment: Alignment) -> pd.DataFrame:
    """``Alignment.class_frame`` with a column ``share``, the class's part of all used particles.

    Rows are sorted by size or, where the method gives an order in which neighbours look alike, by
    that."""
    table = alignment.class_frame()
    table["share"] = table["size"] / max(1, table["size"].sum())
    if "order" in table:
        return table.sort_values("order", kind="stable")
    return table.sort_values("size", ascending=False, kind="stable")


def flags(
    alignment: Alignment, max_shift: float | None = None, key: str = "particle.max_shift"
) -> list[str]:
    """What is wrong with a run, each sentence with a remedy; empty if nothing is.

    Args:
        alignment: the result of the run.
        max_shift: largest shift of the search along each axis in pixels of the input; None skips
            the comparison with it.
        key: name of the setting that ``max_shift`` comes from.
    """
    table = class_table(alignment)
    found = [_piled_up_shifts(alignment, max_shift, key)] if max_shift else []
    empty = table.loc[table["size"] == 0, "class_number"]
    if len(empty):
        found.append(
            f"{len(empty)} of {len(table)} classes are empty ({_listed(empty)}): ask for fewer "
            f"classes, or start from other references or another seed."
        )
    # With few classes, even an equal share is large.
    attracting = table[table["share"] > max(0.4, 1.5 / len(table))]
    for row in attracting.itertuples():
        found.append(
            f"Class {row.class_number} attracts {row.share:.0%} of the particles: check whether "
            f"it mixes different views, and classify its particles again with more classes."
        )
    unresolved = table.loc[(table["size"] > 0) & ~np.isfinite(table["resolution"]), "class_number"]
    if len(unresolved):
        found.append(
            f"In {_these(unresolved)} the two half-sets do not agree at any resolution, because "
            f"of too few particles or too much noise: leave such classes out of a selection."
        )
    found += _junk(alignment, table)
    history = alignment.history
    # In the first iteration every particle gets its first class, which counts as a change.
    share = history["reassigned"].iloc[-1] if "reassigned" in history and len(history) > 1 else 0
    if share > 0.05:
        found.append(
            f"{share:.0%} of the particles still changed class in the last iteration: run more "
            f"iterations."
        )
    return [flag for flag in found if flag]


def _junk(alignment: Alignment, table: pd.DataFrame) -> Iterator[str]:
    """Warnings about classes and particles that are marked as junk."""
    if "junk_share" in table:
        mostly = table.loc[table["junk_share"] > 0.5, "class_number"]
        if len(mostly):
            yield (
                f"Most particles of {_these(mostly)} are marked as junk: look at the average, and "
                f"leave such classes out of a selection."
            )
    share = junk_share(alignment)
    if share > 0.2:
        yield (
            f"{share:.0%} of the particles are marked as junk: check the picking and the "
            f"contrast (images.invert). With quality.junk=set_aside they are left out."
        )


def junk_share(alignment: Alignment) -> float:
    """Share of junk, marked or set aside, among all judged particles; NaN if none was judged."""
    if "junk_score" not in alignment.particle_quality:
        return math.nan
    score = alignment.particle_quality["junk_score"].dropna()
    aside = int(alignment.rejected["reason"].str.startswith("junk:").sum())
    return (int((score > 0).sum()) + aside) / max(1, len(score) + aside)


def _piled_up_shifts(alignment: Alignment, limit: float, key: str) -> str | None:
    """A warning if many shifts are close to the limit of the search.

    Of uniformly distributed shifts, a tenth lies in the outer tenth of the range. More than a
    quarter means that the true shifts of many particles are larger than the limit.
    """
    used = alignment.class_number > 0
    outside = (alignment.pose.shift[used].abs() > 0.9 * limit).double()
    if not len(outside):
        return None
    share = float(outside.mean(0).max())
    if share <= 0.25:
        return None
    return (
        f"{share:.0%} of the shifts along one axis lie in the outer tenth of the search range "
        f"(±{limit:g} px) or beyond it: raise {key}, or centre the particles first."
    )


def _listed(numbers: pd.Series) -> str:
    shown = ", ".join(str(number) for number in sorted(numbers)[:10])
    return shown + (", …" if len(numbers) > 10 else "")


def _these(numbers: pd.Series) -> str:
    return f"class{'es' * (len(numbers) > 1)} {_listed(numbers)}"


def _unit(alignment: Alignment) -> str:
    return "Å" if alignment.pixel_size else "px"


def _numbers(alignment: Alignment, table: pd.DataFrame) -> list[tuple[str, str]]:
    """The headline numbers of the page, each with its name."""
    used = int((alignment.class_number > 0).sum())
    filled = int((table["size"] > 0).sum())
    resolved = table[(table["size"] > 0) & np.isfinite(table["resolution"])]["resolution"]
    unit, size = _unit(alignment), alignment.averages.shape[-1]
    sampling = f", {alignment.pixel_size:.4g} Å/px" if alignment.pixel_size else ""
    best = f"{resolved.min():.1f} / {resolved.median():.1f} {unit}" if len(resolved) else "–"
    score = alignment.score[alignment.class_number > 0].mean().item() if used else math.nan
    more = []
    if "junk_score" in alignment.particle_quality:
        more.append(("marked as junk", _percent(junk_share(alignment))))
    if "angle_sd" in alignment.particle_quality:
        turn, *move = alignment.particle_quality[["angle_sd", "shift_x_sd", "shift_y_sd"]].median()
        more.append(
            ("pose error (median standard deviation)", f"{turn:.2g}° / {sum(move) / 2:.2g} px")
        )
    if "reassigned" in alignment.history and len(alignment.history) > 1:
        more.append(
            (
                "changed class in the last iteration",
                _percent(alignment.history["reassigned"].iloc[-1]),
            )
        )
    return [
        ("particles", f"{len(alignment.pose):,}"),
        ("used", f"{used:,}"),
        ("set aside", f"{len(alignment.pose) - used:,}"),
        ("classes with particles", f"{filled:,} of {len(table):,}"),
        ("effective classes", f"{effective_classes(alignment.class_sizes):.1f}"),
        ("resolution, best / median", best),
        ("mean score", _number(score, 3)),
        ("iterations", f"{len(alignment.history):,}"),
        ("size of the averages", f"{size} px{sampling}"),
        *more,
        *((("CTF", alignment.ctf.removeprefix("CTF: ")),) if alignment.ctf else ()),
        *((name, _percent(value)) for name, value in alignment.figures.items()),
    ]


def _thumbnails(alignment: Alignment, table: pd.DataFrame) -> dict[int, str]:
    """Averages of the classes that have particles, as data URIs by class number."""
    averages = alignment.filtered_averages()
    filled = table.loc[table["size"] > 0, "class_number"].tolist()
    return {number: _data_uri(thumbnail(averages[number - 1])) for number in filled}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs of a dotted name and a value."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "–" if value is None else str(value)


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
