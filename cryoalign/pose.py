"""Poses in the plane and their algebra.

A pose takes a *particle* onto its *reference*: shift by (x, y) pixels, rotate by ``angle`` degrees
(positive turns +x towards +y, y being the row), then mirror x -> -x where ``mirror`` is set:

    v' = F^mirror R(angle) (v + shift),   R(a) = [[cos a, -sin a], [sin a, cos a]],  F = diag(-1, 1)

with v = (x, y) in pixels about the image's centre, pixel ``size // 2`` of each axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pose:
    """A batch of in-plane poses, particle onto reference (see the module's formula).

    Attributes:
        angle: (...) degrees.
        shift: (..., 2) pixels, x then y.
        mirror: (...) bool.
    """

    angle: Tensor
    shift: Tensor
    mirror: Tensor

    def __post_init__(self) -> None:
        if self.shift.shape != (*self.angle.shape, 2) or self.mirror.shape != self.angle.shape:
            raise ValueError(
                f"a Pose needs angle (...), shift (..., 2), mirror (...) of one batch shape; got "
                f"{tuple(self.angle.shape)}, {tuple(self.shift.shape)}, {tuple(self.mirror.shape)}"
            )
        if self.mirror.dtype != torch.bool:
            raise ValueError(f"Pose.mirror must be bool, not {self.mirror.dtype}; use .bool()")

    @classmethod
    def identity(cls, *shape: int, device: torch.device | str | None = None) -> Pose:
        """Poses that change nothing."""
        return cls(
            torch.zeros(shape, device=device),
            torch.zeros(*shape, 2, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )

    @classmethod
    def cat(cls, poses: Sequence[Pose]) -> Pose:
        """Join batches of poses along the first axis."""
        return cls(
            torch.cat([p.angle for p in poses]),
            torch.cat([p.shift for p in poses]),
            torch.cat([p.mirror for p in poses]),
        )

    def __len__(self) -> int:
        return len(self.angle)

    def __getitem__(self, index: Any) -> Pose:
        return Pose(self.angle[index], self.shift[index], self.mirror[index])

    def to(self, *args: Any, **kwargs: Any) -> Pose:
        """Move (or cast) as ``Tensor.to``; the mirror stays bool."""
        angle = self.angle.to(*args, **kwargs)
        return Pose(angle, self.shift.to(*args, **kwargs), self.mirror.to(angle.device))

    def reshape(self, *shape: int) -> Pose:
        """The same poses in another batch shape."""
        return Pose(
            self.angle.reshape(shape), self.shift.reshape(*shape, 2), self.mirror.reshape(shape)
        )

    def scaled(self, factor: float) -> Pose:
        """The same poses in pixels of which ``factor`` go to one of the present pixels."""
        return Pose(self.angle, self.shift * factor, self.mirror)

    def where(self, condition: Tensor, other: Pose) -> Pose:
        """These poses where ``condition`` (...) holds, ``other``'s elsewhere."""
        return Pose(
            torch.where(condition, self.angle, other.angle),
            torch.where(condition.unsqueeze(-1), self.shift, other.shift),
            torch.where(condition, self.mirror, other.mirror),
        )

    def to_table(self) -> Tensor:
        """(n, 4) float64 columns angle, shift x, shift y, mirror of poses (n,)."""
        columns = (self.angle, *self.shift.unbind(-1), self.mirror)
        return torch.stack([column.double() for column in columns], 1)

    @classmethod
    def from_table(cls, table: Tensor) -> Pose:
        """Poses (n,) of the columns that `to_table` makes, in float32."""
        return cls(table[:, 0].float(), table[:, 1:3].float(), table[:, 3] > 0.5)

    def matrix(self) -> Tensor:
        """(..., 3, 3) affine matrices: homogeneous (x, y, 1) of the particle to the reference."""
        rotation = self.linear()  # (..., 2, 2)
        column = (rotation @ self.shift.unsqueeze(-1)).squeeze(-1)  # (..., 2)
        top = torch.cat([rotation, column.unsqueeze(-1)], -1)  # (..., 2, 3)
        bottom = torch.zeros_like(top[..., :1, :])
        bottom = torch.cat([bottom[..., :2], torch.ones_like(bottom[..., :1])], -1)
        return torch.cat([top, bottom], -2)

    def linear(self) -> Tensor:
        """(..., 2, 2) the part F^mirror R(angle) of the pose."""
        angle = torch.deg2rad(self.angle)
        cos, sin = torch.cos(angle), torch.sin(angle)
        sign = torch.where(self.mirror, -1.0, 1.0).to(angle.dtype)
        rows = torch.stack([sign * cos, -sign * sin, sin, cos], -1)
        return rows.unflatten(-1, (2, 2))

    def inverse(self) -> Pose:
        """The pose that takes the reference back onto the particle."""
        sign = torch.where(self.mirror, 1.0, -1.0).to(self.angle.dtype)
        shift = -(self.linear() @ self.shift.unsqueeze(-1)).squeeze(-1)
        return Pose(wrap_degrees(sign * self.angle), shift, self.mirror)


class Found(NamedTuple):
    """What a search found of n particles.

    Attributes:
        label: (n,) int64, index of the reference that fits best.
        pose: (n,) particle onto that reference.
        score: (n,) correlation coefficient there.
    """

    label: Tensor
    pose: Pose
    score: Tensor

    def to(self, device: torch.device | str) -> Found:
        """The same on another device."""
        return Found(self.label.to(device), self.pose.to(device), self.score.to(device))

    def to_table(self) -> Tensor:
        """(n, 6) float64: label, the columns of `Pose.to_table`, score."""
        label, score = self.label.double()[:, None], self.score.double()[:, None]
        return torch.cat([label, self.pose.to_table(), score], 1)

    @classmethod
    def cat(cls, parts: Sequence[Found]) -> Found:
        """The results of several batches as one."""
        labels, poses, scores = zip(*parts, strict=True)
        return cls(torch.cat(labels), Pose.cat(poses), torch.cat(scores))

    @classmethod
    def from_table(cls, table: Tensor) -> Found:
        """The columns that `to_table` makes."""
        return cls(table[:, 0].long(), Pose.from_table(table[:, 1:5]), table[:, 5].float())


def wrap_degrees(angle: Tensor) -> Tensor:
    """Angles brought into [-180, 180)."""
    return torch.remainder(angle + 180.0, 360.0) - 180.0


def compose(first: Pose, then: Pose) -> Pose:
    """The one pose that acts as ``first`` followed by ``then``."""
    sign = torch.where(first.mirror, -1.0, 1.0).to(first.angle.dtype)
    # first's linear part is orthogonal: its transpose brings ``then``'s shift to the particle.
    back = (first.linear().mT @ then.shift.unsqueeze(-1)).squeeze(-1)
    angle = wrap_degrees(first.angle + sign * then.angle)
    return Pose(angle, first.shift + back, first.mirror ^ then.mirror)


def pixel_error(a: Pose, b: Pose, radius: float) -> Tensor:
    """(...) squared pixel error between two poses of one particle, at ``radius`` pixels.

    SPARX's measure, ((2 radius + 1) sin(da / 2))^2 / 2 + dx^2 + dy^2 with the displacements of
    the shifted and rotated image; infinite where the hands differ.
    """
    half = torch.deg2rad(a.angle - b.angle) / 2
    centre_a = (a.linear() @ a.shift.unsqueeze(-1)).squeeze(-1)
    centre_b = (b.linear() @ b.shift.unsqueeze(-1)).squeeze(-1)
    error = ((2 * radius + 1) * torch.sin(half)) ** 2 / 2 + (centre_a - centre_b).square().sum(-1)
    return torch.where(a.mirror == b.mirror, error, torch.full_like(error, torch.inf))


def to_relion(pose: Pose, pixel_size: float) -> dict[str, np.ndarray]:
    """RELION 3.1+ columns of poses: degrees, ångström, and the hand in ``rlnIsFlip``.

    RELION applies v' = R(psi) (v + origin / pixel_size), so psi and origin are the pose's own
    angle and shift; x -> -x about the centre then follows where ``rlnIsFlip`` is 1. RELION's
    Class2D ignores that column: to it such a particle is the mirror image of its class.
    """
    angle, shift = pose.angle.detach().double().cpu(), pose.shift.detach().double().cpu()
    return {
        "rlnAnglePsi": wrap_degrees(angle).numpy(),
        "rlnOriginXAngst": (shift[..., 0] * pixel_size).numpy(),
        "rlnOriginYAngst": (shift[..., 1] * pixel_size).numpy(),
        "rlnIsFlip": pose.mirror.cpu().numpy().astype(np.int64),
    }


def from_relion(columns: Mapping[str, Any], pixel_size: float) -> Pose:
    """Poses from RELION columns (3.1+ in ångström, or 3.0's ``rlnOriginX`` in pixels).

    Absent origins are zero; an absent ``rlnIsFlip`` is no mirror. Raises ValueError without
    ``rlnAnglePsi``.
    """
    if "rlnAnglePsi" not in columns:
        raise ValueError("no column rlnAnglePsi: these particles carry no in-plane alignment")
    angle = torch.as_tensor(np.array(columns["rlnAnglePsi"], dtype=np.float64))
    shift = torch.zeros(*angle.shape, 2, dtype=torch.float64)
    for axis, name in enumerate("XY"):
        if f"rlnOrigin{name}Angst" in columns:
            values = np.array(columns[f"rlnOrigin{name}Angst"], dtype=np.float64) / pixel_size
        elif f"rlnOrigin{name}" in columns:
            values = np.array(columns[f"rlnOrigin{name}"], dtype=np.float64)
        else:
            continue
        shift[..., axis] = torch.as_tensor(values)
    flip = np.array(columns["rlnIsFlip"]) if "rlnIsFlip" in columns else np.zeros(angle.shape)
    return Pose(angle, shift, torch.as_tensor(flip.astype(np.float64)) > 0.5)
