"""Ways to align images to one image: cryoalign's, kornia's, ASPIRE's, all in cryoalign's poses.

An aligner takes images (m, size, size), a reference (size, size) and the largest shift along an
axis in pixels, and gives poses (m,) without mirrors.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.settings import Search

Align = Callable[[Tensor, Tensor, float], Pose]

# kornia: the best of the settings that were tried on noisy particles (docs/peers.md).
STARTS = 12
BLUR = 1.2  # px; without it moving an image by half a pixel pays, because that smooths its noise
COARSE_STEPS, COARSE_RATE = 20, 0.07  # at half the size, rates in radians and half boxes
FINE_STEPS, FINE_RATE = 60, 0.002


class Aligner(NamedTuple):
    """An aligner and what to expect of it."""

    name: str
    package: str
    align: Align
    share: int = 1  # a slow one is given one particle in so many
    wide: bool = True  # finds any angle


def align_cryoalign(images: Tensor, reference: Tensor, max_shift: float) -> Pose:
    """`cryoalign.search.match.best_poses` on one reference."""
    target = prepare_target(reference[None], Search(max_shift=max_shift, mirror=False))
    return best_poses(images, target)[1]


def kornia_default(images: Tensor, reference: Tensor, max_shift: float) -> Pose:
    """``ImageRegistrator("similarity")`` as it comes: a pair at a time, from no turn."""
    from kornia.geometry.transform import ImageRegistrator

    found = [
        ImageRegistrator("similarity").register(image[None, None], reference[None, None])
        for image in images
    ]
    return _from_kornia(torch.cat(found).detach(), images.shape[-1])


def kornia_rigid(images: Tensor, reference: Tensor, max_shift: float, starts: int = STARTS) -> Pose:
    """``ImageRegistrator`` with a rigid model: all images and starting angles at once at half the
    size, then from the best start at full size. Squared differences, Adam."""
    from kornia.filters import gaussian_blur2d
    from kornia.geometry.transform import pyrdown

    size, m = images.shape[-1], len(images)
    pair = torch.stack([images, reference.expand_as(images)])[:, :, None]  # (2, m, 1, h, w)
    blurred = gaussian_blur2d(pair.flatten(0, 1), (7, 7), (BLUR, BLUR))
    small = pyrdown(blurred).unflatten(0, (2, m)).repeat_interleave(starts, 1)
    begin = torch.zeros(m * starts, 3)  # radians, half boxes
    begin[:, 0] = (torch.arange(starts) * (2 * math.pi / starts)).repeat(m)
    pose, matrix = _register(*small, begin, COARSE_STEPS, COARSE_RATE)
    best = _cosine(*small, matrix).view(m, starts).argmax(1) + torch.arange(m) * starts
    moving, fixed = blurred.unflatten(0, (2, m))
    _, matrix = _register(moving, fixed, pose[best], FINE_STEPS, FINE_RATE)
    return _from_kornia(matrix, size)


def _register(
    moving: Tensor, fixed: Tensor, begin: Tensor, steps: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Parameters (b, 3) and matrices (b, 3, 3) that ``ImageRegistrator`` ends with."""
    from kornia.geometry.transform import HomographyWarper, ImageRegistrator

    model = _rigid_model()(begin)
    registrator = ImageRegistrator(
        model, torch.optim.Adam, F.mse_loss, pyramid_levels=1, lr=rate, num_iterations=steps,
        tolerance=0.0, warper=HomographyWarper,
    )  # fmt: skip
    matrix = registrator.register(moving, fixed).detach()
    return model.pose.detach(), matrix


@functools.cache
def _rigid_model() -> Any:
    from kornia.geometry.transform.image_registrator import BaseModel

    class Rigid(BaseModel):  # type: ignore[misc]
        """Turns and shifts of many pairs, in radians and half boxes (kornia's own model has
        degrees, one pair, and starts from no turn)."""

        def __init__(self, begin: Tensor) -> None:
            super().__init__()
            self.begin = begin
            self.pose = torch.nn.Parameter(begin.clone())

        def reset_model(self) -> None:
            with torch.no_grad():
                self.pose.copy_(self.begin)

        def forward(self) -> Tensor:
            angle, x, y = self.pose.unbind(-1)
            cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
            rows = [cos, -sin, x, sin, cos, y, zero, zero, zero + 1]
            return torch.stack(rows, -1).unflatten(-1, (3, 3))

        def forward_inverse(self) -> Tensor:
            return torch.linalg.inv(self.forward())

    return Rigid


def _cosine(moving: Tensor, fixed: Tensor, matrix: Tensor) -> Tensor:
    """(b,) correlation of the moved images with the fixed ones."""
    from kornia.geometry.transform import HomographyWarper

    warped = HomographyWarper(*fixed.shape[-2:])(moving, matrix)
    return F.cosine_similarity(warped.flatten(1), fixed.flatten(1))


def _from_kornia(matrix: Tensor, size: int) -> Pose:
    """Matrices (b, 3, 3) take the reference's normalised coordinates to the image's: the inverse
    of a pose, about the middle of the box instead of pixel ``size // 2``."""
    to_unit = torch.eye(3, dtype=torch.float64) * (2 / size)
    to_unit[:2, 2], to_unit[2, 2] = (2 * (size // 2) + 1) / size - 1, 1
    onto = torch.linalg.inv(torch.linalg.inv(to_unit) @ matrix.double() @ to_unit)
    linear, moved = onto[:, :2, :2], onto[:, :2, 2:]
    angle = torch.atan2(linear[:, 1, 0] - linear[:, 0, 1], linear[:, 0, 0] + linear[:, 1, 1])
    return _turned(torch.rad2deg(angle), torch.linalg.solve(linear, moved)[..., 0])


def aspire(name: str, **options: Any) -> Align:
    """One of ASPIRE's averagers, whose ``align`` takes the first image of a class as the base."""

    def align(images: Tensor, reference: Tensor, max_shift: float) -> Pose:
        _import_aspire()
        from aspire.classification import averager2d
        from aspire.source import ArrayImageSource

        stack = torch.cat([reference[None], images]).numpy().astype(np.float32)
        source = ArrayImageSource(stack, pixel_size=1.0)
        given = dict(options)
        if name != "ReddyChatterjiAverager2D":  # that one searches the whole box
            given["radius"] = math.sqrt(2) * max_shift  # the disc that holds the square
        averager = getattr(averager2d, name)(_aspire_basis(stack.shape[-1]), source, **given)
        members = np.arange(len(stack))[None]
        turns, shifts, _ = averager.align(members, np.zeros(members.shape, dtype=bool))
        angle = -torch.rad2deg(torch.as_tensor(turns[0, 1:], dtype=torch.float64))
        shift = torch.as_tensor(shifts[0, 1:], dtype=torch.float64)
        turn = _turned(angle, shift).linear()
        if name == "ReddyChatterjiAverager2D":  # turns, then shifts
            shift = (turn.mT @ shift[..., None])[..., 0]
        else:
            shift = -shift
        if "ReddyChatterji" in name:  # turns about the box's middle, half a pixel off in even boxes
            middle = torch.full((2, 1), (stack.shape[-1] - 1) / 2 - stack.shape[-1] // 2).double()
            shift = shift + (turn.mT @ middle - middle)[..., 0]
        return _turned(angle, shift)

    return align


@functools.cache
def _import_aspire() -> None:
    """Import ASPIRE without its log folder, progress bars and exception hook."""
    with tempfile.TemporaryDirectory() as folder:
        settings = "log_exceptions: 0, tqdm_disable: true, console_level: ERROR"
        text = f'logging: {{log_dir: "{Path(folder).as_posix()}", {settings}}}\n'
        Path(folder, "config.yaml").write_text(text)
        with mock.patch.dict(os.environ, ASPIREDIR=folder):
            import aspire.classification  # noqa: F401


@functools.cache
def _aspire_basis(size: int) -> Any:
    from aspire.basis import FFBBasis2D

    return FFBBasis2D(size, dtype=np.float32)


def _turned(angle: Tensor, shift: Tensor) -> Pose:
    return Pose(wrap_degrees(angle), shift, torch.zeros(len(angle), dtype=torch.bool))


ALIGNERS = (
    Aligner("cryoalign, K = 1", "cryoalign", align_cryoalign),
    Aligner('kornia "similarity", defaults', "kornia", kornia_default, 50, wide=False),
    Aligner(
        "kornia rigid, 1 start", "kornia", functools.partial(kornia_rigid, starts=1), 20, wide=False
    ),
    Aligner(f"kornia rigid, {STARTS} starts", "kornia", kornia_rigid, 10),
    Aligner("ASPIRE BFT, 1 px", "aspire", aspire("BFTAverager2D"), 5),
    Aligner("ASPIRE BFT, 1/2 px", "aspire", aspire("BFTAverager2D", sub_pixel=2), 10),
    Aligner("ASPIRE BFSR", "aspire", aspire("BFSRAverager2D"), 25),
    Aligner("ASPIRE Reddy-Chatterji", "aspire", aspire("ReddyChatterjiAverager2D"), 5),
    Aligner("ASPIRE BFS Reddy-Chatterji", "aspire", aspire("BFSReddyChatterjiAverager2D"), 25),
)
