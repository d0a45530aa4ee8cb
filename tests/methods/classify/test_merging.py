import torch

from cryoalign.methods.classify.em_step import Sums
from cryoalign.methods.classify.fourier_rings import (
    FourierRings,
    half_circle,
    move_features,
    ring_features,
)
from cryoalign.methods.classify.merging import best_mergers, merge_classes, moved_classes
from cryoalign.particles.simulate import simulate

RINGS = FourierRings(64, 8, 28.0)
SHIFTS = torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0))


def scattered(copies: int = 3) -> tuple[Sums, torch.Tensor]:
    """Sums of classes that show four views, each several times and moved, and the views."""
    made = simulate(n=1, n_classes=4, size=64, snr=1.0, max_shift=2.0, seed=3).views
    x = ring_features(half_circle(made, RINGS), torch.zeros(1, 2), RINGS)[:, 0]
    view = torch.arange(4).repeat(copies)
    generator = torch.Generator().manual_seed(0)
    n = len(view)
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    shift = torch.randint(-1, 2, (n, 2), generator=generator).float()
    mirror = torch.rand(n, generator=generator) < 0.5
    size = 10.0 * (1 + torch.arange(n) % 5)
    signal = move_features(x[view], angle, shift, mirror, RINGS) * size[:, None, None]
    half = signal / 2
    weight = (size[:, None] / 2).expand(n, RINGS.last)
    return Sums(
        torch.stack([half, half]), torch.stack([weight, weight]), torch.stack([size, size]) / 2
    ), view


def test_copies_of_a_view_merge_and_views_do_not() -> None:
    sums, view = scattered()
    merged, new = merge_classes(sums, RINGS, SHIFTS, 4, mirror=True)
    assert merged.signal.shape[:2] == (2, 4)
    for v in range(4):
        assert len(new[view == v].unique()) == 1
    assert len(new.unique()) == 4
    torch.testing.assert_close(merged.size.sum(), sums.size.sum())
    # Aligned, sums add up: nearly all of the power of members in phase.
    power = merged.signal.sum(0).abs().square().sum((1, 2)).sqrt()
    parts = sums.signal.sum(0).abs().square().sum((1, 2)).sqrt()
    whole = torch.zeros(4).index_add(0, new, parts)
    assert (power > 0.97 * whole).all()


def test_hands_are_two_views_where_mirrors_are_not_searched() -> None:
    sums, _ = scattered(1)
    signal = sums.signal[:, [0, 0]].clone()
    sign = 1 - 2 * (torch.arange(signal.shape[-1]) % 2)
    signal[:, 1] = sign * signal[:, 1].conj()
    total, weight = signal.sum(0), sums.weight.sum(0)[[0, 0]]
    moved = moved_classes(total, SHIFTS, RINGS)
    pair = torch.tensor([[0], [1]])
    losses = [
        float(best_mergers(total, weight, moved, pair, SHIFTS, RINGS, m).loss)
        for m in (True, False)
    ]
    assert losses[0] < 0.05 * losses[1]


def test_nothing_to_merge() -> None:
    sums, _ = scattered(1)
    merged, new = merge_classes(sums, RINGS, SHIFTS, 4, mirror=True)
    assert torch.equal(merged.signal, sums.signal)
    assert new.tolist() == [0, 1, 2, 3]
