import math

import pytest
import torch

from bench.bound import pose_covariance
from cryoalign.images.geometry import pixel_grid
from cryoalign.images.templates import templates_of
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search


def _off_grid(pose: Pose, seed: int) -> Pose:
    """Truth rounded to the nearest place of a 256-angle, 1 px grid, as a search would find it."""
    step = 360 / 256
    angle = (pose.angle / step).round() * step
    return Pose(angle, pose.shift.round(), pose.mirror)


@pytest.mark.parametrize("size", [48, 49])
def test_noise_free_particles_come_back_to_their_pose(size: int) -> None:
    data = simulate(n=40, n_classes=4, size=size, snr=1e4, max_shift=2.0, seed=size)
    rings = Search(max_shift=2).rings(size)
    label = data.class_number - 1
    pose, score = refine(data.images, data.views, label, _off_grid(data.pose, 0), rings)
    # What bilinear interpolation of the reference costs at worst; the median is 0.01 degrees.
    error = wrap_degrees(pose.angle - data.pose.angle).abs()
    assert error.median() < 0.03
    assert error.max() < 0.15
    assert (pose.shift - data.pose.shift).norm(dim=-1).max() < 0.02
    assert torch.equal(pose.mirror, data.pose.mirror)
    assert score.min() > 0.99


def test_errors_meet_the_cramer_rao_bound() -> None:
    data = simulate(n=400, n_classes=4, size=64, snr=0.1, max_shift=2.0, seed=7)
    label = data.class_number - 1
    rings = Search(max_shift=2).rings(64)
    pose, _ = refine(data.images, data.views, label, _off_grid(data.pose, 0), rings)
    angle_error = torch.deg2rad(wrap_degrees(pose.angle - data.pose.angle)).double()
    shift_error = (pose.shift - data.pose.shift).double()
    # `bench.bound` is tested against integrals of a Gaussian.
    variance = pose_covariance(data.views).diagonal(dim1=-2, dim2=-1)[label]
    ratio_angle = (angle_error.square() / variance[:, 0]).mean().sqrt()
    ratio_shift = (shift_error.square().sum(1) / variance[:, 1:].sum(1)).mean().sqrt()
    # 400 draws of a normal: a relative error of 1 / sqrt(800) = 3.5 %; three of those and 10 %.
    assert 0.85 < ratio_angle < 1.2
    assert 0.85 < ratio_shift < 1.2


def test_a_step_never_lowers_the_score() -> None:
    data = simulate(n=30, n_classes=2, size=40, snr=0.02, max_shift=1.0, seed=3)
    rings = Search(max_shift=1).rings(40)
    label = data.class_number - 1
    start = _off_grid(data.pose, 0)
    _, before = refine(data.images, data.views, label, start, rings, steps=0)
    _, after = refine(data.images, data.views, label, start, rings, steps=4)
    assert (after >= before - 1e-6).all()  # rounding
    assert (after > before).double().mean() > 0.9


def test_references_that_say_nothing_leave_the_pose() -> None:
    images = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(1, 32, 32)
    label = torch.zeros(3, dtype=torch.int64)
    pose, score = refine(images, empty, label, Pose.identity(3), Search(max_shift=1).rings(32))
    assert torch.equal(pose.angle, torch.zeros(3))
    assert torch.equal(pose.shift, torch.zeros(3, 2))
    assert torch.equal(score, torch.zeros(3))
    # A round reference has no angle: the shift is found all the same.
    grid = pixel_grid((41, 41), images)
    disc = torch.exp(-grid.square().sum(-1) / 50)[None]
    particle = torch.exp(-(grid + torch.tensor([0.4, -0.3])).square().sum(-1) / 50)[None]
    pose, score = refine(particle, disc, label[:1], Pose.identity(1), Search().rings(41))
    torch.testing.assert_close(pose.shift[0], torch.tensor([0.4, -0.3]), atol=2e-3, rtol=0)
    assert math.isfinite(float(pose.angle))
    assert score > 0.999


def test_input_that_does_not_fit_is_refused() -> None:
    images, views, pose = torch.randn(2, 32, 32), torch.randn(3, 32, 32), Pose.identity(2)
    label, rings = torch.tensor([0, 2]), Search(max_shift=1).rings(32)
    for wrong, words in (
        ((images, views, torch.tensor([0, 3]), pose), "labels from 0 to 3, 3 references"),
        ((images, views, torch.tensor([-1, 0]), pose), "labels from -1 to 0"),
        ((images, views, label.int(), pose), "int32"),
        ((images, views[:, 1:, 1:], label, pose), "of one box"),
        ((images, views, label[:1], pose), "one for each image"),
        ((images, views, label, Pose.identity(3)), "one for each image"),
        ((images, views.double(), label, pose), "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            refine(*wrong, rings)


def test_the_operator_keeps_its_promises_for_strided_poses() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 24, 24, generator=generator)
    templates = templates_of(torch.randn(2, 24, 24, generator=generator))
    shift = torch.rand(2, 3, generator=generator).mT  # (3, 2), columns side by side
    label, angle = torch.tensor([0, 1, 0]), torch.rand(6, generator=generator)[::2]
    arguments = (images, templates, label, angle, shift, angle > 0.5, 1, 9, 1)
    torch.library.opcheck(
        torch.ops.cryoalign.refine_poses, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and in PyTorch
def test_steps_go_up_and_not_far_even_of_noise(dtype: torch.dtype) -> None:
    """White noise on both sides: least squares has nothing to follow, and steps overshoot."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(100, 32, 32, generator=generator, dtype=dtype)
    references = torch.randn(3, 32, 32, generator=generator, dtype=dtype)
    start = Pose(
        torch.rand(100, generator=generator) * 360 - 180,
        torch.rand(100, 2, generator=generator) * 2 - 1,
        torch.rand(100, generator=generator) < 0.5,
    )
    label, rings = torch.arange(100) % 3, Search(max_shift=1).rings(32)
    given = (images, references, label, start, rings)
    scores = [refine(*given, steps=steps)[1] for steps in (0, 1, 2, 4)]
    rise = torch.stack(scores).diff(dim=0)
    assert rise.min() > -1e-5  # rounding
    assert rise.sum(0).mean() > 0.01
    once, _ = refine(*given, steps=1)
    assert (once.shift - start.shift).abs().max() < 0.701
    assert wrap_degrees(once.angle - start.angle).abs().max() < 2.001
