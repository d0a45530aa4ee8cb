"""Images of other array libraries as tensors, without a copy: the one door for them.

What holds images in memory comes in through `as_tensor`, where a stack is made of it
(`particles.as_stack`) and in the few functions that take tensors of images. What goes out are
tensors, which NumPy, CuPy and others view by the same protocols (docs/interop.md).
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import DLDeviceType


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array of a library that speaks DLPack: CuPy, JAX, TensorFlow and others."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


@runtime_checkable
class SupportsCuda(Protocol):
    """An array on a GPU that speaks the CUDA array interface: Numba's, say."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Array = Tensor | np.ndarray | SupportsDLPack | SupportsCuda
"""What `as_tensor` takes."""


def as_tensor(images: Array) -> Tensor:
    """A tensor that shares the memory of an array; a tensor is returned as it is.

    NumPy's are viewed directly (memory maps stay lazy, and a read-only array may be given: nothing
    here writes into an argument). DLPack goes before the CUDA array interface where there are both.
    The current PyTorch stream, or the host, waits for what the producer has queued on its own.

    Args:
        images: of real numbers of any type that PyTorch has, in the machine's byte order.

    Raises:
        TypeError: not such an array, or not of real numbers.
        ValueError: it cannot be viewed without a copy; which copy would do is in the message.
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
            "array with __dlpack__ or __cuda_array_interface__; numpy.asarray makes one of a list"
        )
    if tensor.is_complex():
        raise TypeError(f"images are {tensor.dtype}: give real numbers, such as their real part")
    return tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a NumPy array: its own memory on the CPU, a copy from a GPU, never a gradient."""
    return tensor.detach().cpu().numpy()


def _from_numpy(images: np.ndarray) -> Tensor:
    if images.dtype.kind not in "biufc":
        raise TypeError(f"images are {images.dtype}: give real numbers, such as float32")
    if not images.dtype.isnative:
        raise ValueError(
            f"images are {images.dtype.str}, of another machine's byte order: use "
            'images.astype(images.dtype.newbyteorder("="))'
        )
    _refuse_backwards(images.strides)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(images)
        except (TypeError, ValueError) as error:  # long doubles; fields of records
            raise type(error)(f"images cannot be a tensor: {error}") from error


def _from_cuda(images: SupportsCuda) -> Tensor:
    interface = images.__cuda_array_interface__
    _refuse_backwards(interface.get("strides"))
    _need_gpu()
    if interface.get("stream") is not None:  # PyTorch does not look at it: wait for all of them
        torch.cuda.synchronize()
    tensor = torch.as_tensor(images, device="cuda")
    if tensor.numel() and tensor.data_ptr() != interface["data"][0]:
        raise ValueError(
            f"images are on another GPU than the current one, {tensor.device}: enter theirs by "
            "torch.cuda.device(...), or give an array with __dlpack__"
        )
    return tensor


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            "images are on a GPU, where this PyTorch sees none: give them in the host's memory "
            "(CuPy: cupy.asnumpy), or install a CUDA build of PyTorch"
        )


def _refuse_backwards(strides: tuple[int, ...] | None) -> None:
    """PyTorch knows no negative strides; given some by DLPack, it ends the process (2.13)."""
    if strides is not None and min(strides, default=0) < 0:
        raise ValueError(
            f"images run backwards in memory (strides {tuple(strides)}): give a copy, such as "
            "numpy.ascontiguousarray(images)"
        )
