"""Streams: every row once, whoever reads it, in blocks, in another order every epoch."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from cryoalign.learn.dataset import Normalise, ParticleDataset
from cryoalign.learn.stream import ParticleStream
from cryoalign.particles.stack import TensorStack

N = 103
IMAGES = torch.randn(N, 16, 16, generator=torch.Generator().manual_seed(0))
DEFOCUS = torch.arange(N) * 10.0


class Spy(TensorStack):
    """Remembers what was read."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(images)
        self.reads: list[list[int]] = []

    def read(self, rows):
        """Remember and read."""
        self.reads.append(rows.tolist())
        return super().read(rows)


def stream(**settings) -> ParticleStream:
    dataset = ParticleDataset(Spy(IMAGES), Normalise(7), metadata={"defocus_u": DEFOCUS})
    return ParticleStream(dataset, block=8, window=3, **settings)


def order(loader: DataLoader) -> list[int]:
    return torch.cat([batch["index"] for batch in loader]).tolist()


def test_a_stack_is_no_dataset() -> None:
    with pytest.raises(TypeError, match=r"ParticleStream\(ParticleDataset\("):
        ParticleStream(TensorStack(IMAGES))  # type: ignore[arg-type]


def test_samples_are_the_datasets_and_reads_are_blocks() -> None:
    found = stream()
    samples = list(found)
    index = [int(sample["index"]) for sample in samples]
    assert sorted(index) == list(range(N))
    expected = found.dataset.read(index)
    for name, values in expected.items():
        torch.testing.assert_close(torch.stack([s[name] for s in samples]), values)
    blocks = found.dataset.stack.reads[: -(-N // 8)]
    assert sorted(blocks) == [list(range(i, min(i + 8, N))) for i in range(0, N, 8)]
    assert blocks != sorted(blocks)
    # A window is read, then told: the first sample costs three blocks.
    again = stream()
    next(iter(again))
    assert len(again.dataset.stack.reads) == 3


def test_particles_of_different_blocks_are_mixed() -> None:
    first = [int(sample["index"]) // 8 for sample, _ in zip(stream(), range(8), strict=False)]
    assert len(set(first)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_repeat(workers) -> None:
    """Also in workers that outlive an epoch."""
    found = pickle.loads(pickle.dumps(stream(seed=3)))
    loader = DataLoader(found, batch_size=10, num_workers=workers, persistent_workers=workers > 0)
    orders = []
    for epoch in (0, 1, 0):
        found.set_epoch(epoch)
        orders.append(order(loader))
        assert sorted(orders[-1]) == list(range(N))
    assert orders[0] == orders[2] != orders[1]
    assert order(DataLoader(stream(shuffle=False), batch_size=10)) == list(range(N))


def test_processes_and_workers_have_orders_of_their_own() -> None:
    """Else particles of one place in their blocks would always meet."""
    one, other = stream(), stream()
    other.rank = 1
    assert [int(s["index"]) for s in one] != [int(s["index"]) for s in other]
    for seed in range(3):
        found = order(DataLoader(stream(seed=seed), batch_size=8, num_workers=2))
        # Batches of 8 come from workers in turn; a window is three of each, of blocks of 8, the
        # last of which has fewer.
        first = [i for start in (0, 16, 32) for i in found[start : start + 8]]
        second = [i for start in (8, 24, 40) for i in found[start : start + 8]]
        assert [i % 8 for i in first] != [i % 8 for i in second]


def test_more_workers_than_blocks() -> None:
    few = ParticleStream(ParticleDataset(TensorStack(IMAGES)), block=103)
    assert sorted(order(DataLoader(few, batch_size=10, num_workers=2))) == list(range(N))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0 and 4"):
        ParticleStream(ParticleDataset(TensorStack(IMAGES)), block=0)


SCRIPT = """
import json, sys, torch
from torch.utils.data import DataLoader
from cryoalign.learn.dataset import ParticleDataset
from cryoalign.runtime.processes import process_group, rank
from cryoalign.particles.stack import TensorStack
from cryoalign.learn.stream import ParticleStream
def load(stream, workers):
    return DataLoader(stream, 10, num_workers=workers)
if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        dataset = ParticleDataset(TensorStack(torch.zeros(103, 4, 4)))
        stream = ParticleStream(dataset, block=8, window=3)
        seen = {
            workers: torch.cat([b["index"] for b in load(stream, workers)]).tolist()
            for workers in (0, 2)
        }
        with open(f"{sys.argv[1]}/{rank()}.json", "w") as file:
            json.dump(seen, file)
"""


def test_two_processes_see_every_row_once(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    for workers in ("0", "2"):
        one, two = (seen[workers] for seen in ranks)
        assert sorted(one) == list(range(N // 2))
        assert sorted(two) == list(range(N // 2, N))
