"""Arrays of other libraries in and out: the same memory, the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.io.formats import read_images, write_images
from cryoalign.learn.dataset import ParticleDataset, RandomPose
from cryoalign.learn.layers import AlignLayer
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.isac.isac import classify_stable
from cryoalign.methods.isac.settings import Isac
from cryoalign.methods.mra import align_multi_reference
from cryoalign.methods.rfa import align_reference_free
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import TensorStack, as_stack
from cryoalign.pose import Pose, to_relion
from cryoalign.report.embedding import features
from cryoalign.results.alignment import Alignment
from cryoalign.runtime.arrays import as_tensor, to_numpy
from cryoalign.search.match import match
from cryoalign.search.settings import Search


class DLPackOnly:
    """An array of a library that speaks nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **how: Any) -> Any:
        return self._array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._array.__dlpack_device__()


class CudaOnly:
    """An array that speaks nothing but the CUDA array interface, like Numba's."""

    def __init__(self, array: Any) -> None:
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self._keep = array


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


IMAGES = np.random.default_rng(0).normal(size=(6, 16, 16)).astype(np.float32)


def test_memory_is_shared():
    """NumPy, every third of its images, and pure DLPack are seen where they lie."""
    assert as_tensor(IMAGES).data_ptr() == address(IMAGES)
    part = IMAGES[1::3]
    seen = as_tensor(part)
    assert seen.data_ptr() == address(part)
    np.testing.assert_array_equal(seen, part)
    assert as_tensor(DLPackOnly(IMAGES)).data_ptr() == address(IMAGES)
    tensor = torch.from_numpy(IMAGES).clone().requires_grad_()
    assert as_tensor(tensor) is tensor
    assert isinstance(stack := as_stack(DLPackOnly(IMAGES)), TensorStack)
    assert stack.images.data_ptr() == address(IMAGES)
    assert as_stack(stack) is stack


@pytest.mark.filterwarnings("error")
def test_read_only_memory_map_stays_on_disk(tmp_path: Path):
    np.save(tmp_path / "stack.npy", IMAGES)
    mapped = np.load(tmp_path / "stack.npy", mmap_mode="r")
    assert as_tensor(mapped).data_ptr() == address(mapped)
    np.testing.assert_array_equal(as_stack(mapped).read(torch.tensor([4, 1])), IMAGES[[4, 1]])


@pytest.mark.parametrize("dtype", ["f2", "f8", "i1", "u1", "i2", "u2", "i4", "i8"])
def test_types_are_kept_and_read_as_float32(dtype: str):
    images = (10 * np.abs(IMAGES)).astype(dtype)
    stack = TensorStack(images)
    assert stack.images.data_ptr() == address(images)
    read = stack.read(torch.tensor([3, 0]))
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read, images[[3, 0]].astype(np.float32))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (IMAGES.tolist(), TypeError, "numpy.asarray"),
        (IMAGES.astype(">f4"), ValueError, "byte order"),
        (IMAGES[::-1], ValueError, "ascontiguousarray"),
        (IMAGES.astype(object), TypeError, "real numbers"),
        (IMAGES.astype("c8"), TypeError, "real part"),
        (IMAGES.astype("g"), TypeError, "longdouble"),
        (DLPackOnly(IMAGES.astype("c8")), TypeError, "real part"),
        (np.zeros(3, "i1, f4")["f1"], ValueError, "strides"),
    ],
)
def test_what_cannot_be_viewed_says_so(images: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        as_tensor(images)


def test_backwards_array_that_says_so_never_reaches_dlpack():
    """PyTorch ends the process over one."""

    class Backwards(DLPackOnly):
        strides = IMAGES[::-1].strides

    with pytest.raises(ValueError, match="backwards"):
        as_tensor(Backwards(IMAGES[::-1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpu_arrays_need_a_gpu():
    class OnGpu:
        __cuda_array_interface__ = {"shape": (1,), "typestr": "<f4", "data": (8, False)}  # noqa: RUF012

    with pytest.raises(ValueError, match="sees none"):
        as_tensor(OnGpu())


@pytest.fixture(scope="module")
def data():
    return simulate(80, n_classes=2, size=32, snr=1.0, max_shift=1.0, seed=2)


def wrapped(images: Tensor) -> list[Any]:
    return [images.numpy(), DLPackOnly(images.numpy())]


PARTICLE, SEARCH = Particle(max_shift="2 px"), Search(max_shift=2)


def test_alignments_are_the_tensors(data):
    """Every way of aligning finds in arrays what it finds in tensors, to the last bit."""
    ways: list[Callable[[Any, Any], Alignment]] = [
        lambda x, y: align_multi_reference(x, y, iterations=2, particle=PARTICLE),
        lambda x, y: align_reference_free(x, as_tensor(y)[:1].numpy(), iterations=2),
        lambda x, _: classify(x, 2),
        lambda x, _: classify_stable(x, isac=Isac(images_per_group=40)).alignment,
    ]
    for way in ways:
        expected = way(data.images, data.views).to_numpy()
        for images, views in zip(wrapped(data.images), wrapped(data.views), strict=True):
            for name, array in way(images, views).to_numpy().items():
                np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_functions_and_layers_are_the_tensors(data):
    expected = match(data.images, data.views, SEARCH)
    moved = transform(data.images, data.pose)
    layer = AlignLayer(SEARCH)
    aligned = layer(data.images, data.views)
    for images, views in zip(wrapped(data.images), wrapped(data.views), strict=True):
        assert torch.equal(match(images, views, SEARCH).score, expected.score)
        assert torch.equal(transform(images, data.pose), moved)
        assert torch.equal(layer(images, views).images, aligned.images)
        np.testing.assert_array_equal(features(images), features(data.images))
        assert torch.equal(ParticleDataset(images)[7]["image"], data.images[7])


def test_write_images_takes_arrays(tmp_path: Path):
    write_images(tmp_path / "a.mrcs", IMAGES.astype(np.float64))
    np.testing.assert_array_equal(read_images(tmp_path / "a.mrcs"), IMAGES)


def test_results_are_views(data):
    alignment = align_multi_reference(data.images, data.views, iterations=1)
    arrays = alignment.to_numpy()
    assert address(arrays["averages"]) == alignment.averages.data_ptr()
    assert address(np.from_dlpack(alignment.score)) == alignment.score.data_ptr()


def test_exports_leave_the_gradient_behind():
    """NumPy and DLPack refuse tensors that require one; what goes out is detached."""
    images = torch.from_numpy(IMAGES).clone().requires_grad_()
    pose = Pose(torch.ones(6, requires_grad=True), torch.zeros(6, 2), torch.zeros(6).bool())
    moved = transform(images, pose)
    assert address(to_numpy(moved)) == moved.data_ptr()
    assert to_relion(pose, 1.0)["rlnAnglePsi"][0] == 1
    sample = ParticleDataset(images, RandomPose())[0]["image"]
    np.from_dlpack(sample)


@pytest.fixture
def cupy():
    module = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return module


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", [lambda x: x, DLPackOnly, CudaOnly])
def test_cupy_arrays_come_in_without_a_copy(cupy, protocol):
    array = cupy.asarray(IMAGES)
    tensor = as_tensor(protocol(array))
    assert tensor.is_cuda
    assert tensor.data_ptr() == array.data.ptr
    np.testing.assert_array_equal(tensor.cpu(), IMAGES)
    part = array[1::2, :, 3:]
    tensor = as_tensor(protocol(part))
    assert tensor.data_ptr() == part.data.ptr
    np.testing.assert_array_equal(tensor.cpu(), IMAGES[1::2, :, 3:])
    with pytest.raises(ValueError, match="backwards"):
        as_tensor(CudaOnly(array[::-1]))
    with pytest.raises(ValueError, match="backwards"):
        as_tensor(array[::-1])


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", [DLPackOnly, CudaOnly])
def test_a_stream_of_cupys_is_waited_for(cupy, protocol):
    """What CuPy has only queued, on a stream of its own, is done before PyTorch looks."""
    stream = cupy.cuda.Stream(non_blocking=True)
    ones, spare, late = (cupy.asarray(np.full((2**27,), v, np.float32)) for v in (1, 0, 0))
    cupy.cuda.Device().synchronize()
    with stream:
        for target in [spare] * 200 + [late]:  # 0.5 GB each: far longer than queueing them takes
            target.data.copy_from_device_async(ones.data, ones.nbytes, stream)
        queued = not stream.done
        seen = as_tensor(protocol(late))
    assert queued
    assert bool((seen == 1).all())


@pytest.mark.gpu
def test_tensors_go_out_to_cupy_without_a_copy(cupy):
    images = torch.from_numpy(IMAGES).cuda()
    pose = Pose.identity(6, device="cuda")
    moved = transform(images, pose)
    for seen in (cupy.from_dlpack(moved), cupy.asarray(moved)):
        assert seen.data.ptr == moved.data_ptr()
        np.testing.assert_array_equal(cupy.asnumpy(seen), moved.cpu())
    moved = transform(images.requires_grad_(), pose)
    assert cupy.from_dlpack(moved.detach()).data.ptr == moved.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", [lambda x: x, CudaOnly])
def test_cupy_to_alignment_to_cupy(cupy, data, protocol):
    """A whole alignment of a CuPy array is that of the tensor; matches are seen by CuPy."""
    images, views = cupy.asarray(data.images.numpy()), cupy.asarray(data.views.numpy())
    found = align_multi_reference(
        protocol(images), protocol(views), iterations=3, particle=PARTICLE
    )
    expected = align_multi_reference(
        data.images.cuda(), data.views.cuda(), iterations=3, particle=PARTICLE
    )
    assert torch.equal(found.class_number, expected.class_number)
    torch.testing.assert_close(found.averages, expected.averages)
    torch.testing.assert_close(found.score, expected.score)
    right = found.class_number == data.class_number
    assert right.double().mean() > 0.95
    average = cupy.asarray(found.averages)  # from the host: a copy
    np.testing.assert_array_equal(cupy.asnumpy(average), found.averages)

    scores = match(protocol(images), protocol(views), SEARCH).score
    seen = cupy.from_dlpack(scores)
    assert seen.data.ptr == scores.data_ptr()
    np.testing.assert_array_equal(cupy.asnumpy(seen), scores.cpu())
    aligned = transform(protocol(images), found.pose.to("cuda"))
    assert cupy.from_dlpack(aligned).data.ptr == aligned.data_ptr()
