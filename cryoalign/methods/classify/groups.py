"""E-steps of groups of particles, where each group has classes of its own.

Classes are split by an expectation maximisation of the members of each class alone. All groups are
computed together: their particles are put into tiles of equal width, each of one group and one
half-set, so that one batched matrix product serves all tiles.

Letters of shapes as in `em_step`; g groups, t tiles of p particles.
"""

from __future__ import annotations

from collections.abc import Sequence
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

WIDTH = {"cpu": 8, "cuda": 16}  # particles of a tile
AMONG = {"cpu": 2048, "cuda": 16384}  # particles among which those of a tile are found
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
class _Part:
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
        self.level = level
        rows = torch.cat(list(members))
        group = torch.arange(len(members)).repeat_interleave(torch.tensor([*map(len, members)]))
        # Halves of every group, whatever half-sets its members have in all particles.
        half = torch.cat([torch.arange(len(each)) % 2 for each in members])
        kind = level.device.type
        chunk = rows // AMONG[kind]
        self.parts: list[_Part] = []
        for number in chunk[level.is_here(rows)].unique().tolist():
            some = (level.is_here(rows) & (chunk == number)).nonzero().squeeze(1)
            tiles = tiles_of(group[some], half[some], WIDTH[kind])
            tiles = Tiles(rows[some][tiles.members], tiles.here, tiles.group, tiles.half)
            for part in tiles.split(max(1, CHUNK[kind] // WIDTH[kind])):
                present, own = part.group.unique(return_inverse=True)
                self.parts.append(_Part(Tiles(part.members, part.here, own, part.half), present))

    def expect(self, classes: Sequence[Tensor]) -> Sums:
        """Sums of one E-step of all groups, over all processes.

        Args:
            classes: (j, r, m) class images of each group.
        """
        level = self.level

        def step(part: _Part) -> Sums:
            made = part.kept[0] if part.kept else level.of(part.tiles.members.flatten())
            if level.keep and not part.kept:
                part.kept.append(made)
            own = [classes[g] for g in part.groups.tolist()]
            return expect_tiles(made, part.tiles, own, mirror=level.mirror)

        total = no_sums(torch.cat(list(classes)))
        columns = torch.arange(len(total.size[0])).split([len(each) for each in classes])
        for part, sums in zip(self.parts, level.over(step, self.parts), strict=True):
            of_part = torch.cat([columns[g] for g in part.groups.tolist()]).to(level.device)
            for all_of_them, some in zip(total, sums, strict=True):
                all_of_them.index_add_(1, of_part, some)
        return sums_over_ranks(total)
