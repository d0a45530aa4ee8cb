"""The GPU's features, refinement and class sums against float64 in PyTorch."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from cryoalign.images.geometry import sample
from cryoalign.images.polar import (
    Rings,
    normalised_spectra,
    reference_spectra,
    ring_points,
    ring_spectra,
)
from cryoalign.images.templates import _gradient
from cryoalign.operators import kernels
from cryoalign.operators.aligned_sums import sum_aligned
from cryoalign.operators.correlation import correlation_table
from cryoalign.operators.image_search import image_peaks
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.kernels.peaks import Layout
from cryoalign.operators.pose_refinement import refine_poses
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.match import best_match, match
from cryoalign.search.settings import Search

# Box, ring, shifts a side.
SIZES = [
    (90, 36, 7),
    (90, 30, 3),
    (61, 24, 5),
    (64, 31, 1),
    (101, 36, 11),
    (90, 36, 9),
]


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    found = kernels.load()
    if not found.loaded:
        pytest.skip(f"{found.message}; {found.advice}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out is full of NaN: what a kernel leaves out shows."""
    for owner, name in ((Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        plain = getattr(owner, name)

        def fill(*args, _plain=plain, **keywords):
            made = _plain(*args, **keywords)
            return made.fill_(math.nan if made.is_floating_point() else 77)

        monkeypatch.setattr(owner, name, fill)


def particles(n: int, k: int, size: int, snr: float = 0.1, device: str = "cuda"):
    """Noisy particles and views, poses rounded to the search's grid."""
    data = simulate(n=n, n_classes=k, size=size, snr=snr, max_shift=2.0, seed=n + size)
    step = 360 / 256
    start = Pose((data.pose.angle / step).round() * step, data.pose.shift.round(), data.pose.mirror)
    label = data.class_number - 1
    return data.images.to(device), data.views.to(device), label.to(device), start.to(device)


def refinement(device: str, size: int, last_ring: int, n: int = 37, k: int = 3):
    """Arguments of `refine_poses`, but the steps."""
    images, views, label, start = particles(n, k, size, device=device)
    templates = torch.stack([views, *_gradient(views)], 1)
    return images, templates, label, start.angle, start.shift, start.mirror, 1, last_ring


in_pytorch = inspect.unwrap


def widened(arguments: tuple) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("size", "last_ring", "first_ring"), [(90, 36, 1), (61, 30, 4), (64, 31, 1), (180, 85, 1)]
)
def test_refined_poses_are_float64s(gpu, size: int, last_ring: int, first_ring: int) -> None:
    arguments = list(refinement("cuda", size, last_ring))
    arguments[6] = first_ring
    angle, shift, score = refine_poses(*arguments, 3)
    angle64, shift64, score64 = in_pytorch(refine_poses)(*widened(tuple(arguments)), 3)
    # A last step whose gain is rounding may be taken by one and not by the other.
    assert wrap_degrees(angle - angle64).abs().quantile(0.9) < 0.02
    apart = (shift - shift64).norm(dim=1)
    assert apart.median() < 0.001
    assert apart.quantile(0.9) < 0.004
    assert (score - score64).abs().max() < 2e-4
    assert wrap_degrees(angle - angle64).abs().max() < 0.2


@pytest.mark.gpu
def test_refinement_starts_from_what_it_is_given(gpu) -> None:
    arguments = refinement("cuda", 64, 28)
    angle, shift, score = refine_poses(*arguments, 0)
    torch.testing.assert_close(angle, wrap_degrees(arguments[3]))
    assert torch.equal(shift, arguments[4])
    expected = in_pytorch(refine_poses)(*widened(arguments), 0)[2].float()
    torch.testing.assert_close(score, expected, atol=5e-5, rtol=0)


@pytest.mark.gpu
def test_refinement_of_nothing_and_far_away(gpu) -> None:
    images, templates, label, angle, shift, mirror, first, last = refinement("cuda", 64, 28)
    empty = refine_poses(images, 0 * templates, label, angle, shift, mirror, first, last, 3)
    assert torch.equal(empty[1], shift)
    assert not empty[2].any()
    far = refine_poses(images, templates, label, angle, shift + 1e6, mirror, first, last, 3)
    assert torch.equal(far[2], torch.zeros_like(far[2]))


@pytest.mark.gpu
def test_refinement_is_the_same_in_any_batch(gpu) -> None:
    arguments = refinement("cuda", 64, 28, n=70)
    whole = refine_poses(*arguments, 3)
    again = refine_poses(*arguments, 3)
    part = refine_poses(*[a[11:12] if i in (0, 2, 3, 4, 5) else a for i, a in
                          enumerate(arguments)], 3)  # fmt: skip
    for a, b, c in zip(whole, again, part, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[11:12], c)


def placed(device: str, n: int, size: int | tuple[int, int], groups: int, seed: int = 0):
    """Arguments of `sum_aligned`: noise at any pose, with the last group empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, size) if isinstance(size, int) else size
    images = torch.randn(n, *shape, generator=generator)
    angle = 360 * torch.rand(n, generator=generator) - 180
    shift = 12 * torch.rand(n, 2, generator=generator) - 6
    mirror = torch.rand(n, generator=generator) < 0.5
    group = torch.randint(max(1, groups - 1), (n,), generator=generator)
    return *(t.to(device) for t in (images, angle, shift, mirror, group)), groups


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("n", "size", "groups"),
    [(300, 90, 20), (37, 61, 5), (5, 128, 1), (40, (48, 67), 3), (9, 256, 2), (1, 32, 2)],
)
def test_class_sums_are_float64s(gpu, n: int, size, groups: int) -> None:
    arguments = placed("cuda", n, size, groups)
    images, found = arguments[0], sum_aligned(*arguments)
    expected = in_pytorch(sum_aligned)(*widened(arguments))
    # A coordinate of c pixels is off by 1e-7 c; noise changes by about itself from pixel to pixel.
    error = (found - expected).square().mean().sqrt() if n else 0
    assert error <= 3e-7 * max(images.shape[-2:]) * expected.square().mean().sqrt()
    assert groups == 1 or not found[-1].any()


@pytest.mark.gpu
def test_class_sums_are_the_same_in_any_batch(gpu) -> None:
    arguments = placed("cuda", 301, 90, 7)
    found = sum_aligned(*arguments)
    assert torch.equal(found, sum_aligned(*arguments))
    parts = sum(
        sum_aligned(*[a[rows] for a in arguments[:5]], 7)
        for rows in (slice(0, 100), slice(100, 301))
    )
    assert torch.equal(found.float(), parts.float())


def unpacked(packed, layout: Layout, n: int) -> tuple[Tensor, Tensor]:
    """True spectra (n, s, r, m) in float64 as common.cuh lays them out, and which are kept."""
    spectra, scale = packed.spectra.double().cpu(), packed.scale.double().cpu()
    blocks, s = spectra.shape[:2]
    frequencies = 16 * len(layout.steps)
    out = torch.zeros(blocks, 8, s, layout.rings, frequencies, dtype=torch.complex128)
    kept = torch.zeros(layout.rings, frequencies, dtype=torch.bool)
    fragment = 0
    for parity in (0, 1):
        for q, steps in enumerate(layout.steps):
            for t in range(steps):
                for mm in range(8):
                    m = 2 * (8 * q + mm) + parity
                    piece = spectra[:, :, fragment].reshape(blocks, s, 8, 4, 2, 2, 2)
                    for c in range(4):
                        for high in (0, 1):
                            for e in (0, 1):
                                ring = layout.rings - 1 - (16 * t + 2 * c + e + 8 * high)
                                if ring < 0:
                                    assert not piece[:, :, :, c, high, :, e].any()
                                    continue
                                z = torch.complex(*piece[:, :, :, c, high, :, e].unbind(-1))
                                out[:, :, :, ring, m] = z.transpose(1, 2)
                                kept[ring, m] = True
                    fragment += 1
    out = out.flatten(0, 1) * scale[:, :, None, None]
    assert not out[n:].abs().any()
    return out[:n], kept


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("size", "last_ring", "side"), [*SIZES, (101, 40, 9), (140, 64, 3)])
@pytest.mark.parametrize(("first_ring", "ring_step"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("shift_step", [1.0, 0.7])
def test_packed_features_are_ring_spectra(
    gpu,
    size: int,
    last_ring: int,
    side: int,
    first_ring: int,
    ring_step: int,
    shift_step: float,
) -> None:
    n = 11
    images = particles(n, 2, size)[0] * 37 + 5
    rings = Rings(first_ring, last_ring, ring_step, 256)
    # Ring r carries frequencies to pi r: what lies in steps of 16 rings, outermost first.
    radii = rings.radii()
    carried = [int((math.pi * radii >= low).sum()) for low in range(0, 128, 16)]
    layout = Layout(len(radii), 256, tuple(-(-count // 16) for count in carried if count))
    axis = (torch.arange(side) - side // 2) * shift_step
    there = torch.cartesian_prod(axis, axis).float()
    shifts, reach = there.double(), last_ring + side // 2
    packed = kernel_images.pack_images(images, rings, there.cuda(), layout, reach)
    found, kept = unpacked(packed, layout, n)
    # The same at angles half a step on, turned back.
    like = images.cpu().double()
    angle = torch.tensor(math.pi / 256, dtype=torch.float64)
    turn = torch.stack(
        [torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])]
    )
    points = (ring_points(rings, like) @ turn)[None] - shifts[:, None, None]
    polar = sample(like, points[None])
    back = torch.exp(-1j * math.pi / 256 * torch.arange(129, dtype=torch.float64))
    expected = (normalised_spectra(polar, rings) * back)[..., : kept.shape[1]]
    rest = found[:, :, kept] - expected[..., : kept.shape[1]][:, :, kept]
    error = rest.abs().square().sum(-1) / expected[:, :, kept].abs().square().sum(-1)
    assert error.sqrt().max() < 4e-3
    again = kernel_images.pack_images(images, rings, there.cuda(), layout, reach)
    assert torch.equal(again.spectra, packed.spectra)
    assert torch.equal(again.scale, packed.scale)
    part = kernel_images.pack_images(images[8:], rings, there.cuda(), layout, reach)
    assert torch.equal(part.spectra[0, :, :, :12], packed.spectra[1, :, :, :12])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("size", "last_ring", "side"), [*SIZES, (131, 60, 3)])
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("k", [1, 13])
def test_image_peaks_are_float64s(
    gpu, size: int, last_ring: int, side: int, mirror: bool, k: int
) -> None:
    n = 21
    images, views = particles(n, k, size)[:2]
    search = Search(max_shift=side // 2, last_ring=min(last_ring, (size - 1) // 2 - side // 2),
                    mirror=mirror)  # fmt: skip
    rings = search.rings(size)
    spectra = ring_spectra(views, rings)[:, 0]
    numbers = (rings.first_ring, rings.ring_step, rings.last_ring, rings.n_angles, mirror)
    score, place = image_peaks(images, spectra, search.shifts(), *numbers, None)
    wide = ring_spectra(images.double(), rings, search.shifts().cuda())
    table = correlation_table(wide, ring_spectra(views.double(), rings)[:, 0], mirror).flatten(2)
    # The score is the table's at the place given, and near the best there is.
    torch.testing.assert_close(
        score.double(), table.gather(2, place[..., None])[..., 0], atol=2e-5, rtol=0
    )
    assert (table.amax(2) - score).max() < 4e-3
    assert (table.amax(2) - score).mean() < 3e-4
    few, where = image_peaks(images, spectra, search.shifts(), *numbers, 4)
    best, label = score.max(1)
    assert torch.equal(few.max(1).values, best)
    there = where.gather(1, label[:, None])
    assert torch.equal(there, place.gather(1, label[:, None]))
    assert (few - score).abs().max() < 1e-2
    one = image_peaks(images[9:10], spectra, search.shifts(), *numbers, 4)
    assert torch.equal(one[0], few[9:10])
    assert torch.equal(one[1], where[9:10])


@pytest.mark.gpu
def test_images_that_say_nothing(gpu) -> None:
    images, views = particles(9, 3, 64)[:2]
    images[2] = 0
    images[3] = 7.5
    images[4, 32, 32] = 1e4
    search = Search(max_shift=2, last_ring=24)
    found = match(images, views, search)
    expected = match(images.cpu(), views.cpu(), search)
    assert not found.score[2].any()
    assert not found.score[3].any()
    torch.testing.assert_close(found.score.cpu(), expected.score, atol=2e-3, rtol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operators_keep_their_contract(device: str, request: pytest.FixtureRequest) -> None:
    if device == "cuda":
        request.getfixturevalue("gpu")
    torch.library.opcheck(torch.ops.cryoalign.refine_poses, (*refinement(device, 32, 12, n=5), 2))
    torch.library.opcheck(torch.ops.cryoalign.sum_aligned, placed(device, 7, 24, 3))
    images, views = particles(5, 2, 40, device=device)[:2]
    search = Search(max_shift=1, last_ring=12)
    spectra = reference_spectra(views, search.rings(40))
    for candidates in (None, 1):
        torch.library.opcheck(
            torch.ops.cryoalign.image_peaks,
            (images, spectra, search.shifts(), 1, 1, 12, 256, True, candidates),
        )


def test_best_match_is_the_best_of_match() -> None:
    images, views = particles(9, 3, 40, device="cpu")[:2]
    search = Search(max_shift=1, last_ring=12)
    label, pose, score = match(images, views, search).best()
    spectra = reference_spectra(views, search.rings(40))
    again = best_match(images, spectra, search, search.rings(40))
    assert torch.equal(again.label, label)
    assert torch.equal(again.score, score)
    assert torch.equal(again.pose.angle, pose.angle)
    assert torch.equal(again.pose.shift, pose.shift)
    assert torch.equal(again.pose.mirror, pose.mirror)
