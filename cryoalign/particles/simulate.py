"""Simulate particle stacks whose poses are known exactly.

A phantom is a sum of 3D Gaussian blobs, so its projection is a sum of 2D Gaussians, also after any
in-plane rotation, sub-pixel shift and mirror. Particles are computed from this formula at their
pose without interpolation, so they can be used to test code that interpolates. Coordinates are
(x, y[, z]) in pixels from pixel ``size // 2``; poses follow ``cryoalign.pose``.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryoalign.images.ctf import COLUMNS, Optics, ctf_2d, refuse_impossible
from cryoalign.io.formats import write_images
from cryoalign.io.relion import one_group_tables
from cryoalign.io.star import Block, StarTable, StarTables, write_star
from cryoalign.pose import Pose
from cryoalign.runtime.files import replacing

Seed = int | np.random.Generator


@dataclass(frozen=True, eq=False)
class Phantom:
    """A sum of isotropic 3D Gaussians.

    Attributes:
        centres: (b, 3) x, y, z in pixels from the centre of the phantom.
        widths: (b,) standard deviations in pixels.
        weights: (b,) integrals; the pixels of a projection add up to their sum.
    """

    centres: Tensor
    widths: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Simulation:
    """A simulated particle stack with its true poses and classes.

    Attributes:
        images: (n, size, size) float32 particles with noise.
        views: (k, size, size) float32 views without noise, on the scale of the particles.
        pose: (n,) true poses; ``pose[i]`` moves particle i onto its view.
        class_number: (n,) int64, from 1; particle i shows ``views[class_number[i] - 1]``.
        pixel_size: Å per pixel.
        sigma: standard deviation of the noise: 1, or 0 if ``snr`` is infinite.
        optics: (n,) CTFs of the particles; None without. Views are without CTF.
    """

    images: Tensor
    views: Tensor
    pose: Pose
    class_number: Tensor
    pixel_size: float
    sigma: float
    optics: Optics | None = None


def phantom(seed: Seed = 0, *, n_blobs: int = 600, radius: float = 22.0) -> Phantom:
    """A protein-like object without symmetry: domains filled by folded chains of rods.

    There is structure at three scales: domains of a quarter to a half of ``radius``, rods like
    helices, and blobs as narrow as a pixel. Up to 7 broad negative blobs, one per domain, model the
    low frequencies that a microscope does not transfer. They cause the dark halo of real particles;
    without them all views would correlate strongly because each is roughly a disc.

    Args:
        seed: seed of all random choices; the same seed gives the same phantom.
        n_blobs: number of positive blobs.
        radius: px, largest distance of a blob from the centre of mass. The widths of blobs are
            proportional to it but at least 1 px, where sampling a Gaussian at the centres of pixels
            causes less than 1 % aliasing.
    """
    if n_blobs < 1 or radius <= 0:
        raise ValueError(f"a phantom needs n_blobs >= 1 and radius > 0, not {n_blobs}, {radius}")
    rng = np.random.default_rng(seed)
    domains = _domains(rng, n_blobs)
    centres = np.concatenate([_chain(rng, *domain) for domain in domains])
    weights = rng.lognormal(0.0, 0.4, n_blobs)
    widths = np.maximum(1.0, radius * rng.choice([0.045, 0.07, 0.12], n_blobs, p=[0.6, 0.3, 0.1]))
    centres = centres - np.average(centres, axis=0, weights=weights)
    centres = centres * (radius / max(np.linalg.norm(centres, axis=1).max(), 1e-6))
    starts = np.cumsum([0, *(length for *_, length in domains[:-1])])
    masses = np.add.reduceat(weights, starts)
    hearts = np.add.reduceat(weights[:, None] * centres, starts) / masses[:, None]
    return Phantom(
        torch.as_tensor(np.concatenate([centres, hearts])),
        torch.as_tensor(np.concatenate([widths, np.full(len(domains), 0.28 * radius)])),
        torch.as_tensor(np.concatenate([weights, -0.85 * masses])),
    )


def _domains(rng: np.random.Generator, n_blobs: int) -> list[tuple[np.ndarray, float, int]]:
    """Centre, radius and number of blobs of up to 7 touching domains, in arbitrary units."""
    count = min(7, n_blobs)
    radii = rng.uniform(0.25, 0.6, count)
    centres = np.zeros((count, 3))
    for i in range(1, count):
        # Of two places that touch a neighbour take the inner one: compact, but not a ball.
        neighbours = rng.integers(i, size=2)
        reach = 0.85 * (radii[i] + radii[neighbours])
        places = [centres[j] + r * _unit(rng) for j, r in zip(neighbours, reach, strict=True)]
        centres[i] = min(places, key=np.linalg.norm)
    share = radii**3 / (radii**3).sum()
    ends = np.rint(np.cumsum(share) * (n_blobs - count)).astype(int)
    sizes = 1 + np.diff(ends, prepend=0)
    return [(c, float(r), int(s)) for c, r, s in zip(centres, radii, sizes, strict=True)]


def _chain(rng: np.random.Generator, centre: np.ndarray, radius: float, length: int) -> np.ndarray:
    """(length, 3) beads of a chain of straight rods that stays inside its domain."""
    beads = np.empty((length, 3))
    place, direction, left = 0.4 * radius * _unit(rng), _unit(rng), 0
    for i in range(length):
        if left == 0 or np.linalg.norm(place + 0.07 * direction) > radius:
            # Start a new rod; the farther outside, the more it points to the domain's centre.
            direction = _unit(rng) - place / radius
            direction = direction / np.linalg.norm(direction)
            left = int(rng.integers(4, 14))
        place, left = place + 0.07 * direction, left - 1
        beads[i] = place
    return centre + beads


def _unit(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def spread_views(k: int, seed: Seed = 0) -> Tensor:
    """(k, 3) unit viewing directions, spread evenly over the sphere; the same for the same seed.

    Opposite directions give mirrored views and count as the same direction, so no view is the
    mirror image of another. Random directions repel each other until they are at rest.
    """
    if k < 1:
        raise ValueError(f"spread_views needs k >= 1, not {k}")
    rng = np.random.default_rng(seed)
    views = rng.normal(size=(k, 3))
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    itself = np.tile(np.eye(k, dtype=bool), 2)  # (k, 2k)
    spacing = math.sqrt(2 * math.pi / k)
    for rate in np.geomspace(0.3, 0.003, 200) * spacing:
        apart = views[:, None] - np.concatenate([views, -views])[None]  # (k, 2k, 3)
        distance = np.where(itself, np.inf, np.linalg.norm(apart, axis=2))
        force = (apart / distance[..., None] ** 4).sum(1)
        views = views + rate * force / max(np.linalg.norm(force, axis=1).max(), 1e-12)
        views /= np.linalg.norm(views, axis=1, keepdims=True)
    return torch.as_tensor(views)


def project(phantom: Phantom, directions: Tensor, pose: Pose | None = None, *, size: int) -> Tensor:
    """Projections of a phantom, moved from their views by the inverse of ``pose``.

    Args:
        phantom: the object.
        directions: (n, 3) unit vectors. The x axis of a view is horizontal (RELION's rot and tilt,
            with psi = 0).
        pose: (n,) poses that move each projection back onto its view; None gives the views.
        size: width and height of an image in px, odd or even.

    Returns:
        (n, size, size) float32 values at the centres of pixels, exact to float32.
    """
    if directions.ndim != 2 or directions.shape[1] != 3:
        raise ValueError(f"directions must be (n, 3), not {tuple(directions.shape)}")
    if pose is not None and len(pose) != len(directions):
        raise ValueError(f"{len(directions)} directions but {len(pose)} poses: give one pose each")
    axes = _image_axes(directions.double())  # (n, 2, 3)
    places = torch.einsum("nij,bj->nbi", axes, phantom.centres.double())  # (n, b, 2)
    if pose is not None:
        inverse = pose.to(torch.float64).inverse()
        places = (places + inverse.shift[:, None]) @ inverse.linear().mT
    grid = torch.arange(size, dtype=torch.float64) - size // 2
    widths = phantom.widths.double()[:, None]
    scale = (phantom.weights / (2 * math.pi * phantom.widths**2)).float()
    images = torch.empty(len(directions), size, size)
    for part in torch.arange(len(directions)).split(16):  # (16, b, 2, size) fits the cache
        offset = ((grid - places[part][..., None]) / widths[:, None]).float()
        # Clamped at 4e-18, because subnormal numbers make the product ten times slower.
        columns, rows = (-0.5 * offset**2).clamp_min(-40).exp().unbind(2)  # each (n, b, size)
        images[part] = (rows * scale[:, None]).mT @ columns
    return images


def _image_axes(directions: Tensor) -> Tensor:
    """(n, 2, 3) x and y axes of views along ``directions``, as RELION's with psi = 0."""
    x, y, z = directions.unbind(-1)
    tilt, rot = torch.atan2(torch.hypot(x, y), z), torch.atan2(y, x)
    across = [tilt.cos() * rot.cos(), tilt.cos() * rot.sin(), -tilt.sin()]
    down = [-rot.sin(), rot.cos(), torch.zeros_like(rot)]
    return torch.stack([torch.stack(across, -1), torch.stack(down, -1)], 1)


def simulate(
    n: int,
    n_classes: int,
    *,
    size: int = 64,
    snr: float = 0.1,
    max_shift: float = 3.0,
    mirror: bool = True,
    seed: int = 0,
    noise: Literal["white", "coloured"] = "white",
    pixel_size: float = 3.0,
    defocus: tuple[float, ...] | None = None,
    astigmatism: float = 0.02,
    voltage: float = 300.0,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.1,
) -> Simulation:
    """Simulate noisy particles of several views of one phantom.

    Classes, angles, mirrors and shifts are random and uniformly distributed. Views, poses, noise
    and defocus have separate random streams, so the views stay the same for another ``n`` or
    ``snr``.

    Args:
        n: number of particles.
        n_classes: number of views.
        size: width and height of an image in px.
        snr: mean variance of the clean images (with CTF) over the whole box / variance of the
            noise, which is 1. Infinity gives clean images with a mean variance of 1.
        max_shift: largest shift along x and y in px.
        mirror: True mirrors half of the particles.
        seed: seed of all random choices; the same seed gives the same particles.
        noise: ``white``, or ``coloured`` with the power spectrum of ice.
        pixel_size: Å per pixel.
        defocus: smallest and largest, µm; uniformly distributed. None: no CTF.
        astigmatism: largest difference of the two defocus values, µm; its direction is random.
        voltage: kV.
        spherical_aberration: mm.
        amplitude_contrast: from 0 to 1.

    Raises ValueError if the phantom and its shifts do not fit into ``size``, or for CTFs that do
    not exist.
    """
    if n < 1 or n_classes < 1 or not snr > 0 or max_shift < 0:
        raise ValueError(
            f"simulate needs n, n_classes >= 1, snr > 0 and max_shift >= 0, not n={n}, "
            f"n_classes={n_classes}, snr={snr}, max_shift={max_shift}"
        )
    radius = min(0.36 * size, size // 2 - max_shift - 4.0)
    if radius < 6:
        raise ValueError(
            f"size={size} and shifts of {max_shift:g} px leave a phantom of radius {radius:g} px; "
            f"at least 6 px are needed: raise size or lower max_shift"
        )
    shape_rng, view_rng, pose_rng, noise_rng, ctf_rng = np.random.default_rng(seed).spawn(5)
    molecule = phantom(shape_rng, radius=radius)
    directions = spread_views(n_classes, view_rng)
    label = torch.as_tensor(pose_rng.integers(n_classes, size=n))
    pose = Pose(
        torch.as_tensor(pose_rng.uniform(-180, 180, n)).float(),
        torch.as_tensor(pose_rng.uniform(-max_shift, max_shift, (n, 2))).float(),
        torch.as_tensor(pose_rng.random(n) < 0.5) & mirror,
    )
    views = project(molecule, directions, size=size)
    images = project(molecule, directions[label], pose, size=size)
    optics = None
    if defocus is not None:
        least, *_, most = (*defocus, defocus[-1]) if defocus else (0.0, -1.0)
        if len(defocus) > 2 or least > most:
            raise ValueError(
                f"defocus must be the smallest and the largest in µm, e.g. [1, 3], not "
                f"{list(defocus)}"
            )
        middle = ctf_rng.uniform(1e4 * least, 1e4 * most, n)
        half = ctf_rng.uniform(0, 0.5e4 * astigmatism, n)
        given = [middle + half, middle - half, ctf_rng.uniform(0, 180, n)]
        same = [voltage, spherical_aberration, amplitude_contrast, 0.0, pixel_size]
        columns = [*given, *(np.full(n, value) for value in same)]
        optics = Optics(*(torch.as_tensor(each).float() for each in columns))
        refuse_impossible(optics)
        for rows in torch.arange(n).split(256):
            spectra = torch.fft.rfft2(images[rows]) * ctf_2d(optics[rows], size)
            images[rows] = torch.fft.irfft2(spectra, s=(size, size))
    sigma = 1.0 if math.isfinite(snr) else 0.0
    scale = math.sqrt((snr if sigma else 1.0) / float(images.var((1, 2), correction=0).mean()))
    images *= scale
    if sigma:
        _add_noise(images, noise, noise_rng)
    return Simulation(images, views * scale, pose, label + 1, pixel_size, sigma, optics)


def _add_noise(images: Tensor, kind: str, rng: np.random.Generator) -> None:
    """Add Gaussian noise of variance 1 to images (n, size, size), in place.

    "coloured" noise has the power 1 / (1 + (k / 0.06)^2) + 0.15 at k cycles per pixel, similar to
    that of ice.
    """
    if kind not in ("white", "coloured"):
        raise ValueError(f"unknown noise {kind!r}; use 'white' or 'coloured'")
    size = images.shape[-1]
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    power = 1 / (1 + (k / 0.06) ** 2) + 0.15
    amplitude = np.sqrt(power / power.mean())[:, : size // 2 + 1]
    for part in images.split(256):
        values = torch.as_tensor(rng.standard_normal(part.shape, dtype=np.float32))
        if kind == "coloured":
            spectrum = torch.fft.rfft2(values) * torch.as_tensor(amplitude, dtype=torch.float32)
            values = torch.fft.irfft2(spectrum, s=(size, size))
        part += values


def truth_table(simulation: Simulation) -> pd.DataFrame:
    """True poses and classes, with the columns of ``particles.csv`` of a run, except the score."""
    pose = simulation.pose
    columns = {
        "index": np.arange(len(pose)),
        "class_number": simulation.class_number.numpy(),
        "angle": pose.angle.numpy(),
        "shift_x": pose.shift[:, 0].numpy(),
        "shift_y": pose.shift[:, 1].numpy(),
        "mirror": pose.mirror.numpy().astype(int),
    }
    return pd.DataFrame(columns)


def write_simulation(folder: str | Path, simulation: Simulation) -> Path:
    """Write a simulation into ``folder`` and return the STAR file of the particles.

    The files are ``particles.mrcs`` with ``particles.star`` (RELION 3.1; image names relative to
    the folder; with the CTFs, if there are any), ``views.mrcs`` without noise and CTF, and
    ``truth.csv``. The folder is made if it is missing. Raises FileExistsError if it already
    contains a ``particles.star``.
    """
    folder = Path(folder)
    star = folder / "particles.star"
    if star.exists():
        raise FileExistsError(f"{star} exists: choose another folder, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "particles.mrcs", simulation.images, simulation.pixel_size)
    write_images(folder / "views.mrcs", simulation.views, simulation.pixel_size)
    with replacing(folder / "truth.csv") as path:
        truth_table(simulation).to_csv(path, index=False, float_format="%.6f")
    n, size = simulation.images.shape[:2]
    tables = one_group_tables("particles.mrcs", n, size, simulation.pixel_size)
    note = "simulated, without a CTF"
    if simulation.optics is not None:
        note = "simulated, with a CTF"
        tables = _with_optics(tables, simulation.optics)
    write_star(star, tables, (note,))
    return star


def _with_optics(tables: StarTables, optics: Optics) -> StarTables:
    """The tables with a defocus of each particle, and what all share in the optics table."""
    value = {label: getattr(optics, name).double().numpy() for name, label in COLUMNS.items()}
    own = {label: value[label].round(2) for label in value if label.startswith("rlnDefocus")}
    shared = {label: value[label][0].round(6) for label in value if label not in own}
    frame = tables.optics if tables.optics is not None else pd.DataFrame()
    blocks: dict[str, Block] = {
        "optics": StarTable.of(frame.assign(**shared)),
        "particles": StarTable.of(tables.particles.assign(**own)),
    }
    return replace(tables, blocks=blocks)
