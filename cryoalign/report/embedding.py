"""Features of particles for scikit-learn, t-SNE and similar programs.

Each image is reduced to a few principal components: of its pixels (PCA), or in two steps that keep
rows and columns apart (2SDR: multilinear PCA, then PCA of its core scores; Chung et al. 2020). Both
read the particles in batches, so only the features (and the core scores of 2SDR) need memory in
proportion to the number of particles.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.decomposition import IncrementalPCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from cryoalign.images.geometry import pixel_grid, transform
from cryoalign.particles.screen import screen
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.pose import Pose
from cryoalign.results.alignment import Alignment
from cryoalign.runtime.arrays import Array

BATCH = 512
"""Number of particles in memory at a time; PCA by batches needs many at once to be exact."""
CACHE_BYTES = 2**30
"""Prepared images stay in memory between passes if they take at most this many bytes."""


def features(
    images: Array | Stack,
    alignment: Alignment | None = None,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    mask_radius: float | None = None,
    n_components: int = 50,
    method: Literal["pca", "2sdr"] = "pca",
) -> np.ndarray:
    """Reduce each particle to a few numbers, with or without alignment.

    Each image gets mean 0 and standard deviation 1 inside a disc, and is zero outside of it.

    Args:
        images: (n, h, w) tensor or other array (`cryoalign.runtime.arrays.Array`), or a stack.
        alignment: alignment of these particles, which is applied to them; None applies none.
        rows: 0-based numbers of the particles to use; None uses all.
        mask_radius: radius of the disc in px; None takes the largest disc in the image.
        n_components: number of features, at most 256. There are fewer if there are fewer particles
            or pixels.
        method: ``pca`` of the pixels, or ``2sdr`` with 25 rows and 25 columns.

    Returns:
        (len(rows), n_components) float32 features by decreasing variance. Rows are NaN for
        particles that ``alignment`` has set aside, and for those with NaN, infinity or a constant.

    Raises:
        ValueError: unknown method, n_components out of range, an alignment of other particles, or
            fewer than two usable particles.
    """
    if method not in ("pca", "2sdr"):
        raise ValueError(f"unknown method {method!r}; use 'pca' or '2sdr'")
    if not 1 <= n_components <= BATCH // 2:
        raise ValueError(f"n_components must be from 1 to {BATCH // 2}, not {n_components}")
    stack = as_stack(images)
    index = np.arange(len(stack)) if rows is None else np.asarray(rows, dtype=np.int64)
    if alignment is not None and len(alignment.pose) != len(stack):
        raise ValueError(
            f"the alignment has {len(alignment.pose)} particles but the stack {len(stack)}: "
            f"pass the stack that was aligned"
        )
    aligned = np.full(len(index), True)
    if alignment is not None:
        aligned = alignment.class_number.numpy()[index] > 0
    pose = None if alignment is None else alignment.pose
    bad = screen(stack, rows=torch.as_tensor(index[aligned]))["index"].to_numpy()
    usable = aligned & ~np.isin(index, bad)
    if usable.sum() < 2:
        raise ValueError(f"features need at least two usable particles, not {usable.sum()}")
    prepared = _Prepared(stack, index[usable], pose, mask_radius)
    batches: Iterable[Tensor] = list(prepared) if prepared.nbytes <= CACHE_BYTES else prepared
    scores = pca(batches if method == "pca" else _cores(batches), n_components)
    table = np.full((len(index), scores.shape[1]), np.nan, dtype=np.float32)
    table[usable] = scores
    return table


@dataclass(frozen=True)
class _Prepared:
    """Batches of particles that are read, normalised, aligned and masked; can be repeated."""

    stack: Stack
    index: np.ndarray
    pose: Pose | None
    mask_radius: float | None

    @property
    def nbytes(self) -> int:
        return 4 * len(self.index) * self.stack.shape[0] * self.stack.shape[1]

    def _disc(self) -> Tensor:
        distance = pixel_grid(self.stack.shape, torch.empty(0)).norm(dim=-1)
        radius = self.mask_radius or min(self.stack.shape) // 2 - 1
        return distance <= radius  # (h, w)

    def __iter__(self) -> Iterator[Tensor]:
        disc = self._disc()
        # Parts of equal size, because IncrementalPCA is inexact for a small last batch.
        for part in np.array_split(self.index, -(-len(self.index) // BATCH)):
            rows = torch.as_tensor(part)
            batch = self.stack.read(rows).cpu()
            deviation, mean = torch.std_mean(batch[:, disc], dim=1)
            deviation = torch.where(deviation > 0, deviation, 1)  # zero inside the disc
            batch = (batch - mean[:, None, None]) / deviation[:, None, None]
            if self.pose is not None:
                batch = transform(batch, self.pose[rows])
            yield batch * disc


def pca(batches: Iterable[Tensor], n_components: int) -> np.ndarray:
    """Scores (n, n_components) float32 of (b, ...) batches, which are read twice, by PCA.

    There are fewer components if the first batch has fewer images, or an image has fewer pixels.
    """
    model: IncrementalPCA | None = None
    for batch in batches:
        if model is None:
            count = min(n_components, len(batch), batch[0].numel())
            model = IncrementalPCA(n_components=count)
        model.partial_fit(batch.flatten(1).numpy())
    if model is None:
        raise ValueError("pca needs at least one batch of images")
    scores = [model.transform(batch.flatten(1).numpy()) for batch in batches]
    return np.concatenate(scores).astype(np.float32)


def _cores(batches: Iterable[Tensor]) -> list[Tensor]:
    left, right, mean = mpca(batches)
    return [left.mT @ (batch - mean) @ right for batch in batches]  # (b, p, q) each


def mpca(
    batches: Iterable[Tensor], p: int = 25, q: int = 25, *, rounds: int = 30, tol: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    """Multilinear PCA: the bases A and B that keep most of the variance of A^T (X - mean) B.

    Alternates A = top p eigenvectors of sum X B B^T X^T and B = top q of sum X^T A A^T X.

    Args:
        batches: (b, h, w) images, which are read twice in each round.
        p: number of columns of A.
        q: number of columns of B.
        rounds: largest number of rounds.
        tol: stop when a round raises the explained variance by less than this share of it.

    Returns:
        A (h, p), B (w, q) with orthonormal columns, and the mean image (h, w), float32.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total, count = total + batch.sum(0, dtype=torch.float64), count + len(batch)
    mean = (total / count).float()
    right = torch.eye(mean.shape[1])
    explained = 0.0
    for _ in range(rounds):
        left, _ = _top_eigenvectors(((x - mean) @ right for x in batches), p)
        right, gained = _top_eigenvectors(((x - mean).mT @ left for x in batches), q)
        if gained - explained <= tol * gained:
            break
        explained = gained
    return left, right, mean


def _top_eigenvectors(factors: Iterable[Tensor], count: int) -> tuple[Tensor, float]:
    """Top eigenvectors (h, count) of the sum of Y Y^T over batches Y (b, h, q), and the sum of
    their eigenvalues."""
    total = torch.zeros((), dtype=torch.float64)
    for factor in factors:
        rows = factor.transpose(0, 1).flatten(1)  # (h, b * q)
        total = total + (rows @ rows.mT).double()
    values, vectors = torch.linalg.eigh(total)
    return vectors[:, -count:].float(), float(values[-count:].sum())


def embed(table: np.ndarray, seed: int = 0, *, perplexity: float = 30.0) -> np.ndarray:
    """Map features to the plane by t-SNE.

    Args:
        table: (n, d) features.
        seed: seed of t-SNE; the same seed gives the same map.
        perplexity: about the number of neighbours that t-SNE keeps close; at most a third of the
            particles is used.

    Returns:
        (n, 2) float32; rows of NaN stay NaN.
    """
    finite = np.isfinite(table).all(1)
    count = int(finite.sum())
    if count < 4:
        raise ValueError(f"an embedding needs at least four particles with features, not {count}")
    model = TSNE(perplexity=min(perplexity, (count - 1) / 3), init="pca", random_state=seed)
    place = np.full((len(table), 2), np.nan, dtype=np.float32)
    place[finite] = model.fit_transform(table[finite])
    return place


def neighbour_purity(table: np.ndarray, labels: Sequence[int] | np.ndarray, k: int = 10) -> float:
    """Mean share of a particle's nearest neighbours that have its own label.

    For classes of equal size, chance gives one over the number of classes.

    Args:
        table: (n, d) features or an embedding of them; rows of NaN are left out.
        labels: (n,) class of each particle.
        k: number of neighbours; all others if there are fewer.
    """
    label = np.asarray(labels)
    if len(label) != len(table):
        raise ValueError(f"{len(table)} rows of features but {len(label)} labels")
    finite = np.isfinite(table).all(1)
    table, label = table[finite], label[finite]
    if len(table) < 2:
        raise ValueError(f"purity needs at least two particles with features, not {len(table)}")
    model = NearestNeighbors(n_neighbors=min(k, len(table) - 1)).fit(table)
    neighbours = model.kneighbors(return_distance=False)  # (n, k), without the particle itself
    return float((label[neighbours] == label[:, None]).mean())
