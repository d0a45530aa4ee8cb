import numpy as np
import pytest
import torch
from oracle import correlation

from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.operators import correlation as correlate
from cryoalign.operators.correlation import (
    correlation_at,
    correlation_logsumexp,
    correlation_peaks,
    correlation_table,
    table_peaks,
    unravel_place,
)
from cryoalign.operators.ring_products import pair_peaks, ring_factors
from cryoalign.pose import Pose

pytestmark = pytest.mark.usefixtures("in_pytorch")  # kernels/test_cpu.py tests the compiled search


def _spectra(n, k, s, r, m, dtype=torch.complex64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, s, r, m, dtype=dtype, generator=generator),
        torch.randn(k, r, m, dtype=dtype, generator=generator),
    )


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_is_the_formula(size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(size)
    particles, references = rng.normal(size=(2, size, size)), rng.normal(size=(2, size, size))
    rings, radii, angles = Rings(1, 4, angles=16), [1, 2, 3, 4], 16
    shifts = torch.tensor([[0.0, 0.0], [2.0, -1.0], [0.5, 0.25]], dtype=dtype)
    table = correlation_table(
        ring_spectra(torch.tensor(particles, dtype=dtype), rings, shifts),
        ring_spectra(torch.tensor(references, dtype=dtype), rings)[:, 0],
    )
    assert table.shape == (2, 2, 3, 2, 16)
    for n in range(2):
        for k in range(2):
            for s, shift in enumerate(shifts.tolist()):
                for hand in (False, True):
                    expected = correlation(particles[n], references[k], radii, angles, shift, hand)
                    got = table[n, k, s, int(hand)].double().numpy()
                    error = np.abs(got - expected).max() / np.abs(expected).max()
                    assert error < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 5, 4, 7, 9), (2, 13, 3, 2, 17)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_the_operator_is_the_tables_maximum(mirror, shape, dtype, monkeypatch) -> None:
    particles, references = _spectra(*shape, dtype=dtype)
    s, m = shape[2], shape[4]
    table = correlation_table(particles, references, mirror).flatten(2)
    best, where = table.max(-1)
    for block in (1, 500, 2**20):  # however the work is cut
        monkeypatch.setattr(correlate, "CPU_BLOCK", block)
        score, place = correlation_peaks(particles, references, mirror)
        torch.testing.assert_close(score, best, rtol=1e-5, atol=1e-6)
        # Rounding may choose between near equals: the place must hold the maximum.
        torch.testing.assert_close(
            table.gather(-1, place.unsqueeze(-1)).squeeze(-1), best, rtol=1e-5, atol=1e-6
        )
        assert (place == where).double().mean() > 0.9
    shift, hand, angle = unravel_place(place, 2 * (m - 1), mirror)
    assert shift.max() < s
    assert hand.max() <= int(mirror)
    assert angle.max() < 2 * (m - 1)
    torch.testing.assert_close((shift * (1 + mirror) + hand) * 2 * (m - 1) + angle, place)


@pytest.mark.parametrize("mirror", [False, True])
def test_the_peak_of_a_pair_is_the_tables(mirror: bool) -> None:
    particles, references = _spectra(6, 6, 1, 5, 9, dtype=torch.complex128)
    hand = torch.full((6,), mirror)
    score, angle = pair_peaks(particles[:, 0], references, hand)
    table = correlation_table(particles, references)[:, :, 0, int(mirror)]  # (n, k, a)
    best, where = table[torch.arange(6), torch.arange(6)].max(-1)
    torch.testing.assert_close(score, best)
    assert torch.equal(angle, where)


def test_the_place_is_the_pose_of_a_turned_particle() -> None:
    """Physics, not algebra: an image moved by a known pose is found at its inverse."""
    from cryoalign.images.geometry import transform

    generator = torch.Generator().manual_seed(3)
    reference = torch.nn.functional.interpolate(
        torch.randn(1, 1, 9, 9, generator=generator), size=49, mode="bicubic"
    )[0]
    reference = reference * torch.exp(-(torch.linspace(-2, 2, 49) ** 2))
    reference = reference * torch.exp(-(torch.linspace(-2, 2, 49)[:, None] ** 2))
    rings = Rings(1, 18)
    axis = torch.arange(-2, 3.0)
    shifts = torch.cartesian_prod(axis, axis)
    for angle, shift, mirror in [(90.0, (1.0, -2.0), False), (-45.0, (2.0, 1.0), True)]:
        truth = Pose(torch.tensor([angle]), torch.tensor([shift]), torch.tensor([mirror]))
        particle = transform(reference, truth.inverse())
        score, place = correlation_peaks(
            ring_spectra(particle, rings, shifts), ring_spectra(reference, rings)[:, 0]
        )
        found = unravel_place(place[0, 0], rings.n_angles, True)
        assert score[0, 0] > 0.98
        assert shifts[found.shift].tolist() == list(shift)
        assert bool(found.mirror) == mirror
        turned = float(found.angle) * 360 / rings.n_angles
        assert abs((turned - angle + 180) % 360 - 180) < 360 / rings.n_angles


def test_ties_go_to_the_first_place() -> None:
    particles, references = _spectra(1, 1, 1, 3, 9)
    particles = particles.expand(1, 4, 3, 9).contiguous()
    _, place = correlation_peaks(particles, references)
    assert unravel_place(place, 16, True).shift.item() == 0


def test_batch_size_changes_nothing() -> None:
    particles, references = _spectra(7, 5, 9, 11, 33)
    score, place = correlation_peaks(particles, references)
    for n in (1, 3):
        parts = [correlation_peaks(part, references) for part in particles.split(n)]
        assert torch.equal(torch.cat([p[0] for p in parts]), score)
        assert torch.equal(torch.cat([p[1] for p in parts]), place)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_opcheck(dtype: torch.dtype) -> None:
    particles, references = _spectra(3, 4, 2, 5, 9, dtype=dtype)
    for mirror in (True, False):
        torch.library.opcheck(
            torch.ops.cryoalign.correlation_peaks, (particles, references, mirror)
        )
    # Not contiguous, and lazily conjugated, inputs.
    torch.library.opcheck(
        torch.ops.cryoalign.correlation_peaks,
        (particles.transpose(0, 1).conj(), references.flip(0).conj()),
    )
    lazily = correlation_peaks(particles.conj(), references.conj())
    for lazy, plain in zip(
        lazily,
        correlation_peaks(particles.conj().resolve_conj(), references.conj().resolve_conj()),
        strict=True,
    ):
        assert torch.equal(lazy, plain)


@pytest.mark.parametrize(
    ("particles", "references", "message"),
    [
        (torch.zeros(2, 3, 4, 5), torch.zeros(1, 4, 5), "complex"),
        (
            torch.zeros(2, 3, 4, 5, dtype=torch.complex64),
            torch.zeros(1, 3, 5, dtype=torch.complex64),
            "same Rings",
        ),
        (
            torch.zeros(3, 4, 5, dtype=torch.complex64),
            torch.zeros(1, 4, 5, dtype=torch.complex64),
            r"\(n, s, r, m\)",
        ),
        (
            torch.zeros(2, 3, 4, 5, dtype=torch.complex64),
            torch.zeros(1, 4, 5, dtype=torch.complex128),
            "one dtype",
        ),
        (
            torch.zeros(2, 0, 4, 5, dtype=torch.complex64),
            torch.zeros(1, 4, 5, dtype=torch.complex64),
            "no shift",
        ),
    ],
)
def test_what_does_not_fit_is_refused(particles, references, message) -> None:
    with pytest.raises(ValueError, match=message):
        correlation_peaks(particles, references)


def test_candidates_must_be_positive() -> None:
    particles, references = _spectra(2, 3, 4, 5, 9)
    score, place = correlation_peaks(particles, references, True, 1)
    assert torch.equal(score, correlation_peaks(particles, references)[0])
    assert place.shape == (2, 3)
    with pytest.raises(ValueError, match="at least 1"):
        correlation_peaks(particles, references, True, 0)


def _soft(particles, references, temperature, mirror):
    table = correlation_table(particles, references, mirror).flatten(2)
    return temperature * torch.logsumexp(table / temperature, 2)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("block", [1, 500, 2**20])
def test_logsumexp_is_the_tables(mirror, block, monkeypatch) -> None:
    monkeypatch.setattr(correlate, "CPU_BLOCK", block)
    x, y = (t.requires_grad_() for t in _spectra(3, 4, 5, 6, 9, dtype=torch.complex128))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    for temperature in (1.0, 0.05):
        expected = _soft(x, y, temperature, mirror)
        got = correlation_logsumexp(x, y, temperature, mirror)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad((weight * got).sum(), (x, y)),
            torch.autograd.grad((weight * expected).sum(), (x, y)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 200, 2**20])
def test_few_references_in_small_blocks(k, block, monkeypatch) -> None:
    monkeypatch.setattr(correlate, "CPU_BLOCK", block)
    x, y = _spectra(2, k, 3, 4, 9, dtype=torch.complex128)
    table = correlation_table(x, y).flatten(2)
    score, place = table_peaks(x, ring_factors(y))
    torch.testing.assert_close(score, table.amax(2))
    torch.testing.assert_close(table.gather(2, place[..., None])[..., 0], score)
    torch.testing.assert_close(correlation_logsumexp(x, y, 0.1), _soft(x, y, 0.1, True))


def test_logsumexp_goes_to_the_peak() -> None:
    x, y = _spectra(3, 4, 5, 6, 9, dtype=torch.complex128)
    score, _ = correlation_peaks(x, y)
    torch.testing.assert_close(correlation_logsumexp(x, y, 1e-6), score, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mirror", [True, False])
def test_logsumexp_gradcheck_and_opcheck(mirror) -> None:
    x, y = (t.requires_grad_() for t in _spectra(2, 2, 2, 2, 5, dtype=torch.complex128))
    assert torch.autograd.gradcheck(lambda x, y: correlation_logsumexp(x, y, 0.5, mirror), (x, y))
    torch.library.opcheck(torch.ops.cryoalign.correlation_logsumexp, (x, y, 0.5, mirror))


def test_logsumexp_gradient_is_the_weighted_average() -> None:
    """One step of expectation maximisation: at low T the reference's gradient is the particle,
    turned onto it."""
    rings = Rings(1, 9, angles=64)
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(1, 25, 25, generator=generator, dtype=torch.float64)
    spectrum = ring_spectra(image, rings)
    turn = torch.exp(2j * torch.pi * 17 / 64 * torch.arange(33))
    reference = (spectrum[:, 0] * turn).requires_grad_()
    soft = correlation_logsumexp(spectrum, reference, 1e-3, False)
    (gradient,) = torch.autograd.grad(soft.sum(), reference)
    multiplicity = torch.full((33,), 2 / 64, dtype=torch.float64)
    multiplicity[0] = multiplicity[-1] = 1 / 64
    expected = multiplicity * reference.detach()
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none(temperature) -> None:
    with pytest.raises(ValueError, match="positive"):
        correlation_logsumexp(*_spectra(1, 1, 1, 1, 3), temperature)


@pytest.mark.parametrize("size", [20, 21])
def test_correlation_at_is_the_tables_entry(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(4, size, size, generator=generator, dtype=torch.float64)
    references = torch.randn(4, size, size, generator=generator, dtype=torch.float64)
    rings = Rings(1, 6, angles=32)
    shifts = torch.tensor([[0.0, 0.0], [1.0, -1.5], [-2.0, 0.5]], dtype=torch.float64)
    table = correlation_table(
        ring_spectra(images, rings, shifts), ring_spectra(references, rings)[:, 0]
    )
    for s, hand, angle in [(0, 0, 0), (1, 1, 5), (2, 0, 31), (2, 1, 16)]:
        pose = Pose(
            torch.full((4,), angle * 360 / 32, dtype=torch.float64),
            shifts[s].expand(4, 2),
            torch.full((4,), bool(hand)),
        )
        expected = table[torch.arange(4), torch.arange(4), s, hand, angle]
        got = correlation_at(images, references, pose, rings)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gradient_at_the_peak_is_the_gradient_of_the_tables_maximum() -> None:
    generator = torch.Generator().manual_seed(5)
    rings = Rings(1, 6, angles=32)
    shifts = torch.cartesian_prod(torch.arange(-1, 2.0), torch.arange(-1, 2.0)).double()
    images = torch.randn(3, 17, 17, generator=generator, dtype=torch.float64, requires_grad=True)
    references = torch.randn(
        3, 17, 17, generator=generator, dtype=torch.float64, requires_grad=True
    )
    x, y = ring_spectra(images, rings, shifts), ring_spectra(references, rings)[:, 0]
    best = correlation_table(x, y).flatten(2).diagonal().T.amax(-1)
    expected = torch.autograd.grad(best.sum(), (images, references))

    _, place = correlation_peaks(x.detach(), y.detach())
    place = unravel_place(place.diagonal(), 32, True)
    pose = Pose(place.angle.double() * (360 / 32), shifts[place.shift], place.mirror.bool())
    got = torch.autograd.grad(
        correlation_at(images, references, pose, rings).sum(), (images, references)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_correlation_at_gradcheck() -> None:
    generator = torch.Generator().manual_seed(6)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    images, references = leaf(2, 11, 11), leaf(2, 11, 11)
    angle, shift = leaf(2), leaf(2, 2)
    mirror = torch.tensor([False, True])
    rings = Rings(1, 3, angles=8)
    assert torch.autograd.gradcheck(
        lambda i, r, a, s: correlation_at(i, r, Pose(a * 50, s, mirror), rings),
        (images, references, angle, shift),
    )
