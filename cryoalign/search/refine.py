"""Refinement of poses below the search's grid: Gauss-Newton on angle and shift."""

from __future__ import annotations

from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.images.templates import check_labels, templates_of
from cryoalign.operators.pose_refinement import refine_poses
from cryoalign.pose import Pose


def refine(
    images: Tensor,
    references: Tensor,
    label: Tensor,
    pose: Pose,
    rings: Rings,
    steps: int = 2,
) -> tuple[Pose, Tensor]:
    """Improve poses by least squares, particle = amplitude * reference moved + constant.

    The *reference* is interpolated, at the particle's own pixels, and the particle, whose noise
    interpolation would blur and correlate, is left alone: on clean references the errors then
    meet the Cramér-Rao bound (``python -m bench accuracy``). Gauss-Newton with the amplitude
    projected out (Golub & Pereyra 1973); a step that lowers the score is not taken.

    Args:
        images: (n, size, size), background zero.
        references: (k, size, size).
        label: (n,) which reference is each particle's.
        pose: (n,) start, within a grid step of the optimum.
        rings: the disc (or annulus) compared, centred on the reference.
        steps: Gauss-Newton steps.

    Returns:
        The poses (n,) and their scores (n,): the correlation coefficient of particle and moved
        reference over the pixels of the disc.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; labels of no reference.
    """
    check_labels(label, len(references))
    return refine_on(images, templates_of(references), label, pose, rings, steps)


def refine_on(
    images: Tensor, templates: Tensor, label: Tensor, pose: Pose, rings: Rings, steps: int = 2
) -> tuple[Pose, Tensor]:
    """`refine` with `templates_of` the references at hand."""
    angle, shift, score = refine_poses(
        images,
        templates,
        label,
        pose.angle.to(images.dtype),
        pose.shift.to(images.dtype),
        pose.mirror,
        rings.first_ring,
        rings.last_ring,
        steps,
    )
    return Pose(angle, shift, pose.mirror), score
