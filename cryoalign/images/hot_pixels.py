"""Hot pixels: single pixels, of a faulty detector or an X-ray, that no particle can explain."""

import torch
from torch import Tensor

# A hot pixel is so many standard deviations of its image away from the median of its neighbours,
# and so many times the spread of these. White noise reaches 6 deviations in one of 5e8 pixels.
DEVIATIONS, SPREADS = 6.0, 5.0
_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def mend_hot_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Replace hot pixels by the median of their eight neighbours.

    The spread of the neighbours is the range without the lowest and the highest, so that two hot
    pixels side by side are found. At the border, neighbours are mirrored.

    Args:
        images: (n, h, w), at least 2 x 2 pixels.

    Returns:
        The images, themselves if no pixel is hot, and the number of hot pixels in each (n,) int64.
    """
    n, height, width = images.shape
    flat = images.flatten(1)
    from_mean = (flat - flat.mean(1, keepdim=True)).abs()
    deviation = from_mean.square().mean(1).sqrt()
    # The neighbours are looked at only where a pixel is far from the mean, which is rare.
    of, place = (from_mean > (DEVIATIONS - 1) * deviation[:, None]).nonzero().unbind(1)
    y, x = place // width, place % width
    around = torch.stack(
        [images[of, _mirrored(y + dy, height), _mirrored(x + dx, width)] for dy, dx in _AROUND], 1
    )  # (c, 8)
    ordered = around.sort(1).values
    median = (ordered[:, 3] + ordered[:, 4]) / 2
    off = (images[of, y, x] - median).abs()
    hot = (off > DEVIATIONS * deviation[of]) & (off > SPREADS * (ordered[:, 6] - ordered[:, 1]))
    count = torch.zeros(n, dtype=torch.int64, device=images.device)
    count.index_add_(0, of, hot.long())
    if not hot.any():
        return images, count
    images = images.clone()
    images[of[hot], y[hot], x[hot]] = median[hot]
    return images, count


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices one step outside of 0 ... size - 1, brought back to the other side of the border."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
