"""The search of ring spectra on an NVIDIA GPU: packing, coarse search, rescoring.

The coarse search rounds spectra to half precision (fp16) and adds their products in single
precision (fp32). It writes only the best value and shift of every (particle, reference, hand), and
those of the second-best shift. Then the pairs that matter are scored again in fp32 from the
original spectra, which also gives their angle.

Measured against float64 on 4 x 1024 simulated particles (50 references, 49 shifts, SNR 0.1 to
0.006, candidates=4): the reference and hand are always the same. Shift and angle are the same for
99.93 % (99.6 % without the second-best shift); otherwise the score is lower by at most 0.6 % of the
scores' standard deviation. `common.cuh` describes the packed layout.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.operators.kernels import portable_only, usable

# The largest share of a reference's power that the packed layout may leave out. Except for the
# noisiest references it changes the coarse scores less than fp16 does. Rescored ones do not change.
DROPPED_POWER = 1e-4
# The limits of the kernels and of rescoring.
MOST_FREQUENCIES, MOST_RINGS = 640, 112
# Size of the packed particles of a batch: at most this share of the GPU's memory, and at most so
# many bytes, which are enough to keep any card busy.
MEMORY_SHARE, MOST_BYTES = 0.0625, 2**31


@dataclass(frozen=True)
class Layout:
    """Which rings and frequencies the packed spectra keep (see common.cuh).

    Attributes:
        rings: number of rings.
        angles: number of angles on a ring, even.
        steps: for each group of 16 frequencies, how many steps of 16 rings are kept, counted from
            the outermost ring.
    """

    rings: int
    angles: int
    steps: tuple[int, ...]

    @property
    def fragments(self) -> int:
        """Number of fragments, of 512 bytes each, for 8 particles at one shift."""
        return 16 * sum(self.steps)

    @property
    def k_steps(self) -> int:
        """Steps of 16 frequencies of one parity in the inverse transform. The kernel for Hopper
        cards needs 4, so they are 4 wherever it can run."""
        own = (len(self.steps) + 1) // 2
        return 4 if own < 4 and 192 < self.angles <= 256 else own

    @classmethod
    def of_rings(cls, rings: Rings) -> Layout:
        """What rings of an image can carry: the ring of radius r pixels has frequencies up to
        pi r, and below a / 2."""
        radii, angles = rings.radii().tolist(), rings.n_angles
        steps = []
        for low in range(0, min(angles // 2, math.ceil(math.pi * radii[-1])), 16):
            count = sum(math.pi * radius >= low for radius in radii)
            # A group of frequencies that only one ring has is not worth a step.
            if count < 2 and low > 0:
                break
            steps.append(-(-count // 16))
        return cls(len(radii), angles, tuple(steps))

    @classmethod
    def of_references(cls, references: Tensor) -> Layout:
        """Where reference spectra (k, r, m) have power, except for a share `DROPPED_POWER`."""
        k, r, m = references.shape
        deep, wide = -(-r // 16), -(-m // 16)
        pairs = torch.view_as_real(references.flip(1))
        power = torch.linalg.vecdot(pairs, pairs)  # (k, r, m)
        power = power / power.sum((1, 2), keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
        padded = torch.nn.functional.pad(power, (0, 16 * wide - m, 0, 16 * deep - r))
        blocks = padded.reshape(k, deep, 16, wide, 16).sum((2, 4)).amax(0)  # (deep, wide)
        share = blocks.T.tolist()  # [group][step]; waits for the device
        steps, left = [deep] * wide, DROPPED_POWER
        while True:
            # Drop the step with the least power. Only the innermost step of a group can go, and
            # the only step of a group can go only from the group of the highest frequencies.
            ends = [
                (share[q][steps[q] - 1], q)
                for q in range(len(steps))
                if steps[q] > 1 or (q == len(steps) - 1 and q > 0)
            ]
            least, q = min(ends, default=(math.inf, 0))
            if not least <= left:  # NaN stops too
                break
            left -= least
            steps[q] -= 1
            if steps[q] == 0:
                steps.pop()
        return cls(r, 2 * (m - 1), tuple(steps))


class Packed(NamedTuple):
    """Ring spectra in half precision, in the layout of common.cuh.

    Attributes:
        spectra: half (blocks, s, fragments, 32, 8) of particles, in blocks of 8; without s of
            references.
        scale: float (8 blocks, s) or (8 blocks,), by which to multiply to get the true spectra.
    """

    spectra: Tensor
    scale: Tensor


# What a search takes: packed particles, packed references, and the layout of both.
Task = tuple[Packed, Packed, Layout]


def empty_packed(like: Tensor, members: int, shifts: tuple[int, ...], layout: Layout) -> Packed:
    """Memory for packed spectra: ``shifts`` is (s,) for particles, () for references."""
    blocks = -(-members // 8)
    return Packed(
        like.new_empty(blocks, *shifts, layout.fragments, 32, 8, dtype=torch.half),
        like.new_empty(8 * blocks, *shifts, dtype=torch.float),
    )


def pack_particles(spectra: Tensor, layout: Layout) -> Packed:
    """Pack particles' spectra (n, s, r, m) complex64."""
    packed = empty_packed(spectra, len(spectra), (spectra.shape[1],), layout)
    torch.ops.cryoalign_cuda.pack_particles(spectra, layout.steps, *packed)
    return packed


def pack_references(spectra: Tensor, layout: Layout) -> Packed:
    """Pack references' spectra (k, r, m) complex64."""
    packed = empty_packed(spectra, len(spectra), (), layout)
    torch.ops.cryoalign_cuda.pack_references(spectra, layout.steps, *packed)
    return packed


@functools.cache
def dft_matrix(angles: int, k_steps: int, device: torch.device) -> Tensor:
    """The inverse Fourier transform over angles, as tensor-core fragments in half precision.

    The axes are (row blocks, 4, k_steps, 32, 8). Rows are the angles (j + 1/2) 2 pi / a of a
    quarter turn; the others follow by symmetry. The last row is repeated up to a multiple of 16.
    Columns are the frequencies of one parity. The four types, 2 im + parity, are cosines for the
    real parts and sines for the imaginary parts, times 2 (times 1 for frequencies 0 and a / 2).
    """
    quarter = -(-angles // 4)
    rows = 16 * -(-quarter // 16)
    row = torch.arange(rows, dtype=torch.float64).clamp_max(quarter - 1)
    types = []
    for wave in (torch.cos, torch.sin):
        for parity in (0, 1):
            m = 2 * torch.arange(16 * k_steps, dtype=torch.float64) + parity
            weight = 2.0 * (m < angles / 2) - 1.0 * (m == 0) + 1.0 * (m == angles / 2)
            types.append(weight * wave((row + 0.5)[:, None] * m * (2 * math.pi / angles)))
    matrix = torch.stack(types)  # (4, rows, 16 k_steps)
    # Of a 16 x 16 piece, lane 4 g + c of a warp holds rows g, g + 8 and columns 2c, 2c + 1, 2c + 8,
    # 2c + 9.
    pieces = matrix.reshape(4, rows // 16, 2, 8, k_steps, 2, 4, 2)
    pieces = pieces.permute(1, 0, 4, 3, 6, 5, 2, 7)  # row block, type, step, g, c, col 8, row 8, 2
    return pieces.reshape(rows // 16, 4, k_steps, 32, 8).half().to(device)


def search_packed(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`search_two` without the runner-up: score and shift (n, k, hands)."""
    score, shift = search_two(*arguments, **options)
    return score[0], shift[0]


def search_two(
    particles: Packed,
    references: Packed,
    layout: Layout,
    n: int,
    k: int,
    mirror: bool = True,
    portable: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The coarse search of packed spectra: the two best shifts of each pair and hand.

    The second is the best of all other shifts. Both are scored again where they are nearly equal.
    The second value may be that of an angle next to its best one (see search.cuh).

    Args:
        particles, references: packed in ``layout``.
        layout: which rings and frequencies the packed spectra keep.
        n, k: number of particles and references; the last blocks may be partly filled.
        mirror: whether to search the mirrored hand too.
        portable: use the kernel that runs on every card; None asks `portable_only`.

    Returns:
        score: (2, n, k, hands) float, with the rounding of half-precision inputs; the lowest
            float where there is no second shift.
        shift: (2, n, k, hands) int32; -1 where there is no second shift.
    """
    portable = portable_only() if portable is None else portable
    score = particles.scale.new_empty(2, n, k, 1 + mirror)
    shift = torch.empty_like(score, dtype=torch.int32)
    task = _task(particles, references, layout)
    torch.ops.cryoalign_cuda.fused_peaks(*task, portable, score, shift)
    return score, shift


def fused_peaks(
    particles: Tensor, references: Tensor, mirror: bool, candidates: int | None
) -> tuple[Tensor, Tensor] | None:
    """The operator `correlation_peaks`; None for inputs that the kernels do not serve."""
    if not serves(particles, references):
        return None
    references = references.resolve_conj().contiguous()
    n, k = len(particles), len(references)
    score = references.new_empty(n, k, dtype=torch.float)
    place = torch.empty(n, k, dtype=torch.int64, device=references.device)

    def run(rows: slice, some: Tensor, packed: Task) -> None:
        coarse, shift = search_two(*packed, len(some), k, mirror)
        rescore(some, references, coarse, shift, candidates, score[rows], place[rows])

    _in_packed_batches(run, particles, references)
    return score, place


def rescore(
    particles: Tensor,
    references: Tensor,
    coarse: Tensor,
    shift: Tensor,
    candidates: int | None,
    score: Tensor,
    place: Tensor,
) -> None:
    """Fill score and place (n, k): the chosen pairs are scored in single precision.

    Args:
        particles: (n, s, r, m) complex64 ring spectra.
        references: (k, r, m) complex64 ring spectra.
        coarse, shift: the result of `search_two`.
        candidates: how many of a particle's best references are scored again. The others keep
            their coarse score, lowered below all rescored ones, and get place -1. None means all.
        score, place: (n, k) outputs.
    """
    k = coarse.shape[2]
    every = candidates is None or candidates >= k
    top = coarse[0].amax(2)
    if every:
        chosen = torch.arange(k, device=top.device).expand(len(top), k).contiguous()
    else:
        assert candidates is not None
        chosen = top.topk(candidates, dim=1).indices.contiguous()
        score.copy_(top)
        place.fill_(-1)
    torch.ops.cryoalign_cuda.rescore(particles, references, coarse, shift, chosen, score, place)
    if not every:
        lowest = score.gather(1, chosen).amin(1, keepdim=True)
        limit = torch.nextafter(lowest, lowest.new_tensor(-math.inf))
        score.copy_(torch.where(place < 0, torch.minimum(score, limit), score))


def fused_logsumexp(
    particles: Tensor, references: Tensor, temperature: float, mirror: bool
) -> Tensor | None:
    """The operator `correlation_logsumexp`; None for inputs that the kernels do not serve."""
    if not serves(particles, references):
        return None
    out = references.new_empty(len(particles), len(references), dtype=torch.float)

    def run(rows: slice, some: Tensor, packed: Task) -> None:
        logsumexp_packed(*packed, temperature, mirror, out[rows])

    _in_packed_batches(run, particles, references.resolve_conj().contiguous())
    return out


def logsumexp_packed(
    particles: Packed,
    references: Packed,
    layout: Layout,
    temperature: float,
    mirror: bool,
    out: Tensor,
) -> None:
    """Fill ``out`` (n, k) with T log sum exp(score / T) of packed spectra, T the temperature."""
    hands = out.new_empty(*out.shape, 1 + mirror)
    task = _task(particles, references, layout)
    torch.ops.cryoalign_cuda.fused_logsumexp(*task, temperature, hands)
    out.copy_(temperature * torch.logsumexp(hands / temperature, 2))


def _task(particles: Packed, references: Packed, layout: Layout) -> tuple[Any, ...]:
    """The arguments that all searches of packed spectra have in common."""
    matrix = dft_matrix(layout.angles, layout.k_steps, particles.scale.device)
    return *particles, *references, matrix, layout.steps, layout.angles


def _in_packed_batches(run: Callable[..., None], particles: Tensor, references: Tensor) -> None:
    """Pack the references once and the particles batch by batch. ``run`` is called for each batch,
    with its rows, its spectra and the search's task."""
    layout = Layout.of_references(references)
    packed = pack_references(references, layout)

    def pack(rows: slice) -> None:
        some = particles[rows].resolve_conj().contiguous()
        run(rows, some, (pack_particles(some, layout), packed, layout))

    bytes_each = particles.shape[1] * layout.fragments * 64
    in_batches(pack, len(particles), bytes_each, particles.device)


def serves(particles: Tensor, references: Tensor) -> bool:
    """Whether the kernels take these spectra: complex64, on a suitable card, of suitable size."""
    n, _, r, m = particles.shape
    return (
        particles.dtype == torch.complex64
        and usable(particles.device)
        and min(n, len(references), r) > 0
        and m <= _most_frequencies(particles.device.index or 0)
        and r <= MOST_RINGS
    )


@functools.cache
def _most_frequencies(index: int) -> int:
    """How many frequencies fit the shared memory of the portable kernel, for one hand."""
    memory = torch.ops.cryoalign_cuda.shared_limit(index) - 4096
    k_steps = (memory // 256 - 16) // 32
    return min(MOST_FREQUENCIES, 32 * k_steps)


@functools.cache
def _memory(device: torch.device) -> int:
    """Bytes of memory of a GPU. (How much is free takes a millisecond to find out.)"""
    return torch.cuda.get_device_properties(device).total_memory


def in_batches(run: Callable[[slice], None], n: int, bytes_each: int, device: torch.device) -> None:
    """Call ``run`` with the rows of one batch of n particles after another. The packed spectra of a
    batch take ``bytes_each`` per particle; a batch is halved if they do not fit the free memory."""
    fits = int(min(MEMORY_SHARE * _memory(device), MOST_BYTES)) // bytes_each
    batch = max(8, fits // 8 * 8)
    start = 0
    while start < n:
        try:
            run(slice(start, min(start + batch, n)))
        except torch.cuda.OutOfMemoryError:
            if batch <= 8:
                raise
            batch = max(8, batch // 2 // 8 * 8)
            torch.cuda.empty_cache()
            warnings.warn(
                f"GPU memory is short: the search continues with {batch} particles at a time",
                stacklevel=2,
            )
            continue
        start += batch
