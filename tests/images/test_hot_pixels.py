"""Hot pixels against a loop of the definition, and on images without any."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cryoalign.images.hot_pixels import DEVIATIONS, SPREADS, mend_hot_pixels
from cryoalign.particles.simulate import simulate


def mended(image: np.ndarray) -> np.ndarray:
    """The definition, pixel by pixel, in float64."""
    around = np.pad(image, 1, mode="reflect")
    result, deviation = image.copy(), image.std()
    for y, x in np.ndindex(*image.shape):
        window = np.delete(around[y : y + 3, x : x + 3].ravel(), 4)
        median, low, high = np.median(window), *np.sort(window)[[1, 6]]
        off = abs(image[y, x] - median)
        far = abs(image[y, x] - image.mean()) > (DEVIATIONS - 1) * deviation
        if far and off > DEVIATIONS * deviation and off > SPREADS * (high - low):
            result[y, x] = median
    return result


def noisy(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 24, 25, generator=torch.Generator().manual_seed(seed))


def test_hot_pixels_are_those_of_the_definition() -> None:
    images = noisy(6).double() * 3 + 100
    images[0, 12, 7] += 900  # inside
    images[1, 0, 0] -= 900  # a corner
    images[2, 23, 10] += 150  # a border
    images[3, 5, 5] += 900  # two side by side
    images[3, 5, 6] += 800
    images[4, 9:12, 9:12] += 900  # not a pixel, but a thing
    y, x = torch.meshgrid(torch.arange(24.0) - 12.3, torch.arange(25.0) - 12.4, indexing="ij")
    images[5] += 180 * torch.exp(-(x**2 + y**2) / 2)  # sharp, but not a pixel either
    before = images.clone()
    found, count = mend_hot_pixels(images)
    assert torch.equal(images, before)
    assert count.tolist() == [1, 1, 1, 2, 0, 0]
    expected = np.stack([mended(each) for each in images.numpy()])
    torch.testing.assert_close(found.numpy(), expected, rtol=1e-12, atol=0)
    assert torch.equal(found[4:], images[4:])


@pytest.mark.parametrize("snr", [0.05, 1e6])
def test_particles_have_no_hot_pixels(snr: float) -> None:
    """Noise has none, and the particle itself is not taken for one where there is no noise."""
    images = simulate(n=200, n_classes=4, size=48, snr=snr, seed=2).images
    found, count = mend_hot_pixels(images)
    assert found is images
    assert not count.any()


def test_an_image_is_mended_alone() -> None:
    images = noisy(9)
    images[::2, 3, 4] = 70.0
    whole, count = mend_hot_pixels(images)
    alone, one = mend_hot_pixels(images[4:5])
    assert torch.equal(alone[0], whole[4])
    assert one.tolist() == [1]
    assert count.tolist() == [1, 0] * 4 + [1]
