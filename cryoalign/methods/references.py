"""First references, when none are given."""

from __future__ import annotations

import torch
from torch import Tensor

from cryoalign.images.fourier import filter_shells, low_pass_curve
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.results.averages import LOW_PASS
from cryoalign.runtime.processes import same_on_all_ranks

SEEDINGS = ("random",)


def seed_references(particles: PreparedParticles, how: str, n_classes: int, seed: int) -> Tensor:
    """(k, size, size) first references chosen from the particles."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(particles), generator=generator)[:n_classes]
    images = particles.read(same_on_all_ranks(chosen))
    return filter_shells(images, low_pass_curve(particles.size, LOW_PASS).to(images.device))
