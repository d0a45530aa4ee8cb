"""The steps from pixels to a score as PyTorch modules, each of which wraps one function.

A module returns the dtype of its inputs, float64 included. Under autocast it still computes in
float32, because Fourier transforms do not exist in bfloat16 and a correlation is a sum over
thousands of samples. Inputs in half precision are accepted and converted to float32. As PyTorch
recommends, call backward outside of autocast. docs/layers.md has a table of the modules.
"""

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
    """A module that computes in full precision under autocast.

    Inputs in half precision become float32, and arrays of other libraries become tensors
    (`cryoalign.runtime.arrays.as_tensor`).
    """

    def __call__(self, *arrays: Array | None, **named: Array | None) -> Any:
        """Convert the inputs and call forward without autocast."""
        inputs = [_full(x) for x in arrays]
        others = {name: _full(x) for name, x in named.items()}
        first = next(x for x in (*inputs, *others.values()) if x is not None)
        with torch.autocast(first.device.type, enabled=False):
            return super().__call__(*inputs, **others)

    def extra_repr(self) -> str:
        """The settings of the module."""
        own = (f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_" and k != "training")
        return ", ".join(own)


def _full(array: Array | None) -> Tensor | None:
    """The array as a tensor, in float32 if it was in half precision."""
    if array is None:
        return None
    tensor = as_tensor(array)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _OnRings(_FullPrecision):
    """A module that samples images on rings about the centre of the shifted image."""

    def __init__(self, rings: Rings) -> None:
        super().__init__()
        self.rings = rings


class PolarTransform(_OnRings):
    """Images (n, h, w) to their samples on rings, as `polar.to_polar`."""

    def forward(self, images: Tensor, shifts: Tensor | None = None) -> Tensor:
        """(n, s, r, a) bilinear samples, for shifts (s, 2) or (n, s, 2) in px, or None for zero."""
        return to_polar(images, self.rings, shifts)


class RingSpectra(_OnRings):
    """Images (n, h, w) to normalised angular spectra of their rings, as `polar.ring_spectra`."""

    def forward(self, images: Tensor, shifts: Tensor | None = None) -> Tensor:
        """(n, s, r, m) complex unit vectors; shifts as in `PolarTransform`."""
        return ring_spectra(images, self.rings, shifts)


class RigidWarp(_FullPrecision):
    """Images (n, h, w) shifted, rotated and mirrored by poses, as `geometry.transform`."""

    def __init__(self, interpolation: Interpolation = "bicubic") -> None:
        super().__init__()
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation {interpolation!r}: use bilinear or bicubic")
        self.interpolation: Interpolation = interpolation

    def forward(self, images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
        """(n, h, w); angle (n,) degrees, shift (n, 2) pixels, mirror (n,) bool."""
        return transform(images, Pose(angle, shift, mirror), self.interpolation)


class FourierShift(_FullPrecision):
    """Images (n, h, w) shifted by phases of their Fourier transform, as `fourier_shift`."""

    def forward(self, images: Tensor, shift: Tensor) -> Tensor:
        """(n, h, w); shift (n, 2) pixels, x then y."""
        return fourier_shift(images, shift)


class RotationalCorrelation(_FullPrecision):
    """Scores of all poses, with ``mirror`` also of mirrored particles, as `correlation_table`."""

    def __init__(self, mirror: bool = True) -> None:
        super().__init__()
        self.mirror = mirror

    def forward(self, particles: Tensor, references: Tensor) -> Tensor:
        """(n, k, s, hands, a) correlation coefficients of spectra (n, s, r, m) and (k, r, m)."""
        return correlation_table(particles, references, self.mirror)


class PoseMarginal(_FullPrecision):
    """Soft maximum of the scores over all poses, as `correlation_logsumexp`.

    ``temperature`` is in units of the score; a smaller one comes closer to the maximum.
    """

    def __init__(self, temperature: float, mirror: bool = True) -> None:
        super().__init__()
        self.temperature, self.mirror = temperature, mirror

    def forward(self, particles: Tensor, references: Tensor) -> Tensor:
        """(n, k) T log sum exp(score / T) of spectra (n, s, r, m) and (k, r, m)."""
        return correlation_logsumexp(particles, references, self.temperature, self.mirror)


class Aligned(NamedTuple):
    """The result of `AlignLayer` for n particles.

    Attributes:
        images: (n, h, w) particles, moved onto their references.
        score: (n,) score with the chosen reference.
        label: (n,) int64 index of the chosen reference.
        angle: (n,) degrees.
        shift: (n, 2) px, x then y.
        mirror: (n,) bool.
    """

    images: Tensor
    score: Tensor
    label: Tensor
    angle: Tensor
    shift: Tensor
    mirror: Tensor


class AlignLayer(_FullPrecision):
    """Aligns particles to references and returns poses, aligned particles and scores.

    Each particle is aligned to the reference that it fits best. With ``paired``, particle i is
    aligned to reference i, as in an autoencoder. The search for reference, mirror and pose has no
    gradient. ``gradient`` says how gradients are computed afterwards:

    - ``score``: the pose is a constant, and the score at this pose is differentiable. Without
      ``search.refine`` its gradient is that of the maximum over the grid.
    - ``implicit``: the pose is the nearby maximum of the smooth score. It is differentiable
      (`implicit.implicit_pose`), and so are the aligned images.
    - ``soft``: the pose is the weighted mean over the shifts and angles of the chosen reference and
      mirror, with weights exp(score / temperature). The score is T log sum exp(score / T), which
      exceeds the best score by T times the logarithm of how many poses contribute. This is less
      precise, and smooth where two poses have the same score.
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
            search: the poses that are tried, and whether the best one is refined between the grid
                points. Pairs are searched exhaustively, whatever ``search.mode`` says.
            gradient: how gradients are computed, see above.
            temperature: T of ``soft``, in units of the score.
            paired: True aligns particle i to reference i only.

        Raises:
            TypeError: ``search`` is not a `Search`.
            ValueError: unknown gradient, or a temperature that is not positive.
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
        """Align particles to references.

        Args:
            particles: (n, size, size), with a mean background of zero.
            references: (k, size, size); k = n if ``paired``.

        Raises:
            ValueError: sizes, dtypes or devices differ, there are no particles or no references,
                or the numbers of paired images differ.
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
        """Mean poses (n,) and soft scores (n,) over all grid poses of the chosen reference."""
        shifts = self.search.shifts(particles.device).to(particles.dtype)
        chunk = len(particles)
        if particles.device.type == "cpu":  # the tables of a few particles fit into the cache
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
