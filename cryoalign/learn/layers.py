"""The stages from pixels to score as small modules, each over one function of this package.

All keep the dtype of what they are given, float64 included. Under autocast they compute in float32
whatever the surroundings do (backward is to be called outside of it, as PyTorch says): transforms
have no bf16, and a correlation is a sum over thousands of samples (half-precision *inputs* are
taken, and cast). docs/layers.md has the table.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cryoalign.images.geometry import Interpolation, transform
from cryoalign.images.polar import Rings, ring_spectra, to_polar
from cryoalign.learn.implicit import (
    REFINED_STEPS,
    STEPS,
    fourier_shift,
    implicit_pose,
    smooth_score,
)
from cryoalign.operators.correlation import correlation_at, correlation_logsumexp, correlation_table
from cryoalign.pose import Pose
from cryoalign.runtime.arrays import Array, as_tensor
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.paired import CPU_CHUNK, best_pairs, pair_table, pairs_at_a_time
from cryoalign.search.settings import Search

Gradient = Literal["score", "implicit", "soft"]


class _FullPrecision(nn.Module):
    """A module that autocast leaves alone; half-precision inputs become float32, arrays of other
    libraries tensors (`interop.as_tensor`)."""

    def __call__(self, *arrays: Array | None, **named: Array | None) -> Any:
        """Cast and forward."""
        inputs = [_full(x) for x in arrays]
        others = {name: _full(x) for name, x in named.items()}
        first = next(x for x in (*inputs, *others.values()) if x is not None)
        with torch.autocast(first.device.type, enabled=False):
            return super().__call__(*inputs, **others)

    def extra_repr(self) -> str:
        """The settings."""
        own = (f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_" and k != "training")
        return ", ".join(own)


def _full(array: Array | None) -> Tensor | None:
    """A tensor, float32 if it was of half precision."""
    if array is None:
        return None
    tensor = as_tensor(array)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class PolarTransform(_FullPrecision):
    """Images (n, h, w) and trial shifts (s, 2), (n, s, 2) or None to rings (n, s, r, a); see
    `polar.to_polar`."""

    def __init__(self, rings: Rings) -> None:
        super().__init__()
        self.rings = rings

    def forward(self, images: Tensor, shifts: Tensor | None = None) -> Tensor:
        """(n, s, r, a) bilinear samples."""
        return to_polar(images, self.rings, shifts)


class RigidWarp(_FullPrecision):
    """Images (n, h, w) shifted, turned and mirrored by poses; see `geometry.transform`."""

    def __init__(self, interpolation: Interpolation = "bicubic") -> None:
        super().__init__()
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation {interpolation!r}: use bilinear or bicubic")
        self.interpolation: Interpolation = interpolation

    def forward(self, images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
        """(n, h, w); angle (n,) degrees, shift (n, 2) pixels, mirror (n,) bool."""
        return transform(images, Pose(angle, shift, mirror), self.interpolation)


class FourierShift(_FullPrecision):
    """Images (n, h, w) shifted by phases of their transform; see `implicit.fourier_shift`."""

    def forward(self, images: Tensor, shift: Tensor) -> Tensor:
        """(n, h, w); shift (n, 2) pixels, x then y."""
        return fourier_shift(images, shift)


class RingSpectra(_FullPrecision):
    """Images (n, h, w) to normalised angular spectra (n, s, r, m) complex; see
    `polar.ring_spectra`."""

    def __init__(self, rings: Rings) -> None:
        super().__init__()
        self.rings = rings

    def forward(self, images: Tensor, shifts: Tensor | None = None) -> Tensor:
        """(n, s, r, m) unit vectors; shifts as `PolarTransform`."""
        return ring_spectra(images, self.rings, shifts)


class RotationalCorrelation(_FullPrecision):
    """Spectra (n, s, r, m) and references' (k, r, m) to every score (n, k, s, hands, a); see
    `correlate.correlation_table`."""

    def __init__(self, mirror: bool = True) -> None:
        super().__init__()
        self.mirror = mirror

    def forward(self, particles: Tensor, references: Tensor) -> Tensor:
        """(n, k, s, hands, a) correlation coefficients."""
        return correlation_table(particles, references, self.mirror)


class PoseMarginal(_FullPrecision):
    """Spectra (n, s, r, m) and references' (k, r, m) to the soft maximum over all poses (n, k);
    see `correlate.correlation_logsumexp`."""

    def __init__(self, temperature: float, mirror: bool = True) -> None:
        super().__init__()
        self.temperature, self.mirror = temperature, mirror

    def forward(self, particles: Tensor, references: Tensor) -> Tensor:
        """(n, k) T log sum exp(score / T)."""
        return correlation_logsumexp(particles, references, self.temperature, self.mirror)


class Aligned(NamedTuple):
    """What `AlignLayer` gives of n particles.

    Attributes:
        images: (n, h, w) particles moved onto their references.
        score: (n,) on the chosen reference.
        label: (n,) int64 the chosen reference.
        angle: (n,) degrees; shift: (n, 2) pixels; mirror: (n,) bool.
    """

    images: Tensor
    score: Tensor
    label: Tensor
    angle: Tensor
    shift: Tensor
    mirror: Tensor


class AlignLayer(_FullPrecision):
    """Particles and references to poses, aligned particles and scores.

    Every particle goes to its best reference; or, ``paired``, particle i to reference i, as inside
    an autoencoder. The search chooses reference, hand and pose, without a gradient. Then, by
    ``gradient``:

    - ``score``: the pose is a constant, and the score there is differentiable. Without
      ``search.refine`` its gradient is that of the maximum over the grid.
    - ``implicit``: the pose is the maximum of the smooth score near by and itself has a gradient
      (`implicit.implicit_pose`), which the aligned images carry on.
    - ``soft``: the pose is the mean over the shifts and angles of the chosen reference and hand
      with weights exp(score / temperature), and the score T log sum exp(score / T), above the
      best one by T log of how many count; blunter, and smooth across peaks.
    """

    def __init__(
        self,
        search: Search,
        gradient: Gradient = "score",
        temperature: float = 0.01,
        paired: bool = False,
    ) -> None:
        """
        Args:
            search: what poses are tried, and whether the best is refined below the grid. Pairs are
                searched exhaustively, whatever its mode.
            gradient: see above.
            temperature: of ``soft``, in units of the score.
            paired: each particle has a reference of its own.

        Raises:
            TypeError: search is none.
            ValueError: an unknown gradient; a temperature that is not positive.
        """
        super().__init__()
        if not isinstance(search, Search):
            raise TypeError(f"search is a {type(search).__name__}: give a Search(...)")
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient {gradient!r}: use score, implicit or soft")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.search, self.gradient, self.temperature = search, gradient, temperature
        self.paired = paired

    def forward(self, particles: Tensor, references: Tensor) -> Aligned:
        """Align particles (n, size, size), background zero, to references (k, size, size).

        Raises:
            ValueError: boxes, dtypes or devices that do not fit; none of either; of pairs, k is not
                n.
        """
        label, pose = self._choose(particles, references)
        own = references[label]
        rings = self.search.rings(particles.shape[-1])
        if self.gradient == "soft":
            pose, score = self._soft(particles, own, pose.mirror, rings)
        elif self.gradient == "implicit":
            steps = REFINED_STEPS if self.search.refine else STEPS
            pose = implicit_pose(particles, own, pose, rings, steps)
            score = smooth_score(particles, own, pose, rings)
        else:
            score = correlation_at(particles, own, pose, rings)
        moved = transform(particles, pose)
        return Aligned(moved, score, label, pose.angle, pose.shift, pose.mirror)

    @torch.compiler.disable
    @torch.no_grad()
    def _choose(self, particles: Tensor, references: Tensor) -> tuple[Tensor, Pose]:
        if self.paired:
            pose, _ = best_pairs(particles, references, self.search)
            return torch.arange(len(particles), device=particles.device), pose
        label, pose, _ = best_poses(particles, prepare_target(references, self.search))
        return label, pose.to(particles.dtype)

    def _soft(
        self, particles: Tensor, own: Tensor, mirror: Tensor, rings: Rings
    ) -> tuple[Pose, Tensor]:
        """Mean poses (n,) and soft scores (n,) over the grid of the chosen reference and hand."""
        shifts = self.search.shifts(particles.device).to(particles.dtype)
        chunk = len(particles)
        if particles.device.type == "cpu":  # what is made of a few particles stays in cache
            chunk = pairs_at_a_time(CPU_CHUNK, shifts, rings)
        hand = mirror[:, None]
        parts = zip(particles.split(chunk), own.split(chunk), hand.split(chunk), strict=True)
        tables = [pair_table(some, theirs, h, shifts, rings) for some, theirs, h in parts]
        table = torch.cat(tables)[:, :, 0]  # (n, s, a)
        flat = table.flatten(1) / self.temperature
        weight = flat.softmax(1).reshape(table.shape)
        turn = torch.arange(table.shape[-1], device=table.device, dtype=table.dtype)
        turn = turn * (2 * torch.pi / table.shape[-1])
        by_angle = weight.sum(1)  # (n, a)
        angle = torch.atan2((by_angle * turn.sin()).sum(1), (by_angle * turn.cos()).sum(1))
        shift = weight.sum(2) @ shifts
        score = self.temperature * torch.logsumexp(flat, 1)
        return Pose(torch.rad2deg(angle), shift, mirror), score
