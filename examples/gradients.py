"""The operator chooses, PyTorch scores: poses by search, then improved by gradient ascent.

python examples/gradients.py
"""

from __future__ import annotations

import torch

from cryoalign.operators.correlation import correlation_at
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.match import match
from cryoalign.search.settings import Search


def main(n: int = 100, steps: int = 40) -> tuple[float, float]:
    """Median angle error (degrees) of the grid's pose, and after gradient ascent."""
    data = simulate(n, n_classes=1, size=48, snr=0.5, max_shift=2.0, seed=2)
    search = Search(max_shift=2, last_ring=18)
    _, start, _ = match(data.images, data.views, search).best()

    angle, shift = (x.clone().requires_grad_() for x in (start.angle, start.shift))
    # A degree and a pixel move the rim alike if the degree counts 180 / (pi r).
    optimizer = torch.optim.Adam(
        [{"params": [angle], "lr": 0.2}, {"params": [shift], "lr": 0.02}], betas=(0.5, 0.9)
    )
    rings = search.rings(48)
    for _ in range(steps):
        optimizer.zero_grad()
        pose = Pose(angle, shift, start.mirror)
        loss = -correlation_at(data.images, data.views, pose, rings).sum()
        loss.backward()
        optimizer.step()

    errors = [
        float(wrap_degrees(found - data.pose.angle).abs().median())
        for found in (start.angle, angle.detach())
    ]
    print(f"median angle error: grid {errors[0]:.2f}°, after {steps} steps {errors[1]:.2f}°")
    return errors[0], errors[1]


if __name__ == "__main__":
    main()
