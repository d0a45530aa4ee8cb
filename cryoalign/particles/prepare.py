"""Prepare particles for alignment: set unusable ones aside, normalise and resize the others."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, phase_flip, refuse_impossible
from cryoalign.images.fourier import fourier_resize
from cryoalign.images.hot_pixels import mend_hot_pixels
from cryoalign.images.masks import background, normalise
from cryoalign.particles.cache import ImageCache, places_for
from cryoalign.particles.ctf_use import CtfUse, ctf_line
from cryoalign.particles.reading import Made, ReadAhead, look_through, read_chunks
from cryoalign.particles.screen import refuse_above, screen, table_of
from cryoalign.particles.settings import Box, Images
from cryoalign.particles.stack import Stack, as_stack, optics_of
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import (
    choose_device,
    even_batch,
    gather_over_ranks,
    part_length,
    shard,
    sum_over_ranks,
    world_size,
)
from cryoalign.runtime.threads import workers_for

Progress = Callable[[str, int, int], None]
"""Called from time to time with the name of the present work, the amount done, and the total."""

CPU_BATCH = 64  # particles; the arrays of a batch then fit a CPU's cache
CUDA_BATCH_BYTES = 2**29  # most bytes of the images of a batch; a GPU needs many at a time
CUDA_BATCH = 4096  # particles of a batch, at least, if that many fit


def prepare(
    particles: Stack | Array, images: Images | None = None, *, optics: Optics | None = None,
    device: str = "auto", batch_size: int | None = None, max_rejected: float = 0.1,
    progress: Progress | None = None,
) -> PreparedParticles:  # fmt: skip
    """Find the unusable images of a stack, and prepare the others for any method.

    Args:
        particles: a stack (`io.read_particles`) or an array (n, size, size) of any library.
        images: how particles are prepared.
        optics: CTFs of the particles of an array; those of a stack come from its STAR file.
        device: auto, cpu or cuda.
        batch_size: particles per batch; None chooses for the device.
        max_rejected: largest share of unusable particles (NaN, constant) that may be set aside.
        progress: see `Progress`; called here and by the methods that use the particles.

    Raises:
        ValueError: images that are not square, or smaller than ``images.box``; no background; a
            number of CTFs that differs from the particles'; too many unusable particles.
    """
    return PreparedParticles(
        as_stack(particles), images or Images(), choose_device(device), max_rejected, batch_size,
        progress, optics,
    )  # fmt: skip


class PreparedParticles:
    """The usable particles of a stack, prepared batch by batch.

    All images are read once when this is made, to find the unusable ones, and prepared in the same
    pass. Prepared images are kept in memory (`particles.cache`) unless ``images.cache`` is
    ``none``. Those for which there is no room are read and prepared again whenever they are needed;
    memory therefore does not grow with the number of particles.

    Attributes:
        rows: (n,) rows of the stack that are used.
        half: (n,) half-set of each particle, 0 or 1 for even or odd rows.
        rejected: table (index, reason) of the rows that are not used.
        hot_images, hot_pixels: number of images with hot pixels, and of these pixels, which have
            the median of their neighbours (`images.hot_pixels`); 0 if they are kept.
        size: side of the prepared images, pixels.
        scale: pixels of the input per pixel of the prepared images.
        pixel_size: pixel size of the prepared images in Å, or None.
        fingerprint: identifies the particles, by their number, some of their pixels and ``size``.
        progress: see `Progress`; None reports nothing.
    """

    def __init__(
        self, stack: Stack, images: Images, device: torch.device, max_rejected: float = 0.1,
        batch_size: int | None = None, progress: Progress | None = None,
        optics: Optics | None = None,
    ) -> None:  # fmt: skip
        """See `prepare`, which describes the arguments and errors."""
        height, width = stack.shape
        if height != width:
            raise ValueError(f"particles of {height} x {width} px: alignment needs square images")
        if images.box is not None and images.box > width:
            raise ValueError(
                f"images.box {images.box} px is larger than the particles ({width} px): use at "
                f"most {width}"
            )
        if optics is not None:
            refuse_impossible(optics)
        if optics is not None and len(optics) != len(stack):
            raise ValueError(
                f"{len(optics)} CTFs do not fit {len(stack)} particles: give one for each particle"
            )
        self.background_radius = images.background_radius or width / 2
        background(width, self.background_radius)  # raises errors before any image is read
        self.stack, self.images, self.device, self.progress = stack, images, device, progress
        self.size, self.pixel_size = images.box_of(width, stack.pixel_size)
        self.scale = width / self.size
        self._given_optics = optics
        self._unflipped: Optics | None = None  # CTFs before phases were flipped
        usual = CPU_BATCH
        if device.type == "cuda":
            most = max(64, CUDA_BATCH_BYTES // (4 * self.size**2))
            usual = even_batch(len(stack), most, CUDA_BATCH)
        self.batch_size = batch_size or usual
        # Until it is known which images are usable, a process has its share of all.
        own = shard(len(stack), part_length(len(stack), self.batch_size))
        places = places_for(device) if images.cache == "auto" else ()
        cache = ImageCache(len(stack), range(len(stack))[own], self.size, device, places)
        self._caches = {False: cache}  # by: phases flipped
        self.rejected = self._first_pass()
        refuse_above(self.rejected, len(stack), max_rejected)
        good = torch.ones(len(stack), dtype=torch.bool)
        good[torch.tensor(self.rejected["index"].tolist(), dtype=torch.int64)] = False
        self.rows = good.nonzero().squeeze(1)
        self._caches[False].keep_only(self._own_rows()[1])
        self.fingerprint = f"{_fingerprint(stack)}-{self.size}"
        # Particles from which these were chosen by `only`, and the indices of these.
        self._whole: tuple[PreparedParticles, Tensor] | None = None
        self._ahead: ReadAhead | None = None  # while `parts` is used

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def half(self) -> Tensor:
        """(n,) half-set of every particle, 0 or 1."""
        return self.rows % 2

    @property
    def flipped(self) -> bool:
        """Whether phases are flipped where the CTF is negative."""
        return self._unflipped is not None

    @property
    def box(self) -> Box:
        """Side and pixel size of the prepared images."""
        return Box(self.size, self.pixel_size)

    @cached_property
    def optics(self) -> Optics | None:
        """(n,) CTFs of the prepared images, in pixels of these; None if not known.

        Raises:
            ValueError: the STAR file has a defocus, but other values that a CTF needs are missing.
        """
        if self._optics is None:
            return None
        optics = self._optics[self.rows].scaled(self.scale)
        return optics.flipped() if self.flipped else optics

    def phase_flipped(self) -> PreparedParticles:
        """The same particles with phases flipped where the CTF is negative; itself without CTFs."""
        if self.optics is None or self.flipped:
            return self
        other = self._copy()
        other.__dict__.pop("optics", None)  # cached for the particles as they were
        if self._whole is not None:
            whole, members = self._whole
            other._whole = whole.phase_flipped(), members
        elif True not in self._caches:
            self._caches[True] = self._caches[False].successor()
        other._unflipped = self.optics
        return other

    def ctf_line(self, use: CtfUse) -> str:
        """What a method that uses CTFs in this way does with these, see `ctf_use.ctf_line`."""
        return ctf_line(use, self.stack, None if use == "none" else self._optics)

    @cached_property
    def _optics(self) -> Optics | None:
        """CTFs of the whole stack as it is; None if not known."""
        return self._given_optics or optics_of(self.stack)

    def reporting_to(self, progress: Progress) -> PreparedParticles:
        """The same particles with another function for the progress."""
        other = self._copy()
        other.progress = progress
        return other

    def only(self, members: Tensor, reasons: str | Sequence[str]) -> PreparedParticles:
        """Some of the particles; the others are added to ``rejected``.

        Args:
            members: (m,) indices of the particles, in ascending order.
            reasons: why the others are rejected, one reason for all or one for each.
        """
        others = torch.ones(len(self), dtype=torch.bool)
        others[members] = False
        left = pd.DataFrame({"index": self.rows[others].numpy()})
        left["reason"] = pd.array([reasons] * len(left) if isinstance(reasons, str) else reasons)
        other = self._copy()
        other.__dict__.pop("optics", None)  # cached for the present rows
        if len(left):
            tables = [self.rejected, left] if len(self.rejected) else [left]
            table = pd.concat(tables, ignore_index=True)
            other.rejected = table.sort_values("index", kind="stable", ignore_index=True)
        other.rows = self.rows[members]
        other._whole = self, members
        return other

    def read(self, members: Tensor) -> Tensor:
        """(b, size, size) prepared images of the particles with indices ``members`` (b,)."""
        root, own = self._root(members)
        made = self._ahead.take(members) if self._ahead is not None else None
        made = made or root._make(own)
        if not made.new:
            return made.images
        rows = root.rows[own].numpy()
        if not root._cache.is_sample(rows):
            root._cache.put(rows, made.images)
        return root._cache.as_kept(made.images)

    def read_shared(self, members: Tensor) -> Tensor:
        """(b, size, size) images of any particles (b,), on every process. Each is read by the
        process that has it, which may keep it rounded (float16 on a GPU)."""
        own = self.own
        here = ((members >= own.start) & (members < own.stop)).nonzero().squeeze(1)
        found = [torch.zeros(0, self.size, self.size, device=self.device)]
        if len(here):
            found.append(self.read(members[here]))
        order = gather_over_ranks(here).argsort()
        return gather_over_ranks(torch.cat(found))[order.to(self.device)]

    @property
    def part_length(self) -> int:
        """Number of particles of the parts that processes take (`runtime.processes`)."""
        return part_length(len(self), self.batch_size)

    @property
    def own(self) -> slice:
        """The particles of this process."""
        return shard(len(self), self.part_length)

    def part_of(self, batch: Tensor) -> int:
        """Number of the part (`runtime.processes`) of the particles of a batch (b,)."""
        return int(batch[0]) // self.part_length

    def parts(self, doing: str | None = None) -> Iterator[Tensor]:
        """Indices (b,) of the particles of each batch of this process, in order.

        With a single worker (on a GPU, or on a CPU with one thread), the batch that follows is
        read and prepared by another thread while the caller uses the present one; ``read`` gives
        it then. Several workers read their batches at the same time.

        Args:
            doing: name of the work for the progress; None reports nothing.
        """
        # Asked now: while the parts are used, PyTorch may have fewer threads.
        return self._parts(doing, workers_for(self.device) == 1)

    def _parts(self, doing: str | None, ahead: bool) -> Iterator[Tensor]:
        done = 0
        # The particles of a process begin with a batch, so that batches are the same for any number
        # of processes.
        parts = torch.arange(len(self))[self.own].split(self.batch_size)
        parts = [part for part in parts if len(part)]
        reader = self._ahead = ReadAhead(self.device) if ahead else None
        try:
            for part, following in itertools.zip_longest(parts, parts[1:]):
                if reader is not None and following is not None:
                    self._read_ahead(following, reader)
                yield part
                done += len(part)
                if doing is not None:
                    self.report(doing, done, len(self))
        finally:
            self._ahead = None
            if reader is not None:
                reader.close()

    def kept(self) -> str:
        """Where the prepared images of this process are, for the log."""
        where = f" (in each of {world_size()} processes)" * (world_size() > 1)
        return (
            f"Prepared particles: {self._caches[False].described(len(self._own_rows()[0]))}{where}"
        )

    def mended(self) -> str:
        """How many hot pixels there are, for the log; empty if there are none."""
        if not self.hot_pixels:
            return ""
        return (
            f"Hot pixels: {self.hot_pixels:,} in {self.hot_images:,} of {len(self.stack):,} images "
            "replaced by the median of their neighbours"
        )

    def report(self, doing: str, done: int, total: int) -> None:
        """Call ``progress``, if there is one."""
        if self.progress is not None:
            self.progress(doing, done, total)

    def _copy(self) -> PreparedParticles:
        other = copy.copy(self)
        other._ahead = None
        return other

    def _root(self, members: Tensor) -> tuple[PreparedParticles, Tensor]:
        """The particles from which these were chosen in the first place, and indices of these."""
        if self._whole is None:
            return self, members
        whole, own = self._whole
        return whole._root(own[members])

    @property
    def _cache(self) -> ImageCache:
        return self._caches[self.flipped]

    def _own_rows(self) -> tuple[Tensor, range]:
        """Rows of the particles of this process, and the range in which they are."""
        own = self.rows[self.own]
        return own, range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0)

    def _first_pass(self) -> pd.DataFrame:
        """Read all images once: the table of the unusable ones, which is the same on every process.

        The others are prepared and kept, as far as there is room.
        """
        stack, cache = self.stack, self._caches[False]

        hot: list[Tensor] = []  # of every chunk: images with hot pixels, and their number

        def keep(rows: np.ndarray, images: Tensor) -> None:
            if self.images.hot_pixels == "mend":
                images, count = mend_hot_pixels(images)
                hot.append(torch.stack([(count > 0).sum(), count.sum()]))
            if cache.has_room(rows):
                cache.put(rows, self._normalised(images))

        rows = torch.arange(cache.rows.start, cache.rows.stop)
        found = look_through(
            stack, rows, self.device, CPU_BATCH, keep,
            lambda done: self.report("read", done, len(stack)),
        )  # fmt: skip
        none = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.hot_images, self.hot_pixels = sum_over_ranks(sum(hot, none)).tolist()
        everyone = gather_over_ranks(torch.tensor(list(found), dtype=torch.int64))
        # The reasons are not gathered: the few bad images of other processes are read again.
        return table_of(found) if len(everyone) == len(found) else screen(stack, rows=everyone)

    def _prepared(self, images: Tensor) -> Tensor:
        """(b, size, size) prepared images from those of the stack (b, h, w)."""
        if self.images.hot_pixels == "mend":
            images, _ = mend_hot_pixels(images)
        return self._normalised(images)

    def _normalised(self, images: Tensor) -> Tensor:
        """(b, size, size) prepared images from those without hot pixels (b, h, w)."""
        if len(images) == 1:  # the FFT of a single image has other rounding errors than of several
            return self._normalised(images.expand(2, -1, -1))[:1]
        images = -images if self.images.invert else images
        images = normalise(images, self.background_radius, self.images.background)
        return fourier_resize(images, self.size)

    def _load(self, rows: Tensor) -> Tensor:
        """(b, size, size) prepared images of rows (b,), read from the stack."""
        chunks = read_chunks(self.stack, rows, self.device, max(1, len(rows)))
        parts = [self._prepared(images) for _, images in chunks]
        none = torch.empty(0, self.size, self.size, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat([none, *parts])

    def _read_ahead(self, members: Tensor, reader: ReadAhead) -> None:
        """Let another thread make the images of particles, unless they are on the device."""
        root, own = self._root(members)
        if not root._cache.holds(root.rows[own].numpy()):
            reader.start(members, lambda: root._make(own))

    def _make(self, members: Tensor) -> Made:
        """Images of particles, from memory or from the stack; these are not those of `only`."""
        rows = self.rows[members]
        kept = self._cache.get(rows.numpy())
        if kept is not None:
            return Made(kept, False)
        if self._unflipped is None:
            return Made(self._load(rows), True)
        images = self._caches[False].get(rows.numpy())
        images = self._caches[False].as_kept(self._load(rows)) if images is None else images
        if len(members) == 1:  # as in `_prepared`
            images, members = images.expand(2, -1, -1), members.expand(2)
            return Made(phase_flip(images, self._unflipped[members])[:1], True)
        return Made(phase_flip(images, self._unflipped[members]), True)


def _fingerprint(stack: Stack) -> str:
    """The number of images and a checksum of up to 16 of them."""
    rows = torch.linspace(0, len(stack) - 1, min(16, len(stack))).round().long()
    pixels = stack.read(rows).cpu().contiguous().numpy()
    return f"{len(stack)}-{zlib.crc32(pixels.tobytes()):08x}"
