"""Alignment as a step of a scikit-learn pipeline: align, reduce, cluster.

python examples/pipeline.py
"""

from __future__ import annotations

from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from cryoalign.learn.estimators import MultiReferenceAligner
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate


def main(n: int = 600) -> tuple[float, float]:
    """Adjusted Rand index of k-means on new particles without alignment, and after it."""
    data = simulate(n, n_classes=4, size=48, snr=0.15, max_shift=2.0, seed=1)
    images, truth = data.images.numpy(), data.class_number.numpy()
    old, new = slice(0, n // 2), slice(n // 2, n)

    particle = Particle(max_shift="2 px")
    pipeline = Pipeline(
        [
            ("align", MultiReferenceAligner(4, particle=particle, random_state=0)),
            ("pca", PCA(16, random_state=0)),
            ("kmeans", KMeans(4, n_init=10, random_state=0)),
        ]
    )
    plain = clone(pipeline).set_params(align="passthrough")
    flat = images.reshape(n, -1)
    scores = []
    for name, steps in (("without alignment", plain), ("with alignment", pipeline)):
        found = steps.fit(flat[old]).predict(flat[new])
        scores.append(float(adjusted_rand_score(truth[new], found)))
        print(f"{name}: adjusted Rand index {scores[-1]:.2f} on {n - n // 2} new particles")

    grid = GridSearchCV(pipeline.named_steps["align"], {"n_classes": [1, 2, 4]}, cv=2)
    grid.fit(images[old].reshape(n // 2, -1))
    for parameters, score in zip(
        grid.cv_results_["params"], grid.cv_results_["mean_test_score"], strict=True
    ):
        print(f"{parameters}: mean score of held-out particles {score:.3f}")
    return scores[0], scores[1]


if __name__ == "__main__":
    main()
