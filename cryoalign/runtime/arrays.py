"""Use arrays of other libraries as tensors, without a copy.

All images in memory enter the package through `as_tensor`: in `cryoalign.particles.stack.as_stack`
and in the few functions that take tensors of images. Results are tensors, which NumPy, CuPy and
other libraries can use through the same protocols (docs/interop.md).
"""

import warnings
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import DLDeviceType


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array that supports DLPack, such as those of CuPy, JAX and TensorFlow."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


@runtime_checkable
class SupportsCuda(Protocol):
    """An array on a GPU that supports the CUDA array interface, such as those of Numba."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Array = Tensor | np.ndarray | SupportsDLPack | SupportsCuda
"""The arrays that `as_tensor` accepts."""


def as_tensor(images: Array) -> Tensor:
    """A tensor that shares the memory of an array; a tensor is returned unchanged.

    Memory maps of NumPy stay on disk until they are read. Read-only arrays are accepted, because
    this package never writes into its arguments. If an array supports both protocols, DLPack is
    used. The current PyTorch stream, or the host, waits for the operations that the other library
    has queued.

    Args:
        images: real numbers of any type that PyTorch has, in the byte order of this machine.

    Raises:
        TypeError: the argument is not such an array, or its numbers are not real.
        ValueError: a tensor cannot share the memory; the message says which copy to make.
    """
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        tensor = _from_numpy(images)
    elif isinstance(images, SupportsDLPack):
        _refuse_backwards(getattr(images, "strides", None))
        if images.__dlpack_device__()[0] == DLDeviceType.kDLCUDA:
            _need_gpu()
        tensor = torch.from_dlpack(images)
    elif isinstance(images, SupportsCuda):
        tensor = _from_cuda(images)
    else:
        raise TypeError(
            f"images are a {type(images).__name__}: give a torch tensor, a NumPy array, or an "
            "array with __dlpack__ or __cuda_array_interface__; numpy.asarray converts a list"
        )
    if tensor.is_complex():
        raise TypeError(f"images are {tensor.dtype}: give real numbers, such as their real part")
    return tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a NumPy array without gradient: shared memory on the CPU, a copy from a GPU."""
    return tensor.detach().cpu().numpy()


def _from_numpy(images: np.ndarray) -> Tensor:
    if images.dtype.kind not in "biufc":
        raise TypeError(f"images are {images.dtype}: give real numbers, such as float32")
    if not images.dtype.isnative:
        raise ValueError(
            f"images are {images.dtype.str}, in another byte order than this machine's: use "
            'images.astype(images.dtype.newbyteorder("="))'
        )
    _refuse_backwards(images.strides)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(images)
        except (TypeError, ValueError) as error:  # long doubles, fields of structured arrays
            raise type(error)(f"images cannot be a tensor: {error}") from error


def _from_cuda(images: SupportsCuda) -> Tensor:
    interface = images.__cuda_array_interface__
    _refuse_backwards(interface.get("strides"))
    _need_gpu()
    if interface.get("stream") is not None:  # PyTorch ignores the stream: wait for all of them
        torch.cuda.synchronize()
    tensor = torch.as_tensor(images, device="cuda")
    if tensor.numel() and tensor.data_ptr() != interface["data"][0]:
        raise ValueError(
            f"images are not on the current GPU, {tensor.device}: make theirs the current one with "
            "torch.cuda.device(...), or give an array with __dlpack__"
        )
    return tensor


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            "images are on a GPU, but this PyTorch sees none: copy them to the host (CuPy: "
            "cupy.asnumpy), or install a CUDA build of PyTorch"
        )


def _refuse_backwards(strides: tuple[int, ...] | None) -> None:
    """Refuse negative strides: given by DLPack, they make PyTorch 2.13 end the process."""
    if strides is not None and min(strides, default=0) < 0:
        raise ValueError(
            f"images run backwards in memory (strides {tuple(strides)}): make a copy, such as "
            "numpy.ascontiguousarray(images)"
        )
