"""Estimators: scikit-learn's own checks, and what they find in simulated particles.

The checks feed tables of 1 to 10 columns, which are no images. They run on subclasses that draw an
image from a row, each column the amplitude of a smooth pattern: all that the checks look at but the
reading of pixels is then the estimators' own.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from cryoalign.images.fourier import filter_shells, low_pass_curve
from cryoalign.images.masks import soft_mask
from cryoalign.io.formats import write_images
from cryoalign.io.stack import ParticleStack, read_particles
from cryoalign.learn.estimators import (
    LikelihoodClassifier,
    MultiReferenceAligner,
    ReferenceFreeAligner,
)
from cryoalign.methods.classify.settings import Likelihood
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import TensorStack
from cryoalign.search.settings import Schedule
from examples.pipeline import main as pipeline_example

BOX = 20
LAST_RING = 14  # px
PARTICLE = Particle(max_shift="2 px", radius=f"{LAST_RING} px")
DATA = simulate(300, n_classes=3, size=40, snr=0.5, max_shift=1.0, seed=2)
NEW = slice(200, 300)  # particles that were not fitted
IMAGES, LABELS = DATA.images.numpy(), DATA.class_number.numpy()


@pytest.fixture
def stack_with_ctf(tmp_path: Path) -> ParticleStack:
    data = simulate(60, 2, size=40, snr=0.5, max_shift=1.0, seed=2)
    columns = {"rlnDefocusU": 1.5e4, "rlnDefocusV": 1.5e4, "rlnDefocusAngle": 0.0}
    group = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
    write_images(tmp_path / "p.mrcs", data.images, 3.0)
    table = pd.DataFrame({"rlnImageName": [f"{i + 1}@p.mrcs" for i in range(60)]})
    table = table.assign(**columns, **group, rlnPixelSize=3.0)
    starfile.write({"particles": table}, tmp_path / "p.star")
    return read_particles(tmp_path / "p.star")


@pytest.mark.parametrize("kind", [MultiReferenceAligner, LikelihoodClassifier])
def test_the_ctf_of_a_stack_is_used(kind: Any, stack_with_ctf: ParticleStack) -> None:
    fitted = kind(n_classes=2, particle=PARTICLE, random_state=0).fit(stack_with_ctf)
    assert fitted.alignment_.ctf.startswith("CTF: ")
    assert "averages weighted by CTF^2" in fitted.alignment_.ctf
    assert fitted.predict(stack_with_ctf).shape == (60,)


class _Patterns:
    """A row of numbers as an image: the sum of so many patterns, and a background."""

    def _squares(self, X: Any) -> torch.Tensor:
        columns = torch.as_tensor(np.asarray(X, dtype=np.float64))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1 + columns.shape[1], BOX, BOX, generator=generator).double()
        patterns = filter_shells(noise[1:], low_pass_curve(BOX, 0.2)) * soft_mask(BOX, 6, 3)
        return (torch.einsum("np,phw->nhw", columns, patterns) + 0.05 * noise[0]).float()


class Mra(_Patterns, MultiReferenceAligner): ...


class Classify(_Patterns, LikelihoodClassifier): ...


class Rfa(_Patterns, ReferenceFreeAligner): ...


@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks(
    [
        Mra(3, iterations=4, particle=Particle(max_shift="1 px", radius="7 px")),
        Classify(3, likelihood=Likelihood(cycles=1)),
        Rfa(iterations=3, particle=Particle(radius="5 px")),
    ]
)
def test_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


NO_IMAGES = [
    "clustering",
    "dict_unchanged",
    "dont_overwrite_parameters",
    "dtype_object",
    "estimators_dtypes",
    "estimators_fit_returns_self",
    "estimators_nan_inf",
    "estimators_overwrite_params",
    "estimators_pickle",
    "f_contiguous_array_estimator",
    "fit2d_predict1d",
    "fit_check_is_fitted",
    "fit_idempotent",
    "fit_score_takes_y",
    "methods_sample_order_invariance",
    "methods_subset_invariance",
    "n_features_in",
    "n_features_in_after_fitting",
    "pipeline_consistency",
    "positive_only_tag_during_fit",
    "readonly_memmap_input",
    "transformer_data_not_an_array",
    "transformer_general",
    "transformer_preserve_dtypes",
]


@parametrize_with_checks(
    [MultiReferenceAligner(3), LikelihoodClassifier(3), ReferenceFreeAligner()],
    expected_failed_checks=lambda _: {
        f"check_{name}": "feeds a table of 2 to 10 columns, no image or one of 2 x 2 px"
        for name in NO_IMAGES
    },
    xfail_strict=True,
)
def test_scikit_learn_without_help(estimator: Any, check: Any) -> None:
    """The estimators themselves: what feeds no images fails, all else passes."""
    check(estimator)


@pytest.fixture(scope="module")
def fitted() -> MultiReferenceAligner:
    return MultiReferenceAligner(3, particle=PARTICLE, random_state=0).fit(IMAGES[:200])


def matched(labels: np.ndarray, truth: np.ndarray) -> float:
    return float(adjusted_rand_score(truth, labels))


def test_the_fit_is_the_alignment(fitted: MultiReferenceAligner) -> None:
    seed = np.random.RandomState(0).randint(2**31 - 1)
    expected = align_multi_reference(DATA.images[:200], n_classes=3, particle=PARTICLE, seed=seed)
    np.testing.assert_array_equal(fitted.labels_, expected.class_number.numpy() - 1)
    assert matched(fitted.labels_, LABELS[:200]) > 0.95
    assert fitted.n_features_in_ == 1600


def test_new_particles_join_the_classes_of_the_old(fitted: MultiReferenceAligner) -> None:
    assert matched(fitted.predict(IMAGES[NEW]), LABELS[NEW]) > 0.95
    both = np.concatenate([fitted.labels_, fitted.predict(IMAGES[NEW])])
    assert matched(both, LABELS) > 0.95
    assert fitted.score(IMAGES[NEW]) > 0.3
    noise = np.random.default_rng(0).normal(size=IMAGES[NEW].shape).astype(np.float32)
    assert fitted.score(noise) < 0.8 * fitted.score(IMAGES[NEW])


def test_aligned_particles_lie_alike(fitted: MultiReferenceAligner) -> None:
    """Of one class, they correlate with each other as they did not before."""
    out = fitted.transform(IMAGES[NEW])
    assert out.shape == (100, fitted.mask_.sum()) == (100, len(fitted.get_feature_names_out()))
    assert out.dtype == np.float32
    before = IMAGES[NEW][:, fitted.mask_]

    def alike(table: np.ndarray) -> float:
        parts = [np.corrcoef(table[LABELS[NEW] == label]) for label in (1, 2, 3)]
        return float(np.mean([part[np.triu_indices(len(part), 1)].mean() for part in parts]))

    assert alike(out) > 0.3
    assert alike(out) > 2 * alike(before)


def test_what_is_searched_is_masked_and_filtered(fitted: MultiReferenceAligner) -> None:
    """New particles must not be drawn by what noise the averages hold beyond the molecule."""
    y, x = np.mgrid[:40, :40] - 20
    outside = np.hypot(x, y) > LAST_RING + 4 + 1  # the mask's edge, and a pixel
    assert outside.sum() > 100
    assert not fitted.averages_[:, outside].any()
    window = np.cos(np.pi * np.clip(np.hypot(x, y) / (2 * LAST_RING), 0, 0.5)) ** 2
    plain = fitted.alignment_.averages.numpy()

    def fine(images: np.ndarray) -> float:
        """Power beyond 0.35 per pixel in the middle, where the averages' halves hardly agree."""
        k = np.hypot(np.fft.fftfreq(40)[:, None], np.fft.fftfreq(40))
        return float((np.abs(np.fft.fft2(images * window)) ** 2)[:, k > 0.35].sum())

    assert fine(fitted.averages_) < 0.3 * fine(plain)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.reshape(len(x), -1),
        torch.from_numpy,
        TensorStack,
        lambda x: x.tolist(),
        lambda x: pd.DataFrame(x.reshape(len(x), -1)).rename(columns=str),
    ],
)
@pytest.mark.filterwarnings("ignore:X has feature names")
def test_tables_tensors_and_stacks_are_one(form: Any, fitted: MultiReferenceAligner) -> None:
    given = form(IMAGES[NEW])
    np.testing.assert_array_equal(fitted.predict(given), fitted.predict(IMAGES[NEW]))
    again = clone(fitted).fit(form(IMAGES[:200]))
    np.testing.assert_array_equal(again.labels_, fitted.labels_)


def test_the_pixel_size_of_a_stack_is_used() -> None:
    """The same fit from lengths in Å and in pixels, and a resolution in Å."""
    made = simulate(60, 2, size=24, snr=1.0, max_shift=1.0, seed=2, pixel_size=2.5)
    stack = TensorStack(made.images, made.pixel_size)
    scores = []
    for particle in (Particle("8 px", "1 px"), Particle("20 A", "2.5 A")):
        aligner = MultiReferenceAligner(
            n_classes=2, iterations=2, particle=particle, random_state=0, device="cpu"
        )
        scores.append(aligner.fit(stack).score(stack))
        assert aligner.alignment_.pixel_size == 2.5
    assert scores[0] == scores[1]


def test_a_constant_image_is_set_aside(fitted: MultiReferenceAligner) -> None:
    images = IMAGES[NEW].copy()
    images[3] = 1.0
    assert fitted.predict(images)[3] == -1
    assert not fitted.transform(images)[3].any()
    np.testing.assert_array_equal(
        np.delete(fitted.predict(images), 3), np.delete(fitted.predict(IMAGES[NEW]), 3)
    )


def test_in_a_pipeline_and_a_grid() -> None:
    aligner = MultiReferenceAligner(3, particle=PARTICLE, random_state=0)
    steps = [
        ("align", aligner),
        ("pca", PCA(8, random_state=0)),
        ("kmeans", KMeans(3, n_init=5, random_state=0)),
    ]
    pipeline = Pipeline(steps)
    aligned = matched(pipeline.fit_predict(IMAGES), LABELS)
    plain = make_pipeline(PCA(8, random_state=0), KMeans(3, n_init=5, random_state=0))
    assert aligned > 0.9 > 0.7 > matched(plain.fit_predict(IMAGES.reshape(300, -1)), LABELS)
    copy = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(copy.predict(IMAGES[NEW]), pipeline.predict(IMAGES[NEW]))
    grid = GridSearchCV(clone(aligner), {"n_classes": [1, 3]}, cv=2)
    assert grid.fit(IMAGES.reshape(300, -1)).best_params_ == {"n_classes": 3}


def test_likelihood_and_reference_free() -> None:
    found = LikelihoodClassifier(3, random_state=0).fit(IMAGES[:200])
    assert matched(found.labels_, LABELS[:200]) > 0.95
    assert matched(found.predict(IMAGES[NEW]), LABELS[NEW]) > 0.95
    one = LABELS == 1
    schedule = Schedule(max_shift=(2.0, 2.0), shift_step=(1.0, 1.0))
    single = ReferenceFreeAligner(schedule=schedule, random_state=0).fit(IMAGES[one])
    pose = single.alignment_.pose
    # The average has a pose of its own: particles' relative to the first's are the truth's.
    truth = DATA.pose.to(torch.float32)[torch.from_numpy(one)]
    found_pose = pose.inverse().matrix() @ pose[:1].matrix()
    true_pose = truth.inverse().matrix() @ truth[:1].matrix()
    error = (found_pose - true_pose)[1:, :2, :2].norm(dim=(1, 2))
    assert error.median() < 0.15
    assert not hasattr(single, "predict")
    assert single.transform(IMAGES[NEW]).shape == (100, single.mask_.sum())


def test_bad_input_is_named(fitted: MultiReferenceAligner) -> None:
    with pytest.raises(ValueError, match="X has n_features = 10, which is not a square image"):
        clone(fitted).fit(np.ones((5, 10)))
    with pytest.raises(ValueError, match="40 x 30 px: give square images"):
        clone(fitted).fit(IMAGES[:, :, :30])
    with pytest.raises(ValueError, match="expecting 1600 features"):
        fitted.predict(IMAGES[:, :30, :30])
    spoilt = torch.from_numpy(IMAGES[NEW]).clone()
    spoilt[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict(spoilt)
    with pytest.raises(TypeError, match="read_particles"):
        clone(fitted).fit("particles.star")
    for aligner in (MultiReferenceAligner(2.5), LikelihoodClassifier(2.5)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"n_classes must be a whole number .* 2\.5"):
            aligner.fit(IMAGES[:20])


def test_as_many_classes_as_references() -> None:
    given = MultiReferenceAligner(references=DATA.views.numpy(), particle=PARTICLE, iterations=1)
    assert matched(given.fit(IMAGES).labels_, LABELS) > 0.95
    assert len(given.averages_) == 3
    assert len(MultiReferenceAligner(iterations=1).fit(IMAGES).averages_) == 8


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    without, aligned = pipeline_example(n=400)
    assert aligned > 0.8 > 0.3 > without
    assert "held-out particles" in capsys.readouterr().out
