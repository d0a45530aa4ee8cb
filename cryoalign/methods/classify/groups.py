"""E-steps of groups of particles, where each group has classes of its own.

Classes are split by an expectation maximisation of the members of each class alone. All groups are
computed together: their particles are put into tiles of equal width, each of one group and one
half-set, so that one batched matrix product serves all tiles.

Letters of shapes as in `em_step`; g groups, t tiles of p particles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cryoalign.methods.classify.em_step import (
    Features,
    Posterior,
    Sums,
    block_size,
    expect_block,
    model_of,
    no_sums,
    signal_of,
)
from cryoalign.methods.classify.resolution_level import CHUNK, ResolutionLevel, sums_over_ranks

WIDTH = {"cpu": 4, "cuda": 8}  # particles of a tile
MISSING = 1e30  # penalty of classes that a group does not have


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of particles, all on the CPU.

    Attributes:
        members: (t, p) index of every particle; the last tile of a group repeats one.
        here: (t, p) bool, False for such repetitions.
        group: (t,) group of each tile.
        half: (t,) half-set of each tile.
    """

    members: Tensor
    here: Tensor
    group: Tensor
    half: Tensor

    def __len__(self) -> int:
        return len(self.group)

    def split(self, count: int) -> list[Tiles]:
        """Parts of ``count`` tiles; the last one can be smaller."""
        columns = (each.split(count) for each in (self.members, self.here, self.group, self.half))
        return [Tiles(*each) for each in zip(*columns, strict=True)]


def tiles_of(group: Tensor, half: Tensor, width: int) -> Tiles:
    """Tiles of ``width`` from particles with groups (n,) and half-sets (n,)."""
    key = 2 * group + half
    order = key.argsort(stable=True)
    count = torch.bincount(key)
    tiles = -(-count // width)
    first = count.cumsum(0) - count  # of each key, in ``order``
    owner = torch.arange(len(count)).repeat_interleave(tiles)  # (t,)
    number = torch.arange(len(owner)) - (tiles.cumsum(0) - tiles)[owner]
    place = (number * width)[:, None] + torch.arange(width)  # (t, p)
    here = place < count[owner, None]
    members = order[first[owner, None] + torch.where(here, place, 0)]
    return Tiles(members, here, owner // 2, owner % 2)


def expect_tiles(
    data: Features, tiles: Tiles, classes: Sequence[Tensor], *, mirror: bool = False
) -> Sums:
    """One E-step of all groups.

    Args:
        data: the particles of the tiles, t p of them.
        tiles: which group and half-set each tile has, and which of its particles count.
        classes: (j, r, m) features of the class images of each group; their numbers may differ.
        mirror: whether mirrored particles are tried.

    Returns:
        The sums of all classes, those of the first group first.
    """
    device, width = data.rows.device, tiles.here.shape[1]
    number = torch.tensor([len(each) for each in classes])
    padded = torch.nn.utils.rnn.pad_sequence(list(classes), batch_first=True)  # (g, j, r, m)
    missing = torch.arange(padded.shape[1]) >= number[:, None]  # (g, j)
    model = model_of(data.rings, padded, mirror)
    model.penalty[missing.to(device)] = MISSING  # so unlikely that they have no weight
    group, here = tiles.group.to(device), tiles.here.to(device)
    # (2 g, t): which tiles belong to each half-set and group. A product with it sums over tiles
    # in the same order every time, also on a GPU.
    place = tiles.half * len(classes) + tiles.group
    belongs = torch.nn.functional.one_hot(place, 2 * len(classes)).T.float().to(device)
    shape = model.columns.shape  # (2, m, g, 2 r, k h)
    gradient = torch.zeros(*shape[:2], 2 * len(classes), shape[3:].numel(), device=device)
    size = block_size(device, model.per_shift * len(data.shifts) * width)
    parts: list[Posterior] = []
    for start in range(0, len(tiles), size):
        stop = min(start + size, len(tiles))
        some = data.part(start * width, stop * width)
        into = torch.zeros(*shape[:2], stop - start, *shape[3:], device=device)
        parts.append(expect_block(some, model, (group[start:stop], here[start:stop]), into))
        gradient += belongs[:, start:stop] @ into.flatten(3)
    share = torch.cat([each.share for each in parts]).unflatten(0, (-1, width))  # (t, p, j)
    share = share * here[..., None]
    weight = share.mT @ data.weight.unflatten(0, (-1, width))  # (t, j, r)

    present = (~missing).flatten().nonzero().squeeze(1).to(device)

    def of_classes(sums: Tensor) -> Tensor:  # (2 g, j, ...)
        return sums.unflatten(0, (2, -1)).flatten(1, 2)[:, present]

    return Sums(
        of_classes(signal_of(gradient.unflatten(3, shape[3:]), 1 + mirror, data.rings.n_angles)),
        of_classes((belongs @ weight.flatten(1)).unflatten(1, weight.shape[1:])),
        of_classes(belongs @ share.sum(1)),
    )


@dataclass(eq=False)
class _Batch:
    """Some tiles, with their particles as indices of all particles."""

    tiles: Tiles
    groups: Tensor  # (g',) the groups that occur, which ``tiles`` counts from 0
    kept: list[Features] = field(default_factory=list)


class Groups:
    """Groups of particles of a level, as far as they are on this process."""

    def __init__(self, level: ResolutionLevel, members: Sequence[Tensor]) -> None:
        """
        Args:
            level: the particles.
            members: indices of the members of each group. No particle is in two groups.
        """
        self.level, kind = level, level.device.type
        rows = torch.cat(list(members))
        group = torch.arange(len(members)).repeat_interleave(torch.tensor([*map(len, members)]))
        # Halves of every group, whatever half-sets its members have in all particles.
        half = torch.cat([torch.arange(len(each)) % 2 for each in members])
        # Tiles and batches stay within a part, so that processes do not change the results.
        self.parts: list[list[_Batch]] = []
        for some in level.in_parts(rows).values():
            tiles = tiles_of(group[some], half[some], WIDTH[kind])
            tiles = Tiles(rows[some][tiles.members], tiles.here, tiles.group, tiles.half)
            batches = []
            for few in tiles.split(CHUNK[kind] // WIDTH[kind]):
                present, own = few.group.unique(return_inverse=True)
                batches.append(_Batch(Tiles(few.members, few.here, own, few.half), present))
            self.parts.append(batches)

    def expect(self, classes: Sequence[Tensor]) -> Sums:
        """Sums of one E-step of all groups, over all processes.

        Args:
            classes: (j, r, m) class images of each group.
        """
        level, all_of_them = self.level, torch.cat(list(classes))

        def step(batch: _Batch) -> Sums:
            made = batch.kept[0] if batch.kept else level.of(batch.tiles.members.flatten())
            if level.keep and not batch.kept:
                batch.kept.append(made)
            own = [classes[g] for g in batch.groups.tolist()]
            return expect_tiles(made, batch.tiles, own, mirror=level.mirror)

        places = torch.arange(len(all_of_them)).split([len(each) for each in classes])
        found = level.over(step, (batch for part in self.parts for batch in part))

        def of_parts() -> Iterator[Sums]:
            for part in self.parts:
                total = no_sums(all_of_them)
                for batch in part:
                    here = torch.cat([places[g] for g in batch.groups.tolist()]).to(level.device)
                    for sums, some in zip(total, next(found), strict=True):
                        sums.index_add_(1, here, some)
                yield total

        return sums_over_ranks(of_parts(), all_of_them)
