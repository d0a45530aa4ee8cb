"""Particles in, class averages out: the same run as ``cryoalign run``, in Python.

python examples/align.py              simulates its own particles
python examples/align.py STACK [K]    a STAR file, .mrcs, .mrc or .npy, into K classes
"""

from __future__ import annotations

import sys
from pathlib import Path

from cryoalign.io.stack import read_particles
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import simulate
from cryoalign.report import figures as plot
from cryoalign.report.montage import montage


def main(
    stack: str | None = None, n_classes: int = 4, output: Path = Path("align-example")
) -> None:
    """Align, print the classes, write a table and a montage."""
    particles = read_particles(stack) if stack else simulate(400, n_classes, seed=1).images
    alignment = align_multi_reference(
        particles, n_classes=n_classes, particle=Particle(max_shift="3 px"), seed=3
    )
    unit = "Å" if alignment.pixel_size else "px"
    table = alignment.class_frame().rename(columns={"resolution": f"resolution ({unit})"})
    print(table.to_string(index=False))

    output.mkdir(exist_ok=True)
    alignment.to_frame().to_csv(output / "particles.csv", index=False)
    shown = montage(
        alignment.filtered_averages(),
        alignment.class_sizes,
        alignment.resolution,
        pixel_size=alignment.pixel_size,
    )
    plot.save(shown, output / "class_averages.png")
    print(f"{output}/particles.csv and {output}/class_averages.png are written")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
