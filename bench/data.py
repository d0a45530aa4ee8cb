"""Particles whose poses are known: simulated here, or read from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoalign.io import read_images, read_particles
from cryoalign.particles import Stack, TensorStack
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.synthetic import simulate


@dataclass(frozen=True, eq=False)
class KnownSet:
    """Particles and their truth.

    Attributes:
        name: for the table.
        particles: the stack.
        views: (k, size, size) noise-free views, on the particles' scale before normalisation:
            the noise has a standard deviation of 1.
        view: (n,) int64, which view a particle shows.
        pose: (n,) takes each particle onto its view.
    """

    name: str
    particles: Stack
    views: Tensor
    view: Tensor
    pose: Pose


def known_sets(
    data: Path | None, snr: tuple[float, ...], n: int, views: int, size: int, seed: int
) -> list[KnownSet]:
    """The set at a prefix, or else one simulated set per SNR."""
    if data is not None:
        return [read_set(data)]
    sets = []
    for each in snr:
        made = simulate(n, views, size=size, snr=each, seed=seed)
        stack = TensorStack(made.images, made.pixel_size)
        name = f"simulated SNR {each:g}"
        sets.append(KnownSet(name, stack, made.views, made.class_number - 1, made.pose))
    return sets


def read_set(prefix: Path) -> KnownSet:
    """Read ``PREFIX.mrcs``, ``PREFIX_views.mrcs`` and ``PREFIX_truth.npz`` (`truth_of`)."""
    view, pose = truth_of(prefix)
    if int(view.min()) < 0:
        raise ValueError(f"{prefix}_truth.npz has particles without a view: use a set without junk")
    return KnownSet(
        prefix.name,
        read_particles(f"{prefix}.mrcs"),
        read_images(f"{prefix}_views.mrcs"),
        view,
        pose,
    )


def truth_of(prefix: Path) -> tuple[Tensor, Pose]:
    """True view (n,), -1 where there is none, and pose onto it, from ``PREFIX_truth.npz``.

    The file has ``label`` (n,) and x_particle = ``B`` x_view + ``shift``, (n, 2, 2) and (n, 2), in
    pixels about the centre.
    """
    with np.load(f"{prefix}_truth.npz", allow_pickle=False) as truth:
        label, matrix, shift = (torch.from_numpy(truth[key]) for key in ("label", "B", "shift"))
    # x_view = B^-1 (x_particle - shift), and B is orthogonal.
    linear = matrix.double().mT
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 1, 1]))
    pose = Pose(wrap_degrees(angle), -shift.double(), torch.linalg.det(linear) < 0)
    return label.long(), pose


def particles(n: int, k: int, size: int, snr: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, size, size) noisy images and their (k, size, size) views on a device."""
    data = simulate(min(n, 256), k, size=size, snr=snr)
    generator = torch.Generator(device).manual_seed(0)
    base = data.images.to(device)
    images = base.repeat(-(-n // len(base)), 1, 1)[:n]
    for part in images[len(base) :].split(4096):  # copies that are no copies
        part += 0.2 * torch.randn(part.shape, generator=generator, device=device)
    return images, data.views.to(device)
