"""What iterates: E-steps in chunks, and what is measured before the first one."""

import pytest
import torch

from cryoalign.methods.classify import resolution_level as module
from cryoalign.methods.classify.em_step import expect, mix_sums
from cryoalign.methods.classify.fourier_rings import FourierRings, half_circle
from cryoalign.methods.classify.resolution_level import ResolutionLevel
from cryoalign.methods.classify.whitening import Observations
from cryoalign.search.settings import shift_grid

RINGS = FourierRings(40, 5, 16.0)


def noise(n: int, seed: int) -> torch.Tensor:
    """(n, r, a / 2) complex half circles of white noise of unit variance per image component."""
    generator = torch.Generator().manual_seed(seed)
    return half_circle(torch.randn(n, 40, 40, generator=generator), RINGS)


def level_of(polar: torch.Tensor, weight: torch.Tensor, own: torch.Tensor) -> ResolutionLevel:
    seen = Observations(polar, weight, RINGS)
    return ResolutionLevel(seen, 0, own, shift_grid(2, 2), RINGS, True)


def test_chunks_and_subsets_give_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    polar, own = noise(30, 0), torch.randint(-1, 2, (30, 2)).float()
    level = level_of(polar, torch.ones(30, 5), own)
    classes = level.single_particles(torch.tensor([3, 8, 20]), torch.ones(5))
    posterior, sums = expect(level.of(torch.arange(30)), classes, mirror=True)
    monkeypatch.setitem(module.CHUNK, "cpu", 7)
    found, chunked = level.expect(classes)
    evidence, subset = level.sums_of(torch.arange(30), classes)
    for one, other, third in zip(sums, chunked, subset, strict=True):
        scale = float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-5 * scale)
    assert evidence == pytest.approx(float(posterior.log_evidence.mean()), rel=1e-5)
    assert torch.equal(found.label, posterior.share.argmax(1))
    sorted_share = posterior.share.sort(1, descending=True).values
    torch.testing.assert_close(found.share, sorted_share[:, 0])
    torch.testing.assert_close(found.runner_up, sorted_share[:, 1])
    at = posterior.shift.gather(1, found.label[:, None]).squeeze(1)
    assert torch.equal(found.shift, own + level.shifts[at])


def test_the_power_of_the_signal_is_what_noise_does_not_explain() -> None:
    """Signal of three times the noise's power on ring 2 and none elsewhere."""
    n = 400
    polar = noise(n, 1)
    only = torch.zeros(5)
    only[1] = 3.0**0.5
    polar = polar + only[:, None] * noise(n, 2)
    power = level_of(polar, torch.ones(n, 5), torch.zeros(n, 2)).signal_power()
    features, _ = level_of(noise(n, 2), torch.ones(n, 5), torch.zeros(n, 2)).centred(
        torch.arange(n)
    )
    twice = torch.full((RINGS.n_frequencies,), 2.0)
    twice[0] = 1.0
    alive = features.abs().square().sum(0) > 0
    expected = 3 * ((features.abs().square() @ twice).mean(0) / (alive * twice).sum(1))[1]
    assert float(power[1]) == pytest.approx(float(expected), rel=0.1)
    assert float(power[[0, 2, 3, 4]].max()) < 0.1 * float(power[1])


def test_mixed_sums_are_an_average_per_particle() -> None:
    level = level_of(noise(20, 3), torch.ones(20, 5), torch.zeros(20, 2))
    classes = level.single_particles(torch.tensor([1, 2]), torch.ones(5))
    _, all_of_them = level.expect(classes)
    _, few = level.sums_of(torch.arange(0, 20, 2), classes)
    # Twice as many particles that say the same change nothing.
    doubled = type(few)(*(2 * each for each in few))
    for one, other in zip(mix_sums(doubled, few, 0.5), few, strict=True):
        torch.testing.assert_close(one, other)
    mixed = mix_sums(few, all_of_them, 0.25)
    torch.testing.assert_close(mixed.size, 0.25 * 2 * few.size + 0.75 * all_of_them.size)
