"""Order class averages so that neighbours are similar, and rotate them onto each other."""

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from cryoalign.pose import Pose, compose
from cryoalign.search.match import match
from cryoalign.search.settings import Search


def order_averages(averages: Tensor, search: Search) -> tuple[Tensor, Pose]:
    """The order of a short path through all averages, and their poses on its first average.

    The distance of two averages is 1 minus their largest correlation coefficient. Along the path,
    each average is rotated and mirrored onto the average before it. It is not shifted, so that it
    stays centred.

    Args:
        averages: (k, size, size), masked.
        search: the poses that are tried between two averages.

    Returns:
        order: (k,) indices of the averages along the path.
        pose: (k,) pose of each average, in the order of ``averages``.
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
    """(k,) order of k points along a short path through all of them.

    The first path is the best order of the leaves of a hierarchical tree (Bar-Joseph, Gifford &
    Jaakkola 2001). Then sections of the path are reversed as long as this makes it shorter (2-opt).

    Args:
        distance: (k, k) distances of the points, symmetric and not negative.
    """
    k = len(distance)
    if k < 3:
        return np.arange(k)
    condensed = squareform(np.asarray(distance, np.float64), checks=False)
    path = leaves_list(linkage(condensed, "average", optimal_ordering=True)).astype(np.int64)
    # One more point, at distance 0 from all others, closes the path to a circle.
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
