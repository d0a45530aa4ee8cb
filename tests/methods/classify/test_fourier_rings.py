import pytest
import torch

from cryoalign.images.fourier import fourier_resize
from cryoalign.images.geometry import transform
from cryoalign.images.masks import soft_mask
from cryoalign.methods.classify.fourier_rings import (
    FourierRings,
    angular_spectrum,
    half_circle,
    half_circle_of,
    move_features,
    ring_features,
)
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose

NOWHERE = torch.zeros(1, 2)


def views(size: int, last: int) -> tuple[torch.Tensor, FourierRings]:
    """Three views without anything beyond the rings, and the rings."""
    made = simulate(n=1, n_classes=3, size=size, snr=1.0, max_shift=2.0, seed=1).views
    k = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]) * size
    spectra = torch.fft.rfft2(made) * torch.exp(-((k / (0.55 * last)) ** 4))
    return torch.fft.irfft2(spectra, s=(size, size)), FourierRings(size, last, 0.46 * size)


def product(x: torch.Tensor, y: torch.Tensor, rings: FourierRings) -> torch.Tensor:
    """(n, a) inner products of particles (n, r, m), turned, with classes (n, r, m)."""
    return torch.fft.irfft((x.conj() * y).sum(-2), n=rings.n_angles)


@pytest.mark.parametrize("size", [64, 51])
def test_products_are_those_of_images(size: int) -> None:
    images, rings = views(size, 16)
    images = images - images.mean((1, 2), keepdim=True)  # ring 0 is left out
    x = ring_features(half_circle(images, rings), NOWHERE, rings)[:, 0]
    other = x.roll(1, 0)
    exact = (images * images.roll(1, 0)).sum((1, 2))
    scale = images.square().sum((1, 2)).max()
    torch.testing.assert_close(product(x, other, rings)[:, 0] / scale, exact / scale,
                               atol=5e-3, rtol=0)  # fmt: skip


def test_a_cropped_box_gives_the_same_half_circles() -> None:
    images, rings = views(64, 12)
    whole = half_circle(images, rings)
    cropped = half_circle(fourier_resize(images, 40), rings)
    assert (whole - cropped).abs().max() < 5e-3 * whole.abs().max()


def test_features_have_the_band_they_claim() -> None:
    images, rings = views(64, 16)
    masked = images * soft_mask(64, 0.36 * 64)
    wide = FourierRings(64, 16, 60.0)  # a radius that would allow for much more
    full = ring_features(half_circle(masked, wide), NOWHERE, wide)[:, 0].abs().square().sum((1, 2))
    band = (
        ring_features(half_circle(masked, rings), NOWHERE, rings)[:, 0].abs().square().sum((1, 2))
    )
    torch.testing.assert_close(band / rings.n_angles, full / wide.n_angles, rtol=2e-3, atol=0)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_moved_particle_is_found_where_it_was_put(mirror: bool) -> None:
    images, rings = views(64, 16)
    angle = 360.0 / rings.n_angles * 9
    pose = Pose(
        torch.full((3,), angle),
        torch.tensor([[1.5, -2.0]]).expand(3, 2),
        torch.tensor([mirror] * 3),
    )
    particles = transform(images, pose.inverse())
    shifts = torch.tensor([[0.0, 0.0], [1.5, -2.0]])
    x = ring_features(half_circle(particles, rings), shifts, rings)
    y = ring_features(half_circle(images, rings), NOWHERE, rings)[:, 0]
    sign = 1 - 2 * (torch.arange(rings.n_frequencies) % 2)
    table = torch.stack(
        [
            product(x[:, 1], y, rings),
            torch.fft.irfft((sign * x[:, 1].conj() * y.conj()).sum(-2), n=rings.n_angles),
        ],
        1,
    )  # fmt: skip  (n, hand, a)
    place = table.flatten(1).argmax(1)
    assert (place == mirror * rings.n_angles + 9).all()
    assert (table.flatten(1).amax(1) > product(x[:, 0], y, rings).amax(1)).all()
    moved = move_features(x[:, 0], torch.deg2rad(pose.angle), pose.shift, pose.mirror, rings)
    assert (moved - y).abs().square().sum() < 0.02 * y.abs().square().sum()


def test_half_circles_and_features_are_one() -> None:
    images, rings = views(64, 10)
    x = ring_features(half_circle(images, rings), NOWHERE, rings)[:, 0]
    torch.testing.assert_close(angular_spectrum(half_circle_of(x, rings), rings), x,
                               atol=1e-4 * float(x.abs().max()), rtol=0)  # fmt: skip


def test_rings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at most 16"):
        FourierRings(32, 17, 10.0)
