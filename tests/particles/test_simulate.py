"""Phantoms, judged by the formula in float64 loops, by SciPy's interpolation and by statistics."""

import math

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from oracle import ctf
from scipy.ndimage import affine_transform

from cryoalign.io.stack import read_particles
from cryoalign.particles.simulate import phantom, project, simulate, spread_views, write_simulation
from cryoalign.particles.stack import optics_of
from cryoalign.pose import Pose


def brute_force(molecule, direction, angle, shift, mirror, size):
    """The particle by its definition: each pixel looks up the view where the pose takes it."""
    x, y, z = np.asarray(direction, float)
    rot, tilt = math.atan2(y, x), math.acos(z)
    ca, sa, cb, sb = math.cos(rot), math.sin(rot), math.cos(tilt), math.sin(tilt)
    places = np.asarray(molecule.centres) @ np.array([[cb * ca, cb * sa, -sb], [-sa, ca, 0]]).T
    widths, weights = np.asarray(molecule.widths), np.asarray(molecule.weights)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    image = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            v = np.array([column, row]) - size // 2 + np.asarray(shift, float)
            on_view = np.array([c * v[0] - s * v[1], s * v[0] + c * v[1]])
            if mirror:
                on_view[0] = -on_view[0]
            square = ((on_view - places) ** 2).sum(1)
            lobes = np.exp(-square / (2 * widths**2)) / (2 * math.pi * widths**2)
            image[row, column] = (weights * lobes).sum()
    return image


@pytest.mark.parametrize("size", [32, 33])
def test_projection_is_the_formula(size):
    molecule = phantom(3, n_blobs=80, radius=10)
    directions = torch.cat([spread_views(3, 1), torch.tensor([[0.0, 0.0, 1.0]])])
    pose = Pose(
        torch.tensor([0.0, 33.3, -121.0, 90.0]),
        torch.tensor([[0.0, 0.0], [1.7, -2.3], [-0.4, 3.0], [2.0, 0.5]]),
        torch.tensor([False, False, True, True]),
    )
    images = project(molecule, directions, pose, size=size)
    for i in range(4):
        p = pose[i]
        expected = brute_force(molecule, directions[i], p.angle.item(), p.shift, p.mirror, size)
        assert np.abs(images[i].numpy() - expected).max() < 1e-6 * expected.max()
    views = project(molecule, directions[:1], size=size)
    torch.testing.assert_close(views, images[:1])
    # A projection keeps the mass (Poisson summation), but for the halo's tails outside.
    wide = project(molecule, directions[:1], size=64)
    torch.testing.assert_close(wide.sum().double(), molecule.weights.sum(), rtol=1e-4, atol=0)


def test_phantom_is_seeded_within_its_radius_and_centred():
    molecule, again, other = phantom(5, radius=20), phantom(5, radius=20), phantom(6, radius=20)
    assert torch.equal(molecule.centres, again.centres)
    assert not torch.equal(molecule.centres, other.centres)
    assert molecule.centres.norm(dim=1).max() == pytest.approx(20)
    assert (molecule.weights[:, None] * molecule.centres).sum(0).norm() < 1e-9 * 20 * 600
    assert molecule.widths.min() >= 1


def test_neither_symmetry_nor_a_second_view_passes_for_a_view():
    """Turned by 30 degrees or more, or mirrored, or seen from elsewhere, a view is another."""
    molecule = phantom(0, radius=20)
    views = spread_views(8)
    angles = torch.arange(0.0, 360, 5)
    images = project(molecule, views, size=48)
    for i in range(8):
        for mirror in (False, True):
            hand = torch.full(angles.shape, mirror)
            pose = Pose(angles, torch.zeros(len(angles), 2), hand)
            turned = project(molecule, views[i].expand(len(angles), 3), pose, size=48)
            table = torch.corrcoef(torch.cat([images, turned]).flatten(1))[:8, 8:]
            if not mirror:
                assert table[i, 0] > 0.999
                table[i, :6] = table[i, -5:] = 0
            assert table.max() < 0.85


@pytest.mark.parametrize(
    ("k", "best"), [(2, 90.0), (3, 90.0), (4, 70.53), (6, 63.43), (10, 46.67), (16, 37.38)]
)
def test_views_are_spread_nearly_as_well_as_lines_can_be(k, best):
    """Against the best known packings of lines through the origin (Conway, Hardin, Sloane)."""
    views = spread_views(k, seed=4)
    cosine = (views @ views.T).abs().fill_diagonal_(0)
    separation = math.degrees(math.acos(cosine.max().item()))
    assert 0.9 * best < separation < best + 0.01
    assert torch.allclose(views.norm(dim=1), torch.ones(k, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 47])
def test_true_pose_takes_the_particle_onto_its_view(size):
    simulation = simulate(24, 3, size=size, snr=math.inf, seed=2)
    centre = np.array([size // 2, size // 2])
    swap = np.array([[0, 1], [1, 0]])  # SciPy counts (row, column)
    assert set(simulation.class_number.tolist()) == {1, 2, 3}
    assert simulation.pose.mirror.any()
    assert not simulation.pose.mirror.all()
    for i in range(24):
        pose = simulation.pose[i]
        c, s = np.cos(np.radians(pose.angle.item())), np.sin(np.radians(pose.angle.item()))
        linear = np.diag([-1 if pose.mirror else 1, 1]) @ np.array([[c, -s], [s, c]])
        back = swap @ linear.T @ swap
        offset = centre - back @ centre - pose.shift.numpy()[::-1]
        aligned = affine_transform(simulation.images[i].double().numpy(), back, offset, order=5)
        view = simulation.views[simulation.class_number[i] - 1].numpy()
        # What is left is the spline's error; 0.1 px or 1 degree off would leave more than 3 %.
        assert np.linalg.norm(aligned - view) < 0.02 * np.linalg.norm(view)


@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_signal_to_noise_and_spectrum(noise):
    clean = simulate(200, 4, size=50, snr=math.inf, seed=8)
    noisy = simulate(200, 4, size=50, snr=0.05, seed=8, noise=noise)
    assert clean.images.var((1, 2), correction=0).mean() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(noisy.views, clean.views * math.sqrt(0.05))
    residual = noisy.images - clean.images * math.sqrt(0.05)
    assert residual.var() == pytest.approx(1, rel=0.02)  # 500,000 samples, coloured
    power = torch.fft.fft2(residual).abs().square().mean(0) / 50**2
    k = np.hypot(np.fft.fftfreq(50)[:, None], np.fft.fftfreq(50))
    expected = 1 / (1 + (k / 0.06) ** 2) + 0.15 if noise == "coloured" else np.ones_like(k)
    ratio = power.numpy() / (expected / expected.mean())
    assert ratio[k > 0.3].mean() == pytest.approx(1, abs=0.02)
    assert ratio[k < 0.1].mean() == pytest.approx(1, abs=0.05)
    assert noisy.images.dtype == torch.float32


def test_poses_fill_the_search_range_and_seeds_matter():
    simulation = simulate(4000, 5, size=32, max_shift=3, seed=1)
    angle, shift = simulation.pose.angle, simulation.pose.shift
    assert shift.abs().max() <= 3
    assert shift.std(0).tolist() == pytest.approx([math.sqrt(3)] * 2, rel=0.05)
    assert angle.std() == pytest.approx(360 / math.sqrt(12), rel=0.05)
    assert simulation.pose.mirror.float().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.bincount(simulation.class_number, minlength=6)[1:].min() > 700
    fewer, other = simulate(10, 5, size=32, seed=1), simulate(10, 5, size=32, seed=2)
    scale = (fewer.views.std() / simulation.views.std()).item()
    torch.testing.assert_close(fewer.views, simulation.views * scale)
    assert not torch.allclose(fewer.views, other.views, atol=0.1)
    assert not simulate(10, 2, size=32, mirror=False).pose.mirror.any()


def test_refusals():
    with pytest.raises(ValueError, match="raise size or lower max_shift"):
        simulate(10, 2, size=16, max_shift=3)
    with pytest.raises(ValueError, match="'white' or 'coloured'"):
        simulate(10, 2, size=32, noise="pink")
    with pytest.raises(ValueError, match="snr > 0"):
        simulate(10, 2, snr=0)
    with pytest.raises(ValueError, match="one pose each"):
        project(phantom(0, n_blobs=5), spread_views(3), Pose.identity(2), size=32)


def test_written_files_hold_the_simulation(tmp_path):
    simulation = simulate(7, 2, size=33, seed=3, pixel_size=2.5)
    star = write_simulation(tmp_path / "new" / "folder", simulation)
    stack = read_particles(star)
    assert stack.pixel_size == 2.5
    assert torch.equal(stack.read(range(7)), simulation.images)
    tables = starfile.read(star)
    assert tables["optics"].rlnImagePixelSize[0] == 2.5
    assert list(tables["particles"].rlnImageName)[::6] == [
        "000001@particles.mrcs",
        "000007@particles.mrcs",
    ]
    with mrcfile.open(star.with_name("particles.mrcs")) as stack:
        assert np.array_equal(stack.data, simulation.images.numpy())
        assert float(stack.voxel_size.x) == pytest.approx(2.5)
    assert np.array_equal(mrcfile.read(star.with_name("views.mrcs")), simulation.views.numpy())
    truth = pd.read_csv(star.with_name("truth.csv"))
    assert list(truth) == ["index", "class_number", "angle", "shift_x", "shift_y", "mirror"]
    np.testing.assert_allclose(truth[["shift_x", "shift_y"]], simulation.pose.shift, atol=1e-6)
    assert truth.mirror.tolist() == simulation.pose.mirror.int().tolist()
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_simulation(star.parent, simulation)


def test_a_ctf_is_that_of_the_star_file(tmp_path):
    words = {"n": 12, "n_classes": 2, "size": 32, "max_shift": 1.0, "snr": math.inf, "seed": 5}
    plain = simulate(**words)
    made = simulate(**words, defocus=(1.0, 2.0), voltage=200.0, astigmatism=0.3)
    assert made.optics is not None
    expected = torch.fft.rfft2(plain.images.double()) * ctf(made.optics, 32)
    expected = torch.fft.irfft2(expected, s=(32, 32))
    expected = expected / expected.var((1, 2), correction=0).mean().sqrt()
    torch.testing.assert_close(made.images.double(), expected, atol=5e-3, rtol=0)
    assert torch.equal(made.pose.angle, plain.pose.angle)
    stack = read_particles(write_simulation(tmp_path, made))
    optics = optics_of(stack)
    assert optics is not None
    for name in ("defocus_u", "defocus_v", "defocus_angle", "voltage", "pixel_size"):
        torch.testing.assert_close(
            getattr(optics, name), getattr(made.optics, name), atol=0.01, rtol=0
        )
    mean = (optics.defocus_u + optics.defocus_v) / 2
    assert 1e4 <= float(mean.min()) < float(mean.max()) <= 2e4
    assert 0 < float((optics.defocus_u - optics.defocus_v).max()) <= 3000
    with pytest.raises(ValueError, match="smallest and the largest"):
        simulate(**words, defocus=(3.0, 1.0))
