"""The two-stage search by the GPU kernels against the same stages in PyTorch, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from cryoalign.images.fourier import fourier_shrink
from cryoalign.images.geometry import sampling_places, transform
from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import reference_spectra, ring_spectra, shifted_rings
from cryoalign.operators import kernels
from cryoalign.operators.correlation import correlation_table
from cryoalign.operators.kernels.images import pack_templates, refine_packed
from cryoalign.operators.pose_refinement import refine_poses
from cryoalign.operators.ring_products import ring_factors
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, pixel_error, wrap_degrees
from cryoalign.search.coarse_to_fine import coarse_poses
from cryoalign.search.kernel_search import kernel_match, kernel_poses
from cryoalign.search.match import (
    Target,
    best_poses,
    log_evidence,
    match_all,
    prepare_target,
)
from cryoalign.search.settings import Search

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    found = kernels.load()
    if not found.loaded:
        pytest.skip(f"{found.message}; {found.advice}")


def target_of(references: torch.Tensor, **search: float) -> Target:
    target = prepare_target(references.cuda(), Search(**search))
    assert target.kernels is not None
    return target


# Box, references, largest shift, noise: factors 1 (few rings), 2 and 3; one to three references.
CASES = [
    (32, 3, 2.0, 0.5),
    (64, 7, 3.0, 0.1),
    (90, 50, 3.0, 0.1),
    (90, 1, 10.0, 0.05),
    (128, 2, 3.0, 0.05),
    (160, 4, 3.0, 0.02),
    (256, 5, 5.0, 0.02),
]


@pytest.mark.parametrize(("size", "k", "max_shift", "snr"), CASES)
def test_poses_are_those_of_the_stages_in_float64(
    size: int, k: int, max_shift: float, snr: float
) -> None:
    data = simulate(200, k, size=size, snr=snr, max_shift=max_shift, seed=size + k)
    target = target_of(data.views, max_shift=max_shift)
    label, pose, score = best_poses(data.images.cuda(), target)
    slow = prepare_target(data.views.double(), Search(max_shift=max_shift))
    expected, expected_pose, expected_score = best_poses(data.images.double(), slow)
    label, pose, score = label.cpu(), pose.to("cpu"), score.cpu()
    same = (label == expected) & (pose.mirror == expected_pose.mirror)
    assert same.double().mean() >= 0.97
    radius = target.rings.last_ring
    apart = pixel_error(pose[same].to(torch.float64), expected_pose[same], radius)
    # The angles of the first stage differ, so that a step may end elsewhere on a flat peak.
    own = pixel_error(expected_pose[same], data.pose[same].to(torch.float64), radius)
    assert apart.median() < 0.25 * own.median()
    off = (score[same] - expected_score[same]).abs()
    assert off.median() < 1e-3
    assert off.quantile(0.95) < 0.1 / math.sqrt(math.pi * radius**2)


def test_white_references_of_a_large_box_are_searched_with_all_angles() -> None:
    """They need all frequencies, and so more rings and angles than the kernels have."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, 192, 192, generator=generator) * soft_mask(192, 80)
    turned = Pose(torch.tensor([40.0, -100.0, 7.0, 150.0]), torch.zeros(4, 2), torch.zeros(4) > 0)
    images = transform(views, turned.inverse()) + 3 * torch.randn(views.shape, generator=generator)
    target = prepare_target(views.cuda(), Search(mirror=False))
    assert target.kernels is None
    found = best_poses(images.cuda(), target)
    assert found.label.tolist() == [0, 1, 2, 3]
    assert wrap_degrees(found.pose.angle.cpu() - turned.angle).abs().max() < 0.5


def test_a_search_never_waits_for_the_gpu() -> None:
    data = simulate(300, 6, size=64, snr=0.1, max_shift=3.0)
    images, target = data.images.cuda(), target_of(data.views)
    assert target.kernels is not None
    expected = kernel_poses(images, target.kernels)  # tables are made at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kernel_poses(images, target.kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.label, expected.label)
    assert torch.equal(found.score, expected.score)


def test_an_image_has_the_same_pose_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = simulate(100, 6, size=64, snr=0.1, max_shift=3.0)
    images, target = data.images.cuda(), target_of(data.views)
    whole = best_poses(images, target)
    monkeypatch.setattr("cryoalign.search.kernel_search.BATCH_BYTES", 7 * 4 * 64**2)
    parts = best_poses(images, target)
    assert torch.equal(parts.label, whole.label)
    assert torch.equal(parts.pose.to_table(), whole.pose.to_table())


def test_images_that_cannot_be_aligned_spoil_no_others() -> None:
    data = simulate(20, 5, size=64, snr=0.1)
    images, target = data.images.cuda(), target_of(data.views)
    expected = best_poses(images, target)
    images[3], images[7] = math.nan, 0.0
    found = best_poses(images, target)
    others = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(found.label[others], expected.label[others])
    assert torch.equal(found.score[others], expected.score[others])
    assert found.score[3].isnan()
    assert found.score[7] == 0
    assert found.label.min() >= 0
    assert found.label.max() < 5


def test_all_pairs_are_those_of_the_coarse_search() -> None:
    data = simulate(60, 9, size=90, snr=0.1, max_shift=3.0)
    target = target_of(data.views)
    found = match_all(data.images.cuda(), target)
    assert target.kernels is not None
    score, _ = kernel_match(data.images.cuda(), target.kernels)
    assert torch.equal(found.score, score)
    # The same grid in float64, with the angles of the kernels.
    slow, rings = prepare_target(data.views.double(), Search()).screen, target.kernels.coarse.rings
    assert slow is not None
    small = fourier_shrink(data.views.double(), slow.size)
    same_grid = slow._replace(
        rings=rings,
        places=sampling_places(shifted_rings(small, rings, slow.shifts), slow.size, slow.size),
        factors=ring_factors(reference_spectra(small, rings)),
    )
    expected, pose = coarse_poses(data.images.double(), same_grid)
    assert (found.score.cpu() - expected).abs().max() < 2e-3
    near = (found.pose.angle.cpu() - pose.angle).abs() < 1e-3
    assert near.double().mean() > 0.98


@pytest.mark.parametrize("mirror", [True, False])
def test_evidence_is_summed_over_all_poses(mirror: bool) -> None:
    data = simulate(40, 5, size=64, snr=0.1, max_shift=3.0)
    target = target_of(data.views, mirror=mirror)
    assert target.kernels is not None
    coarse, temperature = target.kernels.coarse, 0.02
    found = log_evidence(data.images.cuda(), target, temperature).cpu()
    small = fourier_shrink(data.images.double(), coarse.size)
    spectra = ring_spectra(small, coarse.rings, coarse.shifts.cpu().double())
    references = reference_spectra(fourier_shrink(data.views.double(), coarse.size), coarse.rings)
    table = correlation_table(spectra, references, mirror).flatten(2)
    expected = temperature * torch.logsumexp(table / temperature, 2)
    assert (found - expected).abs().max() < 2e-3


def test_several_poses_of_an_image_are_refined_each_for_itself() -> None:
    data = simulate(12, 3, size=64, snr=0.1, max_shift=2.0)
    images = data.images.cuda()
    target = target_of(data.views, max_shift=2.0)
    rings = target.rings
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (12, 4), generator=generator).cuda()
    angle = (torch.rand(12, 4, generator=generator) * 360 - 180).cuda()
    shift = (torch.rand(12, 4, 2, generator=generator) * 2 - 1).cuda()
    mirror = (torch.rand(12, 4, generator=generator) < 0.5).cuda()
    gone = torch.zeros(12, 4, dtype=torch.bool)
    gone[::2, 1] = gone[5] = True
    gone = gone.cuda()
    found = refine_packed(
        images, pack_templates(target.templates, rings), torch.where(gone, -1, label), angle,
        shift, mirror, 2,
    )  # fmt: skip
    for j in range(4):
        alone = refine_poses(
            images, target.templates, label[:, j].contiguous(), angle[:, j].contiguous(),
            shift[:, j].contiguous(), mirror[:, j].contiguous(), 1, rings.last_ring, 2,
        )  # fmt: skip
        for got, expected in zip(found, alone, strict=True):
            assert torch.equal(got[:, j][~gone[:, j]], expected[~gone[:, j]])
    assert (found[2][gone] == torch.finfo(torch.float32).min).all()
    assert torch.equal(found[0][gone], angle[gone])
