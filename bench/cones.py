"""Views that are hard to tell apart: how many particles the search gives to the right one."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bench.result import Result, Row
from cryoalign.images.masks import soft_mask
from cryoalign.particles.simulate import phantom, project
from cryoalign.pose import Pose
from cryoalign.runtime.processes import choose_device
from cryoalign.search.match import best_poses, match, prepare_target
from cryoalign.search.refine import refine
from cryoalign.search.settings import Search


def run(
    cone: Annotated[tuple[float, ...], "largest angle of a view from the cone's axis, degrees"] = (
        25.0, 10.0,
    ),
    snr: Annotated[tuple[float, ...], "of the particles"] = (0.1, 0.05),
    k: Annotated[int, "views, which are the references"] = 50,
    n: Annotated[int, "particles"] = 500,
    size: Annotated[int, "box, px"] = 90,
    seed: Annotated[int, "of the simulation"] = 0,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:  # fmt: skip
    """Particles of views within a narrow cone: the share, in %, whose view is found.

    The references are the true views. The ceiling refines a particle on every reference, from the
    best pose of the exhaustive grid, and takes the best score.
    """
    where = choose_device(device)
    rows: list[Row] = []
    for angle in cone:
        for each in snr:
            images, views, label = _particles(angle, each, n, k, size, seed)
            images, views = images.to(where), views.to(where)
            row: Row = {"cone °": angle, "SNR": each}
            for mode in ("adaptive", "exhaustive"):
                found = best_poses(images, prepare_target(views, Search(mode=mode)))
                row[f"{mode} %"] = 100 * float((found.label.cpu() == label).double().mean())
            row["every reference refined %"] = 100 * float(
                (_refined(images, views).cpu() == label).double().mean()
            )
            rows.append(row)
    return Result(rows, [f"{n} particles of {size} px, {k} views, on {where.type}"])


def _particles(
    cone: float, snr: float, n: int, k: int, size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Particles (n, size, size), masked views (k, size, size), view of each particle (n,)."""
    generator = np.random.default_rng(seed)
    # Evenly spread over the cone: a spiral of equal areas.
    height = 1 - (1 - math.cos(math.radians(cone))) * (np.arange(k) + 0.5) / k
    turn = np.arange(k) * math.pi * (3 - math.sqrt(5))
    across = np.sqrt(1 - height**2)
    directions = torch.as_tensor(
        np.stack([across * np.cos(turn), across * np.sin(turn), height], 1)
    )
    molecule = phantom(seed, radius=0.36 * size)
    label = torch.as_tensor(generator.integers(k, size=n))
    pose = Pose(
        torch.as_tensor(generator.uniform(-180, 180, n)),
        torch.as_tensor(generator.uniform(-2, 2, (n, 2))),
        torch.as_tensor(generator.random(n) < 0.5),
    )
    clean = project(molecule, directions[label], pose, size=size)
    scale = math.sqrt(snr / float(clean.var((1, 2), correction=0).mean()))
    noise = torch.as_tensor(generator.standard_normal(clean.shape, dtype=np.float32))
    views = project(molecule, directions, size=size) * scale
    return clean * scale + noise, views * soft_mask(size, 0.42 * size), label


def _refined(images: Tensor, views: Tensor) -> Tensor:
    """(n,) the best view of all, each after refinement."""
    search = Search()
    found, rings = match(images, views, search), search.rings(images.shape[-1])
    scores = []
    for view in range(len(views)):
        label = torch.full((len(images),), view, device=images.device)
        scores.append(refine(images, views, label, found.pose[:, view], rings)[1])
    return torch.stack(scores, 1).argmax(1)
