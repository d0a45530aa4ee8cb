"""RELION's Class2D on the same sets, scored in the same way: the comparison of entry classes."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch

from bench.classes import scores
from bench.data import truth_of
from bench.result import Result, Row
from cryoalign.io.relion import read_pose
from cryoalign.io.stack import read_particles
from cryoalign.particles.stack import optics_of
from cryoalign.pose import Pose

# Class2D's as RELION's own interface sets them.
DEFAULTS = (
    *("--tau2_fudge", "2", "--zero_mask", "--flatten_solvent", "--norm", "--scale", "--pad", "2"),
    *("--oversampling", "1", "--psi_step", "12", "--offset_step", "2", "--dont_check_norm"),
)


def run(
    data: Annotated[tuple[Path, ...], "PREFIXes of .star, .mrcs and _truth.npz"] = (),
    k: Annotated[int | None, "classes; else as many as there are true views"] = None,
    iterations: Annotated[int, "of expectation maximisation"] = 25,
    mask_radius: Annotated[float, "of the particle, px"] = 36.0,
    max_shift: Annotated[float, "px"] = 5.0,
    cores: Annotated[int, "threads"] = 2,
    seed: Annotated[int, "of RELION"] = 0,
) -> Result:
    """RELION's Class2D (``relion_refine`` 3.1, its defaults) on sets whose truth is known.

    Needs RELION (Debian: ``apt-get install relion``). The command that was run is the last line.
    """
    if not data:
        raise SystemExit("relion: name sets with --data PREFIX ...")
    program = shutil.which("relion_refine")
    if program is None:
        raise SystemExit("relion: no relion_refine here; Debian has it (apt-get install relion)")
    rows: list[Row] = []
    for prefix in data:
        stack, (view, truth) = read_particles(f"{prefix}.star"), truth_of(prefix)
        classes = k or int(view.max()) + 1
        with_ctf = optics_of(stack) is not None
        command = [
            program, "--i", f"{prefix.name}.star", "--K", str(classes),
            "--iter", str(iterations), "--particle_diameter",
            f"{2 * mask_radius * (stack.pixel_size or 1.0):.0f}",
            *DEFAULTS,
            "--offset_range", f"{max_shift:g}", "--pool", "30", "--j", str(cores),
            "--random_seed", str(seed), *(["--ctf"] if with_ctf else []),
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            wall = time.perf_counter()
            out = Path(folder, "run")
            done = subprocess.run(
                [*command, "--o", str(out)],
                cwd=prefix.parent, capture_output=True, text=True, check=False,
            )  # fmt: skip
            wall = time.perf_counter() - wall
            if done.returncode:
                raise SystemExit(f"relion: {' '.join(command)}\n{done.stderr[-2000:]}")
            result = Path(f"{out}_it{iterations:03d}_data.star")
            label, pose = _read(result, stack.table["rlnImageName"].tolist(), prefix.parent)
        found = scores(label, pose, view, truth, classes)
        row: Row = {"set": prefix.name, "K": classes, "CTF": "yes" if with_ctf else "no"}
        rows.append({**row, "seed": seed, **found, "seconds": wall})
    shown = " ".join(["relion_refine", *command[1:], "--o", "run"])
    return Result(rows, notes=[f"command: {shown}"])


def _read(star: Path, names: list[str], root: Path) -> tuple[torch.Tensor, Pose]:
    """Class index and pose of every particle, in the order of the input's image names."""
    stack = read_particles(star, root=root)
    place = {name: i for i, name in enumerate(stack.table["rlnImageName"])}
    order = torch.tensor([place[name] for name in names])
    label = torch.from_numpy(stack.table["rlnClassNumber"].to_numpy(dtype="int64").copy()) - 1
    return label[order], read_pose(stack)[order]
