"""Particles for training: a map-style dataset with metadata, and transforms of its batches.

    stack = read_particles("particles.star")
    dataset = ParticleDataset(stack, Normalise(40), PhaseFlip(), Mask(36))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)

From a stack that memory does not hold, on a disk that is slow to seek: `stream.ParticleStream`.

A sample is a dict: ``image`` (h, w) float32, ``index`` (row of the stack) and what the stack's
STAR file tells, ``defocus_u`` … ``pixel_size`` (`ctf.Optics`) and ``angle``, ``shift``,
``mirror`` (`pose.Pose`, pixels of the stack). Transforms are functions of a *batch* of samples (a
dict of tensors with one row each), so that ``DataLoader`` workers read and transform a batch at a
time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cryoalign.images.ctf import Optics, optics_from_relion, phase_flip
from cryoalign.images.fourier import fourier_resize
from cryoalign.images.geometry import transform
from cryoalign.images.masks import normalise, soft_mask
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.pose import Pose, compose, from_relion
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import shard

Sample = dict[str, Tensor]
Transform = Callable[[Sample], Sample]
OPTICS = tuple(Optics.__dataclass_fields__)


def metadata_of(stack: Stack) -> Sample:
    """Optics and poses that a stack's STAR file tells, tensors with a row per particle."""
    table, pixel_size = getattr(stack, "table", None), stack.pixel_size
    found: Sample = {}
    if table is None or pixel_size is None:
        return found
    optics = optics_from_relion(table, getattr(stack, "optics", None), pixel_size)
    if optics is not None:
        found |= vars(optics)
    if "rlnAnglePsi" in table:
        found |= {
            name: value if value.dtype == torch.bool else value.float()
            for name, value in vars(from_relion(table, pixel_size)).items()
        }
    return found


class ParticleDataset(Dataset[Sample]):
    """Samples of a stack, read when asked for; pickles if its stack and transforms do.

    Every worker of a ``DataLoader`` reads for itself; every process of several has its own
    contiguous shard, none padded and none twice (no ``DistributedSampler``).

    Attributes:
        rows: (n,) rows of the stack.
        metadata: tensors with a row per particle of the whole stack.
    """

    def __init__(
        self,
        stack: Stack | Array,
        *transforms: Transform,
        rows: Tensor | np.ndarray | Sequence[int] | None = None,
        metadata: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Args:
            stack: `io.read_particles` or another, or an array (n, h, w) (`interop.Array`), of
                any real type: samples are float32, those of float64 too.
            transforms: applied to every batch in this order.
            rows: which particles, whole numbers from 0, or a mask of bools, one per particle of
                the stack; None is all. Of several processes each takes a shard.
            metadata: tensors with a row per particle of the stack; None is `metadata_of` it.

        Raises:
            TypeError: a path, or a transform that is no function.
            ValueError: rows that the stack does not have; metadata of another number of particles.
        """
        stack = as_stack(stack)
        for change in transforms:
            if not callable(change) or isinstance(change, type):
                raise TypeError(
                    f"{change!r} is no transform: give functions of a batch one after the other, "
                    "ParticleDataset(stack, Normalise(40), Mask(36)), or a list as *transforms"
                )
        self.stack, self.transforms = stack, transforms
        chosen = torch.arange(len(stack)) if rows is None else _row_numbers(rows, len(stack))
        self.rows = chosen[shard(len(chosen))]
        self.metadata = dict(metadata_of(stack) if metadata is None else metadata)
        for name, values in self.metadata.items():
            if len(values) != len(stack):
                raise ValueError(
                    f"metadata {name} has {len(values)} rows, the stack {len(stack)} particles: "
                    "give one row per particle of the whole stack"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one of `rows`; negative indices count from the end."""
        try:
            index = operator.index(index)
        except TypeError as error:
            raise TypeError(
                f"{index!r} is no index of one sample: dataset.read(range(0, 3)) reads several"
            ) from error
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Samples of several: how ``DataLoader`` asks for a batch."""
        batch = self.read(indices)
        return [{name: value[i] for name, value in batch.items()} for i in range(len(indices))]

    def read(self, indices: Sequence[int] | Tensor) -> Sample:
        """A batch: the samples of some indices into `rows`, stacked and transformed."""
        return self.transformed(self.raw(indices))

    def raw(self, indices: Sequence[int] | Tensor) -> Sample:
        """A batch as the stack has it."""
        rows = self.rows[torch.as_tensor(indices)]
        batch = {"image": self.stack.read(rows), "index": rows}
        return batch | {name: value[rows] for name, value in self.metadata.items()}

    def transformed(self, batch: Sample) -> Sample:
        """A batch after all transforms."""
        for change in self.transforms:
            batch = change(batch)
        return batch


def _row_numbers(rows: Tensor | np.ndarray | Sequence[int], n: int) -> Tensor:
    """(m,) int64 row numbers, of numbers or of a mask, checked against n particles."""
    numbers = rows.cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))
    if numbers.ndim != 1:
        raise ValueError(f"rows have shape {tuple(numbers.shape)}: give one axis, (n,)")
    if numbers.dtype == torch.bool:
        if len(numbers) != n:
            raise ValueError(f"rows are a mask of {len(numbers)}, the stack has {n} particles")
        return numbers.nonzero().squeeze(1)
    if len(numbers) and (numbers.is_floating_point() or numbers.is_complex()):
        raise TypeError(f"rows are {numbers.dtype}: give whole numbers, or a mask of bools")
    numbers = numbers.long()
    outside = numbers[(numbers < 0) | (numbers >= n)]
    if len(outside):
        raise ValueError(f"row {int(outside[0])} is not in the stack: rows are 0 to {n - 1}")
    return numbers


def _need(fits: bool, what: str, value: float) -> None:
    if not fits:
        raise ValueError(f"{what}, not {value}")


@dataclass(frozen=True)
class Normalise:
    """Background beyond ``radius`` pixels to mean 0 and deviation 1 (`filters.normalise`)."""

    radius: float

    def __post_init__(self) -> None:
        _need(self.radius > 0, "Normalise: radius must be above 0 px", self.radius)

    def __call__(self, batch: Sample) -> Sample:
        return {**batch, "image": normalise(batch["image"], self.radius)}


@dataclass(frozen=True)
class Mask:
    """Nothing beyond ``radius`` pixels, with a soft edge (`filters.soft_mask`)."""

    radius: float
    edge: float = 4.0

    def __post_init__(self) -> None:
        _need(self.radius > 0, "Mask: radius must be above 0 px", self.radius)
        _need(self.edge >= 0, "Mask: edge must be at least 0 px", self.edge)

    def __call__(self, batch: Sample) -> Sample:
        images = batch["image"]
        mask = soft_mask(images.shape[-1], self.radius, self.edge, images.device)
        return {**batch, "image": images * mask}


@dataclass(frozen=True)
class FourierCrop:
    """Images resampled to a box of ``size`` pixels; pixel size and shifts follow."""

    size: int

    def __post_init__(self) -> None:
        whole = isinstance(self.size, Integral) and self.size > 0
        _need(whole, "FourierCrop: size must be a whole number of pixels above 0", self.size)

    def __call__(self, batch: Sample) -> Sample:
        scale = batch["image"].shape[-1] / self.size
        changed = {"image": fourier_resize(batch["image"], self.size)}
        if "pixel_size" in batch:
            changed["pixel_size"] = batch["pixel_size"] * scale
        if "shift" in batch:
            changed["shift"] = batch["shift"] / scale
        return {**batch, **changed}


@dataclass(frozen=True)
class PhaseFlip:
    """The CTF's sign undone (`ctf.phase_flip`)."""

    def __call__(self, batch: Sample) -> Sample:
        missing = [name for name in OPTICS if name not in batch]
        if missing:
            raise ValueError(
                f"PhaseFlip needs {', '.join(missing)} of every particle: use a STAR file with "
                "its CTF columns, or leave PhaseFlip out"
            )
        optics = Optics(**{name: batch[name] for name in OPTICS})
        return {**batch, "image": phase_flip(batch["image"], optics)}


@dataclass(frozen=True)
class RandomPose:
    """Images turned, shifted by up to ``max_shift`` pixels and mirrored at random.

    A pose that a sample has becomes that of the moved image; one without gets the pose that takes
    the moved image back to the stack's. Draws from PyTorch's generator, which ``DataLoader`` seeds
    for every worker. Not after `Mask` with a radius that the shift leaves.
    """

    max_shift: float = 0.0
    mirror: bool = True

    def __post_init__(self) -> None:
        _need(self.max_shift >= 0, "RandomPose: max_shift must be at least 0 px", self.max_shift)

    def __call__(self, batch: Sample) -> Sample:
        images = batch["image"]
        n = len(images)
        pose = Pose(
            torch.rand(n) * 360 - 180,
            (torch.rand(n, 2) * 2 - 1) * self.max_shift,
            torch.rand(n) < (0.5 if self.mirror else 0.0),
        )
        back = pose.inverse()
        if "angle" in batch:
            back = compose(back, Pose(batch["angle"], batch["shift"], batch["mirror"]))
        return {**batch, "image": transform(images, pose), **vars(back)}
