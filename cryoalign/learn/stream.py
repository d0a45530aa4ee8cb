"""Particles of a stack larger than memory, shuffled, with the disk read in order.

    dataset = ParticleDataset(read_particles("particles.star"), Normalise(40), Mask(36))
    stream = ParticleStream(dataset, block=256, window=8)
    loader = DataLoader(stream, batch_size=64, num_workers=2, persistent_workers=True)
    for epoch in range(10):
        stream.set_epoch(epoch)
        for batch in loader:
            ...

A `ParticleDataset` with ``shuffle=True`` reads one image here and one there. A disk or a network
file system that is slow to seek wants long reads; and shuffling whole blocks, then all particles
of a few blocks, is as good for training if a block's particles are not all alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cryoalign.learn.dataset import ParticleDataset, Sample
from cryoalign.runtime.processes import rank

CHUNK = 64
"""Particles transformed at a time."""


class ParticleStream(IterableDataset[Sample]):
    """The samples of a `ParticleDataset`, each once an epoch, read in blocks of its rows.

    Of several processes each streams its own dataset's rows, a contiguous shard; its ``DataLoader``
    workers share out the blocks. A worker holds ``window`` blocks at a time, as raw images.

    It has no length: workers that end on a part of a batch make more batches than rows / batch
    size, of which ``DataLoader`` would warn. ``len(stream.dataset)`` is the number of samples.

    Attributes:
        dataset: whose rows, metadata and transforms these are.
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
            dataset: the particles, in an order that suits the disk: that of the files.
            block: rows read in one go.
            window: blocks held, whose particles are shuffled together.
            shuffle: blocks, and the particles of a window; else all stay in order.
            seed: of the order, which also depends on the epoch, the process and the worker.

        Raises:
            TypeError: no `ParticleDataset`.
            ValueError: ``block`` or ``window`` below 1.
        """
        if not isinstance(dataset, ParticleDataset):
            raise TypeError(
                f"a stream is made of a ParticleDataset, not of a {type(dataset).__name__}: "
                "ParticleStream(ParticleDataset(read_particles(path)))"
            )
        if block < 1 or window < 1:
            raise ValueError(f"block and window must be at least 1, not {block} and {window}")
        self.dataset, self.block, self.window = dataset, block, window
        self.shuffle, self.seed, self.rank = shuffle, seed, rank()
        # In shared memory: workers that outlive an epoch must see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose another order; without it every epoch has the same one."""
        self._epoch.fill_(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, the epoch's number is shared with this one's workers."""
        vars(self).update(state)
        self._epoch.share_memory_()

    def __iter__(self) -> Iterator[Sample]:
        """This worker's samples of the epoch."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        place = [self.seed, int(self._epoch), self.rank]
        blocks = [b for b in torch.arange(len(self.dataset)).split(self.block) if len(b)]
        if self.shuffle:  # alike in all workers
            blocks = [blocks[i] for i in np.random.default_rng(place).permutation(len(blocks))]
        mine = blocks[worker::workers]
        generator = np.random.default_rng([*place, 1 + worker])
        for start in range(0, len(mine), self.window):
            yield from self._samples(mine[start : start + self.window], generator)

    def _samples(
        self, blocks: list[torch.Tensor], generator: np.random.Generator
    ) -> Iterator[Sample]:
        """The samples of a window."""
        # Block by block: what a read maps of a file counts as memory until it ends.
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
