"""Pictures of a run, as Matplotlib figures that know nothing of pyplot's global state.

Every function returns a new Figure; `save` writes it. What is not known (NaN) is drawn as a dash
or left out, never as a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from cryoalign.runtime.files import replacing

BLUE, ORANGE, GREY, INK = "#2b6cb0", "#dd6b20", "#a0aec0", "#1a202c"
GAP = 0.06
"""Between the montage's tiles, in tiles."""
HISTORY = {
    "mean_score": "mean score",
    "reassigned": "particles that changed class",
    "pose_change_px": "median change of pose (px)",
    "empty_classes": "empty classes",
    "stable_share": "stable, of the generation",
    "accounted_share": "accounted for, of all",
}
"""Columns of ``Alignment.history`` that are drawn, and what to call them."""
SCATTERED = 20_000
"""Points of a scatter plot, about."""
Numbers = Tensor | np.ndarray | Sequence[float]


def save(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure (format by suffix: png, pdf, svg), whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor="white")
    return Path(path)


def thumbnail(image: Tensor | np.ndarray) -> bytes:
    """One (h, w) image as a PNG of its own pixels, with the montage's grey levels."""
    pixels = _array(image)
    low, high = grey_range(pixels)
    png = BytesIO()
    imsave(png, pixels, format="png", cmap="gray", vmin=low, vmax=high)
    return png.getvalue()


def montage(
    averages: Tensor | np.ndarray,
    sizes: Numbers,
    resolutions: Numbers,
    *,
    pixel_size: float | None = None,
    order: Numbers | pd.Series | None = None,
) -> Figure:
    """Class averages, each with its number, size and resolution.

    Args:
        averages: (k, h, w). Grey levels of each run from its 1st to its 99.8th percentile inside
            the largest disc, white being high. Classes of size 0 are empty frames.
        sizes: (k,) particles.
        resolutions: (k,) Å, or pixels without ``pixel_size``; NaN or infinite: unknown.
        pixel_size: Å; draws a scale bar.
        order: (k,) place of each class; None puts the largest first.
    """
    images, counts, periods = _array(averages), _array(sizes), _array(resolutions)
    if images.ndim != 3 or not len(images) == len(counts) == len(periods) > 0:
        raise ValueError(
            f"montage needs (k, h, w) averages with k sizes and resolutions, k >= 1; got "
            f"{images.shape}, {counts.shape}, {periods.shape}"
        )
    across = min(len(images), 16, max(5, math.ceil(math.sqrt(1.5 * len(images)))))
    inch = 1.25 if len(images) > 24 else 1.7  # the side of a tile, the unit of the axes
    caption, header = 0.27 / inch, 0.45 / inch
    width = max(across, 3.4 / inch) + GAP
    height = math.ceil(len(images) / across) * (1 + caption) + header
    figure = Figure(figsize=(width * inch, height * inch))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    unit = "Å" if pixel_size else "px"
    for place, k in enumerate(
        np.argsort(-counts if order is None else np.asarray(order), kind="stable")
    ):
        column, top = place % across, header + place // across * (1 + caption)
        label = f"{counts[k]:,.0f} · {_period(periods[k], unit)}" if counts[k] > 0 else ""
        _tile(axes, column, top, images[k] if label else None, f"{k + 1}")
        below = {"ha": "center", "va": "baseline"}
        _text(axes, column + (1 - GAP) / 2, top + 1 - GAP + 0.6 * caption, label, **below)
    # Only now, as every image sets limits and aspect of its own.
    axes.set(xlim=(-GAP, width - GAP), ylim=(height, 0), aspect="auto")
    title = f"{len(images):,} class{'es' * (len(images) > 1)}, {counts.sum():,.0f} particles"
    shown = axes.annotate(title, (0, header / 2), va="center", weight="bold", size=9, color=INK)
    if width * inch > 5:
        key = "   class number · particles · resolution"
        axes.annotate(key, (1, 0.5), xycoords=shown, va="center", size=8, color=INK)
    if pixel_size:
        _scale_bar(axes, width - 2 * GAP, header / 2, images.shape[2] * pixel_size / (1 - GAP))
    return figure


def _tile(axes: Axes, left: float, top: float, image: np.ndarray | None, number: str) -> None:
    """An average (or the frame of none) with its number in the corner."""
    side = 1 - GAP
    shown = _text(axes, left + 0.04, top + 0.04, number, weight="bold", va="top")
    if image is None:
        frame = Rectangle((left, top), side, side, facecolor="#f1f3f6", edgecolor=GREY)
        axes.add_patch(frame)
        _text(axes, left + side / 2, top + side / 2, "empty", color=GREY, ha="center")
        return
    low, high = grey_range(image)
    box = (left, left + side, top + side, top)
    axes.imshow(image, "gray", vmin=low, vmax=high, extent=box, interpolation="bicubic")
    shown.set(color="white", path_effects=[withStroke(linewidth=2, foreground=INK)])


def _scale_bar(axes: Axes, right: float, y: float, tile: float) -> None:
    """A bar of a round length, about a third of a tile, that ends at ``right``; tile in Å."""
    decade = 10.0 ** math.floor(math.log10(tile / 3))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= tile / 3)
    axes.plot([right - length / tile, right], [y, y], color=INK, lw=2.5, solid_capstyle="butt")
    _text(axes, right - length / tile - 0.05, y, f"{length:g} Å", ha="right", size=8)


def grey_range(image: np.ndarray) -> tuple[float, float]:
    """Robust black and white levels of an image's disc; a little apart where it is flat."""
    height, width = image.shape
    y, x = np.ogrid[:height, :width]
    disc = np.hypot(y - height // 2, x - width // 2) < min(height, width) / 2
    values = image[disc & np.isfinite(image)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99.8])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def pose_histograms(
    frame: pd.DataFrame, max_shift: float | None = None, n_classes: int = 0
) -> Figure:
    """x and y shifts, angles by hand, and class sizes of a run.

    Args:
        frame: ``Alignment.to_frame()``; particles set aside (class 0) are left out.
        max_shift: px, the search's limit, marked by dashed lines.
        n_classes: so that empty classes of the highest numbers count, too.
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
        axes[1, 0].legend(fontsize=8, ncols=2, loc="upper right")
    sizes = np.bincount(used["class_number"].to_numpy(int), minlength=n_classes + 1)[1:]
    _size_bars(axes[1, 1], sizes)
    for panel in axes.flat:
        panel.set_ylabel("particles")
        panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_ylim(0, max(1.0, 1.2 * panel.dataLim.y1))  # room for the legend
        _tidy(panel)
    aside = len(frame) - len(used)
    note = f", {aside:,} set aside" if aside else ""
    figure.suptitle(f"{len(used):,} particles{note}", fontsize=11, fontweight="bold")
    return figure


def _shift_histogram(panel: Axes, shift: np.ndarray, axis: str, limit: float | None) -> None:
    widest = max(float(np.abs(shift).max(initial=0)), limit or 0.0, 0.5)
    # The search limit is a bin's edge, so that no bar stands on both sides of it.
    step = limit / 15 if limit and widest < 4 * limit else widest / 30
    reach = step * (math.ceil(widest / step - 1e-6) + 2)
    panel.hist(shift, np.arange(-reach, reach + step / 2, step).tolist(), color=BLUE)
    if limit is not None:
        for edge in (-limit, limit):
            panel.axvline(edge, color=ORANGE, ls="--", lw=1.2)
        panel.plot([], [], color=ORANGE, ls="--", lw=1.2, label=f"search limit ±{limit:g} px")
        panel.legend(fontsize=8, loc="upper right")
    panel.set(xlabel=f"shift in {axis} (px)", xlim=(-reach, reach))


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
        panel.legend(fontsize=8, loc="upper right")


def quality(frame: pd.DataFrame) -> Figure:
    """Error bars of poses, and the evidence and oddness by which junk is told.

    Args:
        frame: ``Alignment.to_frame()`` with the columns of `quality.judge`; particles set aside
            are left out.
    """
    used = frame[frame["class_number"] > 0]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    turn, move, junk = figure.subplots(1, 3)
    turn.hist(_finite(used["angle_sd"]), 40, color=BLUE)
    turn.set(xlabel="sd of the angle (degrees)", ylabel="particles")
    both = [_finite(used[f"shift_{axis}_sd"]) for axis in "xy"]
    move.hist(both, 40, histtype="step", color=[BLUE, ORANGE], label=["x", "y"])
    move.set(xlabel="sd of the shift (px of the input)", ylabel="particles")
    move.legend(fontsize=8, reverse=True)
    few = used.iloc[:: max(1, len(used) // SCATTERED)]
    marked = few["junk_score"] > 0
    for those, colour, name in ((~marked, BLUE, "particles"), (marked, ORANGE, "marked as junk")):
        some = few[those]
        label = f"{name} ({those.mean():.1%})"
        junk.plot(some["evidence"], some["oddness"], ".", color=colour, ms=3, label=label)
    junk.set(xlabel="evidence over noise (nats)", ylabel="oddness of the residual")
    # Above: the few that are marked lie in the corners.
    junk.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    for panel in (turn, move, junk):
        _tidy(panel)
    return figure


def _finite(values: pd.Series) -> np.ndarray:
    """What is known, without the hundredth that would stretch a histogram."""
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
    """Two maps of the particles, before and after alignment, coloured by class.

    The map after alignment flatters: noise that was turned onto a class average resembles it.

    Args:
        before, after: (n, 2) from `embedding.embed`; rows of NaN are left out.
        labels: (n,) class numbers; 0 (set aside) is left out.
        purity: of the two maps, from `embedding.neighbour_purity` with ``k`` neighbours.
    """
    label = _array(labels).astype(int)
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    classes = np.unique(label[label > 0])
    colours = _class_colours(len(classes))
    for i, (panel, place) in enumerate(zip(panels, (before, after), strict=True)):
        shown = (label > 0) & np.isfinite(place).all(1)
        rank = np.searchsorted(classes, label[shown])
        dot = float(np.clip(9000 / max(1, shown.sum()), 2, 25))
        panel.scatter(*place[shown].T, s=dot, c=colours[rank], linewidths=0)
        panel.set(xticks=[], yticks=[], title=f"{'before' if i == 0 else 'after'} alignment")
        panel.set_aspect("equal", adjustable="datalim")
        if purity is not None:
            text = f"of {k} nearest neighbours, {purity[i]:.0%} share the class"
            panel.set_xlabel(text, fontsize=9)
    if len(classes) <= 20:
        for number, colour in zip(classes, colours, strict=True):
            panels[1].scatter([], [], s=30, color=colour, label=f"{number}", linewidths=0)
        figure.legend(title="class", loc="outside right center", fontsize=8, frameon=False)
    return figure


def _class_colours(count: int) -> np.ndarray:
    """(count, 4) colours that neighbours in number do not share."""
    if count <= 10:
        return np.asarray(matplotlib.colormaps["tab10"](np.arange(count)))
    if count <= 20:
        return np.asarray(matplotlib.colormaps["tab20"](np.arange(count)))
    # Golden-ratio steps round the hues keep consecutive classes apart.
    return np.asarray(matplotlib.colormaps["hsv"](np.mod(np.arange(count) * 0.618034, 1)))


def frc_curves(frc: Numbers, pixel_size: float | None = None, *, size: int | None = None) -> Figure:
    """Half-set Fourier ring correlations of the classes, and their mean.

    Args:
        frc: (k, shells); shell i is the frequency i / size. Classes without a finite, non-zero
            curve (empty, or too small to halve) are left out.
        pixel_size: Å; without it frequencies are per pixel.
        size: box in pixels; default 2 (shells - 1), right for even boxes.
    """
    curves = _array(frc)
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
        axes.axhline(threshold, color=ORANGE, ls=style, lw=1.2, label=f"{threshold:g}")
    lowest = min(0.0, float(curves.min())) if len(curves) else 0.0
    axes.set(xlim=(0, frequency[-1]), ylim=(max(-0.5, lowest) - 0.02, 1.02))
    unit = "Å" if pixel_size else "px"
    axes.set(xlabel=f"spatial frequency (1/{unit})", ylabel="half-set FRC")
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_formatter(FuncFormatter(lambda f, _: f"{1 / f:.3g}" if f > 1e-9 else "∞"))
    top.set_xlabel(f"resolution ({unit})")
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)
    return figure


def history(history: pd.DataFrame) -> Figure:
    """How an alignment came to rest: one panel for each of `HISTORY`'s columns that is there.

    Args:
        history: ``Alignment.history``, a row per ``iteration``.
    """
    present = [name for name in HISTORY if name in history]
    if not present:
        raise ValueError(f"history has none of the columns {list(HISTORY)}: {list(history)}")
    figure = Figure(figsize=(2.9 * len(present) + 0.6, 2.7), layout="constrained")
    panels = figure.subplots(1, len(present), squeeze=False)[0]
    for panel, name in zip(panels, present, strict=True):
        values = history[name].to_numpy(float)
        panel.plot(history["iteration"], values, "o-", color=BLUE, ms=3.5, lw=1.5)
        panel.set(xlabel="iteration")
        panel.set_title(HISTORY[name], fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if name == "pose_change_px" and (values > 0).any():
            panel.set_yscale("log")  # from the first guess, tens of pixels, to hundredths
        elif name != "mean_score":
            panel.set_ylim(0, 1.08 * np.nanmax(values, initial=0) or 1)
        if name == "reassigned":
            panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if name == "empty_classes":
            panel.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _tidy(panel)
    return figure


def _tidy(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _text(axes: Axes, x: float, y: float, text: str, **style: Any) -> Text:
    look: dict[str, Any] = {"size": 8, "color": INK, "va": "center"} | style
    return axes.text(x, y, text, **look)


def _period(period: float, unit: str) -> str:
    return f"{period:.1f} {unit}" if math.isfinite(period) else "–"


def _array(values: Numbers) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=float)
