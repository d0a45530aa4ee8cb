"""Random order over a stack that is larger than memory, with long reads from the disk.

    dataset = ParticleDataset(read_particles("particles.star"), Normalise(40), Mask(36))
    stream = ParticleStream(dataset, block=256, window=8)
    loader = DataLoader(stream, batch_size=64, num_workers=2, persistent_workers=True)
    for epoch in range(10):
        stream.set_epoch(epoch)
        for batch in loader:
            ...

A `ParticleDataset` with ``shuffle=True`` reads images one by one from random places, which is slow
on a disk or a network file system with long seek times. A `ParticleStream` reads blocks of
consecutive particles in random order and shuffles the particles of a few blocks at a time. For
training this is as good, unless the particles of one block are all alike.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cryoalign.learn.dataset import ParticleDataset, Sample
from cryoalign.runtime.processes import rank

CHUNK = 64
"""Particles that are transformed at a time, which limits memory."""


class ParticleStream(IterableDataset[Sample]):
    """The samples of a `ParticleDataset`, each once per epoch, read in blocks of rows.

    With several processes, each one streams the contiguous rows of its own dataset. Its
    ``DataLoader`` workers divide the blocks among themselves. A worker holds ``window`` blocks of
    raw images in memory.

    The stream has no length: workers can end with incomplete batches, so there can be more batches
    than rows / batch size, and ``DataLoader`` would warn. Use ``len(stream.dataset)``.

    Attributes:
        dataset: the dataset with the rows, the metadata and the transforms.
    """

    def __init__(
        self,
        dataset: ParticleDataset,
        *,
        block: int = 256,
        window: int = 4,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dataset: the particles, best in the order of their files.
            block: number of rows that are read at once.
            window: number of blocks in memory, whose particles are shuffled together.
            shuffle: True shuffles the blocks and the particles of a window; False keeps the order.
            seed: seed of the order. The order also depends on the epoch, the process and the
                worker.

        Raises:
            TypeError: ``dataset`` is not a `ParticleDataset`.
            ValueError: ``block`` or ``window`` is below 1.
        """
        if not isinstance(dataset, ParticleDataset):
            raise TypeError(
                f"a stream needs a ParticleDataset, not a {type(dataset).__name__}: "
                "ParticleStream(ParticleDataset(read_particles(path)))"
            )
        if block < 1 or window < 1:
            raise ValueError(f"block and window must be at least 1, not {block} and {window}")
        self.dataset, self.block, self.window = dataset, block, window
        self.shuffle, self.seed, self.rank = shuffle, seed, rank()
        # In shared memory, so that workers that live for several epochs see the new number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; otherwise all epochs have the same order."""
        self._epoch.fill_(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the number of the epoch with the workers of the unpickled stream."""
        vars(self).update(state)
        self._epoch.share_memory_()

    def __iter__(self) -> Iterator[Sample]:
        """The samples of this worker in the current epoch."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        place = [self.seed, int(self._epoch), self.rank]
        blocks = [b for b in torch.arange(len(self.dataset)).split(self.block) if len(b)]
        if self.shuffle:  # in the same order in all workers
            blocks = [blocks[i] for i in np.random.default_rng(place).permutation(len(blocks))]
        mine = blocks[worker::workers]
        generator = np.random.default_rng([*place, 1 + worker])
        for start in range(0, len(mine), self.window):
            yield from self._samples(mine[start : start + self.window], generator)

    def _samples(
        self, blocks: list[torch.Tensor], generator: np.random.Generator
    ) -> Iterator[Sample]:
        """The samples of the blocks of a window."""
        # One read per block, so that raw images are in memory once.
        held: list[Sample] = []
        for block in blocks:
            part = self.dataset.raw(block)
            held += ({k: v[i] for k, v in part.items()} for i in range(len(block)))
        order = generator.permutation(len(held)) if self.shuffle else np.arange(len(held))
        for chosen in np.split(order, range(CHUNK, len(held), CHUNK)):
            chunk = [held[i] for i in chosen]
            batch = {name: torch.stack([sample[name] for sample in chunk]) for name in chunk[0]}
            batch = self.dataset.transformed(batch)
            yield from ({k: v[i] for k, v in batch.items()} for i in range(len(chunk)))
