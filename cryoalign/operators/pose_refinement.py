"""The operator that refines poses beyond the step of the search grid, by Gauss-Newton steps."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cryoalign.images.geometry import pixel_grid, sample
from cryoalign.images.polar import Rings
from cryoalign.images.templates import annulus, with_turn
from cryoalign.operators.kernels import cpu as cpu_kernels
from cryoalign.operators.kernels import images as kernel_images
from cryoalign.operators.registration import operator
from cryoalign.pose import Pose, wrap_degrees

# The largest step, in degrees and pixels. It suits a search grid of 1.4 degrees and 1 pixel; a
# longer step would leave the peak that the search found.
MAX_TURN = 2.0
MAX_MOVE = 0.7
ROUNDING = 1e-6  # scores (correlation coefficients) that differ by less count as equal

# Pixels of particles that are refined at a time: they stay in the cache of a CPU core, or limit
# the memory used on a GPU.
CPU_CHUNK = 2**17
CUDA_CHUNK = 2**22


class _Fit(NamedTuple):
    """Poses, and how well the references moved by them fit the particles."""

    angle: Tensor  # (n,) degrees
    shift: Tensor  # (n, 2) pixels
    score: Tensor  # (n,) correlation coefficients
    moments: Tensor  # (n, 6, 6), see `_evaluate`


class _Pixels(NamedTuple):
    """Coordinates of the pixels near the disc, in pixels from the particle's centre."""

    x: Tensor  # (p,)
    y: Tensor  # (p,)
    square: Tensor  # (p,) squared distance from the centre
    place: Tensor  # (n, p) complex: x + iy, or x - iy for mirrored particles


def _check(images: Tensor, templates: Tensor, *others: Any) -> None:
    label, angle, shift, mirror = others[:4]
    n, box = len(images), images.shape[1:]
    if images.ndim != 3 or templates.ndim != 4 or templates.shape[2:] != box:
        raise ValueError(
            f"images {tuple(images.shape)} and references {(len(templates), *templates.shape[2:])} "
            "must be (n, h, w) and (k, h, w) of one box: resize one"
        )
    shapes = [tuple(each.shape) for each in (label, angle, shift, mirror)]
    if shapes != [(n,), (n,), (n, 2), (n,)]:
        raise ValueError(f"labels and poses must be {n}, one for each image; got {shapes}")
    if {images.dtype} != {templates.dtype, angle.dtype, shift.dtype}:
        raise ValueError(f"images are {images.dtype}, references {templates.dtype}: use .to()")
    if len({each.device for each in (images, templates, label, angle, shift, mirror)}) > 1:
        raise ValueError(
            f"images are on {images.device}, references on {templates.device}, labels on "
            f"{label.device}, poses on {angle.device}: move them to one"
        )


def _fake(
    images: Tensor, templates: Tensor, label: Tensor, angle: Tensor, shift: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return angle.new_empty(angle.shape), shift.new_empty(shift.shape), angle.new_empty(angle.shape)


@operator(
    check=_check,
    fake=_fake,
    cpu=cpu_kernels.refine_poses,
    cuda=kernel_images.refine_poses,
)
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
    """Refine the pose of each image against its reference; `refine` calls this operator.

    Args:
        images: (n, h, w) float32 or float64.
        templates: (k, 3, h, w) references and their derivatives along x and y, per pixel.
        label: (n,) int64, the reference of each image.
        angle: (n,) angles to start from, degrees.
        shift: (n, 2) shifts in x and y to start from, pixels.
        mirror: (n,) bool, which images are mirrored; it does not change.
        first_ring, last_ring: inner and outer radius of the annulus that is compared, pixels.
        steps: number of Gauss-Newton steps.

    Returns:
        Angles (n,) in degrees, shifts (n, 2) in pixels, and scores (n,).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    rings, pose = Rings(first_ring, last_ring), Pose(angle, shift, mirror)
    pixels = CPU_CHUNK if images.device.type == "cpu" else CUDA_CHUNK
    chunk = max(1, math.ceil(pixels / (math.pi * last_ring**2)))
    templates = with_turn(templates)
    found = [(angle[:0], shift[:0], angle[:0])]
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        some, names, start_pose = images[part], label[part], pose[part]
        if len(some) == 1:  # a single matrix product rounds differently from a batch: take two
            some, names = some.repeat(2, 1, 1), names.repeat(2)
            start_pose = Pose.cat([start_pose, start_pose])
        # One reference that all share is not copied.
        own = (
            templates.expand(len(some), -1, -1, -1)
            if len(templates) == 1
            else templates.index_select(0, names)
        )
        turned, moved, scored = _refine_chunk(some, own, start_pose, rings, steps)
        count = min(chunk, len(images) - start)
        found.append((turned[:count], moved[:count], scored[:count]))
    angles, shifts, scores = zip(*found, strict=True)
    return torch.cat(angles), torch.cat(shifts), torch.cat(scores)


def _refine_chunk(
    images: Tensor, templates: Tensor, pose: Pose, rings: Rings, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Each particle is cut out in a window about its own start, rounded to whole pixels. All windows
    # are equal, so the result for a particle does not depend on the other particles.
    whole = pose.shift.round()
    shift = pose.shift - whole
    window = _window(rings.last_ring + 1 + math.sqrt(0.5) + steps * MAX_MOVE, images)  # (p, 2)
    pixels = _pixels(window, pose.mirror)
    particles, whole_window = _seen(images, window, whole)  # (n, 2, p)

    def fit(angle: Tensor, shift: Tensor, last: bool) -> _Fit:
        # Derivatives are needed only if another step follows.
        seen = templates[:, :1] if last else templates
        moved = Pose(angle, shift, pose.mirror)
        return _evaluate(particles, seen, pixels, moved, rings, whole_window)

    now = fit(pose.angle, shift, steps == 0)
    for step in range(steps):
        last = step + 1 == steps
        turn, move = _step(now, pose.mirror)
        trial = fit(now.angle + turn, now.shift + move, last)
        now = now._replace(moments=trial.moments) if last else now
        better = trial.score > now.score - ROUNDING
        now = _Fit(
            *(
                torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(trial, now, strict=True)
            )
        )
    return wrap_degrees(now.angle), now.shift + whole, now.score


def _window(reach: float, images: Tensor) -> Tensor:
    """(p, 2) whole pixels in x and y within ``reach`` pixels of the centre. The window is at most
    twice as large as the image."""
    size = min(2 * math.ceil(reach) + 1, 2 * max(images.shape[-2:]) + 1)
    grid = pixel_grid((size, size), images).flatten(0, 1)
    return grid[grid.norm(dim=-1) <= reach]


def _seen(images: Tensor, window: Tensor, shift: Tensor) -> tuple[Tensor, bool]:
    """The images' pixels in the window (p, 2), moved by -shift (n, 2); both in whole pixels.

    Returns:
        (n, 2, p): whether a pixel lies in the image (1 or 0), and its value (0 outside). Then
        whether all pixels of all images do.
    """
    height, width = images.shape[-2:]
    x, y = window.long().unbind(-1)  # (p,)
    left, top = (shift.long() * -1 + shift.new_tensor([width // 2, height // 2]).long()).unbind(1)
    reach = int(window.abs().max())
    if (
        int(torch.minimum(left, top).amin()) >= reach
        and int(left.amax()) < width - reach
        and int(top.amax()) < height - reach
    ):  # the whole window lies in the image, for every particle
        index = (y * width + x) + (top * width + left).unsqueeze(1)  # (n, p)
        values = images.flatten(1).gather(1, index)
        return torch.stack([torch.ones_like(values), values], 1), True
    x, y = x + left.unsqueeze(1), y + top.unsqueeze(1)  # (n, p)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    values = images.flatten(1).gather(1, index)
    return torch.stack([torch.ones_like(values), values], 1) * inside.unsqueeze(1), False


def _pixels(xy: Tensor, mirror: Tensor) -> _Pixels:
    """`_Pixels` at xy (p, 2), for particles of which some are mirrored (n,)."""
    place = torch.view_as_complex(xy)
    hand = torch.where(mirror.unsqueeze(1), place.conj().resolve_conj(), place)
    x, y = (column.contiguous() for column in xy.unbind(-1))
    return _Pixels(x, y, x * x + y * y, hand)


def _evaluate(
    particles: Tensor,
    templates: Tensor,
    pixels: _Pixels,
    pose: Pose,
    rings: Rings,
    whole_window: bool,
) -> _Fit:
    """Scores and moments of particles (n, 2, p) at these poses; see `_seen` for the two rows.

    The moments are weighted sums over the disc's pixels of all products of two of these: 1, the
    particle, the reference and, if the templates have them, the reference's three derivatives. The
    score and the next step follow from them alone, and one matrix product computes them all.
    """
    matrix = torch.view_as_complex(pose.linear().mT.contiguous())  # (n, 2): images of x and y
    shift = pose.shift.unsqueeze(-1)  # (n, 2, 1)
    centre = (matrix * pose.shift).sum(1, keepdim=True)  # (n, 1)
    # Places are complex, x + iy. The image of the y axis is that of the x axis times i, or times -i
    # if mirrored; `_pixels` has conjugated the places of mirrored particles for that reason.
    places = torch.addcmul(centre, pixels.place, matrix[:, :1])  # (n, p) on the reference
    values = sample(templates, torch.view_as_real(places))  # (n, 4, p)
    # Rotation keeps distances: |v + shift| is the distance from the reference's centre too.
    square = torch.addcmul(pixels.square + shift.square().sum(1), pixels.x, 2 * shift[:, 0])
    square = torch.addcmul(square, pixels.y, 2 * shift[:, 1])
    weight = annulus(square.clamp(min=0).sqrt(), rings).unsqueeze(1)
    if not whole_window:
        weight = weight * particles[:, :1]
    own = weight * particles
    across = own @ values.mT  # (n, 2, 4)
    moments = torch.cat(
        [
            torch.cat([own @ particles.mT, across], 2),
            torch.cat([across.mT, (weight * values) @ values.mT], 2),
        ],
        1,
    )  # (n, 6, 6)
    central = _without(moments, 0)
    xx, xy, yy = central[:, 1, 1], central[:, 1, 2], central[:, 2, 2]
    score = xy / (xx * yy).clamp(min=torch.finfo(xy.dtype).tiny).sqrt()
    return _Fit(pose.angle, pose.shift, score, central)


def _without(moments: Tensor, index: int) -> Tensor:
    """Moments (n, c, c) of the columns after column ``index`` has been projected out of them."""
    row = moments[:, index]  # (n, c)
    power = row[:, index].clamp(min=torch.finfo(row.dtype).tiny)
    return moments - row.unsqueeze(-1) * (row / power.unsqueeze(-1)).unsqueeze(-2)


def _step(fit: _Fit, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """The Gauss-Newton step in angle (n,), degrees, and shift (n, 2), pixels.

    The amplitude and the constant of the fit are projected out.
    """
    moments = fit.moments
    xy, yy = moments[:, 1, 2], moments[:, 2, 2]
    # A negative amplitude means that particle and reference do not match: keep it positive.
    amplitude = (xy / yy.clamp(min=torch.finfo(xy.dtype).tiny)).clamp(min=1e-3)
    rest = _without(moments, 2)
    normal, right = rest[:, 3:, 3:], rest[:, 3:, 1] / amplitude.unsqueeze(-1)
    # A small ridge keeps the equations solvable: a round reference does not determine the angle,
    # an empty one determines nothing.
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-4 * diagonal + 1e-4 * diagonal.amax(-1, keepdim=True) * 1e-2 + 1e-12
    step = torch.linalg.solve(normal + torch.diag_embed(ridge), right)  # x', y', turn
    # From the reference's frame to the particle's, in which a mirrored particle turns backwards.
    turn = torch.rad2deg(step[:, 2]) * torch.where(mirror, -1.0, 1.0).to(step.dtype)
    linear = Pose(fit.angle, fit.shift, mirror).linear()
    move = (linear.mT @ step[:, :2].unsqueeze(-1)).squeeze(-1)
    return turn.clamp(-MAX_TURN, MAX_TURN), move.clamp(-MAX_MOVE, MAX_MOVE)
