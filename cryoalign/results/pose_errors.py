"""The covariance of refined poses, particle by particle."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.images.fourier import rfft_weights, shell_count, shell_index, shell_sums
from cryoalign.images.geometry import pixel_grid, sample
from cryoalign.images.polar import Rings
from cryoalign.images.templates import annulus, check_labels, templates_of, with_turn
from cryoalign.pose import Pose

# Pixels of the particles of a chunk: few enough for a core's cache, or for a GPU's memory.
CPU_CHUNK = 2**17
CUDA_CHUNK = 2**24
# Least share of a shell's noise that is assumed to remain in the residual after the fit. In the
# innermost shell the fitted constant removes nearly all of it.
LEAST_LEFT = 0.2
# Least share of a derivative that must be independent of the others; below, the pose counts as
# undetermined. The derivative by the angle of a round reference has 1e-6 in float32, that of an
# ellipse of 5 % has 0.03.
LEAST_INDEPENDENT = 1e-3
REFERENCES = 16  # references whose derivatives are in memory at a time


class Curvature(NamedTuple):
    """How k references determine poses: a QR factorisation of W^1/2 [1, reference, G].

    W are the weights of the disc's pixels, and the columns of G the derivatives of the reference
    by rotation (radians), x and y (px), in the reference's own axes.

    Attributes:
        norm: (k,) of the reference under W, its mean removed.
        root: (k, 3, 3) R^-1 of G, without what constant and reference explain; infinite where only
            rounding errors are left.
        power: (k, shells, 9) power of the columns W^1/2 Q of G on each shell, and of their
            products: the covariance that noise of power 1 on this shell alone gives Q' W^1/2 noise.
        leverage: (k, shells) power of all five columns W^1/2 Q: what the fit removes from the
            residual.
    """

    norm: Tensor
    root: Tensor
    power: Tensor
    leverage: Tensor


def pose_covariance(
    particles: Tensor, references: Tensor, label: Tensor, pose: Pose, rings: Rings
) -> Tensor:
    """Covariance of poses that `refine` has found, from the noise of each particle.

    `refine` fits particle = a * moved reference + c by least squares under the weight W of the
    disc. For noise of covariance C the estimate has the sandwich covariance of M-estimators
    (Huber 1967; White 1982)

        H^-1 (G' W C W G) H^-1 / a^2,    H = G' W G,

    with G the derivatives of the moved reference by angle, shift x and shift y, without what a and
    c explain. For white noise that is sigma^2 / a^2 (G'G)^-1, the inverse Fisher information. C is
    isotropic noise with the power spectrum, by shells, of the particle's residual on the disc,
    corrected for what the fit has removed (MacKinnon & White 1985, HC2).

    This is first order in the noise, about the peak that was found: it does not contain wrong
    classes or hands, nor errors of the reference's own position. References may be noise-free, or
    class averages weighted by their FRC (`averages.filtered_averages`): the weight makes
    <R, truth> = <R, R>, so that their noise needs no term of its own. With unfiltered averages the
    covariance is too small. ``python -m bench coverage`` counts how many 95 % intervals contain
    the truth: 94 to 95 %, and 91 % for the angle at SNR 0.02 on averages of 100, whose FRC is
    optimistic.

    Args:
        particles: (n, size, size), background zero.
        references: (k, size, size).
        label: (n,) int64 index of the reference of each particle.
        pose: (n,) refined.
        rings: the disc that `refine` compared.

    Returns:
        (n, 3, 3) of (angle in degrees, shift x, shift y in pixels); infinite on the diagonal and
        zero elsewhere, where particle and reference do not correlate, or where the reference does
        not determine the pose, as a round one the angle.

    Raises:
        ValueError: boxes, dtypes, lengths or labels that do not fit; boxes that are not square.
    """
    _check(particles, references, label, pose)
    curvature = curvature_of(references, rings)
    return covariance_on(particles, references, curvature, label, pose, rings)


def curvature_of(references: Tensor, rings: Rings) -> Curvature:
    """The part of `pose_covariance` that depends on references (k, size, size) alone."""
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
    shell, twice = _components(size, references)
    leverage = shell_sums((spectrum.abs().square() * twice).sum(1), shell, shell_count(size))
    own = spectrum[:, 2:]
    products = (own.unsqueeze(2) * own.unsqueeze(1).conj()).real * twice  # (k, 3, 3, f)
    power = shell_sums(products.flatten(1, 2), shell, shell_count(size)).mT.contiguous()
    left = factor[:, 2:, 2:]
    slope = (by_x.square() + by_y.square()).sqrt() * weight  # (k, p)
    by_shift = slope.norm(dim=1)
    whole = torch.stack([(slope * radius).norm(dim=1), by_shift, by_shift], 1)
    unknown = (left.diagonal(dim1=1, dim2=2).abs() <= LEAST_INDEPENDENT * whole).any(1)
    inverse, failed = torch.linalg.inv_ex(left)
    root = torch.where((unknown | (failed != 0))[:, None, None], torch.inf, inverse)
    return Curvature(factor[:, 1, 1].abs(), root, power, leverage)


def covariance_on(
    particles: Tensor,
    references: Tensor,
    curvature: Curvature,
    label: Tensor,
    pose: Pose,
    rings: Rings,
) -> Tensor:
    """`pose_covariance` with `curvature_of` the references already computed."""
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
    """Amplitude (n,) of references (n, h, w) in images, and power (n, shells) of the residual.

    References are scaled to unit vectors under the weight after they are moved, because
    interpolation damps them.
    """
    height, width = images.shape[-2:]
    grid = pixel_grid((height, width), images)
    x, y = grid[0, :, 0] + pose.shift[:, :1], grid[:, 0, 1] + pose.shift[:, 1:]  # (n, w), (n, h)
    linear = pose.linear()
    # L (v + shift), column by column and row by row.
    along, down = linear[:, :, :1] * x.unsqueeze(1), linear[:, :, 1:] * y.unsqueeze(1)  # (n, 2, .)
    places = torch.stack([along[:, i, None] + down[:, i, :, None] for i in (0, 1)], -1)
    radius = (
        x.square().unsqueeze(1) + y.square().unsqueeze(2)
    ).sqrt()  # a rotation keeps distances
    weight = annulus(radius, rings).flatten(1)  # (n, p)
    y = sample(references, places).flatten(1)
    x = images.flatten(1)
    total = weight.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x, y = (each - (weight * each).sum(1, keepdim=True) / total for each in (x, y))
    y = y / (weight * y * y).sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    amplitude = (weight * x * y).sum(1)
    residual = weight * (x - amplitude.unsqueeze(1) * y)
    spectrum = torch.fft.rfft2(residual.unflatten(1, (height, width)), norm="ortho")
    shell, twice = _components(width, images)
    count = shell_count(width)
    square = (spectrum.real.square() + spectrum.imag.square()).flatten(1)
    power = shell_sums(square * twice, shell, count)
    # The power of noise of variance 1 in the weighted residual, before the fit removes a part.
    whole = shell_sums(twice, shell, count) * weight.square().mean(1, keepdim=True)
    return amplitude, power / torch.maximum(whole - leverage, LEAST_LEFT * whole)


def _to_particle(pose: Pose) -> Tensor:
    """(n, 3, 3) from (radians, x, y) on the reference to (degrees, x, y) of the pose."""
    # A rotation of a mirrored particle has the opposite sense; a pose shifts before it rotates.
    sign = torch.where(pose.mirror, -1.0, 1.0).to(pose.angle)
    matrix = pose.angle.new_zeros(len(pose), 3, 3)
    matrix[:, 0, 0] = sign * (180 / math.pi)
    matrix[:, 1:, 1:] = pose.linear().mT
    return matrix


def _components(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(f,) shell of each component of rfft2, and its `rfft_weights`."""
    shell = shell_index(size, like.device).flatten()
    return shell, rfft_weights(size, like).repeat(size)


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
