"""Poses, judged by explicit 3x3 float64 matrices, scipy's affine_transform and RELION's files."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.ndimage
import starfile
import torch

from cryoalign.images.geometry import transform
from cryoalign.pose import Pose, compose, from_relion, pixel_error, to_relion, wrap_degrees

SEED = 20240611


def random_pose(n: int, seed: int = SEED, reach: float = 6.0) -> Pose:
    """(n,) float64 poses of both hands."""
    rng = np.random.default_rng(seed)
    return Pose(
        torch.from_numpy(rng.uniform(-400, 400, n)),
        torch.from_numpy(rng.uniform(-reach, reach, (n, 2))),
        torch.from_numpy(rng.integers(2, size=n).astype(bool)),
    )


def matrices(pose: Pose) -> np.ndarray:
    """(n, 3, 3) the definition, spelled out: flip after rotation after shift."""
    out = []
    for angle, (x, y), mirror in zip(
        pose.angle.tolist(), pose.shift.tolist(), pose.mirror.tolist(), strict=True
    ):
        a = np.radians(angle)
        shift = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        out.append((np.diag([-1.0, 1, 1]) if mirror else np.eye(3)) @ turn @ shift)
    return np.stack(out)


def test_matrix_is_shift_then_rotation_then_mirror():
    pose = random_pose(200)
    np.testing.assert_allclose(pose.matrix().numpy(), matrices(pose), atol=1e-12)
    # In words: +x turns towards +y, and the shift comes before the turn.
    quarter = Pose(torch.tensor([90.0]), torch.tensor([[2.0, 0.0]]), torch.tensor([False]))
    moved = quarter.matrix()[0] @ torch.tensor([1.0, 0.0, 1.0])
    np.testing.assert_allclose(moved.numpy(), [0, 3, 1], atol=1e-6)


def test_compose_and_inverse_are_those_of_matrices():
    first, then = random_pose(400, 1), random_pose(400, 2)
    for name, hands in (("first", first), ("then", then)):
        assert set(hands.mirror.tolist()) == {False, True}, name
    both = compose(first, then)
    np.testing.assert_allclose(matrices(both), matrices(then) @ matrices(first), atol=1e-12)
    np.testing.assert_allclose(
        matrices(first.inverse()), np.linalg.inv(matrices(first)), atol=1e-12
    )
    unit = compose(first, first.inverse())
    np.testing.assert_allclose(matrices(unit), np.tile(np.eye(3), (400, 1, 1)), atol=1e-12)
    for pose in (both, first.inverse()):
        assert ((pose.angle >= -180) & (pose.angle < 180)).all()


def test_pixel_error_is_sparx_formula_and_infinite_between_hands():
    a, b, radius = random_pose(100, 3), random_pose(100, 4), 29.0
    error = pixel_error(a, b, radius).numpy()
    ma, mb = matrices(a), matrices(b)
    for i in range(100):
        if a.mirror[i] != b.mirror[i]:
            assert np.isinf(error[i])
            continue
        turn = np.sin(np.radians(float(a.angle[i] - b.angle[i])) / 2) * (2 * radius + 1)
        expected = turn**2 / 2 + ((ma[i, :2, 2] - mb[i, :2, 2]) ** 2).sum()
        np.testing.assert_allclose(error[i], expected, rtol=1e-12)
    # A full turn is no error; a displaced box is its squared distance.
    still = Pose.identity(1)
    turned = Pose(torch.tensor([360.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([False]))
    np.testing.assert_allclose(pixel_error(still, turned, radius).numpy(), [25], rtol=1e-6)


def test_shapes_indexing_and_refusals():
    pose = random_pose(5)
    assert len(pose) == 5
    assert pose[2:4].shift.shape == (2, 2)
    assert pose[torch.tensor([4, 0])].angle.tolist() == pose.angle[[4, 0]].tolist()
    assert len(Pose.cat([pose, pose[:2]])) == 7
    assert pose.to(torch.float32).angle.dtype == torch.float32
    assert pose.to(torch.float32).mirror.dtype == torch.bool
    table = Pose(torch.zeros(3, 4), torch.zeros(3, 4, 2), torch.zeros(3, 4, dtype=torch.bool))
    assert table.matrix().shape == (3, 4, 3, 3)
    with pytest.raises(ValueError, match="one batch shape"):
        Pose(torch.zeros(3), torch.zeros(2, 2), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        Pose(torch.zeros(3), torch.zeros(3, 2), torch.zeros(3))
    wrapped = wrap_degrees(torch.tensor([180.0, -180.0, 540.0, 179.5]))
    assert wrapped.tolist() == [-180, -180, -180, 179.5]


def test_relion_columns_there_and_back():
    pose, pixel_size = random_pose(50), 1.37
    columns = to_relion(pose, pixel_size)
    assert set(columns) == {"rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnIsFlip"}
    assert set(columns["rlnIsFlip"]) == {0, 1}
    back = from_relion(columns, pixel_size)
    np.testing.assert_allclose(matrices(back), matrices(pose), atol=1e-12)
    # RELION 3.0: origins in pixels, no flip.
    old = {
        "rlnAnglePsi": columns["rlnAnglePsi"],
        "rlnOriginX": columns["rlnOriginXAngst"] / pixel_size,
        "rlnOriginY": columns["rlnOriginYAngst"] / pixel_size,
    }
    plain = Pose(pose.angle, pose.shift, torch.zeros_like(pose.mirror))
    np.testing.assert_allclose(matrices(from_relion(old, 99.0)), matrices(plain), atol=1e-12)
    assert from_relion({"rlnAnglePsi": [1.0]}, 1.0).shift.tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="rlnAnglePsi"):
        from_relion({"rlnOriginXAngst": [1.0]}, 1.0)


def blobs(size: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth asymmetric image that ends well inside its box."""
    y, x = np.mgrid[:size, :size] - size // 2
    out = np.zeros((size, size))
    for _ in range(6):
        cx, cy = rng.uniform(-size / 6, size / 6, 2)
        out += rng.uniform(0.3, 1) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 3.5**2))
    return out


def apply_relion(image: np.ndarray, row: dict[str, float], pixel_size: float) -> np.ndarray:
    """RELION's move by scipy, by cubic splines: psi and origin, then x -> -x about n // 2."""
    size = len(image)
    psi = np.radians(row["rlnAnglePsi"])
    rotation = np.array([[np.cos(psi), -np.sin(psi)], [np.sin(psi), np.cos(psi)]])
    origin = np.array([row["rlnOriginXAngst"], row["rlnOriginYAngst"]]) / pixel_size
    # v' = R (v + o): the output at v' is the input at R^T v' - o; scipy speaks (row, column).
    back = rotation.T[::-1, ::-1]
    centre = np.array([size // 2, size // 2])
    offset = centre - back @ centre - origin[::-1]
    moved = scipy.ndimage.affine_transform(image, back, offset, order=3)
    if row["rlnIsFlip"]:
        columns = 2 * (size // 2) - np.arange(size)  # x -> -x about n // 2
        inside = (columns >= 0) & (columns < size)
        moved = np.where(inside, moved[:, columns.clip(0, size - 1)], 0)
    return moved


@pytest.mark.parametrize("size", [48, 49])
def test_exported_pose_applied_as_relion_does_gives_our_picture(size: int):
    rng, n, pixel_size = np.random.default_rng(SEED), 12, 2.1
    pose = random_pose(n, 7, reach=4)
    images = np.stack([blobs(size, rng) for _ in range(n)])
    columns = to_relion(pose, pixel_size)
    ours = transform(torch.from_numpy(images), pose).numpy()
    for i in range(n):
        row = {name: float(values[i]) for name, values in columns.items()}
        theirs = apply_relion(images[i], row, pixel_size)
        # Keys' kernel (ours, a = -0.75) is up to 0.75 % off on such a blob along either axis.
        assert np.abs(ours[i] - theirs).max() < 0.015 * images[i].max()
        other = apply_relion(images[i], {**row, "rlnIsFlip": 1 - row["rlnIsFlip"]}, pixel_size)
        assert np.abs(ours[i] - other).max() > 0.1 * images[i].max()


def evaluator(shared_data: Path) -> ModuleType:
    """evaluate.py of the shared data."""
    spec = importlib.util.spec_from_file_location("evaluate", shared_data / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relion_result(shared_data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """label, A, s of RELION's own Class2D run by our reading, and the pixel size."""
    tables = starfile.read(shared_data / "formats" / "relion_class2d_it025_data.star")
    particles = tables["particles"]
    pixel_size = float(tables["optics"]["rlnImagePixelSize"].iloc[0])
    place = particles["rlnImageName"].str.partition("@")[0].astype(int)
    particles = particles.iloc[np.argsort(place.to_numpy())]
    pose = from_relion({str(c): particles[c].to_numpy() for c in particles}, pixel_size)
    matrix = pose.matrix().numpy()
    label = particles["rlnClassNumber"].to_numpy() - 1
    return label, matrix[:, :2, :2], matrix[:, :2, 2], pixel_size


def test_relions_own_result_is_read_as_evaluate_reads_it(shared_data: Path):
    label, a, s, pixel_size = relion_result(shared_data)
    star = shared_data / "formats" / "relion_class2d_it025_data.star"
    their_label, their_a, their_s, _ = evaluator(shared_data).from_relion(star, pixel_size)
    assert len(label) == 1000
    np.testing.assert_array_equal(label, their_label)
    np.testing.assert_allclose(a, their_a, atol=1e-12)
    np.testing.assert_allclose(s, their_s, atol=1e-9)
    assert np.abs(s).max() > 1  # there was something to compare


@pytest.mark.long
def test_relions_own_result_scores_the_same_by_our_reading(shared_data: Path, tmp_path: Path):
    out = tmp_path / "e0.1"
    command = ["-n", "1000", "--views", "10", "--snr", "0.1", "--seed", "14"]
    subprocess.run(
        [sys.executable, shared_data / "make_bench.py", "--out", out, *command], check=True
    )
    evaluate = evaluator(shared_data)
    truth = dict(np.load(f"{out}_truth.npz"))
    star = shared_data / "formats" / "relion_class2d_it025_data.star"
    label, a, s, _ = relion_result(shared_data)
    theirs = evaluate.from_relion(star, float(truth["apix"]))
    expected = evaluate.score(truth, *theirs[:3], verbose=False)
    figures = evaluate.score(truth, label, a, s, verbose=False)
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == (value if isinstance(value, str) else pytest.approx(value)), name
    # RELION's published figures on this set: 0.73, 1.47 degrees, 0.41 px.
    assert figures["ARI_view"] == pytest.approx(0.73, abs=0.01)
    assert figures["ang_median"] == pytest.approx(1.47, abs=0.02)
    assert figures["shift_median_px"] == pytest.approx(0.41, abs=0.01)
