"""Alignment and classification as scikit-learn estimators.

    from cryoalign.learn.estimators import MultiReferenceAligner

    aligner = MultiReferenceAligner(n_classes=10, random_state=0)
    Pipeline([("align", aligner), ("pca", PCA(20)), ("kmeans", KMeans(10))]).fit_predict(X)

``X`` holds one particle per row, as a table (n, size * size) or as images (n, size, size). It can
be an array that `cryoalign.runtime.arrays.as_tensor` accepts, a nested list, or a stack of
`cryoalign.io.read_particles`, which is read into memory completely. Pixels must be finite. A
constant image is set aside: its label is -1 and its aligned image is zero. The parameters are those
of the functions (`align_multi_reference` and others). Groups of settings such as `Search` are
frozen dataclasses: ``set_params`` and ``GridSearchCV`` replace each of them as a whole.

Fitting computes class averages. New particles are compared with these averages (`transform`,
`predict`, `score`), with all pixels of X, and its CTFs if it is a stack. docs/interop.md explains
more, and lists the checks of scikit-learn that cannot pass with images.
"""

import math
from abc import ABCMeta, abstractmethod
from dataclasses import KW_ONLY, asdict, dataclass
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
from cryoalign.methods.base import Method, align
from cryoalign.methods.classify.classify import Classification
from cryoalign.methods.classify.settings import Likelihood
from cryoalign.methods.mra import MultiReference
from cryoalign.methods.references import SEEDINGS, AlignAndAverage
from cryoalign.methods.rfa import ReferenceFree
from cryoalign.particles.prepare import PreparedParticles, prepare
from cryoalign.particles.settings import Box, Images, Particle
from cryoalign.particles.stack import Stack, TensorStack, as_stack, optics_of
from cryoalign.pose import Found
from cryoalign.results.averages import Averaging
from cryoalign.runtime.arrays import Array, SupportsCuda, SupportsDLPack, as_tensor, to_numpy
from cryoalign.search.match import prepare_target
from cryoalign.search.settings import Schedule, Search, SearchSettings

# scikit-learn reads the parameters of an estimator from the signature of its constructor, which the
# decorator writes. Two estimators are equal only if they are the same object.
_estimator = dataclass(eq=False, repr=False)


@_estimator
class _Aligner(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, metaclass=ABCMeta):
    """Fits an `Alignment`, and moves particles onto its averages.

    Attributes:
        images: how particles are prepared; None stands for ``Images()``.
        particle: what is known of the particle; None stands for ``Particle()``.
        averaging: how averages are made; None stands for ``Averaging()``.
        random_state: seed of every random choice; the same seed gives the same result on the same
            device.
        device: ``auto``, ``cpu`` or ``cuda``.
        batch_size: number of particles processed at a time; None chooses it.
        alignment_: the `Alignment` of the particles that were fitted.
        averages_: (k, size, size) float32 averages, filtered and masked, with which new particles
            are compared; zero for an empty class.
        mask_: (size, size) bool, the pixels that `transform` returns: the disc that is compared.
        n_iter_: number of iterations.
        n_features_in_: pixels of an image.
        feature_names_in_: names of the columns, if X is a data frame.
    """

    _: KW_ONLY
    images: Images | None = None
    particle: Particle | None = None
    averaging: Averaging | None = None
    random_state: int | np.random.RandomState | None = None
    device: str = "auto"
    batch_size: int | None = None

    @abstractmethod
    def _method(self, **shared: Any) -> Method:
        """The method, with the settings that all estimators have and its own."""

    def _made(self, seed: int = 0) -> Method:
        return self._method(
            particle=self.particle or Particle(), averaging=self.averaging or Averaging(), seed=seed
        )

    def _prepared(self, X: Any, images: Tensor, max_rejected: float) -> PreparedParticles:
        """The images of X, with the CTFs of X if it is a stack that has them."""
        optics = optics_of(X) if isinstance(X, Stack) else None
        return prepare(
            TensorStack(images, _pixel_size(X)), self.images, optics=optics, device=self.device,
            batch_size=self.batch_size, max_rejected=max_rejected,
        )  # fmt: skip

    def fit(self, X: Any, y: None = None) -> Self:
        """Align the particles X; ``y`` is ignored.

        Raises:
            ValueError: X does not hold square images or is not finite, or the parameters do not
                fit each other.
        """
        images, pixel_size = self._images(X, reset=True), _pixel_size(X)
        method = self._made(int(check_random_state(self.random_state).randint(2**31 - 1)))
        method.check((self.images or Images()).box_of(images.shape[-1], pixel_size))
        found = align(method, self._prepared(X, images, max_rejected=0.1))
        averaging, size = self.averaging or Averaging(), found.averages.shape[-1]
        radius = self._search(size, found.pixel_size).rings(size).last_ring
        mask = soft_mask(size, radius, averaging.mask_edge)
        self.alignment_ = found
        self.averages_ = to_numpy(masked(found.filtered_averages(), mask))
        self.mask_ = to_numpy(radius_grid(size) <= radius)
        self.n_iter_ = len(found.history)
        self._n_features_out = int(self.mask_.sum())
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Normalise particles, and move each onto the average that it fits best.

        Returns:
            (n, pixels of `mask_`) float32.
        """
        particles, found, n = self._find(X)
        out = np.zeros((n, self._n_features_out), np.float32)
        mask = torch.from_numpy(self.mask_).to(particles.device)
        for members in particles.parts():
            pose = found.pose[members].to(particles.device)
            moved = transform(particles.read(members), pose)
            out[particles.rows[members]] = to_numpy(moved[:, mask])
        return out

    def score(self, X: Any, y: None = None) -> float:
        """Mean correlation coefficient (-1 to 1) of particles with the averages they fit best.

        For the particles that were fitted it is too optimistic, more so with more classes. ``y`` is
        ignored.
        """
        return float(self._find(X)[1].score.mean())

    def _images(self, X: Any, reset: bool) -> Tensor:
        """X as checked images (n, size, size) on the device of X."""
        if isinstance(X, Stack):
            X = X.read(torch.arange(len(X)))
        elif isinstance(X, list | tuple) and len(X) and np.ndim(X[0]) == 2:
            X = np.asarray(X)
        elif isinstance(X, str | Path | ParticleDataset):
            as_stack(X)  # type: ignore[arg-type]  # raises the error
        if not isinstance(X, np.ndarray) and isinstance(X, Tensor | SupportsDLPack | SupportsCuda):
            X = as_tensor(X).detach()
            X = X if X.is_cuda else X.numpy()
        shape: tuple[int, ...] = getattr(X, "shape", ())
        if len(shape) == 3:
            if shape[1] != shape[2]:
                raise ValueError(f"images of {shape[1]} x {shape[2]} px: give square images")
            X = X.reshape(shape[0], -1)
        if isinstance(X, Tensor):  # scikit-learn cannot check arrays on a GPU
            validate_data(self, X, reset=reset, skip_check_array=True)
            if not X.isfinite().all():
                raise ValueError("X contains NaN or infinity: leave those particles out")
        else:
            least = 2 if reset else 1
            X = validate_data(self, X, dtype="numeric", ensure_min_samples=least, reset=reset)
        return as_tensor(self._squares(X))

    def _squares(self, X: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """The rows of X as images (n, size, size)."""
        n, pixels = X.shape
        size = math.isqrt(pixels)
        if size * size != pixels or size < 2:
            raise ValueError(
                f"X has n_features = {pixels}, which is not a square image: give images "
                "(n, size, size), or their pixels (n, size * size)"
            )
        return X.reshape(n, size, size)

    def _find(self, X: Any) -> tuple[PreparedParticles, Found, int]:
        """The usable particles of X, where each fits best, and the number of all particles."""
        check_is_fitted(self)
        particles = self._prepared(X, self._images(X, reset=False), max_rejected=1.0)
        method = self._made()
        if method.ctf_use(method.particle.ctf) != "none":
            particles = particles.phase_flipped()
        search = self._search(particles.size, self.alignment_.pixel_size)
        references = torch.from_numpy(self.averages_).to(particles.device)
        work = AlignAndAverage(particles, Averaging(), search, search.rings(particles.size))
        return particles, work.align(prepare_target(references, search)), len(particles.stack)

    def _search(self, size: int, pixel_size: float | None) -> Search:
        """The poses that are tried for new particles, in prepared images of ``size`` pixels."""
        method, box = self._made(), Box(size, pixel_size)
        reach = method.max_shift(box)
        last = min(round(method.radius(box)), (size - 1) // 2 - math.ceil(reach))
        own = self.search or SearchSettings() if hasattr(self, "search") else SearchSettings()
        return Search(**asdict(own), max_shift=reach, last_ring=last, mirror=method.particle.mirror)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _pixel_size(X: Any) -> float | None:
    """Å per pixel of a stack; None for other particles."""
    return X.pixel_size if isinstance(X, Stack) else None


class _Classes(ClusterMixin, _Aligner):
    """An aligner with several classes.

    Attributes:
        labels_: (n,) int64 class of each fitted particle, from 0; -1 if it was set aside
            (``alignment_.class_number`` - 1). `predict` of the same particles compares them with
            the final averages and can differ for a few of them.
    """

    def fit(self, X: Any, y: None = None) -> Self:
        """Align and classify the particles X; ``y`` is ignored."""
        super().fit(X)
        self.labels_ = to_numpy(self.alignment_.class_number) - 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n,) int64 class of the average that each particle fits best, from 0; -1 if unusable."""
        particles, found, n = self._find(X)
        labels = np.full(n, -1)
        labels[particles.rows] = found.label
        return labels

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]  # ClusterMixin removes it
        return tags


@_estimator
class MultiReferenceAligner(_Classes):
    """`align_multi_reference` as an estimator; the parameters have the same meaning.

    If ``n_classes`` is None, it is the number of the references that are given, or 8 if the
    references are chosen by a word such as "random".
    """

    n_classes: int | None = None
    _: KW_ONLY
    references: Array | str | Path = "random"
    iterations: int = 20
    assign: Assignment | None = None
    search: SearchSettings | None = None

    def _method(self, **shared: Any) -> Method:
        chosen = isinstance(self.references, str) and self.references in SEEDINGS
        return MultiReference(
            references=self.references, iterations=self.iterations,
            n_classes=8 if self.n_classes is None and chosen else self.n_classes,
            assign=self.assign or Assignment(), search=self.search or SearchSettings(), **shared,
        )  # fmt: skip


@_estimator
class LikelihoodClassifier(_Classes):
    """`classify` as an estimator; the parameters have the same meaning.

    It uses the CTFs of a stack; of an array it knows none.
    """

    n_classes: int = 8
    _: KW_ONLY
    likelihood: Likelihood | None = None

    def _method(self, **shared: Any) -> Method:
        likelihood = self.likelihood or Likelihood()
        return Classification(n_classes=self.n_classes, likelihood=likelihood, **shared)


@_estimator
class ReferenceFreeAligner(_Aligner):
    """`align_reference_free` as a transformer; the parameters have the same meaning.

    It makes one average, so it has no ``predict``.
    """

    _: KW_ONLY
    references: Array | Literal["average"] | Path = "average"
    schedule: Schedule | None = None
    iterations: int = 20
    search: SearchSettings | None = None

    def _method(self, **shared: Any) -> Method:
        return ReferenceFree(
            references=self.references, iterations=self.iterations,
            schedule=self.schedule or Schedule(), search=self.search or SearchSettings(), **shared,
        )  # fmt: skip
