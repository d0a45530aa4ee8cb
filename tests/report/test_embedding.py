"""Features and purity, judged by scikit-learn's full PCA and by labels that are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA

from cryoalign.images.geometry import transform
from cryoalign.io.formats import write_images
from cryoalign.io.stack import read_particles
from cryoalign.particles.simulate import simulate
from cryoalign.report import embedding as export
from cryoalign.report.embedding import embed, features, mpca, neighbour_purity
from cryoalign.results.alignment import Alignment

SIMULATION = simulate(400, 4, size=48, snr=0.1, seed=4)


def true_alignment(class_number=SIMULATION.class_number):
    return Alignment(
        pose=SIMULATION.pose,
        class_number=class_number,
        score=torch.ones(400),
        averages=SIMULATION.views,
        frc=torch.ones(4, 25),
        resolution=torch.full((4,), 6.0),
        class_sizes=torch.bincount(class_number, minlength=5)[1:],
        history=pd.DataFrame({"iteration": [1]}),
        pixel_size=3.0,
    )


def full_pca_variance(n_components):
    """Of the same aligned, normalised, masked images, by scikit-learn's exact PCA."""
    y, x = np.indices((48, 48)) - 24
    disc = np.hypot(x, y) <= 20
    inside = SIMULATION.images[:, torch.as_tensor(disc)]
    images = (SIMULATION.images - inside.mean(1)[:, None, None]) / inside.std(1)[:, None, None]
    pixels = transform(images, SIMULATION.pose).numpy()[:, disc]
    return PCA(n_components, svd_solver="full").fit(pixels).explained_variance_


def test_pca_in_batches_keeps_what_a_full_pca_keeps(monkeypatch):
    expected = full_pca_variance(10)
    whole = features(SIMULATION.images, true_alignment(), mask_radius=20, n_components=10)
    monkeypatch.setattr(export, "BATCH", 90)
    monkeypatch.setattr(export, "CACHE_BYTES", 0)
    parts = features(SIMULATION.images, true_alignment(), mask_radius=20, n_components=10)
    assert whole.shape == parts.shape == (400, 10)
    np.testing.assert_allclose(whole.var(0, ddof=1), expected, rtol=1e-3)
    np.testing.assert_allclose(parts.var(0, ddof=1)[:3], expected[:3], rtol=0.01)  # the classes
    assert parts.var(0, ddof=1).sum() > 0.97 * expected.sum()


def test_two_step_reduction_keeps_nearly_as_much():
    expected = full_pca_variance(10)
    table = features(
        SIMULATION.images, true_alignment(), mask_radius=20, n_components=10, method="2sdr"
    )
    kept = table.var(0, ddof=1)
    assert 0.85 * expected.sum() < kept.sum() < 1.0001 * expected.sum()
    np.testing.assert_allclose(kept[:3], expected[:3], rtol=0.1)


def test_mpca_finds_exact_low_rank_images():
    """Images A0 C B0^T + mean with random cores C lose nothing, and the bases span A0 and B0."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(20, 3)))[0]
    right = np.linalg.qr(rng.normal(size=(17, 4)))[0]
    images = left @ rng.normal(size=(50, 3, 4)) @ right.T + rng.normal(size=(20, 17))
    a, b, mean = mpca(
        [torch.as_tensor(images[:30]).float(), torch.as_tensor(images[30:]).float()], 3, 4
    )
    np.testing.assert_allclose(mean, images.mean(0), atol=1e-5)
    np.testing.assert_allclose(a @ a.T, left @ left.T, atol=1e-4)
    np.testing.assert_allclose(b @ b.T, right @ right.T, atol=1e-4)


def test_mpca_finds_columns_that_matter_in_its_rows():
    """One strong pixel against a whole weak column: taken by themselves, columns choose wrong."""
    rng = np.random.default_rng(0)
    images = np.zeros((500, 12, 12))
    images[:, 3, 5] = 2 * rng.normal(size=500)
    images[:, :, 8] = rng.normal(size=(500, 12))
    a, b, _ = mpca([torch.as_tensor(images).float()], 1, 1)
    assert (int(a.abs().argmax()), int(b.abs().argmax())) == (3, 5)


@pytest.mark.parametrize("method", ["pca", "2sdr"])
def test_alignment_brings_classes_together(method):
    labels = SIMULATION.class_number
    before = features(SIMULATION.images, n_components=20, method=method)
    after = features(SIMULATION.images, true_alignment(), n_components=20, method=method)
    assert neighbour_purity(before, labels) < 0.7
    assert neighbour_purity(after, labels) > 0.99


def test_a_stack_on_disk_gives_the_features_of_its_images(tmp_path):
    write_images(tmp_path / "particles.mrcs", SIMULATION.images, 3.0)
    stack = read_particles(tmp_path / "particles.mrcs")
    rows = np.arange(399, 100, -3)
    in_memory = features(SIMULATION.images, true_alignment(), rows=rows, n_components=8)
    np.testing.assert_array_equal(
        features(stack, true_alignment(), rows=rows, n_components=8), in_memory
    )


def test_set_aside_and_bad_particles_are_rows_of_nan():
    images = SIMULATION.images.clone()
    images[3, 5, 5] = float("nan")
    images[7] = 2.5
    number = SIMULATION.class_number.clone()
    number[11] = 0
    table = features(images, true_alignment(number), n_components=5)
    assert np.isnan(table).all(1).nonzero()[0].tolist() == [3, 7, 11]
    assert np.isfinite(table).all(1).sum() == 397
    rows = features(images, true_alignment(number), rows=[11, 0, 3, *range(20, 90)], n_components=5)
    assert np.isnan(rows).all(1).nonzero()[0].tolist() == [0, 2]
    label, kept = number.numpy(), np.isfinite(table).all(1)
    assert neighbour_purity(table, label) == neighbour_purity(table[kept], label[kept])
    place = embed(table[:40], seed=1)
    assert np.isnan(place).all(1).nonzero()[0].tolist() == [3, 7, 11]


def test_purity_of_known_neighbours():
    line = np.array([[0.0], [1], [2], [10], [11], [12]])
    assert neighbour_purity(line, [1, 1, 1, 2, 2, 2], k=2) == 1
    assert neighbour_purity(line, [1, 2, 1, 2, 1, 2], k=1) == 0
    # Nearest two of 0, 1, 2 carry [2, 1], [1, 1], [2, 1] for labels 1, 2, 1; likewise beyond.
    assert neighbour_purity(line, [1, 2, 1, 2, 1, 2], k=2) == pytest.approx(2 / 6)
    assert neighbour_purity(line, [1, 1, 1, 1, 1, 2], k=99) == pytest.approx(5 * 4 / 5 / 6)
    rng = np.random.default_rng(0)
    chance = neighbour_purity(rng.normal(size=(2000, 3)), rng.integers(4, size=2000))
    assert chance == pytest.approx(0.25, abs=0.02)


def test_embedding_is_repeatable_and_keeps_clusters():
    rng = np.random.default_rng(2)
    label = np.repeat([0, 1, 2], 40)
    table = rng.normal(size=(120, 6)) + 12 * np.eye(6)[label]
    place = embed(table, seed=5)
    assert place.shape == (120, 2)
    assert neighbour_purity(place, label) == 1
    np.testing.assert_array_equal(place, embed(table, seed=5))


def test_refusals():
    with pytest.raises(ValueError, match="'pca' or '2sdr'"):
        features(SIMULATION.images, method="umap")
    with pytest.raises(ValueError, match="pass the stack that was aligned"):
        features(SIMULATION.images[:10], true_alignment())
    with pytest.raises(ValueError, match="two usable particles"):
        features(torch.ones(5, 16, 16))
    with pytest.raises(ValueError, match="1 to 256"):
        features(SIMULATION.images, n_components=1000)
    with pytest.raises(ValueError, match="3 labels"):
        neighbour_purity(np.zeros((4, 2)), [1, 2, 3])
