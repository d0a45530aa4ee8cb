import numpy as np
import pytest
import torch
from oracle import ring_samples

from cryoalign.images.polar import (
    Rings,
    angular_samples,
    resolved_frequencies,
    ring_spectra,
    to_polar,
)


@pytest.mark.parametrize("size", [17, 18])
def test_spectra_are_the_transform_of_normalised_ring_samples(size: int) -> None:
    rng = np.random.default_rng(size)
    image = rng.normal(size=(size, size)) + 3
    rings = Rings(first_ring=1, last_ring=5, angles=24)
    shifts = torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.25, 0.6]], dtype=torch.float64)
    spectra = ring_spectra(torch.tensor(image)[None], rings, shifts)
    assert spectra.shape == (1, 3, 5, 13)
    radii = [1, 2, 3, 4, 5]
    factor = np.sqrt(np.array(radii) / sum(radii) / 24)[:, None]
    for s, shift in enumerate(shifts.tolist()):
        expected = np.fft.rfft(ring_samples(image, radii, 24, shift)) * factor
        np.testing.assert_allclose(spectra[0, s].numpy(), expected, atol=1e-12)


def test_samples_outside_are_zero_never_the_neighbours() -> None:
    images = torch.stack([torch.zeros(16, 16), torch.full((16, 16), 1e6)])
    polar = to_polar(images, Rings(1, 12), torch.tensor([[6.0, 6.0], [-6.0, -6.0]]))
    assert polar[0].abs().max() == 0


def test_spectra_of_a_constant_image_say_nothing() -> None:
    spectra = ring_spectra(torch.full((1, 32, 32), 0.1), Rings(1, 10))
    assert torch.equal(spectra, torch.zeros_like(spectra))


def test_spectra_ignore_brightness_and_contrast() -> None:
    image = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(0))
    rings = Rings(2, 15)
    torch.testing.assert_close(
        ring_spectra(image * 37 - 5, rings), ring_spectra(image, rings), rtol=1e-4, atol=1e-6
    )


def test_gradients_of_spectra() -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 9, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[0.3, -0.4]], dtype=torch.float64, requires_grad=True)
    rings = Rings(1, 3, angles=8)
    assert torch.autograd.gradcheck(lambda i, s: ring_spectra(i, rings, s), (image, shift))


@pytest.mark.parametrize(
    ("last_ring", "angles"), [(10, 256), (36, 256), (48, 256), (49, 320), (60, 320), (90, 512)]
)
def test_angles_resolve_nearly_a_pixel_on_the_last_ring(last_ring: int, angles: int) -> None:
    assert angular_samples(last_ring) == angles >= 2 * np.pi * last_ring / 1.2


def test_rings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="last_ring"):
        Rings(first_ring=5, last_ring=4)
    with pytest.raises(ValueError, match="even"):
        Rings(angles=33)


def test_resolved_frequencies_are_those_that_a_ring_of_pixels_can_hold() -> None:
    rings = Rings(first_ring=2, last_ring=20, ring_step=6, angles=128)
    kept = resolved_frequencies(rings)
    assert kept.shape == (4, 65)
    for row, radius in zip(kept.tolist(), (2, 8, 14, 20), strict=True):
        # A wave of frequency m on a circle of 2 pi r pixels has 2 pi r / m of them, 2 at least.
        least = [2 * np.pi * radius / m >= 2 for m in range(1, 65)]
        assert row[0]
        assert sum(row[1:]) == min(64, sum(least) + 2)
        assert row == sorted(row, reverse=True)


def test_white_images_have_no_power_beyond_what_rings_carry() -> None:
    images = torch.randn(200, 41, 41, generator=torch.Generator().manual_seed(0))
    rings = Rings(4, 17, angles=128)
    power = ring_spectra(images, rings)[:, 0].abs().square().mean(0)  # (r, m)
    beyond = ~resolved_frequencies(rings)
    # Linear interpolation's tails: some per cent on rings where it matters, hence two to spare.
    assert (power * beyond)[:, :-1].sum() < 0.05 * power.sum()
    below = resolved_frequencies(Rings(3, 16, angles=128))  # a pixel less would lose more
    assert (power * ~below)[:, :-1].sum() > (power * beyond)[:, :-1].sum()
