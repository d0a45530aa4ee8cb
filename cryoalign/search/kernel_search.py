"""The search in two stages by the GPU kernels: the stages of `coarse_to_fine`, without any wait.

A GPU loses time whenever the program waits for a result, for example to learn how many hypotheses
are left. So the arrays here have the same size for every particle: `SCREENED` references at low
resolution and `FINE_KEPT` at full resolution, and hypotheses below the margins are marked by the
label -1, at which the refinement kernel ends at once. Of a reference, only its better hand is a
hypothesis.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import fourier_shrink
from cryoalign.images.polar import Rings
from cryoalign.operators.kernels.images import (
    RESCORED,
    PackedTemplates,
    ReferenceSpectra,
    logsumexp,
    pack_templates,
    prepare_references,
    refine_packed,
    screen,
)
from cryoalign.pose import Found, Pose
from cryoalign.search.coarse_to_fine import (
    COARSE_MARGIN,
    COARSE_STEPS,
    FINE_KEPT,
    FINE_MARGIN,
    CoarseReferences,
    fine_steps,
)
from cryoalign.search.refine import grid_pose

SCREENED = RESCORED  # references per particle that are refined at low resolution, at most
BATCH_BYTES = 2**29  # of images that are in work at a time


class KernelSearch(NamedTuple):
    """References at both resolutions, as the kernels take them.

    Attributes:
        coarse: the references at low resolution.
        spectra: their ring spectra.
        low, fine: `templates_of` the references at low and at full resolution, packed.
    """

    coarse: CoarseReferences
    spectra: ReferenceSpectra
    low: PackedTemplates
    fine: PackedTemplates


def prepare_kernel_search(
    templates: Tensor, coarse: CoarseReferences, rings: Rings
) -> KernelSearch | None:
    """Prepare references for `kernel_poses`; None if the kernels do not serve them.

    Args:
        templates: (k, 3, size, size) `templates_of` the references.
        coarse: `prepare_coarse` of the references.
        rings: at full resolution.
    """
    if templates.dtype != torch.float32:
        return None
    spectra = prepare_references(coarse.spectra, coarse.rings, coarse.shifts)
    if spectra is None:
        return None
    low = pack_templates(coarse.templates, coarse.rings)
    return KernelSearch(coarse, spectra, low, pack_templates(templates, rings))


def kernel_poses(images: Tensor, search: KernelSearch) -> Found:
    """Best reference, pose and score of every particle (n, size, size), background zero."""
    each = max(1, BATCH_BYTES // (4 * images[0].numel()))
    return Found.cat([_batch_poses(part, search) for part in images.split(each)])


def kernel_match(images: Tensor, search: KernelSearch) -> tuple[Tensor, Pose]:
    """The coarse search's score (n, k) and pose (n, k), in image pixels, for every pair of a
    particle (n, size, size) and a reference."""
    coarse = search.coarse
    small = fourier_shrink(images, coarse.size)
    score, place = screen(small, search.spectra, coarse.mirror, None)
    pose = grid_pose(place, coarse.shifts, coarse.rings, coarse.mirror)
    return score, Pose(pose.angle, pose.shift * coarse.factor, pose.mirror)


def kernel_log_evidence(images: Tensor, search: KernelSearch, temperature: float) -> Tensor:
    """(n, k) `search.match.log_evidence` of particles (n, size, size)."""
    coarse = search.coarse
    small = fourier_shrink(images, coarse.size)
    return logsumexp(small, search.spectra, temperature, coarse.mirror)


def _batch_poses(images: Tensor, search: KernelSearch) -> Found:
    coarse = search.coarse
    small = fourier_shrink(images, coarse.size)
    count = min(SCREENED, len(search.spectra.spectra))
    deviation = 1 / (math.sqrt(math.pi) * coarse.rings.last_ring)
    margin = COARSE_MARGIN * deviation
    score, place = screen(small, search.spectra, coarse.mirror, count, margin)
    label, _ = _best(score, count, margin)
    place = place.gather(1, label.clamp(min=0))
    # A reference that is far from the best one has no place.
    label = torch.where(place < 0, -1, label)
    pose = grid_pose(place.clamp(min=0), coarse.shifts, coarse.rings, coarse.mirror)
    pose, low = _refined(small, search.low, label, pose, COARSE_STEPS)

    which, _ = _best(low, min(FINE_KEPT, count), FINE_MARGIN * deviation)
    label = torch.where(which < 0, -1, label.gather(1, which.clamp(min=0)))
    which = which.clamp(min=0)
    low = low.gather(1, which)
    row = torch.arange(len(images), device=images.device).unsqueeze(1)
    start = pose[row, which]
    start = Pose(start.angle, start.shift * coarse.factor, start.mirror)
    pose, fine = _refined(images, search.fine, label, start, fine_steps(coarse.factor))
    # The sum of both resolutions' scores chooses, as in `coarse_to_fine`.
    best = (low + fine).argmax(1, keepdim=True)
    label, score = label.gather(1, best), fine.gather(1, best)
    return Found(label.squeeze(1), pose[row, best].reshape(-1), score.squeeze(1))


def _best(score: Tensor, count: int, margin: float) -> tuple[Tensor, Tensor]:
    """Indices (n, count) of the best of scores (n, k), and their scores. Those further than
    ``margin`` below the best one have index -1."""
    best, index = score.topk(count, 1)
    # NaN is the largest for `topk`, and is never below the margin.
    return torch.where(best < best[:, :1] - margin, -1, index), best


def _refined(
    images: Tensor, templates: PackedTemplates, label: Tensor, pose: Pose, steps: int
) -> tuple[Pose, Tensor]:
    """Poses (n, c) of every image on references (n, c), refined, and their scores (n, c)."""
    angle, shift, score = refine_packed(
        images, templates, label, pose.angle, pose.shift, pose.mirror, steps
    )
    return Pose(angle, shift, pose.mirror), score
