"""Fourier ring correlation, resolution and the Wiener curve, judged by plain numpy."""

import numpy as np
import pytest
import torch

from cryoalign.images.frc import resolution, ring_correlation, wiener_curve

SEED = 5


def hard_rings(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FRC with every Fourier component in the ring nearest to it."""
    size = len(a)
    f, g = np.fft.fft2(a), np.fft.fft2(b)
    k = np.fft.fftfreq(size) * size
    ring = np.rint(np.hypot(k[:, None], k[None])).astype(int)
    out = []
    for i in range(size // 2 + 1):
        q = ring == i
        power = (np.abs(f[q]) ** 2).sum() * (np.abs(g[q]) ** 2).sum()
        out.append((f[q] * g[q].conj()).real.sum() / np.sqrt(power))
    return np.array(out)


def soft_rings(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A component belongs to the rings on either side of it by linear weights; ring 0 is 1."""
    size = len(a)
    f, g = np.fft.fft2(a), np.fft.fft2(b)
    k = np.fft.fftfreq(size) * size
    radius = np.hypot(k[:, None], k[None])
    # The last ring's coordinate runs on beyond Nyquist.
    out = [1.0]
    for i in range(1, size // 2 + 1):
        w = np.clip(1 - np.abs(radius - i), 0, None)
        power = (w * np.abs(f) ** 2).sum() * (w * np.abs(g) ** 2).sum()
        out.append((w * f * g.conj()).real.sum() / np.sqrt(power))
    return np.array(out)


def noisy_pair(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy copies of a picture whose spectrum falls: FRC goes from 1 to 0."""
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    picture = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) * np.exp(-((k / 0.1) ** 2)),
                            s=(size, size)) * 6  # fmt: skip
    return picture + rng.normal(size=(size, size)), picture + rng.normal(size=(size, size))


@pytest.mark.parametrize("size", [48, 49])
def test_frc_against_plain_rings(size: int):
    rng = np.random.default_rng(SEED)
    pairs = [noisy_pair(size, rng) for _ in range(8)]
    a = torch.from_numpy(np.stack([p[0] for p in pairs]))
    b = torch.from_numpy(np.stack([p[1] for p in pairs]))
    found = ring_correlation(a, b).numpy()
    assert found.shape == (8, size // 2 + 1)
    soft = np.stack([soft_rings(*p) for p in pairs])
    np.testing.assert_allclose(found, soft, atol=1e-6)  # frequencies are single precision
    # Soft rings average over the neighbours, so they differ from hard ones by noise of the rings:
    # 1 / sqrt(pi i) on ring i, less in the mean of 8.
    hard = np.stack([hard_rings(*p) for p in pairs])
    rings = np.arange(3, size // 2 + 1)
    gap = np.abs(found - hard).mean(0)[3:]
    assert (gap < 1.0 / np.sqrt(np.pi * rings)).all()
    assert np.abs((found - hard)[:, 3:].mean()) < 0.02
    assert found[:, 2].min() > 0.8
    assert np.abs(found[:, -5:].mean()) < 0.1


def test_frc_of_equals_opposites_and_nothing():
    image = torch.from_numpy(np.random.default_rng(SEED).normal(size=(1, 20, 20))).float()
    np.testing.assert_allclose(ring_correlation(image, 3 * image).numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(ring_correlation(image, -image)[:, 1:].numpy(), -1, atol=1e-5)
    zero = torch.zeros_like(image)
    for pair in ((zero, zero), (image, zero)):
        assert torch.equal(ring_correlation(*pair)[:, 1:], torch.zeros(1, 10))


def curve(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_resolution_is_where_the_curve_first_falls():
    # Between ring 3 (0.5) and ring 4 (0.1): 0.143 is met at 3 + 0.357 / 0.4.
    frc = curve(1, 0.9, 0.8, 0.5, 0.1, 0.6, 0.0)
    expected = 12 * 1.5 / (3 + (0.5 - 0.143) / 0.4)
    assert resolution(frc, 12, 1.5).item() == pytest.approx(expected)
    assert resolution(frc, 12, 1.5, threshold=0.5).item() == pytest.approx(
        12 * 1.5 / 3
    )  # exactly on the threshold is not below it: the crossing is on the ring
    # Already below on ring 1, and never below.
    assert resolution(curve(1, 0.1, 0.9, 0.9), 6).item() == np.inf
    assert resolution(curve(1, 0.9, 0.9, 0.9), 6, 2.0).item() == pytest.approx(4)
    assert resolution(curve(1, 0.9, 0.9, 0.9), 7, 2.0).item() == pytest.approx(14 / 3)
    # A fall on the last ring is still found.
    assert resolution(curve(1, 0.9, 0.9, 0.0), 6).item() == pytest.approx(
        6 / (2 + (0.9 - 0.143) / 0.9)
    )
    # Curves of a batch do not meet.
    both = torch.cat([curve(1, 0.1, 0.9, 0.9), curve(1, 0.9, 0.9, 0.0)])
    assert resolution(both, 6).tolist() == pytest.approx([np.inf, 6 / (2 + (0.9 - 0.143) / 0.9)])


def test_resolution_of_made_up_noise_is_the_planted_one():
    """Pictures that agree up to ring 10 of 64 and are noise beyond."""
    rng, size = np.random.default_rng(SEED), 64
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    common = np.fft.rfft2(rng.normal(size=(size, size)))
    halves = []
    for _ in range(2):
        noise = np.fft.rfft2(rng.normal(size=(size, size)))
        halves.append(np.fft.irfft2(np.where(k <= 10, common, noise), s=(size, size)))
    frc = ring_correlation(*(torch.from_numpy(h)[None] for h in halves))
    assert size / resolution(frc, size).item() == pytest.approx(11, abs=1)


def test_wiener_curve_is_the_filter_of_least_error():
    # 2 FRC / (1 + FRC) where the curve is smooth: here linear, so that smoothing changes nothing.
    frc = np.linspace(1, 0.2, 17)
    found = wiener_curve(torch.from_numpy(frc)[None])[0].numpy()
    np.testing.assert_allclose(found[1:-1], (2 * frc / (1 + frc))[1:-1], atol=1e-12)
    assert found[0] == 1
    # By experiment: averages x of two halves with noise; the factor that minimises |c x - s|^2.
    rng = np.random.default_rng(SEED)
    s = rng.normal(size=200_000) * 0.8
    halves = s + rng.normal(size=(2, len(s)))
    x = halves.mean(0)
    best = (x * s).sum() / (x * x).sum()
    measured = (halves[0] * halves[1]).sum() / np.sqrt((halves**2).sum(1).prod())
    flat = wiener_curve(torch.full((1, 9), float(measured), dtype=torch.float64))[0, 4].item()
    assert flat == pytest.approx(best, abs=0.01)


def test_wiener_curve_passes_a_node_but_stops_where_two_rings_are_lost():
    node = curve(1, 0.9, 0.3, -0.5, -0.1, 0.8, 0.9, 0.9)  # smoothed: one ring below zero
    assert wiener_curve(node)[0, 3] == 0
    assert (wiener_curve(node)[0, 5:] > 0.5).all()
    frc = curve(1, 0.9, 0.6, 0.1, -0.3, -0.2, 0.5, 0.9)
    smooth = np.convolve(np.pad(frc[0].numpy(), 1, mode="edge"), np.ones(3) / 3, mode="valid")
    expected = np.zeros(8)
    for i, value in enumerate(smooth.clip(0, 1)):
        if value <= 0 and smooth[i + 1] <= 0:
            break
        expected[i] = 2 * value / (1 + value)
    expected[0] = 1
    assert expected[4] == 0  # the revival at the end is noise
    np.testing.assert_allclose(wiener_curve(frc)[0].numpy(), expected, atol=1e-12)
