"""Assignment strategies against independent optima and formulas."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cryoalign.assign import assign_equal, capacities


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
