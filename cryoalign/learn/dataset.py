"""Particles for training: a map-style dataset with metadata, and transforms of batches.

    stack = read_particles("particles.star")
    dataset = ParticleDataset(stack, Normalise(40), PhaseFlip(), Mask(36))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)

For a stack that is larger than memory and on a slow disk, see `stream.ParticleStream`.

A sample is a dict with ``image`` (h, w) float32, ``index`` (row of the stack), and the metadata
of the stack's STAR file: the fields of `ctf.Optics` (``defocus_u`` to ``pixel_size``) and of
`pose.Pose` (``angle``, ``shift`` in pixels of the stack, ``mirror``). A transform is a function of
a *batch* of samples (a dict of tensors with one row for each sample), so that the workers of a
``DataLoader`` read and transform whole batches.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cryoalign.images.ctf import FLAGS, Optics, optics_from_relion, phase_flip
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
    """Optics and poses from a stack's STAR file, as tensors with one row per particle."""
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
    """The samples of a stack, read on demand. It can be pickled if its parts can.

    Every worker of a ``DataLoader`` reads for itself. With several processes, each one has its own
    contiguous part of the rows, so no ``DistributedSampler`` is needed and no sample is repeated.

    Attributes:
        rows: (n,) rows of the stack.
        metadata: tensors with one row per particle of the whole stack.
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
            stack: a stack such as from `io.read_particles`, or an array (n, h, w) of any real
                type. Samples are float32.
            transforms: functions that are applied to every batch, in this order.
            rows: which particles: 0-based row numbers, or a bool mask with one element per
                particle of the stack. None takes all. Each process takes its part of them.
            metadata: tensors with one row per particle of the stack; None uses `metadata_of`.

        Raises:
            TypeError: ``stack`` is a path, or a transform is not a function.
            ValueError: rows that the stack does not have, or metadata of another length.
        """
        stack = as_stack(stack)
        for change in transforms:
            if not callable(change) or isinstance(change, type):
                raise TypeError(
                    f"{change!r} is no transform: give functions of a batch as separate arguments, "
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
        """The sample with an index into `rows`; negative indices count from the end."""
        try:
            index = operator.index(index)
        except TypeError as error:
            raise TypeError(
                f"{index!r} is not the index of one sample: dataset.read(range(0, 3)) reads several"
            ) from error
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} does not exist")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples at once; ``DataLoader`` calls this for a batch."""
        batch = self.read(indices)
        return [{name: value[i] for name, value in batch.items()} for i in range(len(indices))]

    def read(self, indices: Sequence[int] | Tensor) -> Sample:
        """The batch of samples with these indices into `rows`, transformed."""
        return self.transformed(self.raw(indices))

    def raw(self, indices: Sequence[int] | Tensor) -> Sample:
        """The batch of samples with these indices into `rows`, before the transforms."""
        rows = self.rows[torch.as_tensor(indices)]
        batch = {"image": self.stack.read(rows), "index": rows}
        return batch | {name: value[rows] for name, value in self.metadata.items()}

    def transformed(self, batch: Sample) -> Sample:
        """A batch after all transforms were applied."""
        for change in self.transforms:
            batch = change(batch)
        return batch


def _row_numbers(rows: Tensor | np.ndarray | Sequence[int], n: int) -> Tensor:
    """(m,) int64 row numbers from numbers or a mask, checked against a stack of n particles."""
    numbers = rows.cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))
    if numbers.ndim != 1:
        raise ValueError(f"rows have shape {tuple(numbers.shape)}: give a one-dimensional array")
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
    """Scale the background, beyond ``radius`` px, to mean 0 and standard deviation 1."""

    radius: float

    def __post_init__(self) -> None:
        _need(self.radius > 0, "Normalise: radius must be above 0 px", self.radius)

    def __call__(self, batch: Sample) -> Sample:
        return {**batch, "image": normalise(batch["image"], self.radius)}


@dataclass(frozen=True)
class Mask:
    """Set images to zero beyond ``radius`` px, with a soft edge of ``edge`` px."""

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
    """Resample images to a box of ``size`` px; pixel size and shifts are converted."""

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
    """Correct the sign of the CTF (`ctf.phase_flip`), where that was not done before."""

    def __call__(self, batch: Sample) -> Sample:
        missing = [name for name in OPTICS if name not in batch and name not in FLAGS]
        if missing:
            raise ValueError(
                f"PhaseFlip needs {', '.join(missing)} of every particle: use a STAR file with "
                "CTF columns, or leave PhaseFlip out"
            )
        optics = Optics(**{name: batch[name] for name in OPTICS if name in batch})
        flipped = {"phase_flipped": optics.flipped().phase_flipped}
        return {**batch, **flipped, "image": phase_flip(batch["image"], optics)}


@dataclass(frozen=True)
class RandomPose:
    """Rotate images, shift them by up to ``max_shift`` px along x and y, and mirror half of them.

    If a sample has a pose, it becomes the pose of the moved image. Otherwise the sample gets the
    pose that moves the new image back to the original. Random numbers come from PyTorch's
    generator, which ``DataLoader`` seeds for every worker. A `Mask` before this must leave room for
    the shift. With ``mirror=False`` no image is mirrored.
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
