"""Two processes under torchrun give what one gives, and an error is told once."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from cryoalign.app.run import run
from cryoalign.app.settings import load_config
from cryoalign.io.formats import read_images
from cryoalign.particles.simulate import simulate, write_simulation


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    simulation = simulate(101, 3, size=32, snr=0.5, max_shift=1.0, seed=5)
    simulation.images[7], simulation.images[90] = torch.nan, 1.0
    return write_simulation(tmp_path_factory.mktemp("stack"), simulation)


SAME = ("device=cpu", "embedding=false", "threads=1")


def command(*words):
    """Run ``cryoalign run`` with two processes; the finished launcher."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launch, "-m", "cryoalign", "run", *words, *SAME],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.parametrize(
    "more",
    [
        ("method=mra", "n_classes=3", "particle.max_shift=1px"),
        (
            *("method=mra", "n_classes=3", "particle.max_shift=1px"),
            *("assign.strategy=soft", "assign.anneal_iterations=2"),
        ),
        ("method=rfa", "schedule.max_shift=1", "schedule.shift_step=1", "schedule.starts=2"),
    ],
    ids=["mra", "soft", "rfa"],
)
def test_two_processes_give_what_one_gives(star, tmp_path, more):
    words = (f"particles={star}", *more, "iterations=3")
    process = command(*words, f"output={tmp_path / '2'}")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("iteration   2") == 1  # one process speaks
    run(load_config(None, [*words, f"output={tmp_path / '1'}", *SAME]))
    one, two = (pd.read_csv(tmp_path / name / "particles.csv") for name in "12")
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one["class_number"].eq(0).sum() == 2  # the unusable ones, one in each process's share
    averages = [read_images(tmp_path / name / "class_averages.mrcs") for name in "12"]
    assert torch.equal(*averages)
    history = [pd.read_csv(tmp_path / name / "history.csv") for name in "12"]
    np.testing.assert_allclose(history[0]["mean_score"], history[1]["mean_score"], atol=1e-5)


def test_two_processes_find_the_classes_that_one_finds(star, tmp_path):
    """Blocks of particles begin elsewhere, so sums are rounded otherwise: no more than that."""
    words = (f"particles={star}", "n_classes=3", "method=classify", "particle.max_shift=1px")
    process = command(*words, f"output={tmp_path / '2'}")
    assert process.returncode == 0, process.stderr
    run(load_config(None, [*words, f"output={tmp_path / '1'}", *SAME]))
    one, two = (pd.read_csv(tmp_path / name / "particles.csv") for name in "12")
    assert (one["class_number"] == two["class_number"]).mean() > 0.98
    shifts = ["shift_x", "shift_y"]
    assert np.nanmedian((one[shifts] - two[shifts]).abs()) < 0.02
    assert one["class_number"].eq(0).sum() == two["class_number"].eq(0).sum() == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("method=mra n_classes=100", "a whole number from 1 to the 99 usable particles"),  # in all
        ("n_classes=3 output={star.parent}", "not of a cryoalign run"),  # in process 0 only
    ],
)
def test_an_error_ends_all_processes_and_is_told_once(star, tmp_path, words, message):
    output = f"output={tmp_path / 'out'}"
    process = command(f"particles={star}", output, *words.format(star=star).split())
    assert process.returncode != 0
    assert process.stderr.count("cryoalign: error: ") == 1, process.stderr
    assert message in process.stderr
    assert not (tmp_path / "out").exists()
