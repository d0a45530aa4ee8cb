"""Masks, normalisation, resizing and radial filters, judged by formulas and numpy loops."""

import numpy as np
import pytest
import torch

from cryoalign.images.fourier import (
    filter_shells,
    fourier_resize,
    frequency_grid,
    low_pass_curve,
    rfft_weights,
    shell_count,
    shell_index,
    shell_sums,
)
from cryoalign.images.masks import normalise, soft_mask

SEED = 21


def wave_field(size: int, scale: float = 1.0) -> np.ndarray:
    """A band-limited, asymmetric image by its formula, at pixels of ``scale`` about the centre."""
    y, x = (np.mgrid[:size, :size] - size // 2) * scale
    waves = [(0.7, 2, 1, 0.3), (1.1, -3, 2, 1.1), (0.4, 1, -4, 2.0), (0.6, 4, 3, -0.5)]
    field = np.full((size, size), 0.25)
    for height, kx, ky, phase in waves:
        # Whole periods over a box of 1.
        field = field + height * np.cos(2 * np.pi * (kx * x + ky * y) + phase)
    return field


@pytest.mark.parametrize("old", [32, 33])
@pytest.mark.parametrize("new", [16, 17, 22, 23, 32, 33, 48, 49])
def test_fourier_resize_samples_the_same_picture(old: int, new: int):
    image = torch.from_numpy(wave_field(old, 1 / old))
    found = fourier_resize(image.expand(2, 1, -1, -1), new)
    assert found.shape == (2, 1, new, new)
    # Float64 in, and exact: the picture's highest frequency, 4 per box, is below both Nyquists.
    expected = wave_field(new, 1 / new)
    np.testing.assert_allclose(found[1, 0].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [(32, 16), (33, 15), (33, 16), (32, 15)])
def test_fourier_resize_keeps_a_blob_on_the_centre(old: int, new: int):
    y, x = np.mgrid[:old, :old] - old // 2
    blob = np.exp(-(x**2 + y**2) / (2 * 3.0**2))
    small = fourier_resize(torch.from_numpy(blob), new).numpy()
    y, x = np.mgrid[:new, :new] - new // 2
    scale = old / new
    # A Gaussian of 3 px is band-limited to a thousandth in the smaller box.
    expected = np.exp(-((x * scale) ** 2 + (y * scale) ** 2) / (2 * 3.0**2))
    np.testing.assert_allclose(small, expected, atol=2e-3)


def test_only_squares_are_resized():
    with pytest.raises(ValueError, match=r"square, got \(8, 9\)"):
        fourier_resize(torch.zeros(1, 8, 9), 4)


@pytest.mark.parametrize("size", [24, 25])
def test_soft_mask(size: int):
    y, x = np.mgrid[:size, :size] - size // 2
    radius = np.hypot(x, y)
    fall = np.clip((radius - 6.0) / 3.0, 0, 1)
    expected = 0.5 * (1 + np.cos(np.pi * fall))
    np.testing.assert_allclose(soft_mask(size, 6, 3).numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(soft_mask(size, 6, 0).numpy(), radius <= 6)


@pytest.mark.parametrize("subtract", ["ramp", "constant", "none"])
@pytest.mark.parametrize("size", [32, 33])
def test_normalise_is_the_least_squares_fit(size: int, subtract: str):
    rng = np.random.default_rng(SEED)
    radius = 12.0
    y, x = np.mgrid[:size, :size] - size // 2
    outside = np.hypot(x, y) > radius
    images = rng.normal(7, 3, (3, size, size)) + 20 * ~outside + 0.4 * x - 0.3 * y
    found = normalise(torch.from_numpy(images), radius, subtract).numpy()
    columns = {"ramp": [x**0, x, y], "constant": [x**0], "none": []}[subtract]
    for i in range(3):
        fitted = np.zeros((size, size))
        if columns:
            basis = np.stack([each[outside] for each in columns], 1)
            of_plane, *_ = np.linalg.lstsq(basis, images[i][outside])
            fitted = sum(c * each for c, each in zip(of_plane, columns, strict=True))
        left = images[i] - fitted
        np.testing.assert_allclose(found[i], left / left[outside].std(ddof=1), atol=1e-10)


def test_a_ramp_leaves_nothing_behind():
    """The same image with any plane added is the same after it."""
    rng = np.random.default_rng(SEED)
    y, x = np.mgrid[:24, :24] - 12
    noise = torch.from_numpy(rng.normal(size=(2, 24, 24)))
    plane = torch.from_numpy(100 + 3.0 * x - 7.0 * y)
    for radius in (10.0, 12.0, 13.5):
        expected = normalise(noise, radius)
        torch.testing.assert_close(normalise(noise + plane, radius), expected, atol=1e-10, rtol=0)


def test_results_do_not_depend_on_the_number_of_images():
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(67, 40, 40, generator=generator)
    whole = normalise(images, 20.0)
    for part in (slice(0, 1), slice(1, 30), slice(64, 67)):
        assert torch.equal(normalise(images[part], 20.0), whole[part])


def test_normalise_without_noise_and_without_anything():
    size, radius = 32, 12.0
    y, x = np.mgrid[:size, :size] - size // 2
    disc = 5.0 + 2.0 * (np.hypot(x, y) <= 8)
    clean, empty = torch.from_numpy(disc), torch.full((size, size), 5.0, dtype=torch.float64)
    plane = torch.from_numpy(1e4 + 30.0 * x + y)
    found = normalise(torch.stack([clean, empty, plane]), radius)
    # No noise to scale to: background 0 and deviation 1 over all.
    np.testing.assert_allclose(found[0].numpy(), (disc - 5) / disc.std(ddof=1), atol=1e-10)
    assert torch.equal(found[1], torch.zeros(size, size, dtype=torch.float64))
    assert float(found[2].abs().max()) < 1e-10
    with pytest.raises(ValueError, match="radius of 23 px leaves no background in a box of 32"):
        normalise(clean[None], 23.0)


def test_normalise_far_from_zero_in_single_precision():
    """A large offset, as raw micrographs have it, is no obstacle."""
    rng = np.random.default_rng(SEED)
    noise = torch.from_numpy(rng.normal(size=(1, 64, 64))).float()
    shifted = normalise(noise + 3000, 28.0)
    np.testing.assert_allclose(shifted.numpy(), normalise(noise, 28.0).numpy(), atol=2e-3)


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("shells", [9, 5, 1])
def test_filter_shells_is_the_loop(size: int, shells: int):
    rng = np.random.default_rng(SEED)
    images, curves = rng.normal(size=(2, size, size)), rng.uniform(0, 2, (2, shells))
    found = filter_shells(torch.from_numpy(images), torch.from_numpy(curves)).numpy()
    for n in range(2):
        spectrum = np.fft.fft2(images[n])
        for i, ky in enumerate(np.fft.fftfreq(size)):
            for j, kx in enumerate(np.fft.fftfreq(size)):
                shell = np.hypot(kx, ky) * size
                spectrum[i, j] *= np.interp(shell, np.arange(shells), curves[n])
        # The library's frequencies are single precision: a shell number is good to 1e-6.
        np.testing.assert_allclose(found[n], np.fft.ifft2(spectrum).real, atol=1e-5)
    shared = filter_shells(torch.from_numpy(images), torch.from_numpy(curves[0]))
    np.testing.assert_allclose(shared[0].numpy(), found[0], atol=1e-12)


def test_frequency_grid_is_rfft2s():
    size = 12
    kx, ky = frequency_grid(size)
    y, x = np.mgrid[:size, :size]
    wave = np.cos(2 * np.pi * (3 * x - 2 * y) / size)
    row, column = np.argwhere(np.abs(np.fft.rfft2(wave)) > 1)[0]
    assert (float(kx[0, column]), float(ky[row, 0])) == pytest.approx((3 / size, -2 / size))


def test_low_pass_curve_falls_about_the_cutoff():
    curve = low_pass_curve(64, 0.1, width=4.0).numpy()
    shells = np.arange(33)
    expected = 0.5 + 0.5 * np.cos(np.pi * np.clip((shells - 6.4) / 4 + 0.5, 0, 1))
    np.testing.assert_allclose(curve, expected, atol=1e-6)
    assert curve[4] == 1
    assert curve[9] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [16, 17])
def test_shell_sums_of_weighted_power_are_those_of_the_full_transform(size: int):
    image = np.random.default_rng(SEED).normal(size=(size, size))
    k = np.fft.fftfreq(size) * size
    ring = np.rint(np.hypot(k[:, None], k[None])).astype(int)
    expected = np.bincount(ring.ravel(), (np.abs(np.fft.fft2(image)) ** 2).ravel())
    power = torch.fft.rfft2(torch.from_numpy(image)).abs().square()
    power, shell = power * rfft_weights(size, power), shell_index(size)
    found = shell_sums(power, shell, shell_count(size))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    few = shell_sums(power.expand(2, -1, -1), shell, 6)[1]  # the last has all that is beyond
    np.testing.assert_allclose(few.numpy(), [*expected[:5], expected[5:].sum()], rtol=1e-12)
