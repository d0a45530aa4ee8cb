"""Sampling and moving of images, judged by float64 loops, scipy and integer moves."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch

from cryoalign.images.geometry import pixel_grid, radius_grid, sample, transform
from cryoalign.pose import Pose

SEED = 14


def pose_of(angle: float, x: float, y: float, mirror: bool) -> Pose:
    return Pose(
        torch.tensor([angle], dtype=torch.float64),
        torch.tensor([[x, y]], dtype=torch.float64),
        torch.tensor([mirror]),
    )


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """Bilinear value at (x, y) about the centre; pixels outside are zero."""
    height, width = image.shape
    column, row = x + width // 2, y + height // 2
    j, i = int(np.floor(column)), int(np.floor(row))
    total = 0.0
    for di, dj in itertools.product((0, 1), (0, 1)):
        if 0 <= i + di < height and 0 <= j + dj < width:
            weight = (1 - abs(row - i - di)) * (1 - abs(column - j - dj))
            total += weight * image[i + di, j + dj]
    return total


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (6, 9)])
def test_grids_are_about_the_centre_pixel(shape: tuple[int, int]):
    grid = pixel_grid(shape, torch.empty(0, dtype=torch.float64)).numpy()
    y, x = np.mgrid[: shape[0], : shape[1]]
    np.testing.assert_array_equal(grid[..., 0], x - shape[1] // 2)
    np.testing.assert_array_equal(grid[..., 1], y - shape[0] // 2)
    if shape[0] == shape[1]:
        expected = np.hypot(x - shape[1] // 2, y - shape[0] // 2)
        np.testing.assert_allclose(radius_grid(shape[0]).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (6, 9)])
def test_sample_is_the_bilinear_loop_also_at_borders(shape: tuple[int, int]):
    rng = np.random.default_rng(SEED)
    # Images of very different size of value: a neighbour's pixel would show at once.
    images = rng.uniform(1, 2, (3, *shape)) * np.array([1.0, 1e3, 1e6])[:, None, None]
    reach = max(shape) / 2 + 1.5
    points = rng.uniform(-reach, reach, (3, 40, 2))
    corners = np.array(list(itertools.product((-4.5, -4, 3.5, 4, 0), (-4.5, -3.25, 2.5, 3, 0))))
    points = np.concatenate([points, np.tile(corners, (3, 1, 1))], 1)
    found = sample(torch.from_numpy(images), torch.from_numpy(points)).numpy()
    for n in range(3):
        expected = [bilinear(images[n], x, y) for x, y in points[n]]
        np.testing.assert_allclose(found[n], expected, rtol=1e-10, atol=1e-9 * images[n].max())


def test_shared_points_and_channels():
    rng = np.random.default_rng(SEED)
    images = torch.from_numpy(rng.normal(size=(4, 3, 9, 9)))
    shared = torch.from_numpy(rng.uniform(-5, 5, (1, 2, 6, 2)))
    together = sample(images, shared)
    assert together.shape == (4, 3, 2, 6)
    assert torch.equal(together, sample(images, shared.expand(4, -1, -1, -1)))
    own = torch.from_numpy(rng.uniform(-5, 5, (4, 7, 2)))
    found = sample(images, own).numpy()
    for n, c, p in itertools.product(range(4), range(3), range(7)):
        expected = bilinear(images[n, c].numpy(), *own[n, p].tolist())
        np.testing.assert_allclose(found[n, c, p], expected, atol=1e-12)


def test_points_of_another_number_of_images_are_refused():
    with pytest.raises(ValueError, match="points"):
        sample(torch.zeros(4, 8, 8), torch.zeros(2, 5, 2))


@pytest.mark.parametrize("size", [16, 17])
def test_delta_at_the_centre_stays_there(size: int):
    image = torch.zeros(1, size, size, dtype=torch.float64)
    image[0, size // 2, size // 2] = 1
    for angle, mirror in itertools.product(range(-180, 180, 15), (False, True)):
        for interpolation in ("bilinear", "bicubic"):
            moved = transform(image, pose_of(angle, 0, 0, mirror), interpolation)
            assert moved[0, size // 2, size // 2] == pytest.approx(1, abs=1e-12)
            if angle % 90 == 0:
                assert (moved - image).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(10, 10), (11, 11), (8, 13)])
def test_whole_pixels_move_exactly(shape: tuple[int, int]):
    image = np.random.default_rng(SEED).normal(size=shape)
    for x, y in ((3, 0), (0, -2), (-4, 5)):
        expected = np.zeros(shape)
        for row, column in itertools.product(range(shape[0]), range(shape[1])):
            if 0 <= row - y < shape[0] and 0 <= column - x < shape[1]:
                expected[row, column] = image[row - y, column - x]
        moved = transform(torch.from_numpy(image)[None], pose_of(0, x, y, False))[0]
        np.testing.assert_allclose(moved.numpy(), expected, atol=1e-12)
        # Single precision knows a position in the box to a few millionths of a pixel.
        single = transform(torch.from_numpy(image).float()[None], pose_of(0, x, y, False))[0]
        np.testing.assert_allclose(single.numpy(), expected, atol=1e-4)
    flipped = transform(torch.from_numpy(image)[None], pose_of(0, 0, 0, True))[0].numpy()
    for column in range(shape[1]):
        source = 2 * (shape[1] // 2) - column  # x -> -x: in an even box column 0 has no partner
        expected_column = image[:, source] if source < shape[1] else 0 * image[:, 0]
        np.testing.assert_allclose(flipped[:, column], expected_column, atol=1e-12)


@pytest.mark.parametrize("size", [40, 41])
def test_transform_is_scipys_affine_transform(size: int):
    rng = np.random.default_rng(SEED)
    n = 8
    images = rng.normal(size=(n, size, size))  # noise up to the border: bilinear is bilinear
    pose = Pose(
        torch.from_numpy(rng.uniform(-180, 180, n)),
        torch.from_numpy(rng.uniform(-7, 7, (n, 2))),
        torch.arange(n) % 2 == 1,
    )
    ours = transform(torch.from_numpy(images), pose, "bilinear").numpy()
    for i in range(n):
        a = np.radians(float(pose.angle[i]))
        linear = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        linear = np.diag([-1.0 if pose.mirror[i] else 1.0, 1.0]) @ linear
        back = np.linalg.inv(linear)[::-1, ::-1]  # (x, y) -> (row, column)
        centre = np.full(2, size // 2)
        offset = centre - back @ centre - pose.shift[i].numpy()[::-1]
        # grid-constant: zeros lie beyond the border, and are interpolated with.
        theirs = scipy.ndimage.affine_transform(
            images[i], back, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(ours[i], theirs, atol=1e-10)


def test_each_image_moves_alone():
    rng = np.random.default_rng(SEED)
    images = torch.from_numpy(rng.normal(size=(65, 21, 21))).float()
    pose = Pose(
        torch.from_numpy(rng.uniform(-180, 180, 65)).float(),
        torch.from_numpy(rng.uniform(-4, 4, (65, 2))).float(),
        torch.arange(65) % 3 == 0,
    )
    together = transform(images, pose)
    alone = torch.cat([transform(images[i : i + 1], pose[i : i + 1]) for i in range(65)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gradients(interpolation):
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(2, 6, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    # Angles and shifts at which no sample falls on a pixel, where bilinear has a kink.
    angle = torch.tensor([17.3, -101.7], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[0.31, -0.23], [0.17, 0.37]], dtype=torch.float64, requires_grad=True)
    mirror = torch.tensor([False, True])

    def moved(images: torch.Tensor, angle: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return transform(images, Pose(angle, shift, mirror), interpolation)

    assert torch.autograd.gradcheck(moved, (images, angle, shift))
