"""The order of class averages, against all orders and a path that is known."""

import itertools

import numpy as np
import torch

from cryoalign.images.geometry import transform
from cryoalign.methods.isac.ordering import order_averages, shortest_path
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose
from cryoalign.search.match import match
from cryoalign.search.settings import Search


def length(distance: np.ndarray, path) -> float:
    return sum(distance[a, b] for a, b in itertools.pairwise(path))


def test_the_path_is_the_shortest_of_all_or_nearly() -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        points = random.normal(size=(7, 2))
        distance = np.linalg.norm(points[:, None] - points, axis=-1)
        path = shortest_path(distance)
        assert sorted(path) == list(range(7))
        best = min(length(distance, p) for p in itertools.permutations(range(7)))
        assert length(distance, path) <= 1.1 * best


def test_points_on_a_line_come_in_their_order() -> None:
    place = np.random.default_rng(1).permutation(40).astype(float)
    path = shortest_path(np.abs(place[:, None] - place))
    steps = np.diff(place[path])
    assert (steps == 1).all() or (steps == -1).all()


def test_a_sequence_of_views_is_found_and_turned_onto_one_another() -> None:
    """Blends of three images, each turned anyhow and mirrored: order and poses come back."""
    a, b, c = simulate(n=1, n_classes=3, size=40, snr=1.0, seed=3).views
    share = torch.linspace(0, 1, 5)[:, None, None]
    views = torch.cat([(1 - share) * a + share * b, ((1 - share) * b + share * c)[1:]])
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randperm(9, generator=generator)
    turn = Pose(
        torch.rand(9, generator=generator) * 360, torch.zeros(9, 2), torch.arange(9) % 2 > 0
    )
    search = Search(max_shift=1, last_ring=16)
    shown = transform(views[mixed], turn)
    order, pose = order_averages(shown, search)
    path = mixed[order].tolist()
    assert path in (list(range(9)), list(range(8, -1, -1)))
    turned = transform(shown, pose)[order]
    still = match(turned[1:], turned[:-1], Search(max_shift=0, last_ring=16))
    step = still.pose[torch.arange(8), torch.arange(8)]
    assert not step.mirror.any()
    assert float(step.angle.abs().max()) < 3


def test_one_average_has_an_order() -> None:
    order, pose = order_averages(torch.randn(1, 32, 32), Search(max_shift=1))
    assert order.tolist() == [0]
    assert pose.angle.tolist() == [0.0]
