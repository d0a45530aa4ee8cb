"""The fused search on an NVIDIA GPU: layout, packing, coarse search, fp32 rescoring.

Coarse: spectra rounded to fp16, products accumulated in fp32; nothing is written but the best
value and shift of every (particle, reference, hand), and a runner-up. Then the pairs that matter
are scored again in fp32 from the original spectra, which also gives their angle. Measured against
float64 on 4 x 1024 simulated particles (50 references, 49 shifts, SNR 0.1 to 0.006, candidates=4):
always the same reference and hand; the same shift and angle for 99.93 %, and else a score lower by
at most 0.6 % of the scores' standard deviation (without the runner-up: 99.6 %).
`common.cuh` describes the packed
layout; features made straight from images come in by `search_packed`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.operators.kernels import portable_only, usable

# Share of a reference's power that the packed layout may leave out, at most. It moves the coarse
# scores by less than fp16 does in all but the noisiest references; rescored ones do not change.
DROPPED_POWER = 1e-4
# Rescoring and the kernels hold this much, no more.
MOST_FREQUENCIES, MOST_RINGS = 640, 112
# Packed particles of one batch: a share of the free memory, and enough to fill any card.
FREE_SHARE, MOST_BYTES = 0.25, 2**31


@dataclass(frozen=True)
class Layout:
    """Which rings and frequencies the packed spectra keep (see common.cuh).

    Attributes:
        rings: number of rings R.
        angles: a, even.
        steps: T(q): for each group of 16 frequencies how many steps of 16 rings, outermost first.
    """

    rings: int
    angles: int
    steps: tuple[int, ...]

    @property
    def fragments(self) -> int:
        """Fragments of a tile, 512 bytes each."""
        return 16 * sum(self.steps)

    @property
    def k_steps(self) -> int:
        """Steps of 16 m' in the inverse transform; 4 wherever the Hopper kernel may serve."""
        own = (len(self.steps) + 1) // 2
        return 4 if own < 4 and 192 < self.angles <= 256 else own

    @classmethod
    def of_rings(cls, rings: Rings) -> Layout:
        """What rings in an image carry: ring r has frequencies up to pi r, and below a / 2."""
        radii, angles = rings.radii().tolist(), rings.n_angles
        steps = []
        for low in range(0, min(angles // 2, math.ceil(math.pi * radii[-1])), 16):
            count = sum(math.pi * radius >= low for radius in radii)
            # A last group that only the last ring or two reach is not worth a step.
            if count < 2 and low > 0:
                break
            steps.append(-(-count // 16))
        return cls(len(radii), angles, tuple(steps))

    @classmethod
    def of_references(cls, references: Tensor) -> Layout:
        """What these reference spectra (k, r, m) have power in, but for `DROPPED_POWER`."""
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
            # The cheapest step that can go: the innermost of a group; a group's last only at the
            # end of the band.
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
    """Packed spectra.

    Attributes:
        spectra: half (blocks, s, F, 32, 8) of particles, (blocks, F, 32, 8) of references.
        scale: float (8 blocks, s) or (8 blocks,), what turns them back.
    """

    spectra: Tensor
    scale: Tensor


def pack_particles(spectra: Tensor, layout: Layout) -> Packed:
    """Particles' spectra (n, s, r, m) complex64, packed."""
    n, s = spectra.shape[:2]
    blocks = -(-n // 8)
    packed = Packed(
        spectra.new_empty(blocks, s, layout.fragments, 32, 8, dtype=torch.half),
        spectra.new_empty(8 * blocks, s, dtype=torch.float),
    )
    torch.ops.cryoalign_cuda.pack_particles(spectra, layout.steps, *packed)
    return packed


def pack_references(spectra: Tensor, layout: Layout) -> Packed:
    """References' spectra (k, r, m) complex64, packed."""
    blocks = -(-len(spectra) // 8)
    packed = Packed(
        spectra.new_empty(blocks, layout.fragments, 32, 8, dtype=torch.half),
        spectra.new_empty(8 * blocks, dtype=torch.float),
    )
    torch.ops.cryoalign_cuda.pack_references(spectra, layout.steps, *packed)
    return packed


@functools.cache
def dft_matrix(angles: int, k_steps: int, device: torch.device) -> Tensor:
    """The inverse transform as tensor-core fragments: half (row blocks, 4, k_steps, 32, 8).

    Rows: the angles (j + 1/2) 2 pi / a of a quarter turn (the others follow by symmetry), the last
    one repeated to a multiple of 16. Columns: m' of one parity. Types 2 im + parity: cosines for
    real parts, sines for imaginary ones; 2, or 1 for the frequencies 0 and a / 2, times the wave.
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
    # Lane 4 g + c holds rows g, g + 8 and columns 2c, 2c + 1, 2c + 8, 2c + 9 of a 16 x 16 piece.
    pieces = matrix.reshape(4, rows // 16, 2, 8, k_steps, 2, 4, 2)
    pieces = pieces.permute(1, 0, 4, 3, 6, 5, 2, 7)  # row block, type, step, g, c, col 8, row 8, 2
    return pieces.reshape(rows // 16, 4, k_steps, 32, 8).half().to(device)


def search_packed(
    particles: Packed,
    references: Packed,
    layout: Layout,
    n: int,
    k: int,
    mirror: bool = True,
    portable: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The coarse search of packed spectra: best value and shift of each pair and hand.

    Args:
        particles, references: packed in ``layout``.
        layout: theirs.
        n, k: how many there are (the last blocks may be filled up).
        mirror: try the mirrored hand too.
        portable: use the kernel for every card; None asks `portable_only`.

    Returns:
        score: (n, k, hands) float, rounded as fp16 inputs round it.
        shift: (n, k, hands) int32.
    """
    score, shift = search_two(particles, references, layout, n, k, mirror, portable)
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
    """`search_packed` with a runner-up: the best of any other shift, for rescoring near ties.

    The runner-up's value may be that of an angle beside its best one (see search.cuh).

    Returns:
        score: (2, n, k, hands) float; the runner-up's is the lowest float where there is none.
        shift: (2, n, k, hands) int32; -1 where there is none.
    """
    device = particles.scale.device
    score = torch.empty(2, n, k, 1 + mirror, device=device)
    shift = torch.empty(2, n, k, 1 + mirror, device=device, dtype=torch.int32)
    torch.ops.cryoalign_cuda.fused_peaks(
        *particles,
        *references,
        dft_matrix(layout.angles, layout.k_steps, device),
        layout.steps,
        layout.angles,
        portable_only() if portable is None else portable,
        score,
        shift,
    )
    return score, shift


def fused_peaks(
    particles: Tensor, references: Tensor, mirror: bool, candidates: int | None
) -> tuple[Tensor, Tensor] | None:
    """`correlation_peaks` on a GPU; None where the kernels do not serve these inputs."""
    if not serves(particles, references):
        return None
    particles, references = particles.resolve_conj(), references.resolve_conj().contiguous()
    n, k = len(particles), len(references)
    layout = Layout.of_references(references)
    packed = pack_references(references, layout)
    score = references.new_empty(n, k, dtype=torch.float)
    place = torch.empty(n, k, dtype=torch.int64, device=references.device)

    def run(rows: slice) -> None:
        some = particles[rows].contiguous()
        coarse, shift = search_two(
            pack_particles(some, layout), packed, layout, len(some), k, mirror
        )
        rescore(some, references, coarse, shift, candidates, score[rows], place[rows])

    _in_batches(run, n, particles.shape[1] * layout.fragments * 64, particles.device)
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
    """Fill score and place (n, k) from `search_two`'s result, the chosen pairs in fp32.

    ``candidates`` None rescores every pair. Otherwise the best that many references of each
    particle; the others keep their coarse score, but below every rescored one, and place -1.
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
    """`correlation_logsumexp` on a GPU; None where the kernels do not serve these inputs."""
    if not serves(particles, references):
        return None
    particles, references = particles.resolve_conj(), references.resolve_conj().contiguous()
    n, k = len(particles), len(references)
    layout = Layout.of_references(references)
    packed = pack_references(references, layout)
    out = references.new_empty(n, k, 1 + mirror, dtype=torch.float)
    matrix = dft_matrix(layout.angles, layout.k_steps, out.device)

    def run(rows: slice) -> None:
        torch.ops.cryoalign_cuda.fused_logsumexp(
            *pack_particles(particles[rows].contiguous(), layout),
            *packed,
            matrix,
            layout.steps,
            layout.angles,
            temperature,
            out[rows],
        )

    _in_batches(run, n, particles.shape[1] * layout.fragments * 64, particles.device)
    return temperature * torch.logsumexp(out / temperature, 2)


def serves(particles: Tensor, references: Tensor) -> bool:
    """Whether the kernels take these spectra: complex64, a card that can, sizes that fit."""
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
    """As many as one hand's tile in the portable kernel's shared memory holds."""
    memory = torch.ops.cryoalign_cuda.shared_limit(index) - 4096
    k_steps = (memory // 256 - 16) // 32
    return min(MOST_FREQUENCIES, 32 * k_steps)


def _in_batches(
    run: Callable[[slice], None], n: int, bytes_each: int, device: torch.device
) -> None:
    """Run over n particles in batches that fit the free memory; smaller ones if they do not."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fits = int(min(FREE_SHARE * free, MOST_BYTES)) // bytes_each
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
                f"GPU memory is short: the search goes on with {batch} particles at a time",
                stacklevel=2,
            )
            continue
        start += batch
