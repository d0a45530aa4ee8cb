"""What the GPU does around the search: image features, refinement of poses, class sums.

Each function is the CUDA voice of an operator whose PyTorch body is its documentation:
`refine.refine_poses`, `average.sum_aligned`, `search.image_peaks`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.operators.kernels import peaks

# Members of one chunk of a class sum: enough blocks for a GPU, few enough partial sums.
MEMBERS = 16
# Largest value of a half-precision reference: far from overflow, and from subnormal numbers.
TOP = 256.0

# What features.cu is made for.
KERNEL_ANGLES, MOST_RINGS, MOST_GROUPS, MOST_SIDE, MOST_RADIUS = 256, 48, 8, 11, 64
DEVIATION = 0.25  # of its samples, as there
CLOSER = 4  # references of a block of closer.cu


def image_peaks(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    rings: Rings,
    mirror: bool,
    candidates: int | None,
) -> tuple[Tensor, Tensor] | None:
    """`search.image_peaks`; None where the kernels do not serve these inputs."""
    side = _side_of_grid(shifts)
    if side is None or not _serves(images, references, rings, side):
        return None
    n, k = len(images), len(references)
    images, references = images.contiguous(), references.resolve_conj().contiguous()
    layout = peaks.Layout.of_references(references)
    layout = replace(layout, steps=layout.steps[:MOST_GROUPS])
    packed = peaks.pack_references(references, layout)
    there = shifts.to(images.device, torch.float32)
    score = images.new_empty(n, k)
    place = torch.empty(n, k, dtype=torch.int64, device=images.device)

    def run(rows: slice) -> None:
        some = images[rows]
        features = pack_images(some, rings, side, layout)
        coarse, shift = peaks.search_packed(features, packed, layout, len(some), k, mirror)
        rescore(
            some, references, there, rings, side // 2, coarse, shift, candidates,
            score[rows], place[rows],
        )  # fmt: skip

    peaks._in_batches(run, n, side**2 * layout.fragments * 64, images.device)
    return score, place


def pack_images(images: Tensor, rings: Rings, side: int, layout: peaks.Layout) -> peaks.Packed:
    """Packed spectra of images (n, h, w) at a grid of side x side shifts, 1 px apart.

    Rings are sampled half an angle step off the textbook's places; at the frequencies that are
    kept this moves the spectra less than half precision's rounding does that of noisy images.
    """
    gain, largest = _gains(rings, images.device)
    blocks = -(-len(images) // 8)
    packed = peaks.Packed(
        images.new_empty(blocks, side**2, layout.fragments, 32, 8, dtype=torch.half),
        images.new_empty(8 * blocks, side**2),
    )
    torch.ops.cryoalign_cuda.pack_images(
        images, _forward_transform(largest, images.device), gain, layout.steps,
        rings.first_ring, rings.ring_step, side, largest, *packed,
    )  # fmt: skip
    return packed


def rescore(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    rings: Rings,
    max_shift: int,
    coarse: Tensor,
    shift: Tensor,
    candidates: int | None,
    score: Tensor,
    place: Tensor,
) -> None:
    """Fill score and place (n, k) from the coarse result, the pairs that matter in fp32.

    ``candidates`` None rescores every pair. A number rescores up to so many of a particle's best
    references (`CLOSER` at most, then every one), those that may yet be the best; the others
    keep their coarse score, but below any rescored one, and place -1.
    """
    few = 0 if candidates is None or candidates > CLOSER else min(candidates, coarse.shape[1])
    weights = rings.weights(images.device).float()
    torch.ops.cryoalign_cuda.rescore_images(
        images, references, shifts, weights, coarse, shift, few,
        rings.first_ring, rings.ring_step, rings.last_ring + max_shift, score, place,
    )  # fmt: skip


def _serves(images: Tensor, references: Tensor, rings: Rings, side: int) -> bool:
    """Whether the kernels take these: Hopper, 256 angles, few enough rings and shifts."""
    count = len(references) and references.shape[1]
    return (
        references.dtype == torch.complex64
        and torch.cuda.get_device_capability(images.device) == (9, 0)
        and rings.n_angles == KERNEL_ANGLES
        and 0 < count <= MOST_RINGS
        and len(images) > 0
        and side <= MOST_SIDE
        and rings.last_ring <= MOST_RADIUS
    )


def _side_of_grid(shifts: Tensor) -> int | None:
    """Shifts a side, if they are the whole pixels of a square, in `Search.shifts`' order."""
    side = math.isqrt(len(shifts))
    axis = torch.arange(side) - side // 2
    grid = torch.cartesian_prod(axis, axis).to(shifts)
    return side if side % 2 and torch.equal(shifts, grid) else None


@functools.lru_cache(maxsize=8)
def _gains(rings: Rings, device: torch.device) -> tuple[Tensor, float]:
    """(r,) what rings' samples are multiplied by, outside in; and the largest area weight.

    The square root of a weight over the largest, as half precision holds it.
    """
    weights = rings.weights().flip(0)
    largest = float(weights.max())
    return (weights / largest).sqrt().half().float().to(device), largest


@functools.lru_cache(maxsize=8)
def _forward_transform(largest: float, device: torch.device) -> Tensor:
    """Folded samples to packed spectra, as tensor-core fragments: half (2, 4, 2, 4, 32, 8).

    Axes: parity of the frequency m = 2 m' + parity; 16 of 64 rows m'; cosines and minus sines; 16
    of 64 columns; lane; what a lane holds. Columns 2 i and 2 i + 1 are the angles j + 1/2 and
    j + 32 + 1/2 of a quarter turn of 64, where i = 16 a + 4 b + c has j = 8 b + 4 a + c.
    """
    m = 2 * torch.arange(64, dtype=torch.float64)[None] + torch.arange(2)[:, None]  # (2, 64)
    j = torch.arange(32).reshape(4, 2, 4).transpose(0, 1).flatten()
    angle = torch.stack([j, j + 32], 1).flatten() + 0.5
    angle = angle * (2 * math.pi / KERNEL_ANGLES)
    phase = m[:, :, None] * angle
    matrix = torch.stack([phase.cos(), -phase.sin()], 1)  # (parity, part, m', column)
    matrix = matrix * (math.sqrt(largest / KERNEL_ANGLES) / DEVIATION)
    # Lane 4 g + c holds rows g, g + 8 and columns 2c, 2c + 1, 2c + 8, 2c + 9 of a 16 x 16 piece.
    pieces = matrix.reshape(2, 2, 4, 2, 8, 4, 2, 4, 2)
    # parity, part, row block, row 8, g, column block, column 8, c, column 1
    pieces = pieces.permute(0, 2, 1, 5, 4, 7, 6, 3, 8)
    return pieces.reshape(2, 4, 2, 4, 32, 8).half().contiguous().to(device)


def refine_poses(
    images: Tensor,
    templates: Tensor,
    label: Tensor,
    angle: Tensor,
    shift: Tensor,
    mirror: Tensor,
    first_ring: int,
    last_ring: int,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`refine.refine_poses`: all steps of a particle in one block."""
    packed, scale = _pack_templates(templates, last_ring)
    disc = _disc(last_ring, images.shape[-1], images.device)
    found = torch.empty_like(angle), torch.empty_like(shift), torch.empty_like(angle)
    torch.ops.cryoalign_cuda.refine_poses(
        images.contiguous(), packed, scale, label.contiguous(), angle.contiguous(),
        shift.contiguous(), mirror.contiguous(), disc, first_ring, last_ring, steps, *found,
    )  # fmt: skip
    return found


def _pack_templates(templates: Tensor, last_ring: int) -> tuple[Tensor, Tensor]:
    """Square (k, side, side, 4) half about the centre, out to last_ring + 1, and their scale.

    Zeros lie where the box ends; the fourth number of a texel is there for its alignment.
    """
    height, width = templates.shape[-2:]
    reach = last_ring + 1
    scale = templates.flatten(1).abs().amax(1) / TOP
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    packed = templates.new_zeros(
        len(templates), 2 * reach + 1, 2 * reach + 1, 4, dtype=torch.float16
    )
    y, x = height // 2, width // 2
    up, left = min(y, reach), min(x, reach)
    down, right = min(height - 1 - y, reach), min(width - 1 - x, reach)
    part = templates[:, :, y - up : y + down + 1, x - left : x + right + 1]
    part = (part * inverse[:, None, None, None]).permute(0, 2, 3, 1)
    packed[:, reach - up : reach + down + 1, reach - left : reach + right + 1, :3] = part
    return packed, scale


@functools.lru_cache(maxsize=8)
def _disc(last_ring: int, width: int, device: torch.device) -> Tensor:
    """(d, 2) int32: pixels that a disc may cover, when its centre lies within half a pixel.

    The first number holds x and y as half, the second y * width + x. Neighbours lie together
    (4 x 4 patches), so that what a warp reads of a turned reference does too.
    """
    reach = last_ring + 2
    axis = torch.arange(-reach, reach + 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    near = x.square() + y.square() <= (last_ring + 1 + 0.7072) ** 2
    x, y = x[near], y[near]
    patch = ((y + reach) // 4) * reach + (x + reach) // 4
    order = patch.argsort(stable=True)
    x, y = x[order], y[order]
    places = torch.stack([x, y], 1).half().view(torch.int32).squeeze(1)
    return torch.stack([places, (y * width + x).int()], 1).contiguous().to(device)


def sum_aligned(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, group: Tensor, n_groups: int
) -> Tensor:
    """`average.sum_aligned`: chunks of a group's members, each summed by a block in order."""
    n, height, width = images.shape
    group, order = group.sort(stable=True)
    # All on the GPU: nothing waits for the sizes of the groups.
    edges = torch.searchsorted(group, torch.arange(n_groups + 1, device=group.device))
    end = (edges.diff() + MEMBERS - 1).div(MEMBERS, rounding_mode="floor").cumsum(0)
    chunk = torch.arange(min(n, n // MEMBERS + n_groups), device=group.device)
    of = torch.searchsorted(end, chunk, right=True)  # the group of a chunk; n_groups past the last
    padded = torch.cat([end.new_zeros(1), end])
    first = edges[of] + MEMBERS * (chunk - padded[of])
    last = torch.minimum(first + MEMBERS, edges[(of + 1).clamp(max=n_groups)])
    partial = images.new_empty(len(chunk), height, width, dtype=torch.float64)
    total = images.new_empty(n_groups, height, width, dtype=torch.float64)
    torch.ops.cryoalign_cuda.sum_aligned(
        images.contiguous(), angle.float().contiguous(), shift.float().contiguous(),
        mirror.contiguous(), order, first, last, end, partial, total,
    )  # fmt: skip
    return total
