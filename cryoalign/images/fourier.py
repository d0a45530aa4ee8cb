"""Images in Fourier space: which components there are, sums over shells, resizing, radial filters.

Spectra are those of ``torch.fft.rfft2``: (..., size, size // 2 + 1). A *shell* is a ring of
components whose frequency rounds to the same whole number of 1/box.
"""

import math

import torch
from torch import Tensor
from torch_fourier_rescale import fourier_rescale_rfft_2d

from cryoalign.images.geometry import radius_grid


def frequency_grid(size: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """kx (1, size // 2 + 1) and ky (size, 1) of rfft2's components, cycles per pixel."""
    kx = torch.fft.rfftfreq(size, device=device)
    ky = torch.fft.fftfreq(size, device=device)
    return kx[None, :], ky[:, None]


def rfft_weights(size: int, like: Tensor) -> Tensor:
    """(size // 2 + 1,) how many components of the full transform each of rfft's stands for.

    That is 2, a component and its conjugate, except for frequency 0 and the Nyquist frequency of
    an even size, which are their own conjugates: 1.

    Args:
        size: number of real samples.
        like: gives dtype and device.
    """
    weights = torch.full((size // 2 + 1,), 2.0, dtype=like.dtype, device=like.device)
    weights[:1].fill_(1.0)  # a GPU would wait for an assigned number
    if size % 2 == 0:
        weights[-1:].fill_(1.0)
    return weights


def shell_index(size: int, device: torch.device | str | None = None) -> Tensor:
    """(size, size // 2 + 1) int64: the shell of each of rfft2's components."""
    kx, ky = frequency_grid(size, device)
    return (torch.hypot(kx, ky) * size).round().long()


def shell_count(size: int) -> int:
    """How many shells `shell_index` has, from 0 to the corner of the transform."""
    return round(math.hypot(size // 2, size // 2)) + 1


def shell_sums(values: Tensor, shell: Tensor, count: int) -> Tensor:
    """Sums of values over shells, in the order in which the components are stored.

    Args:
        values: (..., *grid); for sums over the full transform, already times `rfft_weights`.
        shell: (*grid) int64 the shell of each component. Those past the last shell, count - 1,
            are counted there.
        count: how many shells.

    Returns:
        (..., count).
    """
    values = values.flatten(values.ndim - shell.ndim)
    index = shell.flatten().clamp(max=count - 1)
    return values.new_zeros(*values.shape[:-1], count).index_add_(-1, index, values)


def radial_mean(image: Tensor) -> Tensor:
    """(size // 2 + 1,) mean of an image (size, size) at whole distances from its centre."""
    size = _square(image)
    count = size // 2 + 2  # the last is for what lies beyond
    distance = radius_grid(size, image.device).round().long()
    pixels = shell_sums(torch.ones_like(image), distance, count)
    return (shell_sums(image, distance, count) / pixels.clamp(min=1))[:-1]


def crop_spectrum(spectrum: Tensor, size: int, factor: Tensor) -> Tensor:
    """The frequencies that a smaller box has, times a factor; the Nyquist frequency is zero.

    Args:
        spectrum: (..., old, old // 2 + 1), rfft2's.
        size: new box in pixels, smaller than the old.
        factor: (..., old, at least (size + 1) // 2) of the components.

    Returns:
        (..., size, size // 2 + 1).
    """
    keep = (size - 1) // 2  # frequencies -keep ... keep
    cropped = spectrum.new_zeros(*spectrum.shape[:-2], size, size // 2 + 1)
    columns = slice(0, keep + 1)
    for rows in (slice(0, keep + 1), slice(-keep, None))[: 1 + bool(keep)]:
        cropped[..., rows, columns] = spectrum[..., rows, columns] * factor[..., rows, columns]
    return cropped


def fourier_shrink(images: Tensor, size: int) -> Tensor:
    """Images (..., h, w), square, in a smaller box: (..., size, size); the centre stays the centre.

    As `fourier_resize`, but the Nyquist frequency of an even size is left out, and it takes two
    transforms and nothing else: the moves to and from pixel 0 are phases.
    """
    old = images.shape[-1]
    if size == old:
        return images
    kx, ky = (frequency * old for frequency in frequency_grid(old, images.device))
    kx = kx[:, : (size + 1) // 2]
    # The centre goes to pixel 0 and from there to the new one's.
    centre = old // 2 / old - size // 2 / size
    move = torch.polar(torch.ones_like(kx + ky), 2 * math.pi * centre * (kx + ky))
    spectrum = torch.fft.rfft2(images)
    cropped = crop_spectrum(spectrum, size, (move * (size / old) ** 2).to(spectrum.dtype))
    return torch.fft.irfft2(cropped, s=(size, size))


def fourier_resize(images: Tensor, size: int) -> Tensor:
    """Images cropped or padded in Fourier space to a new box: values keep their scale.

    The centre stays the centre (pixel size // 2), odd or even.

    Args:
        images: (..., h, w), square.
        size: new box in pixels.

    Returns:
        (..., size, size).
    """
    old = _square(images)
    if size == old:
        return images
    # The library's image-level call moves the centre of odd boxes; its transform-level one is
    # exact, so the shifts are made here.
    spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)), norm="forward")
    spectrum = fourier_rescale_rfft_2d(
        torch.fft.fftshift(spectrum, dim=-2), (old, old), (size, size)
    )
    spectrum = torch.fft.ifftshift(spectrum, dim=-2)
    resized = torch.fft.irfft2(spectrum, s=(size, size), norm="forward")
    return torch.fft.fftshift(resized, dim=(-2, -1))


def filter_shells(images: Tensor, curves: Tensor) -> Tensor:
    """Images multiplied in Fourier space by radial curves.

    Args:
        images: (n, size, size).
        curves: (n, shells) or (shells,), the factor at 0, 1, 2 … 1/box, linear between and
            constant past the last.

    Returns:
        (n, size, size).
    """
    size = _square(images)
    last = curves.shape[-1] - 1
    kx, ky = frequency_grid(size, images.device)
    radius = (torch.hypot(kx, ky) * size).clamp(max=last)
    low = radius.floor().clamp(max=max(last - 1, 0)).long()
    part = radius - low
    factor = curves[..., low] * (1 - part) + curves[..., (low + 1).clamp(max=last)] * part
    return torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=(size, size))


def low_pass_curve(size: int, cutoff: float, width: float = 2.0) -> Tensor:
    """(size // 2 + 1,) factors of `filter_shells`: one, then a cosine fall, then zero.

    Args:
        size: box, pixels.
        cutoff: frequency in the middle of the fall, 1/px.
        width: of the fall, shells.
    """
    beyond = (torch.arange(size // 2 + 1) - cutoff * size) / width
    return 0.5 + 0.5 * torch.cos(math.pi * (beyond + 0.5).clamp(0, 1))


def _square(images: Tensor) -> int:
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"images must be square, got {tuple(images.shape[-2:])}: crop or pad them to a square"
        )
    return images.shape[-1]
