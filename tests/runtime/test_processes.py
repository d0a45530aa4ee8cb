"""Processes under torchrun give what one gives, bit for bit, and an error is told once."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bench.processes import run as bench_processes
from cryoalign.app.run import run
from cryoalign.app.settings import load_config
from cryoalign.io.formats import read_images
from cryoalign.particles.simulate import simulate, write_simulation
from cryoalign.runtime import processes
from tests.runtime.runs_of_all_methods import RUNS
from tests.same_results import STACKS, TABLES

LAUNCH = ["-m", "torch.distributed.run", "--standalone"]
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    simulation = simulate(101, 3, size=32, snr=0.5, max_shift=1.0, seed=5)
    simulation.images[7], simulation.images[90] = torch.nan, 1.0
    return write_simulation(tmp_path_factory.mktemp("stack"), simulation)


SAME = ("device=cpu", "embedding=false", "threads=1")


def command(*words, processes=2):
    """Run ``cryoalign run`` with several processes; the finished launcher."""
    return subprocess.run(
        [
            sys.executable,
            *LAUNCH,
            f"--nproc-per-node={processes}",
            "-m",
            "cryoalign",
            "run",
            *words,
            *SAME,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of `runs_of_all_methods` by 1, 2 and 3 processes."""
    simulation = simulate(124, 3, size=32, snr=0.5, max_shift=1.0, seed=5, defocus=(1.0, 2.0))
    simulation.images[7], simulation.images[110] = torch.nan, 1.0
    star = write_simulation(tmp_path_factory.mktemp("more"), simulation)
    script = Path(__file__).with_name("runs_of_all_methods.py")
    made = {}
    for count in (1, 2, 3):
        made[count] = tmp_path_factory.mktemp(f"by{count}")
        launch = [*LAUNCH, f"--nproc-per-node={count}"] if count > 1 else []
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(made[count]), str(star), *RUNS],
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return made


def assert_same(a, b):
    """Every column of every table but for times, and every pixel."""
    for name in TABLES:
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            one, two = (
                pd.read_csv(x / name).drop(columns="seconds", errors="ignore") for x in (a, b)
            )
            pd.testing.assert_frame_equal(one, two, check_exact=True)
    for name in STACKS:
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            assert torch.equal(*(read_images(x / name) for x in (a, b)))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_several_processes_give_what_one_gives(folders, name, count):
    one, several = folders[1] / name, folders[count] / name
    assert_same(one, several)
    rows = pd.read_csv(one / "particles.csv")
    assert rows["class_number"][[7, 110]].eq(0).all()  # unusable, in the first and the last part
    assert rows["class_number"].gt(0).mean() > 0.3


@pytest.mark.long
def test_many_small_classes_are_those_of_one_process(tmp_path):
    """Rounding once decided which of many classes are found here: 20 views, 30 particles each."""
    simulation = simulate(600, 20, size=48, snr=0.2, seed=5)
    simulation.images[7], simulation.images[500] = torch.nan, 3.0
    star = write_simulation(tmp_path / "stack", simulation)
    words = (f"particles={star}", "n_classes=20", "method=classify", "seed=3")
    run(load_config(None, [*words, f"output={tmp_path / '1'}", *SAME]))
    for count in (2, 3):  # the third has no particles: there are two parts
        process = command(*words, f"output={tmp_path / str(count)}", processes=count)
        assert process.returncode == 0, process.stderr
        assert_same(tmp_path / "1", tmp_path / str(count))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("method", ["mra", "rfa", "classify", "isac"])
def test_two_gpus_give_what_one_gives_in_deterministic_mode(method):
    result = bench_processes(
        processes=(1, 2), method=(method,), n=9000, k=4, size=32, deterministic=True, device="cuda"
    )
    assert all(row["same bits"] for row in result.rows)


def test_one_process_speaks(star, tmp_path):
    words = ("method=mra", "n_classes=3", "particle.max_shift=1px", "iterations=3")
    process = command(f"particles={star}", *words, f"output={tmp_path / '2'}")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("iteration   2") == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 600, 100_000])
def test_processes_have_whole_parts_of_one_division(monkeypatch, n, count):
    length = processes.part_length(n, 64, 24)
    assert length % 64 == 0
    assert -(-n // length) <= 24
    monkeypatch.setattr(processes, "world_size", lambda: count)
    owned = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        own = processes.shard(n, length)
        assert own.start in (n, own.start // length * length)
        owned.append(range(n)[own])
    assert [i for own in owned for i in own] == list(range(n))
    if n >= 100_000:
        assert max(map(len, owned)) - min(map(len, owned)) <= length + length % 64 + 64


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [100_000, 400_000, 1_000_000])
def test_batches_of_a_gpu_are_shared_equally(monkeypatch, n, count):
    batch = processes.even_batch(n, 16_570, 4096)
    assert 4096 <= batch <= 16_570
    monkeypatch.setattr(processes, "world_size", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(len(range(n)[processes.shard(n, processes.part_length(n, batch))]))
    assert max(shares) <= 1.005 * n / count


def test_batches_of_a_gpu_are_not_small_and_fit():
    assert processes.even_batch(9000, 16_570, 4096) == 4096
    assert processes.even_batch(9000, 500, 4096) == 500


def sum_in(order, values, rows, size):
    exact = processes.ExactSum(size, values.shape[2], torch.device("cpu"))
    for i in order:
        exact.add(values[i], rows[i])
    return exact.total()


def test_exact_sums_do_not_depend_on_the_order_and_are_the_sums_of_fractions():
    rng = np.random.default_rng(4)
    count, size, some, columns = 40, 6, 3, 5
    # Rows of all magnitudes, and within them chunks that differ by 10^18 and cancel.
    scale = 10.0 ** (rng.integers(-9, 9, (count, some, 1)))
    values = rng.normal(size=(count, some, columns)) * scale
    values[20:] = -values[:20] * (1 + 1e-9 * rng.normal(size=(20, some, columns)))
    rows = np.array([rng.permutation(size)[:some] for _ in range(count)])
    rows[20:] = rows[:20]
    truth = [[Fraction(0)] * columns for _ in range(size)]
    largest = np.zeros(size)
    for chunk, where in zip(values, rows, strict=True):
        for line, row in zip(chunk, where, strict=True):
            largest[row] = max(largest[row], abs(line).max())
            truth[row] = [t + Fraction(float(v)) for t, v in zip(truth[row], line, strict=True)]
    values, rows = torch.from_numpy(values), torch.from_numpy(rows)
    first = sum_in(range(count), values, rows, size)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(count)
        assert torch.equal(sum_in(order, values, rows, size), first)
    error = np.abs(first.numpy() - np.array(truth, dtype=float)).max(1)
    assert (error <= count * 2.0**-44 * largest).all()
    plain = [
        torch.zeros(size, columns, dtype=torch.float64).index_add(
            0, rows[list(order)].flatten(), values[list(order)].flatten(0, 1)
        )
        for order in (range(count), range(count - 1, -1, -1))
    ]
    assert not torch.equal(*plain)  # the order does change a sum of floating-point numbers


def test_exact_sums_hold_the_smallest_and_largest_numbers_and_tell_what_is_not_finite():
    numbers = [5e-324, 1e-290, 1.5e308, torch.inf, torch.nan, 3.0]
    values = torch.tensor(numbers, dtype=torch.float64)[:, None]
    exact = processes.ExactSum(6, 1, torch.device("cpu"))
    exact.add(values)
    exact.add(torch.zeros(6, 1))
    total = exact.total()[:, 0]
    assert total[0] == 0
    np.testing.assert_allclose(total[1:3].numpy(), [1e-290, 1.5e308], rtol=2.0**-44)
    assert total[3:5].isnan().all()
    assert total[5] == 3


def test_sums_that_depend_on_the_order_are_refused():
    with pytest.raises(TypeError, match="use ExactSum"):
        processes.sum_over_ranks(torch.ones(2))


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
