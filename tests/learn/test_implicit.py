import pytest
import torch

from cryoalign.images.geometry import transform
from cryoalign.images.polar import Rings
from cryoalign.learn.implicit import fourier_shift, implicit_pose, smooth_score
from cryoalign.operators.correlation import correlation_at
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, wrap_degrees

RINGS = Rings(1, 9, angles=64)


def pair(n: int = 2) -> tuple[torch.Tensor, torch.Tensor, Pose]:
    """Float64 particles, their references and their true poses."""
    made = simulate(n, 1, size=28, snr=2.0, max_shift=1.5, seed=3)
    references = made.views.double().expand(n, -1, -1).clone()
    return made.images.double(), references, made.pose.to(torch.float64)


def near(pose: Pose) -> Pose:
    return Pose(pose.angle + 0.7, pose.shift + 0.3, pose.mirror)


def test_fourier_shift_is_exact() -> None:
    images, _, _ = pair()
    by = torch.tensor([[2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    moved = fourier_shift(images, by)
    for image, out, (x, y) in zip(images, moved, by.long().tolist(), strict=True):
        torch.testing.assert_close(out, image.roll((y, x), (0, 1)))
    part = fourier_shift(fourier_shift(images, 0.3 * by), 0.7 * by)
    band = torch.fft.rfft2(part - moved)[:, 1:13, 1:13]  # Nyquist has no phase to shift
    assert band.abs().max() < 1e-9


def test_smooth_score_is_the_score_at_whole_shifts() -> None:
    images, references, pose = pair()
    whole = Pose(pose.angle, pose.shift.round(), pose.mirror)
    torch.testing.assert_close(
        smooth_score(images, references, whole, RINGS),
        correlation_at(images, references, whole, RINGS),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip


def test_the_pose_is_the_maximum() -> None:
    images, references, truth = pair(4)
    found = implicit_pose(images, references, near(truth), RINGS)
    best = smooth_score(images, references, found, RINGS)
    for turn, x, y in [(0.01, 0, 0), (-0.01, 0, 0), (0, 1e-3, 0), (0, -1e-3, 0), (0, 0, 1e-3)]:
        shift = found.shift + torch.tensor([x, y], dtype=torch.float64)
        assert (
            smooth_score(images, references, Pose(found.angle + turn, shift, found.mirror), RINGS)
            < best
        ).all()
    assert (found.shift - truth.shift).abs().max() < 0.3


def test_the_gradient_is_that_of_solving_again() -> None:
    """Finite differences of the re-solved maximum, in directions of particle and reference."""
    images, references, truth = pair()
    start = near(truth)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def value(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        found = implicit_pose(images, references, start, RINGS)
        return (weight * torch.cat([found.angle[:, None], found.shift], 1)).sum()

    leaves = images.clone().requires_grad_(), references.clone().requires_grad_()
    gradients = torch.autograd.grad(value(*leaves), leaves)
    for which, gradient in enumerate(gradients):
        along = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-4
        moved = [[images, references], [images, references]]
        moved[0][which], moved[1][which] = (
            moved[0][which] + step * along, moved[1][which] - step * along
        )  # fmt: skip
        numeric = (value(*moved[0]) - value(*moved[1])) / (2 * step)
        torch.testing.assert_close((gradient * along).sum(), numeric, rtol=1e-5, atol=1e-7)


def test_without_a_maximum_the_pose_is_a_constant() -> None:
    images = torch.zeros(1, 28, 28, dtype=torch.float64, requires_grad=True)
    start = Pose.identity(1).to(torch.float64)
    found = implicit_pose(images, images, start, RINGS)
    (gradient,) = torch.autograd.grad(found.angle.sum() + found.shift.sum(), images)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(found.angle, start.angle)


@pytest.mark.parametrize("steps", [6, 1])
def test_a_gradient_moves_no_pose(steps) -> None:
    """At an SNR where Newton's method does not always end; what has not is a constant."""
    made = simulate(80, 1, size=28, snr=0.02, max_shift=1.5, seed=4)
    images, start = made.images.double(), near(made.pose.to(torch.float64))
    plain = implicit_pose(images, made.views.double(), start, RINGS, steps)
    leaf = images.clone().requires_grad_()
    found = implicit_pose(leaf, made.views.double(), start, RINGS, steps)
    assert torch.equal(found.angle, plain.angle)
    assert torch.equal(found.shift, plain.shift)
    (gradient,) = torch.autograd.grad(found.angle.sum() + found.shift.sum(), leaf)
    size = gradient.flatten(1).norm(dim=1)
    assert (size == 0).any()
    if steps == 6:
        assert size.max() < 100 * size[size > 0].median()


def test_a_minimum_is_no_maximum() -> None:
    """At the minimum of a negative's score the pose stays, and is a constant."""
    images, references, truth = pair()
    flat = Pose(truth.angle + 60, truth.shift + 2, truth.mirror)
    leaf = images.clone().requires_grad_()
    found = implicit_pose(leaf, -references, Pose(truth.angle, truth.shift, truth.mirror), RINGS)
    assert torch.equal(found.shift.detach(), truth.shift)  # the minimum of the negative's score
    (gradient,) = torch.autograd.grad(found.shift.sum(), leaf)
    assert not gradient.any()
    assert implicit_pose(images, references, flat, RINGS).angle.abs().max() <= 180


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gathered_samples_are_those_of_grid_sample(interpolation) -> None:
    images, _, pose = pair()
    far = Pose(pose.angle, pose.shift + 6, pose.mirror)  # part of it comes from outside

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (images, far.angle, far.shift)]
        out = transform(leaves[0], Pose(leaves[1], leaves[2], far.mirror), interpolation)
        return out.detach(), *torch.autograd.grad((out.square() * images).sum(), leaves)

    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        got = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_step_is_no_longer_than_the_peak_is_wide() -> None:
    """Of a particle in noise Newton's step may lead anywhere; it ends at 2 degrees and 0.7 px."""
    made = simulate(80, 1, size=28, snr=0.02, max_shift=1.5, seed=4)
    start = near(made.pose.to(torch.float64))
    found = implicit_pose(made.images.double(), made.views.double(), start, RINGS, steps=1)
    turn = wrap_degrees(found.angle - start.angle).abs()
    move = (found.shift - start.shift).abs()
    assert turn.max() <= 2 + 1e-9
    assert move.max() <= 0.7 + 1e-9
    assert (turn > 1.999).any()
    assert (move > 0.699).any()
