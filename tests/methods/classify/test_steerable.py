import math

import pytest
import torch

from cryoalign.methods.classify.fourier_rings import FourierRings, move_features
from cryoalign.methods.classify.steerable import centre, coefficients, fit_model, log_likelihood
from cryoalign.methods.classify.whitening import observe
from cryoalign.particles.simulate import simulate

RINGS = FourierRings(40, 5, 16.0)
SHIFTS = torch.cartesian_prod(torch.arange(-3, 4.0), torch.arange(-3, 4.0))


def made_up(n: int = 4000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Particles whose rings vary together by one pattern of standard deviation 3 in y, the true
    class features; weights that differ; the pattern (r,)."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.tensor([0.2, 1.0, -0.5, 0.7, 0.1])
    size = (n, RINGS.last, RINGS.n_frequencies)
    alive = torch.tensor(
        [[r >= RINGS.first_ring(m) for m in range(size[2])] for r in range(1, RINGS.last + 1)]
    )
    weight = 0.5 + torch.rand(n, RINGS.last, generator=generator)
    amplitude = (
        3
        * math.sqrt(RINGS.n_angles)
        * torch.randn(n, 1, size[2], generator=generator, dtype=torch.complex64)
    )
    noise = torch.randn(size, generator=generator, dtype=torch.complex64)
    amplitude[..., 0] = amplitude[..., 0].real * math.sqrt(2)
    noise[..., 0] = noise[..., 0].real * math.sqrt(2)
    y = amplitude * pattern[:, None] + 2.0 * math.sqrt(RINGS.n_angles) * torch.eye(size[2])[0]
    x = weight[..., None] * y + (RINGS.n_angles * weight[..., None]).sqrt() * noise
    return x * alive, weight, pattern


def test_the_covariance_is_found_under_noise_and_ctf() -> None:
    x, weight, pattern = made_up()
    model = fit_model(x, weight, RINGS)
    torch.testing.assert_close(
        model.mean, torch.full((5,), 2.0 * math.sqrt(RINGS.n_angles)), rtol=0.05, atol=0
    )
    found = {part.frequency: part for part in model.components}
    for m in (0, 1, 3):
        part = found[m]
        assert len(part.variance) == 1  # one pattern, and no component of noise
        covariance = part.variance * part.vectors @ part.vectors.T
        expected = 9 * RINGS.n_angles * pattern[part.first :, None] * pattern[part.first :]
        assert (covariance - expected).norm() < 0.1 * expected.norm()


def test_likelihood_and_coefficients_are_those_of_the_dense_gaussian() -> None:
    x, weight, _ = made_up()
    model = fit_model(x, weight, RINGS)
    few, q = x[:3].cdouble(), weight[:3].double()
    noise = RINGS.n_angles
    expected = torch.zeros(3, dtype=torch.float64)
    means = []
    for part in model.components:
        for n in range(3):
            scale = 1.0 if part.frequency == 0 else 0.5  # variance of a real or imaginary part
            w = q[n, part.first :]
            v = part.vectors.double()
            prior = scale * (v * part.variance.double()) @ v.T
            total = w[:, None] * prior * w + scale * noise * torch.diag(w)
            value = few[n, part.first :, part.frequency]
            if part.frequency == 0:
                value = value - w * model.mean.double()[part.first :]
            both = torch.stack([value.real, value.imag], 1)
            solved = torch.linalg.solve(total, both)
            alone = both / (scale * noise * w[:, None])
            # What the signal adds to the density of noise alone.
            expected[n] += 0.5 * (both * (alone - solved)).sum()
            gain = torch.linalg.lstsq(v, prior @ (w[:, None] * solved)).solution
            means.append((part.frequency, n, torch.complex(gain[:, 0], gain[:, 1])))
    expected += (few[..., 0].real @ model.mean.double()) / noise
    got = log_likelihood(x[:3, None], weight[:3], model)[:, 0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)
    coefficient = coefficients(x[:3], weight[:3], model)
    for m, n, mean in means:
        torch.testing.assert_close(
            coefficient[n, model.frequency == m].to(mean), mean, rtol=1e-3, atol=1e-3
        )


def test_coefficients_turn_and_mirror_with_the_particle() -> None:
    x, weight, _ = made_up(400)
    model = fit_model(x, weight, RINGS)
    some, weight = x[:2] * (torch.arange(RINGS.n_frequencies) > 0), weight[:2]
    before = coefficients(some, weight, model)
    angle = torch.tensor([0.4, -1.9])
    still, kept = torch.zeros(2, 2), torch.tensor([False, True])
    after = coefficients(move_features(some, angle, still, kept, RINGS), weight, model)
    m = model.frequency
    turned = before * torch.exp(-1j * angle[:, None] * m)
    sign = 1 - 2 * (m % 2)
    expected = torch.where(kept[:, None], sign * turned.conj(), turned)
    moving = m > 0
    torch.testing.assert_close(after[:, moving], expected[:, moving], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("snr", [1.0, 0.1])
def test_particles_of_a_view_are_centred_on_one_point(snr: float) -> None:
    made = simulate(200, 1, size=64, snr=snr, max_shift=3.0, seed=4)
    seen = observe(lambda rows: made.images[rows], 200, 64, None, 10, 26.0, 3.0)
    own = centre(seen, seen.rings.to(10), SHIFTS)
    # The point is the view's own; compare where it lies on the view.
    at = (made.pose.linear() @ (made.pose.shift - own)[..., None].to(made.pose.shift))[..., 0]
    before = (made.pose.linear() @ made.pose.shift[..., None])[..., 0]
    assert float(at.std(0).max()) < 0.6
    assert float(before.std(0).min()) > 1.2
