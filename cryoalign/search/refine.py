"""Poses of a search's grid, and their refinement between its points by Gauss-Newton."""

from torch import Tensor

from cryoalign.images.polar import Rings
from cryoalign.images.templates import check_labels, templates_of
from cryoalign.operators.correlation import unravel_place
from cryoalign.operators.pose_refinement import refine_poses
from cryoalign.pose import Pose, wrap_degrees


def grid_pose(place: Tensor, shifts: Tensor, rings: Rings, mirror: bool) -> Pose:
    """The poses of entries of a correlation table.

    Args:
        place: (...,) int64 `correlation_peaks`' index over shifts, hands and angles.
        shifts: (s, 2) trial shifts, pixels; poses have their dtype.
        rings: of the search.
        mirror: whether mirrored particles were tried.

    Returns:
        (...,) poses, angles in [-180, 180) degrees.
    """
    at = unravel_place(place, rings.n_angles, mirror)
    angle = wrap_degrees(at.angle * (360.0 / rings.n_angles)).to(shifts.dtype)
    return Pose(angle, shifts[at.shift], at.mirror.bool())


def refine(
    images: Tensor,
    references: Tensor,
    label: Tensor,
    pose: Pose,
    rings: Rings,
    steps: int = 2,
) -> tuple[Pose, Tensor]:
    """Improve poses by least squares: particle = amplitude * moved reference + constant.

    The *reference* is interpolated, at the particle's pixels, because interpolation would blur and
    correlate the noise of the particle. On noise-free references the errors meet the Cramér-Rao
    bound (``python -m bench accuracy``). The method is Gauss-Newton with the amplitude projected
    out (Golub & Pereyra 1973); a step that lowers the score is not taken.

    Args:
        images: (n, size, size), background zero.
        references: (k, size, size).
        label: (n,) int64 index of the reference of each particle.
        pose: (n,) start, within a grid step of the optimum.
        rings: the disc (or annulus) that is compared, about the reference's centre.
        steps: Gauss-Newton steps.

    Returns:
        The poses (n,) and their scores (n,): the correlation coefficient of particle and moved
        reference over the pixels of the disc.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; labels outside 0 … k - 1.
    """
    check_labels(label, len(references))
    return refine_on(images, templates_of(references), label, pose, rings, steps)


def refine_on(
    images: Tensor, templates: Tensor, label: Tensor, pose: Pose, rings: Rings, steps: int = 2
) -> tuple[Pose, Tensor]:
    """`refine` with `templates_of` the references already computed."""
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
