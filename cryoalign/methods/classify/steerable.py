"""Steerable principal components: a model of particles that does not depend on their rotation.

If particles are rotated (and mirrored) at random, the covariance of their Fourier rings consists
of one real matrix over rings for every angular frequency m (Zhao, Shkolnisky & Singer 2016). Here
it is estimated with CTF and noise in the model (Bhamre, Zhang & Singer 2016). The features of a
particle are x = q y + noise of variance a q, where q are the ring means of CTF^2 / noise
(`whitening`) and a is the number of angles. Then

    C_m = (sum x x^H - a diag(sum q)) / sum q q^T.

The coefficients of a particle are the means of their posterior under this Gaussian model. The model
also gives the likelihood of a trial shift without any reference: `centre` finds, for every
particle, the shift at which it is most similar to the other particles at any rotation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryoalign.methods.classify.fourier_rings import FourierRings, ring_features
from cryoalign.methods.classify.whitening import Observations

CHUNK = 128  # particles with features at all trial shifts in memory at a time; limits the memory
ROUNDS = 2  # rounds of fitting the model to the centred particles and centring them again


class Components(NamedTuple):
    """The principal components of one angular frequency.

    Attributes:
        frequency: the angular frequency m.
        first: index, from 0, of the innermost ring that can have this frequency.
        variance: (p,) variance of the coefficients.
        vectors: (r - first, p) real features of the components, scaled so that the noise of a
            typical particle has variance 1 in each coefficient.
    """

    frequency: int
    first: int
    variance: Tensor
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class SteerableModel:
    """A Gaussian model of particles on rings, which rotations and mirroring do not change.

    Attributes:
        rings: rings of the features.
        mean: (r,) real features of the mean, which has only frequency 0.
        components: components of every frequency with a variance above that of noise.
    """

    rings: FourierRings
    mean: Tensor
    components: list[Components]

    @property
    def frequency(self) -> Tensor:
        """(p,) int64 angular frequency of every coefficient."""
        counts = torch.tensor([len(c.variance) for c in self.components], dtype=torch.int64)
        each = torch.tensor([c.frequency for c in self.components], dtype=torch.int64)
        return each.repeat_interleave(counts)

    @property
    def variance(self) -> Tensor:
        """(p,) variance of every coefficient."""
        return torch.cat([self.mean[:0], *(c.variance for c in self.components)])


def mean_only(spectra: Tensor, weight: Tensor, rings: FourierRings) -> SteerableModel:
    """`fit_model` without components: the mean over all particles and rotations."""
    return SteerableModel(rings, spectra[..., 0].real.sum(0) / weight.sum(0), [])


def fit_model(spectra: Tensor, weight: Tensor, rings: FourierRings) -> SteerableModel:
    """Mean and principal components of particles.

    Args:
        spectra: (n, r, m) complex features x, already multiplied by CTF / noise.
        weight: (n, r) ring means q of CTF^2 / noise.
        rings: rings of the features.

    Returns:
        The model. Its components are those with a variance above the largest one that noise alone
        has in a sample of n (the edge of Marchenko & Pastur 1967).
    """
    noise = rings.n_angles
    mean = mean_only(spectra, weight, rings).mean
    scale = (weight.mean(0) / noise).sqrt()  # (r,); features times scale have noise of variance 1
    components = []
    for m in range(rings.n_frequencies):
        first = rings.first_ring(m) - 1
        if first >= rings.last:
            break
        x, q, s = spectra[:, first:, m], weight[:, first:], scale[first:]
        if m == 0:
            x = (x.real - q * mean).to(x.dtype)
        moment = (x.mH @ x).real - noise * torch.diag(q.sum(0))
        covariance = s[:, None] * (moment / (q.mT @ q)) * s
        variance, vectors = torch.linalg.eigh(covariance.double())
        ratio = len(s) / (len(x) if m else len(x) / 2)  # frequency 0 is real: half the numbers
        beyond = variance > 2 * ratio**0.5 + ratio
        if beyond.any():
            variance, vectors = variance[beyond].flip(0), vectors[:, beyond].flip(1)
            components.append(Components(m, first, variance.to(s), vectors.to(s) / s[:, None]))
    return SteerableModel(rings, mean, components)


def coefficients(spectra: Tensor, weight: Tensor, model: SteerableModel) -> Tensor:
    """(n, p) complex posterior means of the coefficients of particles.

    A rotation by phi multiplies the coefficients of frequency m by exp(-i m phi). The coefficients
    of the mirrored particle are (-1)^m times the conjugates.

    Args:
        spectra: (n, r, m) features.
        weight: (n, r) ring means of CTF^2 / noise.
        model: the model.
    """
    found = [_posterior(spectra[:, None], weight, model, each)[1] for each in model.components]
    return torch.cat([spectra.new_zeros(len(spectra), 1, 0), *found], 2)[:, 0]


def log_likelihood(spectra: Tensor, weight: Tensor, model: SteerableModel) -> Tensor:
    """(n, s) log-likelihood of trial shifts, up to a constant for each particle.

    Args:
        spectra: (n, s, r, m) features of the particle moved by every shift.
        weight: (n, r) ring means of CTF^2 / noise.
        model: the model.
    """
    total = (spectra[..., 0].real @ model.mean) / model.rings.n_angles
    for each in model.components:
        linear, mean = _posterior(spectra, weight, model, each)
        # A frequency m above 0 counts for m and -m of the real image.
        share = 1.0 if each.frequency else 0.5
        total = total + share * (linear.real * mean.real + linear.imag * mean.imag).sum(-1)
    return total


def _posterior(
    spectra: Tensor, weight: Tensor, model: SteerableModel, part: Components
) -> tuple[Tensor, Tensor]:
    """For the coefficients of one frequency: linear terms of the log-likelihood (n, s, p) and
    posterior means (n, s, p), both complex."""
    noise = model.rings.n_angles
    q = weight[:, part.first :]
    x = spectra[:, :, part.first :, part.frequency]
    if part.frequency == 0:
        x = (x.real - (q * model.mean[part.first :])[:, None]).to(x.dtype)
    vectors = part.vectors
    linear = (x @ vectors.to(x.dtype)) / noise  # (n, s, p)
    precision = torch.einsum("rp,nr,rq->npq", vectors, q / noise, vectors)
    precision = precision + torch.diag(part.variance.reciprocal())
    sides = torch.cat([linear.real, linear.imag], 1).mT  # (n, p, 2 s)
    solved = torch.cholesky_solve(sides, torch.linalg.cholesky(precision)).mT
    return linear, torch.complex(*solved.chunk(2, 1))


def centre(observations: Observations, rings: FourierRings, shifts: Tensor) -> Tensor:
    """(n, 2) the most likely trial shift of every particle under a model of all particles.

    The first model is the mean over all particles and rotations. Then, `ROUNDS` times, a model
    with components is fitted to the particles as they are centred so far. The shift does not centre
    the particle's mass, but a point that is the same in all particles of a view.

    Args:
        observations: the particles.
        rings: the rings that are used, at most those of the observations.
        shifts: (s, 2) trial shifts, pixels.
    """
    own = shifts.new_zeros(len(observations), 2)
    for turn in range(ROUNDS + 1):
        spectra, weight = spectra_about(observations, rings, own)
        model = (fit_model if turn else mean_only)(spectra, weight, rings)
        found = []
        for rows in torch.arange(len(own), device=own.device).split(CHUNK):
            trial = ring_features(observations.polar[rows], shifts, rings)
            found.append(log_likelihood(trial, weight[rows], model).argmax(1))
        own = shifts[torch.cat(found)]
    return own


def spectra_about(
    observations: Observations, rings: FourierRings, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Features (n, r, m) of particles moved by their own shifts (n, 2), and weights (n, r)."""
    spectra = ring_features(observations.polar, own[:, None], rings)[:, 0]
    return spectra, observations.weight[:, : rings.last]
