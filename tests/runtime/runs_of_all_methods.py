"""Runs of every method, for `test_processes`: FOLDER PARTICLES.star NAME ...

Started by Python or by ``torchrun``. Parts and batches are made small, so that a few particles fill
several of them.
"""

import io
import sys

import torch
from rich.console import Console

from cryoalign.app.run import run
from cryoalign.app.settings import load_config
from cryoalign.methods.classify import resolution_level, whitening
from cryoalign.methods.isac import realignment
from cryoalign.runtime.processes import process_group

RUNS = {
    "mra": ["method=mra", "n_classes=3", "iterations=2", "quality.junk=set_aside", "images.box=24"],
    "mra-soft": ["method=mra", "n_classes=3", "iterations=2", "assign.strategy=soft",
                 "assign.anneal_iterations=1"],
    "rfa": ["method=rfa", "iterations=2", "schedule.max_shift=1", "schedule.shift_step=1",
            "schedule.starts=2"],
    "classify": ["method=classify", "n_classes=3", "quality.junk=set_aside"],
    "classify-stochastic": ["method=classify", "n_classes=3", "likelihood.start=stochastic"],
    "classify-invariants": ["method=classify", "n_classes=3", "likelihood.start=invariants"],
    "isac": ["method=isac", "isac.images_per_group=30", "iterations=2", "isac.passes=2",
             "isac.start=likelihood"],
}  # fmt: skip
ALWAYS = ["device=cpu", "threads=1", "embedding=false", "batch_size=16", "seed=3"]


def main(folder: str, star: str, *names: str) -> None:
    """Run the methods with these names one after the other, in one group of processes."""
    resolution_level.LEAST["cpu"], resolution_level.CHUNK["cpu"], whitening.CHUNK = 32, 16, 16
    realignment.BATCH = 16
    with process_group(torch.device("cpu")):
        for name in names:
            shift = [] if name == "rfa" else ["particle.max_shift=1px"]
            words = [f"particles={star}", *RUNS[name], *shift, *ALWAYS, f"output={folder}/{name}"]
            run(load_config(None, words), console=Console(file=io.StringIO()))


if __name__ == "__main__":
    main(*sys.argv[1:])
