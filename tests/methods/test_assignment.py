"""Assignment strategies against independent optima and formulas."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.images.masks import normalise
from cryoalign.images.polar import normalised_spectra, reference_spectra, to_polar
from cryoalign.methods.assignment import (
    Assignment,
    assign_equal,
    assign_robust,
    assign_stochastic,
    capacities,
    noise_temperature,
    soft_weights,
)
from cryoalign.methods.mra import align_multi_reference
from cryoalign.methods.state import State
from cryoalign.operators.correlation import correlation_table
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate
from cryoalign.search.match import log_evidence, prepare_target
from cryoalign.search.settings import Search, SearchSettings


def best_total(scores: Tensor, least: int, most: int) -> float:
    """The optimum by SciPy: a column per place of a class, a row per particle or empty place."""
    n, k = scores.shape
    cost = np.zeros((k * most, k * most))
    cost[:n] = -scores.double().numpy()[:, np.repeat(np.arange(k), most)]
    cost[n:, np.tile(np.arange(most), k) < least] = 1e6  # places that must not stay empty
    rows, columns = linear_sum_assignment(cost)
    return -float(cost[rows, columns].sum())


@pytest.mark.parametrize("slack", [0.0, 0.2, 0.5, 2.0])
@pytest.mark.parametrize(("n", "k"), [(60, 5), (31, 4), (3, 5), (40, 1)])
def test_equal_is_the_optimum_within_the_capacities(n: int, k: int, slack: float) -> None:
    least, most = capacities(n, k, slack)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        attraction = 1.5 * torch.randn(k, generator=generator)
        scores = torch.randn(n, k, generator=generator) + attraction
        label = assign_equal(scores, slack)
        sizes = torch.bincount(label, minlength=k)
        assert sizes.min() >= least
        assert sizes.max() <= most
        total = float(scores.double().gather(1, label[:, None]).sum())
        assert total == pytest.approx(best_total(scores, least, min(most, n)), abs=1e-6)


def test_equal_with_ties_and_bad_input() -> None:
    ties = (torch.rand(200, 7, generator=torch.Generator().manual_seed(0)) * 4).round()
    for scores in (ties, torch.zeros(200, 7)):
        label = assign_equal(scores)
        assert set(torch.bincount(label, minlength=7).tolist()) == {28, 29}
        total = float(scores.double().gather(1, label[:, None]).sum())
        assert total == pytest.approx(best_total(scores, 28, 29))
    assert capacities(100, 10, 0.0) == (10, 10)
    assert capacities(101, 10, 0.1) == (9, 12)
    with pytest.raises(ValueError, match="slack"):
        assign_equal(ties, -0.1)
    with pytest.raises(ValueError, match="finite"):
        assign_equal(torch.full((3, 2), torch.nan))


def crowded(n: int = 300, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores (n, k) in which class 0 attracts everyone, and the true classes (n,)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(k, (n,), generator=generator)
    scores = 0.2 + 0.01 * torch.randn(n, k, generator=generator)
    scores[torch.arange(n), truth] += 0.05
    scores[:, 0] += 0.1
    return scores, truth


def test_stochastic_climbs_and_does_not_leap() -> None:
    scores, _ = crowded(k=6)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(
        assign_stochastic(scores, torch.full((300,), -1), generator), scores.argmax(1)
    )
    label = torch.randint(6, (300,), generator=generator)
    after = assign_stochastic(scores, label, generator)
    own = scores.gather(1, label[:, None]).squeeze(1)
    new = scores.gather(1, after[:, None]).squeeze(1)
    assert (new >= own).all()
    assert torch.equal(after == label, own == scores.max(1).values)  # stays only at the top
    climbing = own < scores.max(1).values
    leaped = (after == scores.argmax(1))[climbing].double().mean()
    assert 0.3 < leaped < 0.9  # first of the better ones, in random order
    for _ in range(12):
        after = assign_stochastic(scores, after, generator)
    assert torch.equal(after, scores.argmax(1))


def test_robust_resists_an_attractor() -> None:
    scores, truth = crowded()
    assert (scores.argmax(1) == 0).all()
    wrong = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.3
    label = torch.where(wrong, (truth + 1) % 3, truth)
    for _ in range(5):
        label = assign_robust(scores, label)
    assert (label == truth).double().mean() > 0.98


def test_robust_is_the_product_of_two_shares() -> None:
    scores, truth = crowded(40)
    found = assign_robust(scores, truth)
    for i in range(40):
        merit = []
        for c in range(3):
            inside, outside = scores[truth == c, c], scores[truth != c, c]
            share = [(x <= scores[i, c]).double().mean() for x in (inside, outside)]
            merit.append(float(share[0] * share[1] + 1e-9 * scores[i, c]))
        assert int(found[i]) == int(np.argmax(merit))


def test_soft_weights_are_the_formula_in_double_precision() -> None:
    data = simulate(6, 3, size=24, snr=1.0, max_shift=1.0, seed=1)
    search = Search(max_shift=1, mode="exhaustive")
    temperature = 0.02
    evidence = log_evidence(data.images, prepare_target(data.views, search), temperature)
    found = soft_weights(evidence, temperature)
    rings = search.rings(24)
    polar = to_polar(data.images.double(), rings, search.shifts().double())
    table = correlation_table(
        normalised_spectra(polar, rings), reference_spectra(data.views.double(), rings)
    )
    weight = torch.exp((table - table.max()) / temperature).flatten(2).sum(2)
    expected = weight / weight.sum(1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-3)
    assert (expected.max(1).values < 0.999).any()  # soft indeed


def test_the_noises_temperature_makes_scores_likelihoods() -> None:
    """Two candidate signals, known noise: softmax(c / T) is the posterior of the noise model."""
    generator = torch.Generator().manual_seed(0)
    pixels, snr = 4000, 0.01
    signals = torch.randn(2, pixels, generator=generator, dtype=torch.float64)
    signals = signals / signals.square().mean(1, keepdim=True).sqrt() * snr**0.5
    noise = torch.randn(200, pixels, generator=generator, dtype=torch.float64)
    particles = signals[0] + noise
    logs = -0.5 * (particles[:, None] - signals).square().sum(2)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (particles, signals)]
    scores = unit[0] @ unit[1].T
    temperature = noise_temperature(float(scores[:, 0].mean()), pixels)
    ratio = (scores[:, 0] - scores[:, 1]) / temperature / (logs[:, 0] - logs[:, 1])
    assert ratio.median() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        (Assignment("equal"), "adaptive"),
        (Assignment("equal"), "exhaustive"),
        (Assignment("stochastic"), "adaptive"),
        (Assignment("robust", start_classes=1, level_iterations=2), "adaptive"),
        (Assignment("robust", similarity="correntropy"), "exhaustive"),
        (Assignment("soft", anneal_iterations=4), "adaptive"),
        (Assignment("soft", anneal_iterations=4), "exhaustive"),
    ],
)
def test_every_strategy_aligns(how: Assignment, mode: str) -> None:
    data = simulate(80, 4, size=32, snr=0.5, max_shift=1.0, seed=11)
    states: list[State] = []
    found = align_multi_reference(
        data.images, "random", n_classes=4, assign=how, iterations=10, seed=3,
        particle=Particle(max_shift="1 px"), search=SearchSettings(mode=mode),
        on_step=states.append,
    )  # fmt: skip
    assert adjusted_rand_score(data.class_number, found.class_number) > 0.6
    assert int(found.class_sizes.sum()) == 80
    # The averages are what labels and poses say, hard at the end whatever the way.
    prepared = normalise(data.images, 16.0)
    for c in range(4):
        members = (found.class_number == c + 1).nonzero().squeeze(1)
        again = transform(prepared[members], found.pose[members]).mean(0)
        assert np.corrcoef(again.flatten(), found.averages[c].flatten())[0, 1] > 0.9999
    if how.strategy == "equal":
        assert found.class_sizes.tolist() == [20] * 4
    if how.start_classes:
        assert [len(state["references"]) for state in states][:5] == [1, 2, 2, 4, 4]


def test_too_few_iterations_are_refused_resumed_or_not() -> None:
    images = simulate(40, 2, size=24, snr=1.0, max_shift=1.0).images
    states: list[State] = []
    split = Assignment(start_classes=1, level_iterations=1)
    particle = Particle(max_shift="1 px")
    align_multi_reference(
        images, n_classes=8, assign=split, iterations=4, particle=particle,
        on_step=states.append,
    )  # fmt: skip
    for assign, message in (
        (split, "1 classes become 8 after 3 times 1 iterations"),
        (Assignment("soft", anneal_iterations=3), "anneals for 3 iterations, but there are 3"),
    ):
        for resume in (None, states[0]):
            with pytest.raises(ValueError, match=message):
                align_multi_reference(
                    images,
                    n_classes=8,
                    assign=assign,
                    iterations=3,
                    particle=particle,
                    resume=resume,
                )
