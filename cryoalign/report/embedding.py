"""Particles as rows of a feature table, for scikit-learn, t-SNE and the like.

Images are reduced to a few principal components, either of their pixels (PCA) or in two steps that
keep rows and columns apart (2SDR: multilinear PCA, then PCA of its core scores; Chung et al. 2020).
Both pass over the particles in batches: memory does not grow with the number of particles, but for
the features themselves (and, for 2SDR, its core scores).
"""

from __future__ import annotations

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
"""Particles held at a time."""
CACHE_BYTES = 2**30
"""Prepared images are kept between passes where they take no more than this."""


def features(
    images: Array | Stack,
    alignment: Alignment | None = None,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    mask_radius: float | None = None,
    n_components: int = 50,
    method: Literal["pca", "2sdr"] = "pca",
) -> np.ndarray:
    """Reduce particles, as they are or aligned, to a few numbers each.

    Every image gets mean 0 and deviation 1 inside a disc of ``mask_radius`` and is zero outside.

    Args:
        images: (n, h, w) tensor or other array (`interop.Array`), or a stack.
        alignment: of these particles, applied to them; None takes them as they are.
        rows: which particles (0-based); default all.
        mask_radius: px; default the largest disc in the image.
        n_components: at most 256; fewer come back where there are not as many particles or pixels.
        method: ``pca`` of the pixels, or ``2sdr`` with 25 rows and 25 columns.

    Returns:
        (len(rows), n_components) float32, most variable first. Particles that ``alignment`` set
        aside, or that hold NaN, infinity or one constant, are rows of NaN.

    Raises:
        ValueError: unknown method, n_components out of range, an alignment of other particles, or
            fewer than two usable ones.
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
        raise ValueError(f"features need two usable particles or more, not {usable.sum()}")
    prepared = _Prepared(stack, index[usable], pose, mask_radius)
    batches: Iterable[Tensor] = list(prepared) if prepared.nbytes <= CACHE_BYTES else prepared
    scores = pca(batches if method == "pca" else _cores(batches), n_components)
    table = np.full((len(index), scores.shape[1]), np.nan, dtype=np.float32)
    table[usable] = scores
    return table


@dataclass(frozen=True)
class _Prepared:
    """Particles read, normalised, aligned and masked, batch by batch, as often as asked."""

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
        # Even parts: a small last one would tell IncrementalPCA little.
        for part in np.array_split(self.index, -(-len(self.index) // BATCH)):
            rows = torch.as_tensor(part)
            batch = self.stack.read(rows).cpu()
            deviation, mean = torch.std_mean(batch[:, disc], dim=1)
            deviation = torch.where(deviation > 0, deviation, 1)  # all of the signal is outside
            batch = (batch - mean[:, None, None]) / deviation[:, None, None]
            if self.pose is not None:
                batch = transform(batch, self.pose[rows])
            yield batch * disc


def pca(batches: Iterable[Tensor], n_components: int) -> np.ndarray:
    """(n, n_components) principal component scores of (b, ...) batches that are iterated twice.

    Fewer components where the first batch has not as many images, or an image as many pixels.
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

    Alternates A = top p eigenvectors of sum X B B^T X^T and B = top q of sum X^T A A^T X until the
    explained variance gains less than ``tol`` of itself in a round, at most ``rounds`` times.

    Args:
        batches: (b, h, w) images, iterated over twice a round.

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
    """The top eigenvectors (h, count) of the sum of Y Y^T over (b, h, q) batches of Y, and the
    sum of their eigenvalues."""
    total = torch.zeros((), dtype=torch.float64)
    for factor in factors:
        rows = factor.transpose(0, 1).flatten(1)  # (h, b * q)
        total = total + (rows @ rows.mT).double()
    values, vectors = torch.linalg.eigh(total)
    return vectors[:, -count:].float(), float(values[-count:].sum())


def embed(table: np.ndarray, seed: int = 0, *, perplexity: float = 30.0) -> np.ndarray:
    """(n, 2) t-SNE map of (n, d) features, the same for the same seed. Rows of NaN stay NaN.

    A third of the particles is the most that ``perplexity`` may be; larger ones are lowered to it.
    """
    finite = np.isfinite(table).all(1)
    count = int(finite.sum())
    if count < 4:
        raise ValueError(f"an embedding needs four particles with features or more, not {count}")
    model = TSNE(perplexity=min(perplexity, (count - 1) / 3), init="pca", random_state=seed)
    place = np.full((len(table), 2), np.nan, dtype=np.float32)
    place[finite] = model.fit_transform(table[finite])
    return place


def neighbour_purity(table: np.ndarray, labels: Sequence[int] | np.ndarray, k: int = 10) -> float:
    """Mean share of a particle's ``k`` nearest neighbours that carry its own label.

    Works on features or on an embedding of them, (n, d); rows of NaN are left out. With fewer than
    ``k`` others, all others are the neighbours. One over the number of classes is chance, for
    classes of one size.
    """
    label = np.asarray(labels)
    if len(label) != len(table):
        raise ValueError(f"{len(table)} rows of features but {len(label)} labels")
    finite = np.isfinite(table).all(1)
    table, label = table[finite], label[finite]
    if len(table) < 2:
        raise ValueError(f"purity needs two particles with features or more, not {len(table)}")
    model = NearestNeighbors(n_neighbors=min(k, len(table) - 1)).fit(table)
    neighbours = model.kneighbors(return_distance=False)  # (n, k), the particle itself left out
    return float((label[neighbours] == label[:, None]).mean())
