"""Features of particles that do not change if they are turned, and classes found by them.

The bispectrum of the steerable coefficients a_i (`steerable`), a_i a_j conj(a_k) over all triples
with m_i + m_j = m_k, is the same for a particle turned by any angle, and the conjugate for its
mirror image: real parts are even, imaginary parts odd (Zhao & Singer 2014). Shifts are taken out
before, by `steerable.centre`. Moduli enter by a power below 1, so that the few strong coefficients
do not drown the others, and principal components of even and odd parts keep what varies.
"""

from __future__ import annotations

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

POWER = 0.6  # of the coefficients' moduli
TRIPLES = 1500  # products kept, those of the largest expected modulus
FEATURES = 200  # principal components kept
NEIGHBOURS = 10  # of every particle in the graph
CHUNK = 1024  # rows of the similarity matrix at a time
SAMPLE = 10_000  # particles that seeds are looked for among, at most


@dataclass(frozen=True, eq=False)
class Invariants:
    """Rotation-invariant features of n particles.

    Attributes:
        values: (n, d) unit vectors.
        odd: (d,) bool: which change their sign if the particle is mirrored.
        shift: (n, 2) pixels, where the particles were centred.
    """

    values: Tensor
    odd: Tensor
    shift: Tensor

    def mirrored(self) -> Tensor:
        """(n, d) the features of the mirror images."""
        return torch.where(self.odd, -self.values, self.values)


class Seeds(NamedTuple):
    """Groups of particles that look alike, to start classes from.

    Attributes:
        label: (n,) int64 group of every particle; -1 where it was not looked at.
        member: (k,) int64 the particle most like the others of its group.
        shift: (n, 2) pixels, where particles were centred; 0 where not looked at.
    """

    label: Tensor
    member: Tensor
    shift: Tensor


def triples(frequency: Tensor, variance: Tensor, most: int) -> Tensor:
    """(t, 3) indices i, j, k of coefficients with m_i <= m_j and m_i + m_j = m_k, no pair twice.

    Args:
        frequency: (p,) int64.
        variance: (p,); of more triples than ``most`` those with the largest product are kept.
    """
    order = torch.arange(len(frequency))
    i, j = torch.meshgrid(order, order, indexing="ij")
    fits = (frequency[i] < frequency[j]) | ((frequency[i] == frequency[j]) & (i <= j))
    i, j = i[fits], j[fits]
    pair, k = (frequency[i] + frequency[j] == frequency[:, None]).T.nonzero().T
    found = torch.stack([i[pair], j[pair], k], 1)
    # With m_i = 0 the roles of j and k can be exchanged: the conjugate.
    found = found[(frequency[found[:, 0]] > 0) | (found[:, 1] <= found[:, 2])]
    if len(found) <= most:
        return found
    weight = variance.log()[found].sum(1)
    return found[weight.topk(most).indices.sort().values]


def bispectrum(coefficients: Tensor, index: Tensor) -> Tensor:
    """(n, t) products a_i a_j conj(a_k) of coefficients (n, p), moduli to the power `POWER`."""
    tiny = torch.finfo(coefficients.real.dtype).tiny
    a = coefficients * coefficients.abs().clamp(min=tiny) ** (POWER - 1)
    i, j, k = index.T
    return a[:, i] * a[:, j] * a[:, k].conj()


def invariants(
    observations: Observations, rings: FourierRings, shifts: Tensor, seed: int = 0
) -> Invariants:
    """Rotation-invariant features, on centred particles.

    Args:
        observations: the particles.
        rings: rings used, at most the observations': up to where single particles have signal.
        shifts: (s, 2) trial shifts of the centring, pixels.
        seed: of the randomised decomposition.

    Raises:
        ValueError: the particles differ by no more than noise.
    """
    own = centre(observations, rings, shifts)
    spectra, weight = spectra_about(observations, rings, own)
    model = fit_model(spectra, weight, rings)
    index = triples(model.frequency, model.variance.cpu(), TRIPLES)
    if not len(index):
        raise ValueError(
            f"{len(own)} particles differ by no more than noise on {rings.last} rings: there is "
            "nothing to tell classes by; give more particles"
        )
    products = bispectrum(coefficients(spectra, weight, model), index.to(own.device))
    values, odd = _principal(products, seed)
    norm = values.norm(dim=1, keepdim=True)
    return Invariants(values / torch.where(norm > 0, norm, 1.0), odd, own)


def _principal(products: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Scores (n, d) of even and odd parts on their principal components, and which are odd (d,)."""
    from sklearn.utils.extmath import randomized_svd  # here: it takes long to import

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
    """The particles most like each: cosines (n, count) and rows (n, count), best first.

    Args:
        features: of n > count particles.
        count: how many.
        mirror: whether mirrored particles are alike.
    """
    values, other = features.values, features.mirrored()
    cosines, rows = [], []
    for start in range(0, len(values), CHUNK):
        some = values[start : start + CHUNK]
        alike = some @ values.T
        if mirror:
            alike = torch.maximum(alike, some @ other.T)
        alike.diagonal(start).fill_(-torch.inf)
        best = alike.topk(count, 1)
        cosines.append(best.values)
        rows.append(best.indices)
    return torch.cat(cosines), torch.cat(rows)


def communities(cosines: Tensor, rows: Tensor, n_groups: int, seed: int = 0) -> Tensor:
    """(n,) groups of a neighbour graph by spectral clustering (Shi & Malik 2000).

    Args:
        cosines: (n, count) similarities of neighbours; those below 0 count as hardly any.
        rows: (n, count) int64 the neighbours.
        n_groups: how many groups.
        seed: of eigenvectors and k-means.
    """
    n, count = rows.shape
    weight = cosines.clamp(min=1e-6).cpu().double().numpy().ravel()
    # int32: all that scikit-learn takes.
    from sklearn.cluster import SpectralClustering  # here: it takes long to import

    source = np.repeat(np.arange(n, dtype=np.int32), count)
    target = rows.cpu().numpy().astype(np.int32).ravel()
    graph = csr_array((weight, (source, target)), shape=(n, n))
    method = SpectralClustering(n_groups, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Views that no edge joins are what is hoped for.
        warnings.filterwarnings("ignore", "Graph is not fully connected")
        found = method.fit_predict(graph.maximum(graph.T))
    return torch.from_numpy(found).long()


def seeds_from_invariants(
    observations: Observations,
    rings: FourierRings,
    shifts: Tensor,
    n_groups: int,
    *,
    mirror: bool = True,
    seed: int = 0,
) -> Seeds:
    """Groups of particles that look alike, found without aligning any.

    Of more than `SAMPLE` particles a random sample is looked at.

    Args:
        observations, rings, shifts: see `invariants`.
        n_groups: how many groups.
        mirror: whether mirrored particles are of one group.
        seed: of the random choices.

    Returns:
        The groups; each has at least one member.

    Raises:
        ValueError: not more particles than neighbours and groups; nothing to tell them by.
    """
    n = len(observations)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[:SAMPLE].sort().values
    if len(rows) <= max(NEIGHBOURS, n_groups):
        raise ValueError(
            f"{n} particles are too few for {n_groups} groups of a graph with {NEIGHBOURS} "
            "neighbours each: ask for fewer, or start from random particles"
        )
    here = rows.to(observations.polar.device)
    some = Observations(observations.polar[here], observations.weight[here], observations.rings)
    features = invariants(some, rings, shifts, seed)
    found = communities(*neighbours(features, NEIGHBOURS, mirror), n_groups, seed)
    label = torch.full((n,), -1).index_put((rows,), found)
    shift = torch.zeros(n, 2).index_put((rows,), features.shift.cpu())
    return Seeds(label, rows[_medoids(features, found, mirror)], shift)


def _medoids(features: Invariants, label: Tensor, mirror: bool) -> Tensor:
    """(k,) of every group the particle whose cosines with the others sum to most."""
    chosen = []
    for group in range(int(label.max()) + 1):
        members = (label == group).nonzero().squeeze(1)[:CHUNK]
        here = members.to(features.values.device)
        some = features.values[here]
        alike = some @ some.T
        if mirror:
            alike = torch.maximum(alike, some @ features.mirrored()[here].T)
        chosen.append(members[int(alike.sum(1).argmax())])
    return torch.stack(chosen)
