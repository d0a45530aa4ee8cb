import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from cryoalign.methods.classify import invariants as module
from cryoalign.methods.classify.invariants import bispectrum, seeds_from_invariants, triples
from cryoalign.methods.classify.whitening import Observations, observe
from cryoalign.particles.simulate import Simulation, simulate

SHIFTS = torch.cartesian_prod(torch.arange(-2, 3.0), torch.arange(-2, 3.0))


def observed(made: Simulation) -> Observations:
    return observe(lambda rows: made.images[rows], len(made.images), 64, None, 12, 26.0, 2.0)


def test_triples_are_all_there_are() -> None:
    frequency = torch.tensor([0, 0, 1, 1, 2, 3])
    variance = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 1.0])
    expected = {
        (i, j, k)
        for i in range(6)
        for j in range(6)
        for k in range(6)
        if frequency[i] + frequency[j] == frequency[k]
        and (frequency[i], i) <= (frequency[j], j)
        and (frequency[i] > 0 or j <= k)
    }
    assert set(map(tuple, triples(frequency, variance, 100).tolist())) == expected
    (best,) = triples(frequency, variance, 1).tolist()
    assert best == [0, 0, 0]


def test_the_bispectrum_knows_no_turn_and_conjugates_with_the_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    frequency = torch.tensor([0, 0, 1, 1, 2, 2, 3, 5])
    a = torch.randn(3, 8, generator=generator, dtype=torch.complex128)
    a[:, :2] = a[:, :2].real.to(a.dtype)
    index = triples(frequency, torch.ones(8), 1000)
    before = bispectrum(a, index)
    turned = a * torch.exp(-1j * torch.tensor([0.3, 2.0, -1.0])[:, None] * frequency)
    torch.testing.assert_close(bispectrum(turned, index), before)
    mirrored = (1 - 2 * (frequency % 2)) * turned.conj()
    torch.testing.assert_close(bispectrum(mirrored, index), before.conj())


def test_views_are_found_without_alignment() -> None:
    made = simulate(400, 4, size=64, snr=0.1, max_shift=2.0, seed=3)
    seen = observed(made)
    assert bool(made.pose.mirror.any())
    seeds = seeds_from_invariants(seen, seen.rings.to(12), SHIFTS, 4)
    view = made.class_number - 1
    assert adjusted_rand_score(view, seeds.label) > 0.95
    assert len(set(view[seeds.member].tolist())) == 4
    assert torch.equal(seeds.label[seeds.member], torch.arange(4))
    again = seeds_from_invariants(seen, seen.rings.to(12), SHIFTS, 4)
    assert all(torch.equal(a, b) for a, b in zip(seeds, again, strict=True))


def test_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 150)
    seen = observed(simulate(200, 2, size=64, snr=0.3, max_shift=2.0, seed=3))
    seeds = seeds_from_invariants(seen, seen.rings.to(12), SHIFTS, 2)
    assert int((seeds.label < 0).sum()) == 50
    assert bool((seeds.label[seeds.member] >= 0).all())


def test_what_cannot_be_grouped_is_refused() -> None:
    made = simulate(40, 2, size=64, snr=0.3, max_shift=2.0, seed=3)
    few = observed(made)
    with pytest.raises(ValueError, match="too few for 40 groups"):
        seeds_from_invariants(few, few.rings.to(12), SHIFTS, 40)
    noise = torch.randn(300, 64, 64, generator=torch.Generator().manual_seed(0))
    nothing = observe(lambda rows: noise[rows], 300, 64, None, 6, 26.0, 2.0)
    nothing = Observations(1e-3 * nothing.polar, nothing.weight, nothing.rings)
    with pytest.raises(ValueError, match="no more than noise"):
        seeds_from_invariants(nothing, nothing.rings.to(6), SHIFTS, 2)
