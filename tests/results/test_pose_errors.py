import math

import pytest
import torch

from cryoalign.images.polar import Rings
from cryoalign.particles.simulate import Phantom, project
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.results import pose_errors as uncertainty
from cryoalign.results.pose_errors import pose_covariance
from cryoalign.search.refine import refine

SIZE, RINGS = 48, Rings(1, 18)


def _blobs(off_centre: float) -> Phantom:
    """Eight blobs, broad enough for bilinear sampling; off the centre, a turn is a shift too."""
    generator = torch.Generator().manual_seed(5)
    places = torch.rand(8, 3, generator=generator, dtype=torch.float64) * 16 - 8
    places[:, 0] += off_centre
    signs = torch.tensor([1, 1, -1, 1, 1, -1, 1, 1], dtype=torch.float64)
    return Phantom(places, torch.full((8,), 2.0, dtype=torch.float64), 20 * signs)


def _moved(phantom: Phantom, pose: Pose) -> torch.Tensor:
    """The view along z as particles show it: evaluated, not interpolated."""
    along = torch.tensor([[0.0, 0.0, 1.0]]).expand(len(pose), 3)
    return project(phantom, along, pose, size=SIZE)


def _view(phantom: Phantom) -> torch.Tensor:
    return _moved(phantom, Pose.identity(1).to(torch.float64))


def _poses(n: int) -> Pose:
    generator = torch.Generator().manual_seed(1)
    angle = torch.rand(n, generator=generator, dtype=torch.float64) * 360 - 180
    shift = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 4 - 2
    return Pose(angle, shift, torch.arange(n) % 2 == 1)


def _noise(n: int, coloured: bool) -> torch.Tensor:
    noise = torch.randn(n, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    if not coloured:
        return noise
    k = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE))
    amplitude = (1 / (1 + (k / 0.06) ** 2) + 0.15).sqrt()
    return torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(SIZE, SIZE))


@pytest.mark.parametrize("mirror", [False, True])
def test_white_noise_gives_the_inverse_fisher_information(mirror: bool) -> None:
    """Against derivatives by difference of evaluated particles, in float64."""
    phantom = _blobs(4.0)
    n, level = 200, 0.2
    pose = Pose(torch.tensor([77.0]), torch.tensor([[1.3, -0.4]]), torch.tensor([mirror]))
    pose = pose.to(torch.float64)
    columns = [_moved(phantom, pose), torch.ones(1, SIZE, SIZE)]
    for axis, step in enumerate((0.2, 0.02, 0.02)):
        ends = []
        for sign in (1, -1):
            change = torch.zeros(3, dtype=torch.float64)
            change[axis] = sign * step
            ends.append(
                _moved(phantom, Pose(pose.angle + change[0], pose.shift + change[1:], pose.mirror))
            )
        columns.append((ends[0] - ends[1]) / (2 * step))
    axis_x = torch.arange(SIZE) - SIZE // 2
    x, y = torch.meshgrid(axis_x + 1.3, axis_x - 0.4, indexing="xy")
    disc = torch.hypot(x, y) < RINGS.last_ring + 0.5
    jacobian = torch.cat(columns)[:, disc].double()  # (5, p)
    expected = (level**2 * torch.linalg.inv(jacobian @ jacobian.mT))[2:, 2:]

    images = _moved(phantom, pose) + level * _noise(n, coloured=False)
    many = Pose(
        *(
            each.expand(n, *each.shape[1:]).to(dtype)
            for each, dtype in (
                (pose.angle, torch.float32),
                (pose.shift, torch.float32),
                (pose.mirror, torch.bool),
            )
        )
    )
    label = torch.zeros(n, dtype=torch.int64)
    view = _view(phantom)
    refined, _ = refine(images, view, label, many, RINGS, steps=4)
    found = pose_covariance(images, view, label, refined, RINGS)
    assert found.dtype == torch.float32
    # Off the diagonal in units of the deviations: zero there has no relative error.
    scale = expected.diagonal().sqrt()
    ratio = found.double().mean(0) / (scale[:, None] * scale)
    truth = expected / (scale[:, None] * scale)
    assert truth[0, 1:].abs().max() > 0.3  # the case has correlations to get wrong
    # The mean of 200 noise estimates, each from some hundred numbers: 1 %; three of those and the
    # disc's rim.
    torch.testing.assert_close(ratio, truth, atol=0.04, rtol=0)


@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("off_centre", [0.0, 4.0])
def test_intervals_cover_the_truth(coloured: bool, off_centre: float) -> None:
    phantom, n = _blobs(off_centre), 2000
    truth, view = _poses(n), _view(phantom)
    images = _moved(phantom, truth) + 0.3 * _noise(n, coloured)
    label = torch.zeros(n, dtype=torch.int64)
    start = Pose((truth.angle / 1.4).round() * 1.4, truth.shift.round(), truth.mirror)
    pose, _ = refine(images, view, label, start.to(torch.float32), RINGS, steps=4)
    covariance = pose_covariance(images, view, label, pose, RINGS)
    turn = wrap_degrees(pose.angle - truth.angle)
    error = torch.cat([turn[:, None], pose.shift - truth.shift], 1).float()  # (n, 3)
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    covered = (error.abs() < 1.96 * deviation).double().mean(0)
    # Three binomial deviations, 3 sqrt(0.05 * 0.95 / n) = 0.015; and one per cent for what first
    # order, and a disc that a steep spectrum leaks from, leave out.
    assert (covered - 0.95).abs().max() < 0.025
    distance = (error.unsqueeze(1) @ torch.linalg.solve(covariance, error.unsqueeze(2))).squeeze()
    # Chi-squared with three degrees of freedom: mean 3, of 2000 within 3 sqrt(6 / 2000) = 0.16,
    # times 1.1 for the same reason.
    assert float(distance.mean()) == pytest.approx(3, abs=0.46)


def test_what_says_nothing_is_not_known() -> None:
    generator = torch.Generator().manual_seed(0)
    view = _view(_blobs(0.0))
    references = torch.cat([view, torch.zeros_like(view), torch.ones_like(view)])
    images = torch.cat([view, view, view, -view, torch.zeros_like(view)])
    images = images + 0.1 * torch.randn(5, SIZE, SIZE, generator=generator)
    images[4] = 0
    label = torch.tensor([0, 1, 2, 0, 0])
    found = pose_covariance(images, references, label, Pose.identity(5), RINGS)
    assert found[0].isfinite().all()
    for nothing in found[[1, 3, 4]]:
        assert torch.equal(nothing, torch.diag(torch.full((3,), math.inf)))
    assert (found[2].diagonal() > 1e6).all()  # a constant, but for rounding


def test_a_round_reference_does_not_tell_the_angle() -> None:
    """Nor one blob off the centre, which a shift takes where a turn does."""
    x, y = torch.meshgrid(*[torch.arange(SIZE) - SIZE // 2] * 2, indexing="xy")
    centred, off, bar = (
        torch.exp(-((x - at) ** 2) / (2 * width**2) - (y - at) ** 2 / 18)
        for at, width in ((0, 3.0), (4, 3.0), (0, 3.15))
    )
    references = torch.stack([centred, off, bar])
    generator = torch.Generator().manual_seed(0)
    images = references + 0.05 * torch.randn(3, SIZE, SIZE, generator=generator)
    found = pose_covariance(images, references, torch.arange(3), Pose.identity(3), RINGS)
    assert found[:2, 0, 0].isinf().all()
    assert found[2].isfinite().all()  # 5 % longer: known, if badly
    assert found[2, 0, 0] > 10


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    phantom, truth = _blobs(1.0), _poses(7)
    images = _moved(phantom, truth) + _noise(7, coloured=True)
    arguments = _view(phantom), torch.zeros(7, dtype=torch.int64), truth.to(torch.float32), RINGS
    whole = pose_covariance(images, *arguments)
    monkeypatch.setattr(uncertainty, "CPU_CHUNK", 3 * SIZE**2)
    torch.testing.assert_close(pose_covariance(images, *arguments), whole, rtol=1e-4, atol=1e-9)
    none = pose_covariance(images[:0], arguments[0], arguments[1][:0], truth[:0], RINGS)
    assert none.shape == (0, 3, 3)


def test_input_that_does_not_fit_is_refused() -> None:
    images, views = torch.randn(2, 20, 20), torch.randn(3, 20, 20)
    label, pose, rings = torch.zeros(2, dtype=torch.int64), Pose.identity(2), Rings(1, 8)
    with pytest.raises(ValueError, match="one box"):
        pose_covariance(images, torch.randn(3, 21, 21), label, pose, rings)
    with pytest.raises(ValueError, match="square"):
        pose_covariance(images[:, :18], views[:, :18], label, pose, rings)
    with pytest.raises(ValueError, match=r"particles are torch.float64, references torch.float32"):
        pose_covariance(images.double(), views, label, pose, rings)
    with pytest.raises(ValueError, match="one each"):
        pose_covariance(images, views, label, Pose.identity(3), rings)
    with pytest.raises(ValueError, match="labels from 0 to 3, 3 references"):
        pose_covariance(images, views, torch.tensor([0, 3]), pose, rings)
