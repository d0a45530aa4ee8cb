"""Many small minimisations at once, of a problem whose minimum and difficulty are known."""

import torch

from cryoalign.search.least_squares import Point, gauss_newton

FAR = torch.tensor([[0.3, 0.2], [2.0, 1.0], [5.0, -3.0], [-9.0, 4.0], [20.0, 20.0]]).double()
TURN = torch.tensor([[0.8, 0.6], [-0.6, 0.8]]).double()


def saturating(unknowns: torch.Tensor, rows: torch.Tensor) -> Point:
    """Least squares of arctan along two oblique axes, whose minimum is at zero.

    Beyond 1.39 a Gauss-Newton step, arctan(v) (1 + v^2), lands further out than it began.
    """
    v = unknowns @ TURN.T
    residual, slope = v.atan(), 1 / (1 + v.square())
    return Point(
        unknowns,
        50 * residual.square().sum(1),
        100 * (residual * slope) @ TURN,
        100 * TURN.T @ torch.diag_embed(slope.square()) @ TURN,
        rows.unsqueeze(1),
    )


def test_far_starts_come_to_the_minimum() -> None:
    found = gauss_newton(saturating, FAR, torch.full((2,), 1e6).double(), 80)
    # What is left promises less than 1e-3 of the loss, 50 r^2.
    assert found.unknowns.abs().max() < 0.01
    assert torch.equal(found.notes[:, 0], torch.arange(5))


def test_no_unknown_moves_further_than_the_longest_step() -> None:
    longest = torch.tensor([0.5, 0.1]).double()
    for steps in (1, 2, 3):
        found = gauss_newton(saturating, FAR, longest, steps)
        assert ((found.unknowns - FAR).abs() <= steps * longest + 1e-12).all()
