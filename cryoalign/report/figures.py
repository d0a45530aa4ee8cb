"""Pictures of a run, except the montage of its class averages.

Every function returns a new Matplotlib figure and leaves pyplot's global state alone. Values that
are not known (NaN) are left out.
"""

import itertools
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from cryoalign.report.montage import BLUE, GREY, INK, ORANGE, Numbers, as_array
from cryoalign.runtime.files import replacing

HISTORY = {
    "log_evidence": ("log-evidence", "mean per particle (nats)"),
    "certainty": ("certainty of the class", "mean posterior"),
    "rings": ("resolution used", "Fourier rings"),
    "classes": ("classes", "number of classes"),
    "mean_score": ("mean score", "correlation coefficient"),
    "reassigned": ("particles that changed class", "share of the particles"),
    "pose_change_px": ("median change of the pose", "pixels"),
    "empty_classes": ("empty classes", "number of classes"),
    "stable_share": ("stable particles", "share of the generation"),
    "accounted_share": ("particles in accepted classes", "share of all particles"),
}
"""Columns of ``Alignment.history`` that are drawn, each with a title and the label of its axis."""
SHARES = ("certainty", "reassigned", "stable_share", "accounted_share")
COUNTS = ("classes", "empty_classes")
TINTS = ("#e2e8f0", "#feebc8", "#c6f6d5", "#e9d8fd")
"""Background colours of the steps of a run."""
SCATTERED = 20_000
"""A scatter plot shows at most about this many points; more take seconds and show nothing new."""
ABOVE: dict[str, Any] = {
    "loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "fontsize": 8, "frameon": False
}  # fmt: skip
"""Legends stand above the axes, where they cover no data."""


def save(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure to a file whose suffix gives the format: png, pdf or svg.

    If writing fails, no incomplete file is left.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor="white")
    return Path(path)


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=dpi, facecolor="white")
    return png.getvalue()


def pose_histograms(
    frame: pd.DataFrame, max_shift: float | None = None, n_classes: int = 0
) -> Figure:
    """Draw histograms of the shifts and angles of the particles, and the sizes of the classes.

    Args:
        frame: ``Alignment.to_frame()``; particles that were set aside (class 0) are left out.
        max_shift: largest shift of the search in px, drawn as dashed lines; None draws none.
        n_classes: number of classes, including empty ones.
    """
    used = frame[frame["class_number"] > 0]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, panel in zip("xy", axes[0], strict=True):
        _shift_histogram(panel, used[f"shift_{axis}"].to_numpy(float), axis, max_shift)
    mirrored = used["mirror"].to_numpy(float) == 1
    angle = np.mod(used["angle"].to_numpy(float), 360)
    share = mirrored.mean() if len(used) else 0.0
    groups = [angle[~mirrored], angle[mirrored]]
    names = [f"as picked ({1 - share:.0%})", f"mirrored ({share:.0%})"]
    axes[1, 0].hist(groups, range(0, 361, 10), stacked=True, color=[BLUE, ORANGE], label=names)
    axes[1, 0].set(xlabel="angle (degrees)", xlim=(0, 360), xticks=range(0, 361, 60))
    if share > 0:
        axes[1, 0].legend(**ABOVE)
    sizes = np.bincount(used["class_number"].to_numpy(int), minlength=n_classes + 1)[1:]
    _size_bars(axes[1, 1], sizes)
    for panel in axes.flat:
        panel.set_ylabel("particles")
        panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_ylim(0, max(1.0, 1.05 * panel.dataLim.y1))
        _tidy(panel)
    aside = len(frame) - len(used)
    note = f", {aside:,} set aside" if aside else ""
    figure.suptitle(f"{len(used):,} particles{note}", fontsize=11, fontweight="bold")
    return figure


def _shift_histogram(panel: Axes, shift: np.ndarray, axis: str, limit: float | None) -> None:
    widest = max(float(np.abs(shift).max(initial=0)), limit or 0.0, 0.5)
    # The search limit is the edge of a bin, so that each bar is inside or outside of it.
    step = limit / 15 if limit and widest < 4 * limit else widest / 30
    reach = step * (math.ceil(widest / step - 1e-6) + 2)
    panel.hist(shift, np.arange(-reach, reach + step / 2, step).tolist(), color=BLUE)
    if limit is not None:
        for edge in (-limit, limit):
            panel.axvline(edge, color=ORANGE, ls="--", lw=1.2)
        panel.plot([], [], color=ORANGE, ls="--", lw=1.2, label=f"search limit ±{limit:g} px")
        panel.legend(**ABOVE)
    panel.set(xlabel=f"shift in {axis} (px of the input)", xlim=(-reach, reach))


def _size_bars(panel: Axes, sizes: np.ndarray) -> None:
    order = np.argsort(-sizes, kind="stable")
    panel.bar(np.arange(len(sizes)), sizes[order], width=0.85, color=BLUE)
    if 0 < len(sizes) <= 30:
        labels = [str(k + 1) for k in order]
        panel.set_xticks(range(len(sizes)), labels, fontsize=8 if len(sizes) <= 20 else 6)
        panel.set_xlabel("class, largest first")
    else:
        panel.set_xlabel("rank of class, largest first")
    if len(sizes):
        mean = sizes.mean()
        panel.axhline(mean, color=GREY, lw=1.2, zorder=3, label=f"mean {mean:,.0f}")
        panel.legend(**ABOVE)


def quality(frame: pd.DataFrame) -> Figure:
    """Draw the standard deviations of the poses, and the two measures by which junk is found.

    Args:
        frame: ``Alignment.to_frame()`` with the columns of `cryoalign.results.evidence.judge`;
            particles that were set aside are left out.
    """
    used = frame[frame["class_number"] > 0]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    turn, move, junk = figure.subplots(1, 3)
    turn.hist(_finite(used["angle_sd"]), 40, color=BLUE)
    turn.set(xlabel="standard deviation of the angle (degrees)", ylabel="particles")
    both = [_finite(used[f"shift_{axis}_sd"]) for axis in "xy"]
    move.hist(both, 40, histtype="step", color=[BLUE, ORANGE], label=["x", "y"])
    move.set(xlabel="standard deviation of the shift (px)", ylabel="particles")
    move.legend(**ABOVE, reverse=True)
    few = used.iloc[:: max(1, len(used) // SCATTERED)]
    marked = few["junk_score"] > 0
    for those, colour, name in ((~marked, BLUE, "particles"), (marked, ORANGE, "marked as junk")):
        some = few[those]
        label = f"{name} ({those.mean():.1%})"
        junk.plot(some["evidence"], some["oddness"], ".", color=colour, ms=3, label=label)
    junk.set(xlabel="evidence against noise (nats)", ylabel="oddness (standard deviations)")
    junk.legend(**ABOVE)
    for panel in (turn, move, junk):
        _tidy(panel)
    return figure


def _finite(values: pd.Series) -> np.ndarray:
    """The finite values up to their 99th percentile, since outliers would widen a histogram."""
    known = values.to_numpy(float)
    known = known[np.isfinite(known)]
    return known[known <= np.quantile(known, 0.99)] if len(known) else known


def embedding(
    before: np.ndarray,
    after: np.ndarray,
    labels: Numbers,
    purity: tuple[float, float] | None = None,
    *,
    k: int = 10,
) -> Figure:
    """Draw two maps of the particles, before and after alignment, coloured by class.

    The map after alignment is too optimistic: even noise that is aligned to a class average comes
    to resemble that average.

    Args:
        before, after: (n, 2) maps from `embedding.embed`; rows of NaN are left out.
        labels: (n,) class numbers; 0 (set aside) is left out.
        purity: the two maps' values of `embedding.neighbour_purity`; None writes none.
        k: number of neighbours that ``purity`` was computed with.
    """
    label = as_array(labels).astype(int)
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    classes = np.unique(label[label > 0])
    colours = _class_colours(len(classes))
    for i, (panel, place) in enumerate(zip(panels, (before, after), strict=True)):
        shown = (label > 0) & np.isfinite(place).all(1)
        rank = np.searchsorted(classes, label[shown])
        dot = float(np.clip(9000 / max(1, shown.sum()), 2, 25))
        panel.scatter(*place[shown].T, s=dot, c=colours[rank], linewidths=0)
        panel.set(xticks=[], yticks=[], title=("before alignment", "after alignment")[i])
        panel.set_aspect("equal", adjustable="datalim")
        if purity is not None:
            text = f"{purity[i]:.0%} of the {k} nearest neighbours are of the same class"
            panel.set_xlabel(text, fontsize=9)
    if len(classes) <= 20:
        for number, colour in zip(classes, colours, strict=True):
            panels[1].scatter([], [], s=30, color=colour, label=f"{number}", linewidths=0)
        figure.legend(title="class", loc="outside right center", fontsize=8, frameon=False)
    return figure


def _class_colours(count: int) -> np.ndarray:
    """(count, 4) RGBA colours; consecutive classes differ clearly."""
    if count <= 20:
        name = "tab10" if count <= 10 else "tab20"
        return np.asarray(matplotlib.colormaps[name](np.arange(count)))
    # Steps of the golden ratio in hue give consecutive classes different colours.
    return np.asarray(matplotlib.colormaps["hsv"](np.mod(np.arange(count) * 0.618034, 1)))


def frc_curves(frc: Numbers, pixel_size: float | None = None, *, size: int | None = None) -> Figure:
    """Draw the Fourier ring correlation between the half-sets of each class, and the mean curve.

    Args:
        frc: (k, shells) correlations; shell i is the frequency i / size. Classes that are empty,
            or too small to split into half-sets, are left out.
        pixel_size: Å per pixel of the averages; None draws frequencies in 1/px.
        size: box in pixels; None stands for 2 (shells - 1), which is right for even boxes.
    """
    curves = as_array(frc)
    box = (size or 2 * (curves.shape[1] - 1)) * (pixel_size or 1.0)
    frequency = np.arange(curves.shape[1]) / box
    curves = curves[np.isfinite(curves).all(1) & (np.abs(curves[:, 1:]) > 0).any(1)]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    few = len(curves) <= 10
    axes.plot(frequency, curves.T, color=BLUE, lw=1.0, alpha=0.6 if few else 0.25)
    if len(curves):
        axes.plot(frequency, curves.mean(0), color=INK, lw=2, label="mean of classes")
    for threshold, style in ((0.5, ":"), (0.143, "--")):
        axes.axhline(threshold, color=ORANGE, ls=style, lw=1.2, label=f"FRC = {threshold:g}")
    lowest = min(0.0, float(curves.min())) if len(curves) else 0.0
    axes.set(xlim=(0, frequency[-1]), ylim=(max(-0.5, lowest) - 0.02, 1.02))
    unit = "Å" if pixel_size else "px"
    axes.set(xlabel=f"spatial frequency (1/{unit})", ylabel="half-set FRC")
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_formatter(FuncFormatter(lambda f, _: f"{1 / f:.3g}" if f > 1e-9 else "∞"))
    top.set_xlabel(f"resolution ({unit})")
    top.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)
    return figure


def history(table: pd.DataFrame, box_length: float | None = None) -> Figure:
    """Draw how a run converged: one panel for each column of `HISTORY` that the table has.

    If the table has a column ``step``, the background colour shows the step of each iteration.

    Args:
        table: ``Alignment.history``, one row per ``iteration``.
        box_length: side of the particles' box in Å, which converts ``rings`` (Fourier pixels) to
            a resolution in Å. None draws the number of rings.
    """
    present = [name for name in HISTORY if name in table]
    if not present:
        raise ValueError(
            f"history has no column that can be drawn: it has {list(table)}, and the picture shows "
            f"{list(HISTORY)}"
        )
    across = 2 if len(present) == 4 else min(3, len(present))
    down = math.ceil(len(present) / across)
    figure = Figure(figsize=(3.3 * across if across > 2 else 4.6 * across, 2.7 * down + 0.3))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(present) :]:
        figure.delaxes(panel)
    for panel, name in zip(panels, present, strict=False):
        values, (title, unit) = table[name].to_numpy(float), HISTORY[name]
        if name == "rings" and box_length is not None:
            values, unit = box_length / values, "Å"
        panel.plot(table["iteration"], values, "o-", color=BLUE, ms=3.5, lw=1.5)
        panel.set(xlabel="iteration", ylabel=unit)
        panel.set_title(title, fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        panel.set_xlim(table["iteration"].min() - 0.5, table["iteration"].max() + 0.5)
        _scale_history(panel, name, values)
        _tidy(panel)
    if "step" in table:
        _mark_steps(figure, table)
    return figure


def _scale_history(panel: Axes, name: str, values: np.ndarray) -> None:
    """Choose the limits and the ticks of the y axis."""
    if name == "pose_change_px" and (values > 0).any():
        panel.set_yscale("log")  # from tens of pixels in the first iteration to hundredths
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    elif name in SHARES or name in COUNTS:
        top = float(np.nanmax(values, initial=0)) or 1.0
        panel.set_ylim(-0.04 * top, 1.08 * top)  # markers at 0 stay whole
    if name in SHARES:
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if name in COUNTS:
        panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _mark_steps(figure: Figure, table: pd.DataFrame) -> None:
    """Colour the background of every panel by the step of each iteration, with a legend."""
    steps = [f"step {each}" if isinstance(each, int) else str(each) for each in table["step"]]
    tint = dict(zip(dict.fromkeys(steps), itertools.cycle(TINTS), strict=False))
    for panel in figure.axes:
        for iteration, step in zip(table["iteration"], steps, strict=True):
            panel.axvspan(iteration - 0.5, iteration + 0.5, color=tint[step], lw=0, zorder=0)
    patches = [Patch(color=colour, label=step) for step, colour in tint.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=8, fontsize=8, frameon=False)


def _tidy(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
