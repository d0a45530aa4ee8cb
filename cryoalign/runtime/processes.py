"""Operations over several processes; the only module that imports ``torch.distributed``.

A single process uses the same code. Results do not depend on the number of processes, bit for bit,
by three rules. The particles are divided into parts whose borders do not depend on the number of
processes, and a process takes whole parts. Batches do not cross the borders of parts, so that every
matrix product has the same shape on any number of processes. Sums over parts are exact
(`ExactSum`), so that their order does not matter.
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


PARTS = 96
"""Largest number of parts: so many processes can share the work, and 2, 3, 4, 6, 8 … share it
equally."""


def even_batch(n: int, most: int, least: int) -> int:
    """A batch size of at most ``most`` with which n particles have 24 batches, or a multiple, so
    that 2, 3, 4, 6 or 8 processes have equally many; ``least`` if batches were smaller."""
    count = 24 * max(1, -(-n // (24 * most)))
    return max(min(least, most), -(-n // count))


def part_length(n: int, batch: int, parts: int = PARTS) -> int:
    """Number of particles of a part, if n particles are divided into at most ``parts`` parts of
    whole batches. It does not depend on the number of processes."""
    return batch * max(1, -(-n // (batch * parts)))


def shard(n: int, length: int = 1) -> slice:
    """The particles of this process: whole parts of ``length`` particles. All processes have the
    same number of parts, or one more; the last of all parts may be shorter, and a process has no
    particles if there are fewer parts than processes."""
    count = -(-n // length)
    start, stop = ((rank() + i) * count // world_size() * length for i in (0, 1))
    return slice(min(start, n), min(stop, n))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the whole numbers of all processes (tensors of one shape), on every process.

    Raises:
        TypeError: the numbers are not whole, so that their sum would depend on their order.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"sums of {tensor.dtype} depend on the order: use ExactSum")
    return _reduced(tensor, dist.ReduceOp.SUM)


DIGIT = 44  # bits of a digit of `ExactSum`; an int64 has room for 2^19 additions
LOWEST, NOT_FINITE = -22, 24  # place of the digits of the smallest values; of NaN and infinity
ONES = tuple(2.0 ** (DIGIT * place) for place in range(LOWEST - 1, NOT_FINITE))


class ExactSum:
    """Sums of rows of numbers over all processes, which no order and no number of processes change.

    A number is written as two digits to the base 2^44, whole numbers that are added exactly. Both
    digits of a row stand at the same places for all processes: the upper one at the first digit of
    the largest magnitude that was ever added to the row. What lies below the lower digit is left
    out: at most 2^-44 (6e-14) of that magnitude in every addition, down to 2^-88. This is the idea
    of Demmel & Nguyen (2015), "Parallel reproducible summation".
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        """Sums (rows, columns) of zero."""
        self.digits = torch.zeros(2, rows, columns, dtype=torch.int64, device=device)
        self.place = torch.full((rows,), LOWEST, device=device)  # of the upper digit
        ones = torch.tensor(ONES, dtype=torch.float64, device=device)  # exact: powers of two
        nan, zero = ones.new_tensor([torch.nan]), ones.new_zeros(1)
        self.ones, self.shares = torch.cat([ones, nan]), torch.cat([ones.reciprocal(), zero])

    def add(self, values: Tensor, rows: Tensor | None = None) -> None:
        """Add values (b, columns) to the rows with indices ``rows`` (b,), each at most once; None:
        to all."""
        if rows is None:
            rows = torch.arange(len(self.place), device=self.place.device)
        values = values.double()
        largest = values.abs().amax(1)
        # frexp: a magnitude from 2^(e - 1) to 2^e
        place = (largest.frexp().exponent - 1).div(DIGIT, rounding_mode="floor").clamp(min=LOWEST)
        place = torch.where(largest > 0, place, LOWEST)
        place = torch.where(largest.isfinite(), place, NOT_FINITE)
        self._raise(torch.maximum(self.place[rows], place), rows)
        scaled = values * self._at(self.shares, self.place[rows])
        upper = scaled.long()  # without what follows the point
        self.digits[0].index_add_(0, rows, upper)
        self.digits[1].index_add_(0, rows, ((scaled - upper) * 2.0**DIGIT).long())

    def total(self) -> Tensor:
        """(rows, columns) float64 sums over all processes, on every process; NaN in a row to which
        NaN or infinity was added."""
        self._raise(_reduced(self.place, dist.ReduceOp.MAX), slice(None))
        upper, lower = sum_over_ranks(self.digits).double()
        return upper * self._at(self.ones, self.place) + lower * self._at(self.ones, self.place - 1)

    def _at(self, table: Tensor, place: Tensor) -> Tensor:
        """(rows, 1) entries of a table that begins one place below `LOWEST`."""
        return table[place - (LOWEST - 1)][:, None]

    def _raise(self, place: Tensor, rows: Tensor | slice) -> None:
        """Move the upper digits of rows to higher places: digits too low for these are left out."""
        by = place - self.place[rows]
        if not by.any():
            return
        upper, lower = self.digits[:, rows]
        by = by[:, None]
        self.digits[1, rows] = torch.where(by == 0, lower, torch.where(by == 1, upper, 0))
        self.digits[0, rows] = torch.where(by == 0, upper, 0)
        self.place[rows] = place


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


def _reduced(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    """The tensors of all processes (of one shape), reduced to one on every process."""
    if world_size() == 1:
        return tensor
    total = _for_backend(tensor).clone()
    dist.all_reduce(total, how)
    return total.to(tensor.device)


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
