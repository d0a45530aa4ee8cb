"""How well refined poses are known: their covariance, particle by particle."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import frequency_grid
from cryoalign.images.geometry import pixel_grid, sample
from cryoalign.images.polar import Rings
from cryoalign.images.templates import annulus, check_labels, templates_of, with_turn
from cryoalign.pose import Pose

# Particles of a chunk hold so many pixels: they stay in a core's cache, or spare a GPU's memory.
CPU_CHUNK = 2**17
CUDA_CHUNK = 2**24
# Of a shell's noise, what the fit leaves in the residual at least: the constant takes the first.
LEAST_LEFT = 0.2
# What a derivative must keep, of what its pixels could tell, once all before it have explained
# theirs. Round and band-limited references keep 1e-6 of a turn in fp32, a 5 % ellipse 0.03.
LEAST_TOLD = 1e-3
REFERENCES = 16  # whose derivatives are in memory at a time


class Curvature(NamedTuple):
    """What references tell of poses: a QR factorisation of W^1/2 [1, reference, G], G being its
    derivatives by turn (radians), x and y (px) in its own frame.

    Attributes:
        norm: (k,) of the reference under W, its mean removed.
        root: (k, 3, 3) R^-1 of G, less what constant and reference explain; infinite where it has
            none but for rounding.
        power: (k, shells, 9) of W^1/2 Q of G in Fourier space: noise of power 1 in one shell alone
            gives Q' W^1/2 noise this covariance.
        leverage: (k, shells) power of W^1/2 Q of all five: what the fit takes from the residual.
    """

    norm: Tensor
    root: Tensor
    power: Tensor
    leverage: Tensor


def pose_covariance(
    particles: Tensor, references: Tensor, label: Tensor, pose: Pose, rings: Rings
) -> Tensor:
    """Covariance of poses that `refine` has found, from each particle's own noise.

    `refine` fits particle = a * moved reference + c by least squares under the weight W of the
    disc. For noise of covariance C the estimate has the sandwich covariance of M-estimators
    (Huber 1967; White 1982)

        H^-1 (G' W C W G) H^-1 / a^2,    H = G' W G,

    G being the derivatives of the moved reference by angle, shift x and shift y, less what a and c
    explain. For white noise that is sigma^2 / a^2 (G'G)^-1, the inverse Fisher information. C is
    isotropic noise, its power spectrum that of the particle's residual on the disc, by shells,
    made up for what the fit has taken of it (MacKinnon & White 1985, HC2).

    First order in the noise, for the peak that was found: it says nothing of wrong classes or
    hands, nor of where the reference itself stands. References may be noise-free, or class averages
    weighted by their FRC (`average.filtered_averages`): such a weight makes <R, truth> = <R, R>, so
    that their own noise needs no term. Of plain averages H counts noise as knowledge: filter them.
    How often 95 % intervals hold the truth: ``python -m bench coverage`` (94 to 95 %; 91 % for the
    angle at SNR 0.02 on averages of 100, whose FRC is optimistic).

    Args:
        particles: (n, size, size), background zero.
        references: (k, size, size).
        label: (n,) int64, which reference is each particle's.
        pose: (n,) refined.
        rings: the disc that `refine` compared.

    Returns:
        (n, 3, 3) of (angle in degrees, shift x, shift y in pixels); infinite on the diagonal, zero
        elsewhere, where particle and reference do not correlate or the reference leaves part of the
        pose open, as a round one does the angle.

    Raises:
        ValueError: boxes, dtypes, lengths or labels that do not fit; boxes that are not square.
    """
    _check(particles, references, label, pose)
    curvature = curvature_of(references, rings)
    return covariance_on(particles, references, curvature, label, pose, rings)


def curvature_of(references: Tensor, rings: Rings) -> Curvature:
    """What `pose_covariance` needs to know of references (k, size, size), for any particles."""
    if not len(references):
        return _curvature(references, rings)
    parts = [_curvature(some, rings) for some in references.split(REFERENCES)]
    return Curvature(*(torch.cat(of) for of in zip(*parts, strict=True)))


def _curvature(references: Tensor, rings: Rings) -> Curvature:
    size = references.shape[-1]
    value, by_x, by_y, by_turn = with_turn(templates_of(references)).flatten(2).unbind(1)  # (k, p)
    columns = torch.stack([torch.ones_like(value), value, by_turn, by_x, by_y], 2)  # (k, p, 5)
    radius = pixel_grid((size, size), references).norm(dim=-1).flatten()
    weight = annulus(radius, rings).sqrt()
    basis, factor = torch.linalg.qr(columns * weight[:, None])
    images = (basis * weight[:, None]).mT.unflatten(2, (size, size))
    spectrum = torch.fft.rfft2(images, norm="ortho").flatten(2)  # (k, 5, f)
    shell, twice = shells_of(size, references.device)
    leverage = _by_shell((spectrum.abs().square() * twice).sum(1), shell)
    own = spectrum[:, 2:]
    products = (own.unsqueeze(2) * own.unsqueeze(1).conj()).real * twice  # (k, 3, 3, f)
    power = _by_shell(products.flatten(1, 2), shell).mT.contiguous()
    left = factor[:, 2:, 2:]
    slope = (by_x.square() + by_y.square()).sqrt() * weight  # (k, p)
    by_shift = slope.norm(dim=1)
    could = torch.stack([(slope * radius).norm(dim=1), by_shift, by_shift], 1)
    silent = (left.diagonal(dim1=1, dim2=2).abs() <= LEAST_TOLD * could).any(1)
    inverse, failed = torch.linalg.inv_ex(left)
    root = torch.where((silent | (failed != 0))[:, None, None], torch.inf, inverse)
    return Curvature(factor[:, 1, 1].abs(), root, power, leverage)


def covariance_on(
    particles: Tensor,
    references: Tensor,
    curvature: Curvature,
    label: Tensor,
    pose: Pose,
    rings: Rings,
) -> Tensor:
    """`pose_covariance` with `curvature_of` the references at hand."""
    pixels = CPU_CHUNK if particles.device.type == "cpu" else CUDA_CHUNK
    chunk = max(1, pixels // particles.shape[-1] ** 2)
    found = [particles.new_empty(0, 3, 3)]
    for start in range(0, len(particles), chunk):
        part = slice(start, start + chunk)
        norm, root, power, leverage = (each[label[part]] for each in curvature)
        at = pose[part].to(particles.dtype)
        fitted, noise = _fitted(particles[part], references[label[part]], leverage, at, rings)
        amplitude = fitted / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        middle = (noise.unsqueeze(1) @ power).reshape(-1, 3, 3)
        known = (amplitude > 0) & root.isfinite().all(2).all(1)
        scale = torch.where(known, amplitude, 1.0)[:, None, None]
        turn = _to_particle(at) @ torch.where(known[:, None, None], root / scale, 0.0)
        unknown = torch.where(known, 0.0, torch.inf).to(norm).unsqueeze(1).expand(-1, 3)
        found.append(turn @ middle @ turn.mT + torch.diag_embed(unknown))
    return torch.cat(found)


def _fitted(
    images: Tensor, references: Tensor, leverage: Tensor, pose: Pose, rings: Rings
) -> tuple[Tensor, Tensor]:
    """Amplitude (n,) of references (n, h, w), as unit vectors under the weight, in images; and
    the residual's power (n, shells).

    Interpolation damps a moved reference: taken of unit vectors, its amplitude does not show it.
    """
    height, width = images.shape[-2:]
    grid = pixel_grid((height, width), images)
    x, y = grid[0, :, 0] + pose.shift[:, :1], grid[:, 0, 1] + pose.shift[:, 1:]  # (n, w), (n, h)
    linear = pose.linear()
    # L (v + shift), column by column and row by row.
    along, down = linear[:, :, :1] * x.unsqueeze(1), linear[:, :, 1:] * y.unsqueeze(1)  # (n, 2, .)
    places = torch.stack([along[:, i, None] + down[:, i, :, None] for i in (0, 1)], -1)
    radius = (x.square().unsqueeze(1) + y.square().unsqueeze(2)).sqrt()  # a turn keeps distances
    weight = annulus(radius, rings).flatten(1)  # (n, p)
    y = sample(references, places).flatten(1)
    x = images.flatten(1)
    total = weight.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x, y = (each - (weight * each).sum(1, keepdim=True) / total for each in (x, y))
    y = y / (weight * y * y).sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    amplitude = (weight * x * y).sum(1)
    residual = weight * (x - amplitude.unsqueeze(1) * y)
    spectrum = torch.fft.rfft2(residual.unflatten(1, (height, width)), norm="ortho")
    shell, twice = shells_of(width, images.device)
    power = _by_shell((spectrum.real.square() + spectrum.imag.square()).flatten(1) * twice, shell)
    # What noise of variance 1 leaves in the weighted residual, less what the fit takes.
    whole = _by_shell(twice, shell) * weight.square().mean(1, keepdim=True)
    return amplitude, power / torch.maximum(whole - leverage, LEAST_LEFT * whole)


def _to_particle(pose: Pose) -> Tensor:
    """(n, 3, 3) from (turn in radians, x, y) on the reference to (degrees, x, y) of the pose."""
    # Mirrored, a turn goes backwards; a pose shifts before it turns.
    sign = torch.where(pose.mirror, -1.0, 1.0).to(pose.angle)
    matrix = pose.angle.new_zeros(len(pose), 3, 3)
    matrix[:, 0, 0] = sign * (180 / math.pi)
    matrix[:, 1:, 1:] = pose.linear().mT
    return matrix


def shells_of(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(f,) shell of each component of rfft2, and how often it counts: twice but for the edges."""
    kx, ky = frequency_grid(size, device)
    shell = (torch.hypot(kx, ky) * size).round().long()
    twice = torch.full_like(kx, 2.0)
    twice[:, 0] = 1
    if size % 2 == 0:
        twice[:, -1] = 1
    return shell.flatten(), twice.expand(size, -1).flatten()


def _by_shell(values: Tensor, shell: Tensor) -> Tensor:
    """(..., shells) sums of values (..., f)."""
    shells = int(shell.amax()) + 1
    return values.new_zeros(*values.shape[:-1], shells).index_add_(-1, shell, values)


def _check(particles: Tensor, references: Tensor, label: Tensor, pose: Pose) -> None:
    if particles.ndim != 3 or references.ndim != 3 or particles.shape[1:] != references.shape[1:]:
        raise ValueError(
            "pose_covariance takes particles (n, size, size) and references (k, size, size) of "
            f"one box; got {tuple(particles.shape)} and {tuple(references.shape)}"
        )
    if references.shape[1] != references.shape[2]:
        raise ValueError(f"pose_covariance takes square boxes, got {tuple(references.shape)}")
    if particles.dtype != references.dtype or not references.is_floating_point():
        raise ValueError(
            f"particles are {particles.dtype}, references {references.dtype}: use .float() on both"
        )
    if not len(particles) == len(label) == len(pose):
        raise ValueError(
            f"{len(particles)} particles, {len(label)} labels, {len(pose)} poses: give one each"
        )
    check_labels(label, len(references))
