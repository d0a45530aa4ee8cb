"""Prepare particles for alignment: set unusable ones aside, normalise and resize the others."""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, phase_flip, refuse_impossible
from cryoalign.images.fourier import fourier_resize
from cryoalign.images.masks import background, normalise
from cryoalign.particles.ctf_use import CtfUse, ctf_line
from cryoalign.particles.screen import refuse_above, screen
from cryoalign.particles.settings import Box, Images
from cryoalign.particles.stack import Stack, as_stack, optics_of
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import choose_device, gather_over_ranks, shard
from cryoalign.runtime.threads import available_memory

Progress = Callable[[str, int, int], None]
"""Called from time to time with the name of the present work, the amount done, and the total."""

CPU_BATCH = 64  # particles; the arrays of a batch then fit a CPU's cache
CUDA_BATCH_BYTES = 2**29  # bytes of the images of a batch; a GPU needs many particles at a time
CACHE_SHARE = 0.25  # largest share of the free memory for prepared images


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

    Prepared images are kept in memory after they are made, if all of them take at most a quarter
    of the free memory (of the GPU, if that is the device).

    Attributes:
        rows: (n,) rows of the stack that are used.
        half: (n,) half-set of each particle, 0 or 1 for even or odd rows.
        rejected: table (index, reason) of the rows that are not used.
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
        self.rejected = _screened(stack, progress)
        refuse_above(self.rejected, len(stack), max_rejected)
        good = torch.ones(len(stack), dtype=torch.bool)
        good[torch.tensor(self.rejected["index"].tolist(), dtype=torch.int64)] = False
        self.rows = good.nonzero().squeeze(1)
        self.size, self.pixel_size = images.box_of(width, stack.pixel_size)
        self.scale = width / self.size
        self.fingerprint = f"{_fingerprint(stack)}-{self.size}"
        usual = CPU_BATCH
        if device.type == "cuda":
            usual = max(64, CUDA_BATCH_BYTES // (4 * self.size**2))
        self.batch_size = batch_size or usual
        self._given_optics = optics
        self._unflipped: Optics | None = None  # CTFs before phases were flipped
        self._cache = _Cache(len(self), self.size, device)
        # Particles from which these were chosen by `only`, and the indices of these.
        self._whole: tuple[PreparedParticles, Tensor] | None = None

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
        optics = self._given_optics or optics_of(self.stack)
        if optics is None:
            return None
        optics = optics[self.rows].scaled(self.scale)
        return optics.flipped() if self.flipped else optics

    def phase_flipped(self) -> PreparedParticles:
        """The same particles with phases flipped where the CTF is negative; itself without CTFs."""
        if self.optics is None or self.flipped:
            return self
        other = copy.copy(self)
        other.__dict__.pop("optics", None)  # cached for the particles as they were
        if self._whole is not None:
            whole, members = self._whole
            other._whole = whole.phase_flipped(), members
        other._unflipped, other._cache = self.optics, _Cache(len(self), self.size, self.device)
        return other

    def ctf_line(self, use: CtfUse) -> str:
        """What a method that uses CTFs in this way does with these, see `ctf_use.ctf_line`."""
        known = None if use == "none" else self._given_optics or optics_of(self.stack)
        return ctf_line(use, self.stack, known)

    def reporting_to(self, progress: Progress) -> PreparedParticles:
        """The same particles with another function for the progress."""
        other = copy.copy(self)
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
        other = copy.copy(self)
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
        if self._whole is not None:
            whole, own = self._whole
            return whole.read(own[members])
        kept = self._cache.get(members)
        if kept is not None:
            return kept
        images = self.stack.read(self.rows[members]).to(self.device)
        images = -images if self.images.invert else images
        images = normalise(images, self.background_radius, self.images.background)
        images = fourier_resize(images, self.size)
        if self._unflipped is not None:
            images = phase_flip(images, self._unflipped[members])
        self._cache.put(members, images)
        return images

    def parts(self, doing: str | None = None) -> Iterator[Tensor]:
        """Indices (b,) of the particles of each batch of this process, in order.

        Args:
            doing: name of the work for the progress; None reports nothing.
        """
        done = 0
        for part in torch.arange(len(self))[shard(len(self))].split(self.batch_size):
            if len(part):
                yield part
                done += len(part)
                if doing is not None:
                    self.report(doing, done, len(self))

    def report(self, doing: str, done: int, total: int) -> None:
        """Call ``progress``, if there is one."""
        if self.progress is not None:
            self.progress(doing, done, total)


class _Cache:
    """Prepared images of this process's particles in memory, or nothing if there is too little
    memory. Threads may share it. What it gives must not be written to."""

    def __init__(self, n: int, size: int, device: torch.device) -> None:
        own = shard(n)
        self.first, count = own.start, own.stop - own.start
        self.shape, self.device = (count, size, size), device
        self.images: Tensor | None = None
        self.lock, self.complete = threading.Lock(), False
        self.there = torch.zeros(count, dtype=torch.bool)
        self.has_room = 4 * count * size**2 <= CACHE_SHARE * available_memory(device)

    def get(self, members: Tensor) -> Tensor | None:
        """(b, size, size) images, or None if one of them is not here."""
        if self.images is None or not len(members):
            return None
        index = members.numpy() - self.first  # many times faster than PyTorch on so few numbers
        if index.min() < 0 or index.max() >= len(self.there):  # of another process
            return None
        if not (self.complete or self.there[index].all()):
            return None
        if (index[1:] - index[:-1] == 1).all():
            return self.images[int(index[0]) : int(index[-1]) + 1]  # adjacent images need no copy
        return self.images[torch.from_numpy(index).to(self.device)]

    def put(self, members: Tensor, images: Tensor) -> None:
        """Keep those of images (b, size, size) that are this process's, if there is enough memory
        for all of its particles."""
        here = (members >= self.first) & (members < self.first + len(self.there))
        if not self.has_room or not here.any():
            return
        with self.lock, torch.inference_mode(False):
            if self.images is None:
                self.images = torch.empty(self.shape, device=self.device)
        rows = members[here] - self.first
        self.images[rows.to(self.device)] = images[here.to(images.device)]
        self.there[rows] = True
        self.complete = bool(self.there.all())


def _screened(stack: Stack, progress: Progress | None) -> pd.DataFrame:
    """`particles.screen.screen` of the whole stack, with the result on every process."""
    rows = torch.arange(len(stack))[shard(len(stack))]
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("read", done, len(stack))

    found = screen(stack, progress=report, rows=rows)
    bad = torch.tensor(found["index"].tolist(), dtype=torch.int64)
    everyone = gather_over_ranks(bad)
    # The reasons are not gathered: the few bad images of other processes are read again.
    return found if len(everyone) == len(bad) else screen(stack, rows=everyone)


def _fingerprint(stack: Stack) -> str:
    """The number of images and a checksum of up to 16 of them."""
    rows = torch.linspace(0, len(stack) - 1, min(16, len(stack))).round().long()
    pixels = stack.read(rows).cpu().contiguous().numpy()
    return f"{len(stack)}-{zlib.crc32(pixels.tobytes()):08x}"
