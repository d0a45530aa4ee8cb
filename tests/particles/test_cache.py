"""Prepared images in memory: what comes back, what there is room for, and what float16 costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles import cache as module
from cryoalign.particles import prepare as preparation
from cryoalign.particles.cache import ImageCache, Place, places_for
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate
from cryoalign.pose import wrap_degrees
from cryoalign.results.alignment import Alignment

CPU = torch.device("cpu")
SIZE = 8
IMAGE = 4 * SIZE**2  # bytes as float32


def place(images: int, dtype: torch.dtype = torch.float32, name: str = "memory") -> Place:
    """Room for that many images."""
    return Place(name, CPU, dtype, False, images * dtype.itemsize * SIZE**2)


def images(n: int) -> Tensor:
    return torch.randn(n, SIZE, SIZE, generator=torch.Generator().manual_seed(n))


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * IMAGE)
    monkeypatch.setattr(module, "BLOCKS", 1)


def cache_of(n: int, *places: Place, rows: range | None = None) -> ImageCache:
    return ImageCache(n, range(n) if rows is None else rows, SIZE, CPU, places)


def test_any_selection_of_rows_comes_back_in_its_order() -> None:
    cache, given = cache_of(11, place(11)), images(11)
    order = np.random.default_rng(1).permutation(11)
    for part in np.split(order, [1, 4, 9]):  # neither in order nor within one block
        assert cache.get(part) is None
        cache.put(part, given[part])
    rng = np.random.default_rng(2)
    for rows in [*(rng.integers(0, 11, 6) for _ in range(20)), np.arange(2, 10), np.array([7])]:
        found = cache.get(rows)
        assert found is not None
        assert torch.equal(found, given[rows])
    assert cache.holds(order)


def test_what_has_no_room_is_left_out_and_takes_no_memory() -> None:
    cache, given = cache_of(20, place(9)), images(20)  # two blocks of four
    for part in np.arange(20).reshape(10, 2):
        assert cache.has_room(part) == (part[0] < 8)
        cache.put(part, given[part])
    assert list(cache.kept().values()) == [8]
    assert torch.equal(cache.get(np.arange(8)), given[:8])
    assert cache.get(np.array([7, 8])) is None
    assert not cache.holds(np.array([7, 8]))


def test_most_of_a_small_room_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**27)
    monkeypatch.setattr(module, "BLOCKS", 8)
    cache, given = cache_of(200, place(100)), images(200)
    cache.put(np.arange(200), given)
    (kept,) = cache.kept().values()
    assert 87 < kept <= 100


def test_a_second_place_takes_what_the_first_has_no_room_for() -> None:
    first, second = place(5, name="first"), place(4, name="second")
    cache, given = cache_of(20, first, second), images(20)
    cache.put(np.arange(20), given)
    assert cache.kept() == {first: 4, second: 4}
    assert torch.equal(cache.get(np.arange(8)), given[:8])


def test_only_rows_of_this_process_are_kept() -> None:
    cache, given = cache_of(20, place(12), rows=range(6, 14)), images(20)
    cache.put(np.arange(20), given)
    assert cache.get(np.arange(6, 14)) is not None
    assert cache.get(np.array([5])) is None
    assert cache.get(np.array([14])) is None
    cache.keep_only(range(9, 20))  # blocks from 4 are freed, those from 8 and 12 stay
    assert cache.get(np.array([7])) is None
    cache.put(np.arange(14, 20), given[14:])
    assert torch.equal(cache.get(np.arange(9, 16)), given[9:16])
    assert torch.equal(cache.get(np.arange(16, 20)), given[16:])  # in the room of what was freed


def test_float16_loses_at_most_its_rounding_and_never_overflows() -> None:
    given = images(6)
    given[1] *= 1e4
    given[2, 3, 3] = 1e6  # a hot pixel; float16 ends at 65504
    given[3, 0, 0] = -3e9
    given[4] *= 1e-3
    cache = cache_of(6, place(8, torch.float16))
    cache.put(np.arange(6), given)
    found = cache.get(np.arange(6))
    assert found is not None
    assert found.dtype == torch.float32
    error = (found.double() - given.double()).abs()
    # Half of the last bit of a number, or of the smallest number: of an image's largest pixel
    # divided by 2^15, if that is above 1.
    scale = (given.flatten(1).abs().amax(1).double() / 2**15).clamp(min=1)[:, None, None]
    assert (error <= given.double().abs() * 2**-11 * 1.001 + scale * 2**-25).all()


def test_places_follow_the_device_and_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 1000, "cuda": 400}
    monkeypatch.setattr(module, "available_memory", lambda device: free[device.type])
    (only,) = places_for(CPU)
    assert (only.dtype, only.budget, only.pinned) == (torch.float32, 250, False)
    gpu, host = places_for(torch.device("cuda"))
    assert (gpu.device.type, gpu.dtype, gpu.budget) == ("cuda", torch.float16, 100)
    assert (host.device.type, host.dtype, host.budget, host.pinned) == (
        "cpu", torch.float16, 250, True,
    )  # fmt: skip


def test_float16_changes_poses_and_averages_far_less_than_noise_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a signal-to-noise ratio of 0.05, where a pose is known to about a degree."""
    data = simulate(n=240, n_classes=3, size=48, snr=0.05, max_shift=2.0, seed=4)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**20)

    def aligned() -> Alignment:
        return align_multi_reference(
            data.images, data.views, iterations=2, particle=Particle(max_shift="3 px"),
            device="cpu",
        )  # fmt: skip

    exact = aligned()
    half = Place("memory", CPU, torch.float16, False, 2**30)
    monkeypatch.setattr(preparation, "places_for", lambda device: (half,))
    rounded = aligned()
    assert (exact.class_number == rounded.class_number).double().mean() > 0.99
    same = (exact.class_number == rounded.class_number) & (exact.pose.mirror == rounded.pose.mirror)
    turn = wrap_degrees(exact.pose.angle - rounded.pose.angle).abs()[same]
    move = (exact.pose.shift - rounded.pose.shift).norm(dim=1)[same]
    right = exact.pose.mirror == data.pose.mirror
    truth_turn = wrap_degrees(exact.pose.angle - data.pose.angle).abs()[right].median()
    truth_move = (exact.pose.shift - data.pose.shift).norm(dim=1)[right].median()
    assert 0 < turn.median() < 0.02 * truth_turn
    assert move.median() < 0.02 * truth_move
    difference = (exact.averages - rounded.averages).flatten(1).norm(dim=1)
    assert (difference < 0.01 * exact.averages.flatten(1).norm(dim=1)).all()


@pytest.mark.gpu
def test_a_gpu_keeps_float16_and_the_rest_in_pinned_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    cuda = torch.device("cuda")
    given = images(11).cuda()
    size = 2 * SIZE**2
    gpu = Place("GPU memory", cuda, torch.float16, False, 8 * size)
    host = Place("host memory", CPU, torch.float16, True, 8 * size)
    cache = ImageCache(11, range(11), SIZE, cuda, (gpu, host))
    assert cache.length == 8
    for part in np.split(np.random.default_rng(1).permutation(11), [2, 5]):
        cache.put(part, given[torch.from_numpy(part).cuda()])
    assert cache.kept() == {gpu: 8, host: 3}
    for rows in (np.arange(11), np.array([10, 2, 2, 9, 0]), np.array([8, 9])):
        found = cache.get(rows)
        assert found is not None
        assert found.is_cuda
        expected = given[torch.from_numpy(rows).cuda()]
        assert torch.equal(found, expected.half().float())
    assert cache.holds(np.arange(8))
    assert not cache.holds(np.arange(9))


def test_images_for_which_there_is_no_room_are_as_those_that_are_kept() -> None:
    images = 3 * torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(2))
    images[4] *= 1e5  # beyond the range of float16
    half = Place("half", torch.device("cpu"), torch.float16, False, 10**6)
    cache = ImageCache(6, range(6), 5, torch.device("cpu"), [half])
    rows = np.arange(6)
    cache.put(rows, images)
    kept = cache.get(rows)
    assert kept is not None
    assert torch.equal(cache.as_kept(images), kept)
    assert not torch.equal(kept, images)
    whole = ImageCache(6, range(6), 5, torch.device("cpu"), [half._replace(dtype=torch.float32)])
    assert whole.as_kept(images) is images
