"""Rotation-invariant features of particles, and groups of particles with similar features.

The bispectrum of the steerable coefficients a_i (`steerable`) is a_i a_j conj(a_k) for all triples
with m_i + m_j = m_k. A rotation of the particle does not change it, and mirroring gives its complex
conjugate: real parts are even, imaginary parts odd (Zhao & Singer 2014). Particles are centred
first, by `steerable.centre`. The moduli of the coefficients are raised to a power below 1, so that
a few large ones do not dominate. The features are principal components of the even and odd parts.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from cryoalign.methods.classify.fourier_rings import FourierRings
from cryoalign.methods.classify.steerable import centre, coefficients, fit_model, spectra_about
from cryoalign.methods.classify.whitening import Observations

POWER = 0.6  # exponent of the coefficients' moduli
TRIPLES = 1500  # largest number of products, those with the largest expected modulus
FEATURES = 200  # largest number of principal components
NEIGHBOURS = 10  # neighbours of every particle in the graph
CHUNK = 1024  # rows of the similarity matrix that are computed at a time; limits the memory
SAMPLE = 10_000  # largest number of particles that are grouped; the time grows with its square


@dataclass(frozen=True, eq=False)
class Invariants:
    """Rotation-invariant features of n particles.

    Attributes:
        values: (n, d) unit vectors.
        odd: (d,) bool, features that change their sign when the particle is mirrored.
        shift: (n, 2) shifts that centre the particles, pixels.
    """

    values: Tensor
    odd: Tensor
    shift: Tensor

    def mirrored(self) -> Tensor:
        """(n, d) features of the mirror images."""
        return torch.where(self.odd, -self.values, self.values)


class Seeds(NamedTuple):
    """Groups of similar particles, from which classes can start.

    Attributes:
        label: (n,) int64 group of every particle; -1 if it was not in the sample.
        member: (k,) int64 the particle of each group that is most similar to the others.
        shift: (n, 2) shifts that centre the particles, pixels; 0 outside the sample.
    """

    label: Tensor
    member: Tensor
    shift: Tensor


def triples(frequency: Tensor, variance: Tensor, most: int) -> Tensor:
    """(t, 3) indices i, j, k of coefficients with m_i <= m_j and m_i + m_j = m_k, without repeats.

    Args:
        frequency: (p,) int64 angular frequencies m of the coefficients.
        variance: (p,) variances of the coefficients.
        most: largest number of triples; those with the largest product of variances are kept.
    """
    order = torch.arange(len(frequency))
    i, j = torch.meshgrid(order, order, indexing="ij")
    fits = (frequency[i] < frequency[j]) | ((frequency[i] == frequency[j]) & (i <= j))
    i, j = i[fits], j[fits]
    pair, k = (frequency[i] + frequency[j] == frequency[:, None]).T.nonzero().T
    found = torch.stack([i[pair], j[pair], k], 1)
    # With m_i = 0, exchanging j and k gives the conjugate.
    found = found[(frequency[found[:, 0]] > 0) | (found[:, 1] <= found[:, 2])]
    if len(found) <= most:
        return found
    weight = variance.log()[found].sum(1)
    return found[weight.topk(most).indices.sort().values]


def bispectrum(coefficients: Tensor, index: Tensor) -> Tensor:
    """(n, t) products a_i a_j conj(a_k) of coefficients (n, p), whose moduli are raised to `POWER`,
    for the triples ``index`` (t, 3)."""
    tiny = torch.finfo(coefficients.real.dtype).tiny
    a = coefficients * coefficients.abs().clamp(min=tiny) ** (POWER - 1)
    i, j, k = index.T
    return a[:, i] * a[:, j] * a[:, k].conj()


def invariants(
    observations: Observations, rings: FourierRings, shifts: Tensor, seed: int = 0
) -> Invariants:
    """Rotation-invariant features of particles, which are centred first.

    Args:
        observations: the particles.
        rings: rings that are used, at most those of the observations; the last one should be where
            the signal of single particles ends.
        shifts: (s, 2) trial shifts of the centring, pixels.
        seed: seed of the randomised decomposition.

    Raises:
        ValueError: the particles differ only by noise.
    """
    own = centre(observations, rings, shifts)
    spectra, weight = spectra_about(observations, rings, own)
    model = fit_model(spectra, weight, rings)
    index = triples(model.frequency, model.variance.cpu(), TRIPLES)
    if not len(index):
        raise ValueError(
            f"{len(own)} particles differ by no more than noise on {rings.last} rings, so that "
            "they cannot be grouped: give more particles, or use likelihood.start=singles"
        )
    products = bispectrum(coefficients(spectra, weight, model), index.to(own.device))
    values, odd = _principal(products, seed)
    norm = values.norm(dim=1, keepdim=True)
    return Invariants(values / torch.where(norm > 0, norm, 1.0), odd, own)


def _principal(products: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Scores (n, d) of products (n, t) on the principal components of their even and odd parts,
    and (d,) bool, whether each component is odd."""
    from sklearn.utils.extmath import randomized_svd  # imported here because this is slow

    scores, powers, odd = [], [], []
    for part, values in enumerate((products.real - products.real.mean(0), products.imag)):
        count = min(FEATURES, *values.shape)
        u, s, _ = randomized_svd(values.cpu().numpy(), count, n_iter=2, random_state=seed)
        scores.append(torch.from_numpy(u * s))
        powers.append(torch.from_numpy(s))
        odd.append(torch.full((count,), bool(part)))
    keep = torch.cat(powers).topk(min(FEATURES, sum(map(len, powers)))).indices
    return torch.cat(scores, 1)[:, keep].to(products.real), torch.cat(odd)[keep].to(products.device)


def neighbours(features: Invariants, count: int, mirror: bool) -> tuple[Tensor, Tensor]:
    """The most similar particles of each particle: cosines (n, count) and indices (n, count), best
    first.

    Args:
        features: features of n particles, n > count.
        count: number of neighbours.
        mirror: whether a particle is also compared with the mirror images of the others.
    """
    values, other = features.values, features.mirrored() if mirror else None
    cosines, rows = [], []
    for start in range(0, len(values), CHUNK):
        similarity = _similarity(values[start : start + CHUNK], values, other)
        similarity.diagonal(start).fill_(-torch.inf)
        best = similarity.topk(count, 1)
        cosines.append(best.values)
        rows.append(best.indices)
    return torch.cat(cosines), torch.cat(rows)


def _similarity(some: Tensor, values: Tensor, mirrored: Tensor | None) -> Tensor:
    """(b, n) cosines of features (b, d) with others (n, d), or with their mirror images (n, d) if
    those are given and larger."""
    cosines = some @ values.T
    return cosines if mirrored is None else torch.maximum(cosines, some @ mirrored.T)


def communities(cosines: Tensor, rows: Tensor, n_groups: int, seed: int = 0) -> Tensor:
    """(n,) groups of a neighbour graph, found by spectral clustering (Shi & Malik 2000).

    Args:
        cosines: (n, count) similarities of neighbours; negative ones count as 1e-6.
        rows: (n, count) int64 indices of the neighbours.
        n_groups: number of groups.
        seed: seed of eigenvectors and k-means.
    """
    n, count = rows.shape
    weight = cosines.clamp(min=1e-6).cpu().double().numpy().ravel()
    from sklearn.cluster import SpectralClustering  # imported here because this is slow

    # scikit-learn accepts only int32.
    source = np.repeat(np.arange(n, dtype=np.int32), count)
    target = rows.cpu().numpy().astype(np.int32).ravel()
    graph = csr_array((weight, (source, target)), shape=(n, n))
    method = SpectralClustering(n_groups, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Groups of different views need not be connected.
        warnings.filterwarnings("ignore", "Graph is not fully connected")
        found = method.fit_predict(graph.maximum(graph.T))
    return torch.from_numpy(found).long()


def seeds_from_invariants(
    observations: Observations, rings: FourierRings, shifts: Tensor, n_groups: int, *,
    mirror: bool = True, seed: int = 0,
) -> Seeds:  # fmt: skip
    """Groups of similar particles, found without aligning them.

    At most `SAMPLE` particles, chosen at random, are grouped.

    Args:
        observations, rings, shifts: as for `invariants`.
        n_groups: number of groups.
        mirror: whether a particle and its mirror image belong to the same group.
        seed: seed of the random choices.

    Returns:
        The groups; each has at least one member.

    Raises:
        ValueError: particles that are not more than neighbours or groups, or differ only by noise.
    """
    n = len(observations)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[:SAMPLE].sort().values
    if len(rows) <= max(NEIGHBOURS, n_groups):
        raise ValueError(
            f"{n} particles are too few for {n_groups} groups of a graph with {NEIGHBOURS} "
            "neighbours each: use a smaller n_classes, or likelihood.start=singles"
        )
    here = rows.to(observations.polar.device)
    some = Observations(observations.polar[here], observations.weight[here], observations.rings)
    features = invariants(some, rings, shifts, seed)
    found = communities(*neighbours(features, NEIGHBOURS, mirror), n_groups, seed)
    label = torch.full((n,), -1).index_put((rows,), found)
    shift = torch.zeros(n, 2).index_put((rows,), features.shift.cpu())
    return Seeds(label, rows[_medoids(features, found, mirror)], shift)


def _medoids(features: Invariants, label: Tensor, mirror: bool) -> Tensor:
    """(k,) the particle of every group that has the largest sum of cosines with the others."""
    chosen = []
    for group in range(int(label.max()) + 1):
        members = (label == group).nonzero().squeeze(1)[:CHUNK]
        here = members.to(features.values.device)
        some, other = features.values[here], features.mirrored()[here] if mirror else None
        chosen.append(members[int(_similarity(some, some, other).sum(1).argmax())])
    return torch.stack(chosen)
