import math

import pytest
import torch

from cryoalign.images.fourier import fourier_resize, fourier_shrink
from cryoalign.images.geometry import transform
from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search import coarse_to_fine as adaptive
from cryoalign.search.coarse_to_fine import coarse_factor, coarse_shifts, prepare_coarse
from cryoalign.search.match import best_poses, match, prepare_target
from cryoalign.search.refine import grid_pose, refine
from cryoalign.search.settings import Search


@pytest.fixture(autouse=True)
def one_thread():
    """Small products gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def found(images: torch.Tensor, references: torch.Tensor, mode: str, **search: float):
    return best_poses(images, prepare_target(references, Search(mode=mode, **search)))


def errors(data: Simulation, n: int, label: torch.Tensor, pose: Pose) -> tuple[float, float, float]:
    """Share of wrong classes or hands; median angle (degrees) and shift (pixels) of the others."""
    truth = data.pose[:n]
    right = (label == data.class_number[:n] - 1) & (pose.mirror == truth.mirror)
    turn = wrap_degrees(pose.angle - truth.angle).abs()[right].median()
    off = (pose.shift - truth.shift).norm(dim=1)[right].median()
    return float((~right).double().mean()), float(turn), float(off)


def broadband(k: int, size: int, cutoff: float, radius: float, seed: int = 3) -> torch.Tensor:
    """(k, size, size) white noise up to ``cutoff`` cycles/px, within a mask."""
    white = torch.randn(k, size, size, generator=torch.Generator().manual_seed(seed))
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size))
    views = torch.fft.irfft2(torch.fft.rfft2(white) * (frequency < cutoff), s=(size, size))
    return views * soft_mask(size, radius)


def particles_of(views: torch.Tensor, n: int, snr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, size, size), at random poses, and label (n,), hand (n,) in one (n, 2)."""
    k, size = len(views), views.shape[-1]
    generator = torch.Generator().manual_seed(4)
    label = torch.randint(k, (n,), generator=generator)
    pose = Pose(
        torch.rand(n, generator=generator) * 360 - 180,
        torch.rand(n, 2, generator=generator) * 6 - 3,
        torch.rand(n, generator=generator) < 0.5,
    )
    back = pose.inverse()
    # Moved on a grid three times as fine: bicubic interpolation loses little there.
    large = fourier_resize(views[label], 3 * size)
    clean = fourier_resize(transform(large, Pose(back.angle, 3 * back.shift, back.mirror)), size)
    clean = clean * (math.sqrt(snr) / views.std())
    images = clean + torch.randn(n, size, size, generator=generator)
    return images, torch.stack([label, pose.mirror.long()], 1)


def choices(images: torch.Tensor, references: torch.Tensor, mode: str, **search: float):
    """(n, 2) class and hand."""
    label, pose, _ = found(images, references, mode, **search)
    return torch.stack([label, pose.mirror.long()], 1)


def test_broadband_references_are_compared_at_more_than_half_the_resolution() -> None:
    """What tells them apart lies where half the resolution has nothing."""
    views = broadband(20, 72, 0.3, 29)
    images, truth = particles_of(views, 100, 0.012)
    assert coarse_factor(views, Rings(1, 32)) < 1.5
    exhaustive, adaptive = (
        int((choices(images, views, mode, last_ring=32) != truth).any(1).sum())
        for mode in ("exhaustive", "adaptive")
    )
    assert exhaustive <= 2  # it can be done
    assert adaptive <= exhaustive


def test_molecules_and_noisy_averages_are_compared_at_half_the_resolution() -> None:
    data = simulate(1500, 30, size=90, snr=0.02, seed=0)
    mask = soft_mask(90, 36)
    rings = Rings(1, 36)
    assert coarse_factor(data.views * mask, rings) == 2
    averages = torch.zeros_like(data.views).index_add_(
        0, data.class_number - 1, transform(data.images, data.pose)
    )
    assert coarse_factor(averages * mask, rings) == 2
    assert coarse_factor(torch.zeros(2, 90, 90), rings) == 2
    assert coarse_factor(broadband(5, 90, 0.4, 33), rings) == 1


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("mirror", [True, False])
def test_half_the_angles_find_what_all_angles_do(mirror: bool) -> None:
    data = simulate(120, 12, size=72, snr=0.05, max_shift=2.0, mirror=mirror, seed=2)
    coarse = prepare_coarse(data.views, Rings(1, 32), 2.0, mirror)
    assert coarse.half_factors is not None
    small = fourier_shrink(data.images, coarse.size)
    these = adaptive._screened(small, coarse, coarse.half_factors, 0.15)
    score, place = (each.flatten(1) for each in adaptive._peaks_in_pytorch(small, coarse))
    pose = grid_pose(place, coarse.shifts, coarse.rings, mirror)
    pair = these.label * (1 + mirror) + (these.pose.mirror.long() if mirror else 0)
    exact = score[these.particle, pair]
    assert len(these.particle) > 1.2 * len(small)
    assert set(these.particle.tolist()) == set(range(len(small)))
    # A score is that of the exact table, or lower where half the angles prefer another shift.
    assert (these.score <= exact + 1e-6).all()
    same = (these.pose.shift == pose.shift[these.particle, pair]).all(1)
    assert same.double().mean() > 0.8
    torch.testing.assert_close(these.score[same], exact[same], rtol=0, atol=1e-6)
    turn = wrap_degrees(these.pose.angle - pose.angle[these.particle, pair])[same]
    assert (turn.abs() < 1e-3).all()
    best = adaptive._best(these, these.score, len(small), 1, 0.0)
    assert torch.equal(best.label, score.argmax(1) // (1 + mirror))


@pytest.mark.usefixtures("in_pytorch")
def test_half_the_angles_only_where_they_lose_little() -> None:
    views = broadband(20, 72, 0.3, 29)
    assert prepare_coarse(views, Rings(1, 32), 3.0, True).half_factors is None
    images, truth = particles_of(views, 100, 0.012)
    assert int((choices(images, views, "adaptive", last_ring=32) != truth).any(1).sum()) == 0
    low = broadband(20, 72, 0.1, 29)
    assert prepare_coarse(low, Rings(1, 32), 3.0, True).half_factors is not None


@pytest.mark.parametrize("seed", range(8))
def test_white_references_are_compared_at_full_resolution(seed: int) -> None:
    """All frequencies have as much power as the last: no coarser grid is known to keep enough."""
    assert coarse_factor(broadband(5, 90, 0.5, 33, seed), Rings(1, 36)) == 1
    assert coarse_factor(broadband(5, 90, 0.8, 33, seed), Rings(1, 36)) == 1


def test_margins_keep_what_wider_ones_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a third of all particles is lost in noise, twice the hypotheses change one choice in
    25: half as many would change three times that (6 and 1, margin 0.75)."""
    views = broadband(30, 64, 0.2, 23)
    images, _ = particles_of(views, 300, 0.004)
    kept = choices(images, views, "adaptive", last_ring=26)
    wider = (("COARSE_KEPT", 16), ("COARSE_MARGIN", 3.0), ("FINE_KEPT", 4), ("FINE_MARGIN", 2.0))
    for name, value in wider:
        monkeypatch.setattr(adaptive, name, value)
    wide = choices(images, views, "adaptive", last_ring=26)
    assert int((kept != wide).any(1).sum()) <= 14


def test_a_particle_of_nan_harms_no_other() -> None:
    data = simulate(20, 4, size=48, snr=0.2, max_shift=2, seed=0)
    images = data.images.clone()
    images[3, 10, 10], images[7] = math.nan, math.nan
    label, pose, score = found(images, data.views, "adaptive", max_shift=2)
    other, other_pose, other_score = found(data.images, data.views, "adaptive", max_shift=2)
    good = torch.ones(20, dtype=torch.bool)
    good[[3, 7]] = False
    assert torch.equal(label[good], other[good])
    assert torch.equal(pose.angle[good], other_pose.angle[good])
    assert torch.equal(score[good], other_score[good])
    assert not score[~good].isfinite().any()  # told by the score, and no crash
    assert ((label >= 0) & (label < 4)).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["clean", "noisy"])
def test_adaptive_loses_nothing(kind: str, seed: int) -> None:
    n, k = 150, 12
    data = simulate(n + 50 * k, k, size=72, snr=0.05, seed=seed)
    references = data.views
    if kind == "noisy":  # averages of 50 other particles, at poses that are slightly off
        generator = torch.Generator().manual_seed(seed)
        pose = data.pose[n:]
        pose = Pose(
            pose.angle + torch.randn(len(pose), generator=generator),
            pose.shift + 0.4 * torch.randn(len(pose), 2, generator=generator),
            pose.mirror,
        )
        member = data.class_number[n:] - 1
        references = torch.zeros_like(references).index_add_(
            0, member, transform(data.images[n:], pose)
        )
        references = references / torch.bincount(member)[:, None, None]
    references = references * soft_mask(72, 28)
    images = data.images[:n]
    label, pose, score = found(images, references, "adaptive", last_ring=28)
    other, other_pose, other_score = found(images, references, "exhaustive", last_ring=28)

    search = Search(last_ring=28)
    grid = match(images, references, search)
    row = torch.arange(n)
    first, second = (
        refine(images, references, c, grid.pose[row, c], search.rings(72))[1]
        for c in grid.score.topk(2, 1).indices.unbind(1)
    )
    decided = (first - second).abs() > 0.25 / (math.sqrt(math.pi) * 28)
    assert decided.double().mean() > 0.9
    assert torch.equal(label[decided], other[decided])
    wrong, turn, off = errors(data, n, label, pose)
    other_wrong, other_turn, other_off = errors(data, n, other, other_pose)
    # Medians of 150 errors, paired: a few per cent of play.
    assert wrong <= other_wrong + 1 / n
    assert turn <= 1.07 * other_turn
    assert off <= 1.07 * other_off
    if kind == "clean":
        assert (score - other_score).abs().median() < 1e-4


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (48, {"max_shift": 2}),
        (49, {"max_shift": 2}),
        (81, {"max_shift": 3, "mirror": False}),
        (64, {"max_shift": 1.5, "shift_step": 0.5, "first_ring": 3}),
        (80, {"max_shift": 2, "ring_step": 2, "last_ring": 33}),
        (64, {"max_shift": 0}),
    ],
)
@pytest.mark.parametrize("k", [1, 5])
def test_noise_free_particles_come_back_to_their_pose(size: int, settings: dict, k: int) -> None:
    reach = min(1.5, settings["max_shift"])
    data = simulate(
        30, k, size=size, snr=1e4, max_shift=reach, mirror=settings.get("mirror", True), seed=size
    )
    label, pose, score = found(data.images, data.views, "adaptive", **settings)
    assert torch.equal(label, data.class_number - 1)
    assert torch.equal(pose.mirror, data.pose.mirror)
    assert wrap_degrees(pose.angle - data.pose.angle).abs().max() < 0.3
    assert (pose.shift - data.pose.shift).norm(dim=-1).max() < 0.06
    assert score.min() > 0.98


@pytest.mark.usefixtures("in_pytorch")  # whose batches these are
def test_batch_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = simulate(45, 6, size=48, snr=0.05, seed=4)
    label, pose, score = found(data.images, data.views, "adaptive")
    for batch, chunk, together in ((1, 1, 1), (7, 3, 2), (1024, 32, 5)):
        monkeypatch.setattr(adaptive, "BATCH", batch)
        monkeypatch.setattr(adaptive, "CHUNK", chunk)
        monkeypatch.setattr(adaptive, "TOGETHER", together)
        again, other, other_score = found(data.images, data.views, "adaptive")
        assert torch.equal(label, again)
        assert torch.equal(score, other_score)
        assert torch.equal(pose.angle, other.angle)
        assert torch.equal(pose.shift, other.shift)


@pytest.mark.parametrize(("old", "new"), [(91, 45), (90, 45), (65, 33), (64, 31)])
def test_fourier_shrink_is_the_fourier_resize(old: int, new: int) -> None:
    images = torch.randn(2, old, old, generator=torch.Generator().manual_seed(old))
    torch.testing.assert_close(fourier_shrink(images, new), fourier_resize(images, new))


def test_fourier_shrink_keeps_the_centre_of_even_boxes() -> None:
    data = simulate(3, 3, size=64, snr=math.inf, max_shift=0, seed=0)
    small = fourier_shrink(data.views, 40)
    truth = fourier_resize(data.views, 40)
    # Only the last frequency is left out.
    assert (small - truth).abs().max() < 0.02 * truth.abs().max()


@pytest.mark.parametrize("reach", [0.0, 0.5, 1.0, 1.5, 2.3])
def test_coarse_shifts_leave_no_gap(reach: float) -> None:
    shifts = coarse_shifts(reach)
    axis = torch.linspace(-reach, reach, 41)
    everywhere = torch.cartesian_prod(axis, axis)
    gap = (everywhere[:, None] - shifts).abs().amax(-1).amin(1).max()
    assert gap <= 0.5 + 1e-5


def test_images_that_say_nothing_and_no_images() -> None:
    data = simulate(4, 3, size=40, snr=1.0, max_shift=2, seed=0)
    images = torch.cat([torch.zeros(2, 40, 40), data.images])
    label, pose, score = found(images, data.views, "adaptive")
    assert label.shape == score.shape == pose.angle.shape == (6,)
    assert torch.equal(label[2:], data.class_number - 1)
    assert torch.equal(score[:2], torch.zeros(2))
    with pytest.raises(ValueError, match="no images"):
        found(images[:0], data.views, "adaptive")


def test_small_boxes_are_compared_at_full_resolution() -> None:
    coarse = prepare_coarse(torch.randn(2, 32, 32), Search(max_shift=2).rings(32), 2, True)
    assert coarse.factor == 1
    coarse = prepare_coarse(broadband(2, 90, 0.1, 36), Search(last_ring=36).rings(90), 3, True)
    assert (coarse.factor, coarse.size, len(coarse.shifts)) == (2, 45, 9)


def test_a_gpu_has_its_kernels_angles_only_where_they_are_enough() -> None:
    for last in (16, 30, 48):
        assert adaptive._angles(last, on_gpu=True) == 256
    for last in (49, 62, 96):
        assert adaptive._angles(last, on_gpu=True) == adaptive._angles(last) >= 2 * math.pi * last


def test_modes_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"requires search\.refine=true"):
        Search(mode="adaptive", refine=False)
    assert Search().is_adaptive
    assert Search(mode="adaptive").is_adaptive
    assert not Search(refine=False).is_adaptive
    assert not Search(mode="exhaustive").is_adaptive
