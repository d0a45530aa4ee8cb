"""Compiled CUDA implementations of the operators that take images.

`image_peaks`, `refine_poses` and `sum_aligned` are documented where the operators of the same name
are declared. They return None for inputs that the kernels do not serve.
"""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.operators.kernels import peaks, usable

# Images that one GPU block adds up: small enough to keep a GPU busy with few images, large enough
# to keep the number of partial sums small.
MEMBERS = 16
# References in half precision are scaled to this largest value, which is far both from overflow
# (65504) and from the smallest normal number (6e-5).
TOP = 256.0

# The limits of features.cu: angles on a ring, rings, and groups of 16 frequencies.
KERNEL_ANGLES, MOST_RINGS, MOST_GROUPS = 256, 64, 8
DEVIATION = 0.25  # features.cu scales the samples to this standard deviation
RESCORED = 4  # references that a block of rescore_images.cu takes at most
# How far below the best score, beside the rounding of half precision, a reference may be that is
# scored again: noise on rings that are sampled half an angle step apart.
MARGIN = 4e-3


def unpack_options(
    first_ring: int, ring_step: int, last_ring: int, angles: int, *others: Any
) -> tuple[Rings, bool, int | None]:
    """The rings, mirror and candidates from the operator's last six arguments."""
    return Rings(first_ring, last_ring, ring_step, angles), *others


class ReferenceSpectra(NamedTuple):
    """References that are ready for any number of calls of `screen`.

    Attributes:
        spectra: (k, r, m) complex64, contiguous.
        packed: the same in half precision, in ``layout``.
        layout: rings and frequencies in which the references have power.
        rings: of the spectra.
        shifts: (s, 2) trial shifts, float32.
        reach: how far from the centre rings at any shift can reach, whole pixels.
    """

    spectra: Tensor
    packed: peaks.Packed
    layout: peaks.Layout
    rings: Rings
    shifts: Tensor
    reach: int


def prepare_references(references: Tensor, rings: Rings, shifts: Tensor) -> ReferenceSpectra | None:
    """Prepare ring spectra (k, r, m) and trial shifts (s, 2) for `screen`; None if the kernels do
    not serve them. This waits for the GPU, `screen` does not."""
    reach = rings.last_ring + math.ceil(float(shifts.abs().max())) if len(shifts) else 0
    if not _serves_search(references, rings, reach):
        return None
    references = references.resolve_conj().contiguous()
    layout = peaks.Layout.of_references(references)
    layout = replace(layout, steps=layout.steps[:MOST_GROUPS])
    packed = peaks.pack_references(references, layout)
    there = shifts.to(references.device, torch.float32)
    return ReferenceSpectra(references, packed, layout, rings, there, reach)


def screen(
    images: Tensor,
    references: ReferenceSpectra,
    mirror: bool,
    candidates: int | None,
    margin: float = MARGIN,
) -> tuple[Tensor, Tensor]:
    """The operator `image_search.image_peaks` for images (n, h, w) and prepared references.

    Of the ``candidates`` those whose score is more than ``margin`` below the best one have no exact
    score and place either.
    """
    n, k = len(images), len(references.spectra)
    images, layout = images.contiguous(), references.layout
    score = images.new_empty(n, k)
    place = torch.empty(n, k, dtype=torch.int64, device=images.device)

    def run(rows: slice) -> None:
        some = images[rows]
        features = pack_images(some, references.rings, references.shifts, layout, references.reach)
        coarse, shift = peaks.search_packed(
            features, references.packed, layout, len(some), k, mirror
        )
        rescore(
            some, references.spectra, references.shifts, references.rings, references.reach,
            coarse, shift, candidates, score[rows], place[rows], margin,
        )  # fmt: skip

    peaks.in_batches(run, n, len(references.shifts) * layout.fragments * 64, images.device)
    return score, place


def logsumexp(
    images: Tensor, references: ReferenceSpectra, temperature: float, mirror: bool
) -> Tensor:
    """(n, k) T log sum exp(score / T) over all poses, T the temperature, from images (n, h, w)."""
    n, images, layout = len(images), images.contiguous(), references.layout
    out = images.new_empty(n, len(references.spectra))

    def run(rows: slice) -> None:
        features = pack_images(
            images[rows], references.rings, references.shifts, layout, references.reach
        )
        peaks.logsumexp_packed(features, references.packed, layout, temperature, mirror, out[rows])

    peaks.in_batches(run, n, len(references.shifts) * layout.fragments * 64, images.device)
    return out


def image_peaks(
    images: Tensor, references: Tensor, shifts: Tensor, *options: Any
) -> tuple[Tensor, Tensor] | None:
    """The operator `image_search.image_peaks`."""
    rings, mirror, candidates = unpack_options(*options)
    if not (_serves(images) and len(images)):
        return None
    prepared = prepare_references(references, rings, shifts)
    return None if prepared is None else screen(images, prepared, mirror, candidates)


def pack_images(
    images: Tensor, rings: Rings, shifts: Tensor, layout: peaks.Layout, reach: int
) -> peaks.Packed:
    """Packed spectra of images (n, h, w) float32 at trial shifts (s, 2) float32.

    The rings are sampled half an angle step away from the places that `polar` uses. At the
    frequencies that are kept, this changes the spectra of noisy images less than the rounding to
    half precision does.
    """
    gain, largest = _gains(rings, images.device)
    packed = peaks.empty_packed(images, len(images), (len(shifts),), layout)
    torch.ops.cryoalign_cuda.pack_images(
        images, shifts, _forward_transform(largest, images.device), gain, layout.steps,
        rings.first_ring, rings.ring_step, reach, largest, *packed,
    )  # fmt: skip
    return packed


def rescore(
    images: Tensor,
    references: Tensor,
    shifts: Tensor,
    rings: Rings,
    reach: int,
    coarse: Tensor,
    shift: Tensor,
    candidates: int | None,
    score: Tensor,
    place: Tensor,
    margin: float = MARGIN,
) -> None:
    """Fill score and place (n, k): the pairs that matter are scored in single precision.

    Args:
        images, references, shifts, rings: as of the operator.
        reach: as of `ReferenceSpectra`.
        coarse, shift: (n, k, hands) from `peaks.search_packed`.
        candidates: as in `peaks.rescore`, except that more than `RESCORED` means all references.
        score, place: (n, k) outputs.
        margin: as of `screen`.
    """
    few = 0 if candidates is None or candidates > RESCORED else min(candidates, coarse.shape[1])
    weights = rings.weights(images.device).float()
    torch.ops.cryoalign_cuda.rescore_images(
        images, references, shifts, weights, coarse, shift, few, margin,
        rings.first_ring, rings.ring_step, reach, score, place,
    )  # fmt: skip


def _serves(images: Tensor) -> bool:
    return images.dtype == torch.float32 and usable(images.device)


def _serves_search(references: Tensor, rings: Rings, reach: int) -> bool:
    """Whether the kernels take these: 256 angles, few enough rings, and an image about its centre
    that fits the memory of a block."""
    count = len(references) and references.shape[1]
    if not (
        references.dtype == torch.complex64
        and usable(references.device)
        and rings.n_angles == KERNEL_ANGLES
        and 0 < count <= MOST_RINGS
    ):
        return False
    needed = rescore_bytes(count, reach)
    return needed <= torch.ops.cryoalign_cuda.shared_limit(references.device.index or 0)


def rescore_bytes(rings: int, reach: int) -> int:
    """At most so many bytes of shared memory are taken by rescore_images.cu, the kernel that needs
    most: transforms of pairs of rings, ring products, and the window of the image."""
    side = 2 * reach + 2
    transforms = 8 * (max((rings + 1) // 2, 4) * 288 + 8 * 264 + 256)
    return transforms + 4 * (112 + side * (side + 15)) + 4096


@functools.lru_cache(maxsize=8)
def _gains(rings: Rings, device: torch.device) -> tuple[Tensor, float]:
    """Factors (r,) for the samples of each ring, outermost first, and the largest area weight.

    A factor is the square root of a ring's weight over the largest weight, in half precision.
    """
    weights = rings.weights().flip(0)
    largest = float(weights.max())
    return (weights / largest).sqrt().half().float().to(device), largest


@functools.lru_cache(maxsize=8)
def _forward_transform(largest: float, device: torch.device) -> Tensor:
    """The matrices that turn folded samples into packed spectra, as tensor-core fragments.

    Half precision, (2, 4, 2, 4, 32, 8). The axes are: the parity of the frequency
    m = 2 m' + parity; 16 of 64 rows m'; cosines and negative sines; 16 of 64 columns; the lane of
    a warp; what a lane holds. Columns 2 i and 2 i + 1 are the angles j + 1/2 and j + 32 + 1/2 of a
    quarter turn of 64 angles, where i = 16 a + 4 b + c has j = 8 b + 4 a + c.
    """
    m = 2 * torch.arange(64, dtype=torch.float64)[None] + torch.arange(2)[:, None]  # (2, 64)
    j = torch.arange(32).reshape(4, 2, 4).transpose(0, 1).flatten()
    angle = torch.stack([j, j + 32], 1).flatten() + 0.5
    angle = angle * (2 * math.pi / KERNEL_ANGLES)
    phase = m[:, :, None] * angle
    matrix = torch.stack([phase.cos(), -phase.sin()], 1)  # (parity, part, m', column)
    matrix = matrix * (math.sqrt(largest / KERNEL_ANGLES) / DEVIATION)
    # See `peaks.dft_matrix` for the rows and columns that a lane holds.
    pieces = matrix.reshape(2, 2, 4, 2, 8, 4, 2, 4, 2)
    # parity, part, row block, row 8, g, column block, column 8, c, column 1
    pieces = pieces.permute(0, 2, 1, 5, 4, 7, 6, 3, 8)
    return pieces.reshape(2, 4, 2, 4, 32, 8).half().contiguous().to(device)


class PackedTemplates(NamedTuple):
    """`templates_of` references, as the refinement reads them.

    Attributes:
        squares: half (k, side, side, 4), the central square of each reference: value, derivatives
            along x and y, and one unused number, all over ``scale``.
        scale: (k,).
        rings: first and last ring bound the pixels that are compared.
    """

    squares: Tensor
    scale: Tensor
    rings: Rings


def refine_poses(
    images: Tensor, templates: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The operator `pose_refinement.refine_poses`: one GPU block makes all steps of a particle."""
    if not _serves(images):
        return None
    label, angle, shift, mirror = others[:4]
    first_ring, last_ring, steps = others[4:]
    packed = pack_templates(templates, Rings(first_ring, last_ring))
    return refine_packed(images, packed, label, angle, shift, mirror, steps)


def refine_packed(
    images: Tensor,
    templates: PackedTemplates,
    label: Tensor,
    angle: Tensor,
    shift: Tensor,
    mirror: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`refine_poses` with packed templates, for one pose of every image (n, h, w) or several.

    Args:
        label: (n, ...) int64 reference of each pose; -1 leaves the pose as it is, with the lowest
            float as its score.
        angle, mirror: (n, ...); shift: (n, ..., 2).

    Returns:
        Angles, shifts and scores, of these shapes.
    """
    packed, scale, rings = templates
    disc = _disc(rings.last_ring, images.shape[-1], images.device)
    angle, shift = angle.contiguous(), shift.contiguous()
    found = torch.empty_like(angle), torch.empty_like(shift), torch.empty_like(angle)
    torch.ops.cryoalign_cuda.refine_poses(
        images.contiguous(), packed, scale, label.contiguous(), angle, shift, mirror.contiguous(),
        disc, rings.first_ring, rings.last_ring, steps, *found,
    )  # fmt: skip
    return found


def pack_templates(templates: Tensor, rings: Rings) -> PackedTemplates:
    """Pack templates (k, 3, h, w) for the refinement within ``rings``.

    The square that is kept reaches last_ring + 1 pixels from the centre, with zeros outside the
    box.
    """
    height, width = templates.shape[-2:]
    reach, y, x = rings.last_ring + 1, height // 2, width // 2
    scale = templates.flatten(1).abs().amax(1) / TOP
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    # A negative margin cuts off.
    margins = (reach - x, reach + 1 + x - width, reach - y, reach + 1 + y - height)
    square = torch.nn.functional.pad(templates, margins) * inverse[:, None, None, None]
    packed = torch.nn.functional.pad(square.half().permute(0, 2, 3, 1), (0, 1))
    return PackedTemplates(packed.contiguous(), scale, rings)


@functools.lru_cache(maxsize=8)
def _disc(last_ring: int, width: int, device: torch.device) -> Tensor:
    """(d, 2) int32: the pixels that a disc can cover if its centre is off by up to half a pixel.

    The first number holds x and y in half precision, the second is y * width + x. They come in
    patches of 4 x 4 pixels, so that the threads of a warp read nearby pixels of the reference.
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
) -> Tensor | None:
    """The operator `aligned_sums.sum_aligned`. A GPU block sums up to `MEMBERS` images of a group,
    in order; the partial sums are then added in order."""
    if not _serves(images):
        return None
    n, height, width = images.shape
    group, order = group.sort(stable=True)
    # All of this stays on the GPU, so that the program need not wait for the sizes of the groups.
    edges = torch.searchsorted(group, torch.arange(n_groups + 1, device=group.device))
    end = (edges.diff() + MEMBERS - 1).div(MEMBERS, rounding_mode="floor").cumsum(0)
    chunk = torch.arange(min(n, n // MEMBERS + n_groups), device=group.device)
    of = torch.searchsorted(end, chunk, right=True)  # a chunk's group; n_groups after the last
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
