"""Operations over several processes; the only module that imports ``torch.distributed``.

With a single process they return their arguments, so the same code serves both cases.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, from 0; 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(n: int) -> slice:
    """The part of n particles of process r of W: from r n // W up to (r + 1) n // W."""
    return slice(rank() * n // world_size(), (rank() + 1) * n // world_size())


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes (of the same shape), on every process."""
    if world_size() == 1:
        return tensor
    total = _for_backend(tensor).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """The tensors of all processes, joined along the first axis by rank, on every process."""
    if world_size() == 1:
        return tensor
    ours = _for_backend(tensor).contiguous()
    lengths = [torch.zeros(1, dtype=torch.int64, device=ours.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(ours)], device=ours.device))
    longest = max(int(n) for n in lengths)
    padded = ours.new_zeros(longest, *ours.shape[1:])
    padded[: len(ours)] = ours
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    joined = torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])
    return joined.to(tensor.device)


def same_on_all_ranks(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, on every process."""
    if world_size() == 1:
        return tensor
    shared = _for_backend(tensor).clone()
    dist.broadcast(shared, 0)
    return shared.to(tensor.device)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the process group if ``torchrun`` launched one; yield the device of this process.

    The backend is gloo on CPUs and NCCL on GPUs. Each process has its own GPU, by LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: start at most "
                f"--nproc-per-node {torch.cuda.device_count()}, or use device=cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _for_backend(tensor: Tensor) -> Tensor:
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()


def choose_device(device: str) -> torch.device:
    """The device of this name; ``auto`` is the GPU if PyTorch sees one, else the CPU.

    Raises:
        ValueError: the name is unknown, or there is no CUDA GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch finds no CUDA GPU here: use device=cpu")
    return chosen
