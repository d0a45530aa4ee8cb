"""Class averages as pictures: one tile for a class, or the montage of all of them."""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from torch import Tensor

BLUE, ORANGE, GREY, INK = "#2b6cb0", "#dd6b20", "#a0aec0", "#1a202c"
"""The colours of all pictures."""
GAP = 0.06
"""Space between two tiles of the montage, in units of a tile's side."""
Numbers = Tensor | np.ndarray | Sequence[float]


def thumbnail(image: Tensor | np.ndarray) -> bytes:
    """One (h, w) image as a PNG of h x w pixels, with the same grey levels as in the montage."""
    pixels = as_array(image)
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
    """Draw all class averages, each with its number, its particles and its resolution.

    Args:
        averages: (k, h, w) images. Each has its own grey levels, from the 1st percentile (black)
            to the 99.8th percentile (white) of the pixels inside the largest disc. A class without
            particles is drawn as an empty frame.
        sizes: (k,) number of particles in each class.
        resolutions: (k,) in Å, or in pixels if ``pixel_size`` is None. NaN or infinity means
            unknown and is drawn as a dash.
        pixel_size: Å per pixel of the averages; adds a scale bar. None draws no bar.
        order: (k,) place of each class; None puts the largest first.
    """
    images, counts, periods = as_array(averages), as_array(sizes), as_array(resolutions)
    if images.ndim != 3 or not len(images) == len(counts) == len(periods) > 0:
        raise ValueError(
            f"montage needs (k, h, w) averages with k sizes and resolutions, k >= 1; got "
            f"{images.shape}, {counts.shape}, {periods.shape}"
        )
    across = min(len(images), 16, max(5, math.ceil(math.sqrt(1.5 * len(images)))))
    inch = 1.25 if len(images) > 24 else 1.7  # the side of a tile, which is 1 on the axes
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
    # This comes last because every imshow changes the limits and the aspect of the axes.
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
    """Draw one average, or an empty frame for None, with its number in the corner."""
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
    """Draw a bar that ends at ``right``: a round length of at most a third of a tile (in Å)."""
    decade = 10.0 ** math.floor(math.log10(tile / 3))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= tile / 3)
    axes.plot([right - length / tile, right], [y, y], color=INK, lw=2.5, solid_capstyle="butt")
    _text(axes, right - length / tile - 0.05, y, f"{length:g} Å", ha="right", size=8)


def grey_range(image: np.ndarray) -> tuple[float, float]:
    """Black and white levels of an (h, w) image that outliers do not change.

    They are the 1st and 99.8th percentiles of the finite pixels inside the largest disc. For an
    image of one value, the levels lie 0.5 below and above that value.
    """
    height, width = image.shape
    y, x = np.ogrid[:height, :width]
    disc = np.hypot(y - height // 2, x - width // 2) < min(height, width) / 2
    values = image[disc & np.isfinite(image)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99.8])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def as_array(values: Numbers) -> np.ndarray:
    """Numbers as a float64 NumPy array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=float)


def _text(axes: Axes, x: float, y: float, text: str, **style: Any) -> Text:
    look: dict[str, Any] = {"size": 8, "color": INK, "va": "center"} | style
    return axes.text(x, y, text, **look)


def _period(period: float, unit: str) -> str:
    return f"{period:.1f} {unit}" if math.isfinite(period) else "–"
