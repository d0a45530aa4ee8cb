"""Class sums, centring and references, judged by loops and by pictures whose place is known."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from oracle import ctf

from cryoalign.images.frc import wiener_curve
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked, soft_mask
from cryoalign.particles.prepare import PreparedParticles, prepare
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Pose
from cryoalign.results.averages import (
    Averaging,
    ClassSums,
    centring,
    class_filters,
    class_sums,
    ctf_weighted_sums,
    displacement,
    filtered_averages,
    move,
    sum_parts,
)

SEED = 33
CPU = torch.device("cpu")
N, K, SIZE = 41, 4, 20
EMPTY = 2  # the class that gets no member


def stack(seed: int = SEED) -> tuple[torch.Tensor, Pose, torch.Tensor, torch.Tensor]:
    """Noise particles, poses of both hands, labels that leave one class empty, half-sets."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(N, SIZE, SIZE))).float()
    pose = Pose(
        torch.from_numpy(rng.uniform(-180, 180, N)).float(),
        torch.from_numpy(rng.uniform(-3, 3, (N, 2))).float(),
        torch.from_numpy(rng.integers(2, size=N).astype(bool)),
    )
    label = torch.from_numpy(rng.choice([0, 1, 3], N))
    return images, pose, label, torch.arange(N) % 2


def parts(n: int, size: int) -> tuple[torch.Tensor, ...]:
    """Rows a few at a time."""
    return torch.arange(n).split(size)


def sums_of(batch: int) -> ClassSums:
    images, pose, label, half = stack()
    return sum_parts(parts(len(images), batch), images.__getitem__, pose, label, half, K, SIZE, CPU)


def test_class_sums_are_the_loop():
    images, pose, label, half = stack()
    found = sums_of(7)
    total, count = np.zeros((2, K, SIZE, SIZE)), np.zeros((2, K), int)
    for i in range(N):
        moved = transform(images[i : i + 1], pose[i : i + 1])[0].double().numpy()
        total[half[i], label[i]] += moved
        count[half[i], label[i]] += 1
    np.testing.assert_allclose(found.total.numpy(), total, atol=1e-12)
    np.testing.assert_array_equal(found.count.numpy(), count)
    np.testing.assert_array_equal(found.sizes.numpy(), count.sum(0))
    whole = total.sum(0) / count.sum(0).clip(1)[:, None, None]
    np.testing.assert_allclose(found.averages().numpy(), whole, atol=1e-6)
    halves = total / count.clip(1)[..., None, None]
    np.testing.assert_allclose(found.half_averages().numpy(), halves, atol=1e-6)
    assert found.sizes[EMPTY] == 0
    assert not found.averages()[EMPTY].any()
    assert found.frc().shape == (K, SIZE // 2 + 1)


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 40, 64])
def test_batch_size_changes_no_bit(batch: int):
    one, other = sums_of(N), sums_of(batch)
    assert torch.equal(one.averages(), other.averages())
    assert torch.equal(one.half_averages(), other.half_averages())
    assert torch.equal(one.count, other.count)


def imaged(done: str, batch: int | None = None) -> tuple[Simulation, PreparedParticles]:
    """Particles with CTFs, as recorded, or flipped or multiplied by another program before."""
    made = simulate(200, 3, size=40, snr=0.5, max_shift=1.0, defocus=(1.0, 2.5), seed=SEED)
    assert made.optics is not None
    n = len(made.images)
    transfer = ctf(made.optics, 40).float()
    factor = {"nothing": 1.0, "flipped": transfer.sign(), "multiplied": transfer}[done]
    images = torch.fft.irfft2(torch.fft.rfft2(made.images) * factor, s=(40, 40))
    optics = replace(
        made.optics,
        phase_flipped=torch.full((n,), done == "flipped"),
        premultiplied=torch.full((n,), done == "multiplied"),
    )
    return made, prepare(images, optics=optics, device="cpu", batch_size=batch)


@pytest.mark.parametrize("done", ["nothing", "flipped", "multiplied"])
def test_averages_are_corrected_for_the_ctf_whatever_was_done_before(done: str):
    made, particles = imaged(done)
    label = made.class_number - 1
    flipped = particles.phase_flipped()
    sums, order = ctf_weighted_sums(flipped, made.pose, label, 4), torch.tensor([1, 0, 2, 3])
    found = sums.ordered(order)
    assert torch.equal(found.averages(), sums.averages()[order])
    assert not found.averages()[3].any()  # no members
    plain = class_sums(flipped, made.pose, label, 3).averages()
    for k, at in enumerate([1, 0, 2]):
        view = made.views[k].flatten()
        likeness = [
            float(torch.corrcoef(torch.stack([view, each.flatten()]))[0, 1])
            for each in (found.averages()[at], plain[k])
        ]
        assert likeness[0] > 0.95
        assert likeness[0] > likeness[1] + 0.02
    # The scale is that of the views, and noise is that of the background before multiplication.
    gain = float((found.averages()[[1, 0, 2]] * made.views).sum() / made.views.square().sum())
    assert gain == pytest.approx(1.0, abs=0.1) or done == "multiplied"


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_changes_no_bit_with_a_ctf(batch: int):
    sums = []
    for size in (200, batch):
        made, particles = imaged("nothing", size)
        label = made.class_number - 1
        sums.append(ctf_weighted_sums(particles.phase_flipped(), made.pose, label, 3))
    assert torch.equal(sums[0].averages(), sums[1].averages())
    assert torch.equal(sums[0].half_averages(), sums[1].half_averages())


def test_aligned_copies_average_to_the_original():
    """Particles made by inverse poses: their average is the picture, so poses are not inverted."""
    y, x = np.mgrid[:48, :48] - 24
    blobs = ((6, 2, 1.0), (-5, 5, 0.7), (1, -7, 0.5))
    picture = sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 18) for a, b, h in blobs)
    rng = np.random.default_rng(SEED)
    n = 16
    pose = Pose(
        torch.from_numpy(rng.uniform(-180, 180, n)),
        torch.from_numpy(rng.uniform(-4, 4, (n, 2))),
        torch.arange(n) % 2 == 1,
    )
    particles = []
    for matrix in pose.matrix().numpy():
        # particle(v) = picture(L v + t) by scipy's splines, in (row, column).
        linear, centre = matrix[:2, :2][::-1, ::-1], np.array([24, 24])
        offset = centre + matrix[:2, 2][::-1] - linear @ centre
        particles.append(scipy.ndimage.affine_transform(picture, linear, offset, order=3))
    images = torch.from_numpy(np.stack(particles)).float()
    label, half = torch.zeros(n, dtype=torch.int64), torch.arange(n) % 2
    found = sum_parts(
        parts(len(images), 5), images.__getitem__, pose.to(torch.float32), label, half, 1, 48, CPU
    )
    assert np.abs(found.averages()[0].numpy() - picture).max() < 0.02
    assert found.frc()[0, :8].min() > 0.99


def blob_at(x0: float, y0: float, size: int, height: float = 1.0) -> torch.Tensor:
    y, x = np.mgrid[:size, :size] - size // 2
    blob = np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 3.5**2))
    return torch.from_numpy(height * blob).float()


@pytest.mark.parametrize("size", [40, 41])
@pytest.mark.parametrize("height", [1.0, -1.0], ids=["bright", "dark"])
def test_mass_brings_a_blob_to_the_centre(size: int, height: float):
    places = [(3.3, -4.6), (-2.0, 0.4), (0.0, 0.0)]
    averages = torch.stack([blob_at(*p, size, height) for p in places] + [torch.zeros(size, size)])
    label = torch.zeros(1, dtype=torch.int64)
    mask = soft_mask(size, 15)
    shift = centring(averages, Pose.identity(1), label, "mass", mask)
    # The mask's edge and the threshold on a pixel grid leave hundredths of a pixel.
    np.testing.assert_allclose(shift[:3].numpy(), -np.array(places), atol=0.1)
    assert shift[3].tolist() == [0, 0]
    moved = transform(averages, move(Pose.identity(4), shift))
    np.testing.assert_allclose(moved[:3].numpy(), height * blob_at(0, 0, size).expand(3, -1, -1),
                               atol=0.05)  # fmt: skip


def test_members_brings_their_boxes_to_the_centre_on_average():
    _, pose, label, _ = stack()
    averages = torch.randn(K, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
    mask = soft_mask(SIZE, 8)
    shift = centring(averages, pose, label, "members", mask)
    matrix = pose.matrix().numpy()
    for c in range(K):
        centres = matrix[label.numpy() == c, :2, 2]  # where a box's centre comes to lie
        expected = -centres.mean(0) if len(centres) else np.zeros(2)
        np.testing.assert_allclose(shift[c].numpy(), expected, atol=1e-5)
    centred = displacement(move(pose, shift[label]))
    for c in (0, 1, 3):
        np.testing.assert_allclose(centred[label == c].mean(0).numpy(), 0, atol=1e-5)
    assert not centring(averages, pose, label, "none", mask).any()


def test_moved_poses_compensate_moved_averages():
    """The particle at its moved pose is the moved picture of the particle at its old pose."""
    size, n = 48, 10
    rng = np.random.default_rng(SEED)
    places = rng.uniform(-5, 5, (n, 2, 2))
    images = torch.stack([blob_at(*a, size) + 0.5 * blob_at(*b, size) for a, b in places])
    pose = Pose(
        torch.from_numpy(rng.uniform(-180, 180, n)).float(),
        torch.from_numpy(rng.uniform(-3, 3, (n, 2))).float(),
        torch.arange(n) % 2 == 0,
    )
    shift = torch.from_numpy(rng.uniform(-4, 4, (n, 2))).float()
    moved = move(pose, shift)
    assert torch.equal(moved.mirror, pose.mirror)
    at_once = transform(images, moved)
    twice = transform(transform(images, pose), move(Pose.identity(n), shift))
    # Two Keys interpolations against one.
    assert (at_once - twice).abs().max() < 0.03
    assert (at_once - transform(images, pose)).abs().max() > 0.2  # and it did move
    expected = displacement(pose) + shift
    np.testing.assert_allclose(displacement(moved).numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("how", ["wiener", "none"])
def test_references_are_finite_masked_and_without_mean(how):
    sums = sums_of(16)
    averaging = Averaging(filter=how, mask_edge=2.0)
    mask = soft_mask(SIZE, 7, 2.0)
    references = masked(filtered_averages(sums, averaging, mask), mask)
    assert references.shape == (K, SIZE, SIZE)
    assert torch.isfinite(references).all()
    assert not references[EMPTY].any()
    assert references[0].any()
    assert not references[:, mask == 0].any()
    np.testing.assert_allclose(references.sum((1, 2)).numpy(), 0, atol=1e-3)
    if how == "none":
        expected = masked(sums.averages(), mask)
        np.testing.assert_allclose(references.numpy(), expected.numpy(), atol=1e-6)
    else:  # noise does not survive its own FRC
        power = references.square().sum() / masked(sums.averages(), mask).square().sum()
        assert power < 0.5


def test_masked_removes_the_mean_under_the_mask():
    rng = np.random.default_rng(SEED)
    images, mask = rng.normal(3, 1, (2, 12, 12)), soft_mask(12, 3, 2).numpy()
    expected = [(i - (i * mask).sum() / mask.sum()) * mask for i in images]
    found = masked(torch.from_numpy(images).float(), torch.from_numpy(mask))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_a_common_offset_is_no_agreement_of_the_halves():
    """The mask's own disc must not correlate: independent noise on a pedestal has no FRC."""
    rng = np.random.default_rng(SEED)
    images = torch.from_numpy(rng.normal(1.0, 1.0, (2, 48, 48)))
    sums = ClassSums(images[:, None], torch.ones(2, 1, dtype=torch.int64))
    curve = sums.frc(soft_mask(48, 16, 4.0))[0, 1:12]
    assert curve.abs().mean() < 0.25
    assert sums.frc()[0, 1:12].abs().mean() < 0.25


def test_a_class_of_one_half_is_filtered_as_the_others_are():
    rng = np.random.default_rng(SEED)
    curves = torch.from_numpy(np.sort(rng.uniform(0.2, 1, (3, 9)))[:, ::-1].copy())
    curves[1, 1:] = 0.0  # no member in one of its halves
    trusted = torch.tensor([True, False, True])
    found = class_filters(curves, trusted)
    torch.testing.assert_close(found[[0, 2]], wiener_curve(curves[[0, 2]]))
    torch.testing.assert_close(found[1:2], wiener_curve(curves[[0, 2]].mean(0, keepdim=True)))
    alone = class_filters(curves, torch.zeros(3, dtype=torch.bool))
    assert (alone[:, :2] > 0.9).all()  # a low-pass, not a blank
    assert not alone[:, -1].any()
