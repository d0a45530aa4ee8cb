"""Particles whose poses are known: simulated here, or read from files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, ctf_2d, optics_from_relion
from cryoalign.io.formats import image_pixel_size, read_images
from cryoalign.io.stack import read_particles
from cryoalign.io.star import read_star
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import Phantom, phantom, project, simulate, spread_views
from cryoalign.particles.stack import Stack, TensorStack
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.results.alignment import Alignment


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
        optics: (n,) as they are believed to be, or None without a CTF.
        magnification: (n,) of each particle's picture of its view.
        defocus_offset: (n,) Å, what the optics' defocus lacks.
    """

    name: str
    particles: Stack
    views: Tensor
    view: Tensor
    pose: Pose
    optics: Optics | None = None
    magnification: Tensor | None = None
    defocus_offset: Tensor | None = None


def known_sets(
    data: Path | tuple[Path, ...] | None,
    snr: tuple[float, ...],
    n: int,
    views: int,
    size: int,
    seed: int,
) -> list[KnownSet]:
    """The sets at one prefix or several, or else one simulated set per SNR."""
    if data:
        return [read_set(prefix) for prefix in ((data,) if isinstance(data, Path) else data)]
    sets = []
    for each in snr:
        made = simulate(n, views, size=size, snr=each, seed=seed)
        stack = TensorStack(made.images, made.pixel_size)
        name = f"simulated SNR {each:g}"
        sets.append(KnownSet(name, stack, made.views, made.class_number - 1, made.pose))
    return sets


def enlarged_sets(
    snr: tuple[float, ...], n: int, views: int, size: int, seed: int
) -> list[KnownSet]:
    """A simulated set per SNR, its particles enlarged by N(1, 0.01) and seen through CTFs.

    300 kV, 2.7 mm, 0.1, 3.6 Å; defocus 1 to 3 µm with up to 500 Å of astigmatism; the defocus that
    is given lacks N(0, 300 Å). Particles are evaluated at their pose and magnification, not
    interpolated; the SNR is that behind the CTF.
    """
    generator = np.random.default_rng(seed)
    radius = min(0.36 * size, size // 2 - 8.0)
    molecule, directions = phantom(seed, radius=radius), spread_views(views, seed)
    view = torch.as_tensor(generator.integers(views, size=n))
    pose = Pose(
        torch.as_tensor(generator.uniform(-180, 180, n)),
        torch.as_tensor(generator.uniform(-3, 3, (n, 2))),
        torch.as_tensor(generator.random(n) < 0.5),
    )
    growth = torch.as_tensor(generator.normal(1, 0.01, n))
    offset = torch.as_tensor(generator.normal(0, 300, n)).float()
    u = torch.as_tensor(generator.uniform(1e4, 3e4, n)).float()
    v = u - torch.as_tensor(generator.uniform(0, 500, n)).float()
    turn = torch.as_tensor(generator.uniform(0, 180, n)).float()
    constant = [torch.full((n,), value) for value in (300.0, 2.7, 0.1, 0.0, 3.6)]
    optics = Optics(u, v, turn, *constant)
    images = torch.cat(
        [
            project(_grown(molecule, growth[i]), directions[view[[i]]], pose[[i]], size=size)
            for i in range(n)
        ]
    )
    true = replace(optics, defocus_u=u + offset, defocus_v=v + offset)
    images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf_2d(true, size), s=(size, size))
    power = float(images.var((1, 2), correction=0).mean())
    noise = torch.as_tensor(generator.standard_normal(images.shape, dtype=np.float32))
    sets = []
    for each in snr:
        scale = math.sqrt(each / power)
        name, stack = f"simulated with CTF, SNR {each:g}", TensorStack(images * scale + noise, 3.6)
        clean = project(molecule, directions, size=size) * scale
        sets.append(KnownSet(name, stack, clean, view, pose, optics, growth, offset))
    return sets


def _grown(molecule: Phantom, growth: Tensor) -> Phantom:
    """The phantom whose projection at v is this one's at v / growth."""
    return Phantom(
        molecule.centres * growth, molecule.widths * growth, molecule.weights * growth.square()
    )


def read_set(prefix: Path) -> KnownSet:
    """Read ``PREFIX.mrcs``, ``PREFIX_views.mrcs`` and ``PREFIX_truth.npz`` (`truth_of`); and the
    optics of ``PREFIX.star`` where there is one with rlnDefocusU."""
    view, pose = truth_of(prefix)
    if int(view.min()) < 0:
        raise ValueError(f"{prefix}_truth.npz has particles without a view: use a set without junk")
    particles, optics = read_particles(f"{prefix}.mrcs"), None
    star = Path(f"{prefix}.star")
    if star.exists():
        tables = read_star(star)
        optics = optics_from_relion(
            tables.particles, tables.optics, image_pixel_size(f"{prefix}.mrcs") or 1.0
        )
    views = read_images(f"{prefix}_views.mrcs")
    return KnownSet(prefix.name, particles, views, view, pose, optics)


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


def particle_of(
    radius: float | None = None, max_shift: float = 3.0, mirror: bool = True
) -> Particle:
    """The section ``particle`` of lengths in pixels."""
    given = None if radius is None else f"{radius} px"
    return Particle(radius=given, max_shift=f"{max_shift} px", mirror=mirror)


def reference_of(found: Alignment) -> Tensor:
    """(n,) which of the given references each particle joined; -1 where set aside. Class numbers
    are by size."""
    given = torch.tensor([0, *found.class_quality["reference"]])
    return given[found.class_number] - 1


def particles(n: int, k: int, size: int, snr: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, size, size) noisy images and their (k, size, size) views on a device."""
    data = simulate(min(n, 256), k, size=size, snr=snr)
    generator = torch.Generator(device).manual_seed(0)
    base = data.images.to(device)
    images = base.repeat(-(-n // len(base)), 1, 1)[:n]
    for part in images[len(base) :].split(4096):  # copies that are no copies
        part += 0.2 * torch.randn(part.shape, generator=generator, device=device)
    return images, data.views.to(device)
