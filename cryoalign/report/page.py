"""One HTML page per run: the numbers, the pictures, and what deserves a second look.

The page holds everything, pictures included, and asks nothing of the network: it can be mailed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cryoalign.report import figures as plot
from cryoalign.results.alignment import Alignment
from cryoalign.results.quality import effective_classes
from cryoalign.runtime.files import replacing

MAPS = "Particles before and after alignment (t-SNE)"
QUALITY = "How good it is"
CAPTIONS = {
    QUALITY: "Standard deviations of poses by each particle's own noise, given its class. Evidence "
    "is against the particle being noise, by the average of the half-set that it is not in; "
    "oddness says how unlike the others' what is left of it is. Particles with too little of the "
    "one or too much of the other are marked as junk.",
    MAPS: "After: every particle is turned onto its own class's average, which by itself parts the "
    "classes; neighbours of one class are no proof that the classes are right.",
}
CLASS_COLUMNS = (
    ("compactness", "compactness", 3),
    ("pixel_error", "pixel error", 2),
    ("junk_share", "junk", 3),
    ("rank", "rank", 0),
)
"""Columns of ``Alignment.class_quality`` that the page shows: name, heading, digits."""
COLUMN_NOTES = {
    "compactness": "Compactness: the share of a member's variance that all members have in common.",
    "pixel_error": "Pixel error: the mean of the members' between realignments, in pixels of the "
    "shrunk images. Neighbours in the table look alike.",
    "junk_share": "Junk: share of members marked.",
    "rank": "Rank: from good (1) to junk, by compactness and what is no junk.",
}
LISTED = 20
"""Particles set aside that the page lists; ``rejected.csv`` has them all."""


@dataclass(frozen=True)
class Picture:
    """A figure on the page, as a data URI."""

    title: str
    caption: str
    source: str


def write_report(
    alignment: Alignment,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, Figure] | None = None,
    *,
    max_shift: float | None = None,
    shift_key: str = "particle.max_shift",
) -> Path:
    """Write ``report.html`` into ``folder``, made if need be, and return its path.

    Args:
        alignment: what the run found.
        config: its settings, nested as in the YAML file; listed on the page. ``particles`` names
            the input.
        figures: more pictures, by title, to stand after the run's own.
        max_shift: the largest shift that the method tried, pixels of the input.
        shift_key: the setting that allows larger ones.
    """
    config = config or {}
    largest_first = "order" not in alignment.class_quality
    pictures = list(_pictures(alignment, max_shift, figures or {}, largest_first))
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
        classes=_rows(alignment, table),
        largest_first=largest_first,
        more_columns=[name for key, name, _ in CLASS_COLUMNS if key in table],
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
    """``Alignment.class_frame`` with each class's share of the particles used, by size or, where
    the method gives one, in the order in which neighbours look alike."""
    table = alignment.class_frame()
    table["share"] = table["size"] / max(1, table["size"].sum())
    if "order" in table:
        return table.sort_values("order", kind="stable")
    return table.sort_values("size", ascending=False, kind="stable")


def flags(
    alignment: Alignment, max_shift: float | None = None, key: str = "particle.max_shift"
) -> list[str]:
    """What a look at the numbers finds wrong with a run, each with a remedy; empty if nothing.

    Args:
        max_shift: the search's limit on each axis, pixels of the input.
        key: the setting that it comes from.
    """
    table = class_table(alignment)
    found = [_piled_up_shifts(alignment, max_shift, key)] if max_shift else []
    empty = table.loc[table["size"] == 0, "class_number"]
    if len(empty):
        found.append(
            f"{len(empty)} of {len(table)} classes are empty ({_listed(empty)}): ask for fewer "
            f"classes, or start from other references or another seed."
        )
    # Of few classes a fair one is large.
    attracting = table[table["share"] > max(0.4, 1.5 / len(table))]
    for row in attracting.itertuples():
        found.append(
            f"Class {row.class_number} attracts {row.share:.0%} of the particles: look for "
            f"different views in it, and align its particles again with more classes."
        )
    unresolved = table.loc[(table["size"] > 0) & ~np.isfinite(table["resolution"]), "class_number"]
    if len(unresolved):
        found.append(
            f"In {_these(unresolved)} the two halves of the particles do not agree at any "
            f"resolution: too few particles, or noise; leave such classes out of a selection."
        )
    found += _junk(alignment, table)
    history = alignment.history
    # In a first and only iteration every particle changes from no class to one.
    share = history["reassigned"].iloc[-1] if "reassigned" in history and len(history) > 1 else 0
    if share > 0.05:
        found.append(
            f"{share:.0%} of the particles still changed class in the last iteration: allow more "
            f"iterations."
        )
    return [flag for flag in found if flag]


def _junk(alignment: Alignment, table: pd.DataFrame) -> Iterator[str]:
    """What is marked as junk, where that was judged."""
    if "junk_share" in table:
        mostly = table.loc[table["junk_share"] > 0.5, "class_number"]
        if len(mostly):
            yield (
                f"Most members of {_these(mostly)} are marked as junk: look at the average, and "
                f"leave such classes out of a selection."
            )
    share = junk_share(alignment)
    if share > 0.2:
        yield (
            f"{share:.0%} of the particles are judged junk: look at the picking, and at the "
            f"contrast (images.invert). quality.junk=set_aside leaves them out."
        )


def junk_share(alignment: Alignment) -> float:
    """Share of junk, marked or set aside, among the particles judged; NaN where none were."""
    if "junk_score" not in alignment.particle_quality:
        return math.nan
    score = alignment.particle_quality["junk_score"].dropna()
    aside = int(alignment.rejected["reason"].str.startswith("junk:").sum())
    return (int((score > 0).sum()) + aside) / max(1, len(score) + aside)


def _piled_up_shifts(alignment: Alignment, limit: float, key: str) -> str | None:
    """A warning where shifts crowd at the search's limit.

    A tenth of uniform shifts lies in the outer tenth of the range; a quarter or more tells of
    particles that belong further out.
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
        f"(±{limit:g} px) or beyond: raise {key}, or centre the particles first."
    )


def _listed(numbers: pd.Series) -> str:
    shown = ", ".join(str(number) for number in sorted(numbers)[:10])
    return shown + (", …" if len(numbers) > 10 else "")


def _these(numbers: pd.Series) -> str:
    return f"class{'es' * (len(numbers) > 1)} {_listed(numbers)}"


def _unit(alignment: Alignment) -> str:
    return "Å" if alignment.pixel_size else "px"


def _numbers(alignment: Alignment, table: pd.DataFrame) -> list[tuple[str, str]]:
    """The page's headline figures."""
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
        more.append(("pose known to (median sd)", f"{turn:.2g}° / {sum(move) / 2:.2g} px"))
    if "reassigned" in alignment.history and len(alignment.history) > 1:
        more.append(("changed class last", _percent(alignment.history["reassigned"].iloc[-1])))
    return [
        ("particles", f"{len(alignment.pose):,}"),
        ("used", f"{used:,}"),
        ("set aside", f"{len(alignment.pose) - used:,}"),
        ("classes with particles", f"{filled:,} of {len(table):,}"),
        ("effective classes", f"{effective_classes(alignment.class_sizes):.1f}"),
        ("resolution, best / median", best),
        ("mean score", _number(score, 3)),
        ("iterations", f"{len(alignment.history):,}"),
        ("averages", f"{size} px{sampling}"),
        *more,
        *((name, _percent(value)) for name, value in alignment.figures.items()),
    ]


def _rows(alignment: Alignment, table: pd.DataFrame) -> list[dict[str, Any]]:
    """The class table's rows as the template wants them."""
    averages = alignment.filtered_averages()
    rows = []
    for row in table.to_dict("records"):
        image = averages[row["class_number"] - 1]
        rows.append(
            {str(name): value for name, value in row.items()}
            | {
                "thumbnail": _data_uri(plot.thumbnail(image)) if row["size"] else "",
                "resolution_text": _number(row["resolution"], 1),
                "score_text": _number(row["mean_score"], 3),
                "more": [
                    (row[key], _number(row[key], digits))
                    for key, _, digits in CLASS_COLUMNS
                    if key in row
                ],
            }
        )
    return rows


def _pictures(
    alignment: Alignment, limit: float | None, more: Mapping[str, Figure], largest_first: bool
) -> Iterator[Picture]:
    frame, averages = alignment.to_frame(), alignment.averages
    montage = plot.montage(
        alignment.filtered_averages(),
        alignment.class_sizes,
        alignment.resolution,
        pixel_size=alignment.pixel_size,
        order=alignment.class_quality.get("order"),
    )
    order = "Largest class first" if largest_first else "Neighbours look alike"
    caption = f"{order}; each weighted by its own Fourier ring correlation."
    yield _picture("Class averages", caption, montage)
    poses = plot.pose_histograms(frame, limit, len(averages))
    caption = (
        "Shifts in pixels of the input. Centring an average moves its members' shifts along, which "
        "may so exceed the search's limit."
    )
    yield _picture("Poses and class sizes", caption, poses)
    curves = plot.frc_curves(alignment.frc, alignment.pixel_size, size=averages.shape[-1])
    yield _picture("Resolution", "Fourier ring correlation of two half-sets, per class.", curves)
    if "junk_score" in frame:
        yield _picture(QUALITY, CAPTIONS[QUALITY], plot.quality(frame))
    if set(plot.HISTORY) & set(alignment.history):
        yield _picture("Convergence", "", plot.history(alignment.history))
    for title, figure in more.items():
        yield _picture(title, CAPTIONS.get(title, ""), figure)


def _picture(title: str, caption: str, figure: Figure) -> Picture:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110, facecolor="white")
    return Picture(title, caption, _data_uri(png.getvalue()))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as (dotted key, value) pairs."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "–" if value is None else str(value)


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
