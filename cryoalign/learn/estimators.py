"""Alignment and classification as scikit-learn estimators.

    from cryoalign.learn.estimators import MultiReferenceAligner

    aligner = MultiReferenceAligner(n_classes=10, random_state=0)
    Pipeline([("align", aligner), ("pca", PCA(20)), ("kmeans", KMeans(10))]).fit_predict(X)

X is a table (n, size * size), a row per particle, or images (n, size, size): an array that
`interop.as_tensor` takes, a nested list, or a stack of `io.read_particles`, which is read into
memory whole. Pixels must be finite; a constant image is set aside: its label is -1,
its aligned image zero. Settings are those of the functions (`align_multi_reference`, …), frozen
dataclasses, whole values to ``set_params`` and ``GridSearchCV``.

What is fitted are averages. New particles are searched against them (`transform`, `predict`,
`score`), with all pixels of X and no CTF. docs/interop.md says more, and which of scikit-learn's
checks images cannot pass.
"""

from __future__ import annotations

import math
from abc import ABCMeta, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cryoalign.images.geometry import radius_grid, transform
from cryoalign.images.masks import masked, soft_mask
from cryoalign.learn.dataset import ParticleDataset
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.base import Alternation
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.split_and_merge import Likelihood
from cryoalign.methods.mra import align_multi_reference
from cryoalign.methods.references import SEEDINGS
from cryoalign.methods.rfa import align_reference_free
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.particles.settings import Images
from cryoalign.particles.stack import Stack, TensorStack, as_stack
from cryoalign.pose import Found
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging
from cryoalign.runtime.arrays import Array, SupportsCuda, SupportsDLPack, as_tensor, to_numpy
from cryoalign.runtime.processes import choose_device
from cryoalign.search.match import prepare_target
from cryoalign.search.settings import Schedule, Search


class _Aligner(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, metaclass=ABCMeta):
    """Fits an `Alignment`, and moves particles onto its averages.

    Attributes:
        alignment_: the `Alignment` of the particles that were fitted.
        averages_: (k, size, size) float32 averages, filtered and masked, that others are searched
            against; zero where a class is empty.
        mask_: (size, size) bool, the pixels that `transform` keeps: `averaging.mask_radius`, or
            the last ring's disc.
        n_iter_: iterations run.
        n_features_in_: pixels of an image; feature_names_in_: of a data frame's columns.
    """

    images: Images | None
    averaging: Averaging | None
    random_state: int | np.random.RandomState | None
    device: str
    batch_size: int | None

    @abstractmethod
    def _align(self, images: Tensor, seed: int) -> Alignment:
        """The alignment of particles (n, size, size)."""

    @abstractmethod
    def _search(self, size: int) -> Search:
        """What poses of new particles are tried, in prepared images of ``size`` pixels."""

    def fit(self, X: Any, y: None = None) -> Self:
        """Align particles; ``y`` is ignored.

        Raises:
            ValueError: X is no table of square images, or not finite; what does not fit.
        """
        images = self._images(X, reset=True)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        found = self._align(images, int(seed))
        averaging, size = self.averaging or Averaging(), found.averages.shape[-1]
        radius = averaging.mask_radius or self._search(size).rings(size).last_ring
        mask = soft_mask(size, radius, averaging.mask_edge)
        self.alignment_ = found
        self.averages_ = to_numpy(masked(found.filtered_averages(), mask))
        self.mask_ = to_numpy(radius_grid(size) <= radius)
        self.n_iter_ = len(found.history)
        self._n_features_out = int(self.mask_.sum())
        return self

    def transform(self, X: Any) -> np.ndarray:
        """(n, pixels of `mask_`) float32: particles normalised, each moved onto the average that
        it fits best, and masked."""
        particles, found, n = self._find(X)
        out = np.zeros((n, self._n_features_out), np.float32)
        mask = torch.from_numpy(self.mask_).to(particles.device)
        for members, images in particles.batches():
            moved = transform(images, found.pose[members].to(particles.device))
            out[particles.rows[members]] = to_numpy(moved[:, mask])
        return out

    def score(self, X: Any, y: None = None) -> float:
        """Mean correlation coefficient of particles with the averages that they fit best, in
        [-1, 1]; higher is better. On particles that were fitted it is optimistic, more so with
        more classes; ``y`` is ignored."""
        return float(self._find(X)[1].score.mean())

    def _images(self, X: Any, reset: bool) -> Tensor:
        """(n, size, size) of a checked X, on whatever device it is."""
        if isinstance(X, Stack):
            X = X.read(torch.arange(len(X)))
        elif isinstance(X, list | tuple) and len(X) and np.ndim(X[0]) == 2:
            X = np.asarray(X)
        elif isinstance(X, str | Path | ParticleDataset):
            as_stack(X)  # type: ignore[arg-type]  # raises, and says what to give
        if not isinstance(X, np.ndarray) and isinstance(X, Tensor | SupportsDLPack | SupportsCuda):
            X = as_tensor(X).detach()
            X = X if X.is_cuda else X.numpy()
        shape: tuple[int, ...] = getattr(X, "shape", ())
        if len(shape) == 3:
            if shape[1] != shape[2]:
                raise ValueError(f"images of {shape[1]} x {shape[2]} px: give square ones")
            X = X.reshape(shape[0], -1)
        if isinstance(X, Tensor):  # which scikit-learn's array checks cannot look at on a GPU
            validate_data(self, X, reset=reset, skip_check_array=True)
            if not X.isfinite().all():
                raise ValueError("X holds NaN or infinity: leave those particles out")
        else:
            least = 2 if reset else 1
            X = validate_data(self, X, dtype="numeric", ensure_min_samples=least, reset=reset)
        return as_tensor(self._squares(X))

    def _squares(self, X: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Rows as images."""
        n, pixels = X.shape
        size = math.isqrt(pixels)
        if size * size != pixels or size < 2:
            raise ValueError(
                f"X has n_features = {pixels}, no square image: give images (n, size, size), or "
                "their pixels (n, size * size)"
            )
        return X.reshape(n, size, size)

    def _find(self, X: Any) -> tuple[PreparedParticles, Found, int]:
        """The usable ones of n particles, and where each fits best."""
        check_is_fitted(self)
        stack = TensorStack(self._images(X, reset=False))
        particles = PreparedParticles(
            stack, self.images or Images(), choose_device(self.device), 1.0, self.batch_size
        )
        search = self._search(particles.size)
        references = torch.from_numpy(self.averages_).to(particles.device)
        turns = Alternation(particles, Averaging(), search.rings(particles.size), None)
        return particles, turns.search(prepare_target(references, search)), len(stack)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class _Classes(ClusterMixin, _Aligner):
    """An aligner with several classes.

    Attributes:
        labels_: (n,) int64 class of the particles that were fitted, from 0; -1 = set aside
            (``alignment_.class_number`` is one more). They are those of the method; `predict` of
            the same particles searches the averages made of them, and may differ for a few.
    """

    def fit(self, X: Any, y: None = None) -> Self:
        """Align and classify particles; ``y`` is ignored.

        Raises:
            ValueError: X is no table of square images, or not finite; what does not fit.
        """
        super().fit(X)
        self.labels_ = to_numpy(self.alignment_.class_number) - 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n,) int64 the class, from 0, whose average each particle fits best; -1 = unusable."""
        particles, found, n = self._find(X)
        labels = np.full(n, -1)
        labels[particles.rows] = found.label
        return labels

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]  # which ClusterMixin empties
        return tags


class MultiReferenceAligner(_Classes):
    """`align_multi_reference` as an estimator; parameters are its own, n_classes to device.

    n_classes None is as many as references are given, or 8 where they are chosen by a word."""

    def __init__(
        self,
        n_classes: int | None = None,
        *,
        references: Array | str | Path = "random",
        iterations: int = 20,
        assign: Assignment | None = None,
        search: Search | None = None,
        images: Images | None = None,
        averaging: Averaging | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.n_classes = n_classes
        self.references = references
        self.iterations = iterations
        self.assign = assign
        self.search = search
        self.images = images
        self.averaging = averaging
        self.random_state = random_state
        self.device = device
        self.batch_size = batch_size

    def _align(self, images: Tensor, seed: int) -> Alignment:
        chosen = isinstance(self.references, str) and self.references in SEEDINGS
        n_classes = 8 if self.n_classes is None and chosen else self.n_classes
        return align_multi_reference(
            images, self.references, n_classes=n_classes, iterations=self.iterations,
            assign=self.assign, search=self.search, images=self.images, averaging=self.averaging,
            seed=seed, device=self.device, batch_size=self.batch_size,
        )  # fmt: skip

    def _search(self, size: int) -> Search:
        return self.search or Search()


class LikelihoodClassifier(_Classes):
    """`classify` as an estimator; parameters are its own, n_classes to device. No CTF: phase-flip
    particles that have one (`ctf.phase_flip`), or use `classify`."""

    def __init__(
        self,
        n_classes: int = 8,
        *,
        likelihood: Likelihood | None = None,
        images: Images | None = None,
        averaging: Averaging | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.n_classes = n_classes
        self.likelihood = likelihood
        self.images = images
        self.averaging = averaging
        self.random_state = random_state
        self.device = device
        self.batch_size = batch_size

    def _align(self, images: Tensor, seed: int) -> Alignment:
        return classify(
            images, self.n_classes, likelihood=self.likelihood, images=self.images,
            averaging=self.averaging, seed=seed, device=self.device, batch_size=self.batch_size,
        )  # fmt: skip

    def _search(self, size: int) -> Search:
        model = self.likelihood or Likelihood()
        room = (size - 1) // 2 - math.ceil(model.max_shift)
        last = min(round(model.mask_radius or 0.4 * size), room)
        return Search(max_shift=model.max_shift, last_ring=last, mirror=model.mirror)


class ReferenceFreeAligner(_Aligner):
    """`align_reference_free` as a transformer; parameters are its own, references to device. There
    is one average, and so no ``predict``."""

    def __init__(
        self,
        *,
        references: Array | Literal["average"] | Path = "average",
        schedule: Schedule | None = None,
        iterations: int = 20,
        search: Search | None = None,
        images: Images | None = None,
        averaging: Averaging | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.references = references
        self.schedule = schedule
        self.iterations = iterations
        self.search = search
        self.images = images
        self.averaging = averaging
        self.random_state = random_state
        self.device = device
        self.batch_size = batch_size

    def _align(self, images: Tensor, seed: int) -> Alignment:
        return align_reference_free(
            images, self.references, schedule=self.schedule, iterations=self.iterations,
            search=self.search, images=self.images, averaging=self.averaging, seed=seed,
            device=self.device, batch_size=self.batch_size,
        )  # fmt: skip

    def _search(self, size: int) -> Search:
        reach = max((self.schedule or Schedule()).max_shift)
        return replace(self.search or Search(), max_shift=reach)
