"""Features for scikit-learn: particles before and after alignment, as a t-SNE map.

python examples/embed.py    writes embed-example.png (Chung et al. 2020, Fig. 4c and d)
"""

from __future__ import annotations

from pathlib import Path

from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.simulate import simulate
from cryoalign.report import figures as plot
from cryoalign.report.embedding import embed, features, neighbour_purity


def main(output: Path = Path("embed-example.png"), n: int = 400) -> None:
    """Align, reduce by PCA, cluster, draw."""
    data = simulate(n, n_classes=4, snr=0.1, seed=1)
    alignment = align_multi_reference(data.images, n_classes=4, seed=3)
    labels = alignment.class_number.numpy()
    before, after = (features(data.images, a, mask_radius=24) for a in (None, alignment))

    for name, table in (("before", before), ("after", after)):
        found = KMeans(4, n_init=10, random_state=0).fit_predict(table)
        rand = adjusted_rand_score(data.class_number, found)
        purity = neighbour_purity(table, labels)
        print(f"{name} alignment: purity of 10 neighbours {purity:.2f}, k-means ARI {rand:.2f}")

    maps = [embed(table) for table in (before, after)]
    purities = (neighbour_purity(maps[0], labels), neighbour_purity(maps[1], labels))
    plot.save(plot.embedding(maps[0], maps[1], labels, purities), output)
    print(f"{output} is written")


if __name__ == "__main__":
    main()
