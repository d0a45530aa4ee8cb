"""Class averages in an order in which neighbours are similar, rotated onto each other."""

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from cryoalign.pose import Pose, compose
from cryoalign.search.match import match
from cryoalign.search.settings import Search


def order_averages(averages: Tensor, search: Search) -> tuple[Tensor, Pose]:
    """The order of the shortest path through all averages, and their poses on the first.

    The distance of two averages is 1 minus their largest correlation coefficient. Along the path,
    each average is rotated and mirrored onto the one before. It is not moved, so that it stays
    centred as its members are.

    Args:
        averages: (k, size, size), masked.
        search: the poses tried between two averages.

    Returns:
        order (k,), indices into averages; pose (k,) of each average, in the order given.
    """
    k = len(averages)
    pose = Pose.identity(k)
    if k < 2:
        return torch.arange(k), pose
    found = match(averages, averages, search)
    score = found.score.cpu().double()
    distance = (1 - torch.maximum(score, score.T)).clamp(min=0).numpy()
    order = torch.from_numpy(shortest_path(distance))
    onto = found.pose.to("cpu")
    angle, mirror = pose.angle.clone(), pose.mirror.clone()
    still = torch.zeros(2)
    for before, now in zip(order[:-1].tolist(), order[1:].tolist(), strict=True):
        forth = score[now, before] >= score[before, now]
        step = onto[now, before] if forth else onto[before, now].inverse()
        turned = compose(
            Pose(step.angle, still, step.mirror), Pose(angle[before], still, mirror[before])
        )
        angle[now], mirror[now] = turned.angle, turned.mirror
    return order, Pose(angle, pose.shift, mirror)


def shortest_path(distance: np.ndarray) -> np.ndarray:
    """(k,) an order of k points with a short path through all of them.

    It starts as the best order of the leaves of a hierarchical tree (Bar-Joseph, Gifford & Jaakkola
    2001). Then sections of the path are reversed as long as that makes it shorter (2-opt).

    Args:
        distance: (k, k) symmetric, not negative.
    """
    k = len(distance)
    if k < 3:
        return np.arange(k)
    condensed = squareform(np.asarray(distance, np.float64), checks=False)
    path = leaves_list(linkage(condensed, "average", optimal_ordering=True)).astype(np.int64)
    # A further point, at distance 0 from all, closes the path to a circle.
    padded = np.zeros((k + 1, k + 1))
    padded[:k, :k] = distance
    path = np.append(path, k)
    while True:
        ahead = np.roll(path, -1)
        before = padded[path, ahead]
        gain = (
            before[:, None] + before - padded[path[:, None], path] - padded[ahead[:, None], ahead]
        )
        gain[np.tril_indices(k + 1)] = 0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-12:
            break
        path[i + 1 : j + 1] = path[i + 1 : j + 1][::-1]
    start = int((path == k).argmax())
    return np.roll(path, -start)[1:]
