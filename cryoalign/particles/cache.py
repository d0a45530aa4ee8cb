"""Prepared images in memory: of a GPU, of the host, or both."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cryoalign.runtime.threads import available_memory

SHARE = 0.25  # largest share of the free memory for prepared images
BLOCK_BYTES = 2**27  # most bytes of the images that are allocated at a time
BLOCKS = 8  # least number of blocks for which there is room, so that most of the room is used
TWICE = 4  # most blocks that are there twice while one replaces the other
LARGEST = 2.0**15  # float16 has no larger power of two


class Place(NamedTuple):
    """A memory that keeps images.

    Attributes:
        name: of the memory, for the log.
        device: where the images are.
        dtype: float32; or float16, with a scale for each image.
        pinned: whether it is memory of the host from which a GPU can copy at any time.
        budget: bytes that may be used.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    pinned: bool
    budget: int


def places_for(device: torch.device) -> tuple[Place, ...]:
    """Where images for a device are kept: on a GPU as float16, and those for which there is no room
    in the host's memory. Each may take `SHARE` of the memory that is free now."""
    host = torch.device("cpu")
    if device.type != "cuda":
        room = int(SHARE * available_memory(device))
        return (Place("memory", device, torch.float32, False, room),)
    rooms = [int(SHARE * available_memory(each)) for each in (device, host)]
    return (
        Place("GPU memory", device, torch.float16, False, rooms[0]),
        Place("host memory", host, torch.float16, True, rooms[1]),
    )


@dataclass(eq=False)
class _Block:
    """Images (length, size, size) of adjacent rows, some of which are not there yet.

    Images of dtype float16 are divided by ``scale`` (length, 1, 1), which is 1 for all images that
    fit the range of float16.
    """

    place: Place
    images: Tensor
    scale: Tensor | None
    there: np.ndarray


class ImageCache:
    """Prepared images of some of a stack's rows, in blocks of adjacent rows.

    Blocks are allocated when the first of their images is put, until the budget of every place is
    used. Threads may share the cache. The images that it gives must not be written to.
    """

    def __init__(
        self, n: int, rows: range, size: int, device: torch.device, places: Sequence[Place]
    ) -> None:
        """
        Args:
            n: number of rows of the stack.
            rows: those that may be kept.
            size: side of the images, pixels.
            device: where images are given.
            places: where they may be kept, in order of preference.
        """
        self.n, self.rows, self.size, self.device = n, rows, size, device
        self.places = tuple(places)
        widest = max((each.dtype.itemsize for each in places), default=4)
        block = min(BLOCK_BYTES, max((each.budget for each in places), default=0) // BLOCKS)
        self.length = max(1, block // (widest * size**2))
        self._blocks: dict[int, _Block] = {}
        self._used = [0] * len(self.places)  # bytes, also of `_before`
        self._lock = threading.Lock()
        self._before: ImageCache | None = None  # whose blocks are replaced by those of this one

    def keep_only(self, rows: range) -> None:
        """Change the rows that may be kept, and free the blocks in which there is none of them."""
        self.rows = rows
        wanted = range(rows.start // self.length, (rows.stop - 1) // self.length + 1)
        for number in [each for each in self._blocks if each not in wanted]:
            self._free(number)

    def successor(self) -> ImageCache:
        """An empty cache for other images of the same rows, such as phase-flipped ones.

        It has the same room. A block of this cache is freed when the other has all of its images,
        or when more than `TWICE` blocks are in both.
        """
        other = copy.copy(self)
        other._blocks, other._before = {}, self
        return other

    def has_room(self, rows: np.ndarray) -> bool:
        """Whether some of these rows (b,) would be kept."""
        numbers = {int(rows[0]) // self.length, int(rows[-1]) // self.length} if len(rows) else ()
        return any(each in self._blocks or self._place(each) is not None for each in numbers)

    def holds(self, rows: np.ndarray) -> bool:
        """Whether all of these rows (b,) are on the device already."""
        for number in np.unique(rows // self.length).tolist():
            block = self._blocks.get(number)
            if block is None or block.place.device.type != self.device.type:
                return False
            if not block.there[rows[rows // self.length == number] % self.length].all():
                return False
        return True

    def get(self, rows: np.ndarray) -> Tensor | None:
        """(b, size, size) float32 images of rows (b,), or None if one of them is not here."""
        if not len(rows):
            return None
        numbers, index = np.divmod(rows, self.length)  # faster than PyTorch on so few numbers
        if (numbers == numbers[0]).all():
            return self._from(self._blocks.get(int(numbers[0])), index)
        images = torch.empty(len(rows), self.size, self.size, device=self.device)
        for number in np.unique(numbers).tolist():
            (at,) = np.nonzero(numbers == number)
            part = self._from(self._blocks.get(number), index[at])
            if part is None:
                return None
            images[_selection(at, self.device)] = part
        return images

    def is_sample(self, rows: np.ndarray) -> bool:
        """Whether rows (b,) are a sample from many blocks: to keep it would take their room from
        whole batches."""
        return len(np.unique(rows // self.length)) > 1 + 4 * -(-len(rows) // self.length)

    def put(self, rows: np.ndarray, images: Tensor) -> None:
        """Keep images (b, size, size) of rows (b,), as far as these may be kept and have room."""
        numbers, index = np.divmod(rows, self.length)
        own = (rows >= self.rows.start) & (rows < self.rows.stop)
        for number in np.unique(numbers[own]).tolist():
            block = self._block(number)
            if block is None:
                continue
            (at,) = np.nonzero(own & (numbers == number))
            part = images if len(at) == len(rows) else images[_selection(at, images.device)]
            where = _selection(index[at], block.place.device)
            if block.scale is not None:
                scale = _scale(part)
                block.scale[_selection(index[at], self.device)] = scale
                part = (part / scale).to(block.place.dtype)
            if isinstance(where, slice):
                block.images[where].copy_(part)  # straight into pinned memory
            else:
                block.images[where] = part.to(block.place.device)
            block.there[index[at]] = True
            if self._before is not None:
                self._before._free_replaced(number, block)

    def as_kept(self, images: Tensor) -> Tensor:
        """Images (b, size, size) as the cache would give them, rounded to float16 if it keeps such:
        results then do not depend on which images there is room for."""
        if all(each.dtype == torch.float32 for each in self.places):
            return images
        scale = _scale(images)
        return (images / scale).half() * scale

    def kept(self) -> dict[Place, int]:
        """Number of images in each place."""
        count = dict.fromkeys(self.places, 0)
        for block in self._blocks.values():
            count[block.place] += int(block.there.sum())
        return count

    def described(self, wanted: int) -> str:
        """Where the images are, of ``wanted`` that would be kept if there was room, in words."""
        kept = {place: count for place, count in self.kept().items() if count}
        parts = [
            f"{_in_units(count * place.dtype.itemsize * self.size**2)}, kept in {place.name}"
            for place, count in kept.items()
        ]
        again = wanted - sum(kept.values())
        if again > 0:
            parts.append(f"{again} of {wanted} images are read again whenever they are needed")
        return "; ".join(parts)

    def _from(self, block: _Block | None, index: np.ndarray) -> Tensor | None:
        if block is None or not block.there[index].all():
            return None
        images = block.images[_selection(index, block.place.device)]
        if block.scale is None:
            return images
        images = images.to(self.device, non_blocking=True)
        return images * block.scale[_selection(index, self.device)]  # float16 * float32: float32

    def _block(self, number: int) -> _Block | None:
        """The block of a number, made if there is room for it."""
        with self._lock, torch.inference_mode(False):
            found = self._blocks.get(number)
            replaced = None if self._before is None else self._before._blocks.get(number)
            place = replaced.place if replaced is not None else self._place(number)
            place = None if found is not None else place
            if place is None:
                return found
            self._used[self.places.index(place)] += self._bytes(number, place)
            length = self._length(number)
            shape = (length, self.size, self.size)
            images = torch.empty(
                shape, dtype=place.dtype, device=place.device, pin_memory=place.pinned
            )
            scale = None
            if place.dtype != torch.float32:
                scale = torch.ones(length, 1, 1, device=self.device)
            made = _Block(place, images, scale, np.zeros(length, bool))
            self._blocks[number] = made
            if self._before is not None:
                both = [each for each in self._before._blocks if each in self._blocks]
                for each in both[:-TWICE]:
                    self._before._free(each)
            return made

    def _free_replaced(self, number: int, by: _Block) -> None:
        """Free a block if all of its images are in another one."""
        with self._lock:
            block = self._blocks.get(number)
            if block is not None and (by.there | ~block.there).all():
                self._free(number)

    def _free(self, number: int) -> None:
        place = self._blocks.pop(number).place
        self._used[self.places.index(place)] -= self._bytes(number, place)

    def _place(self, number: int) -> Place | None:
        """The first place with room for a block."""
        for place, used in zip(self.places, self._used, strict=True):
            if used + self._bytes(number, place) <= place.budget:
                return place
        return None

    def _length(self, number: int) -> int:
        """Rows of a block; the last one may be shorter."""
        return min(self.length, self.n - number * self.length)

    def _bytes(self, number: int, place: Place) -> int:
        return self._length(number) * place.dtype.itemsize * self.size**2


def _scale(images: Tensor) -> Tensor:
    """(b, 1, 1) what images (b, h, w) are divided by to fit the range of float16."""
    return (images.flatten(1).abs().amax(1) / LARGEST).clamp(min=1)[:, None, None]


def _selection(index: np.ndarray, device: torch.device) -> slice | Tensor:
    """A slice if the numbers are adjacent and ascend (no copy is made then), else a tensor."""
    if (index[1:] - index[:-1] == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index).to(device)


def _in_units(number: int) -> str:
    """A number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= 0.1 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
