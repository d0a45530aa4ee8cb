import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from cryoalign.images.ctf import optics_from_relion, phase_flip
from cryoalign.images.fourier import fourier_resize
from cryoalign.images.geometry import transform
from cryoalign.images.masks import normalise, soft_mask
from cryoalign.io.stack import read_particles
from cryoalign.learn import dataset as module
from cryoalign.learn.dataset import (
    FourierCrop,
    Mask,
    Normalise,
    ParticleDataset,
    PhaseFlip,
    RandomPose,
)
from cryoalign.particles.simulate import simulate, write_simulation
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Pose


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    made = simulate(23, 2, size=40, snr=1.0, max_shift=1.0, seed=0)
    folder = tmp_path_factory.mktemp("set")
    write_simulation(folder, made)
    return made, folder / "particles.star"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_particle_once_with_its_metadata(star, workers) -> None:
    made, path = star
    dataset = ParticleDataset(read_particles(path), Normalise(18), FourierCrop(32), Mask(12))
    dataset = pickle.loads(pickle.dumps(dataset))
    loader = DataLoader(dataset, batch_size=5, shuffle=True, num_workers=workers)
    batches = list(loader)
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == list(range(23))
    images = torch.cat([batch["image"] for batch in batches])
    expected = fourier_resize(normalise(made.images, 18), 32) * soft_mask(32, 12)
    torch.testing.assert_close(images, expected[index])


def test_ranks_share_without_overlap(star, monkeypatch) -> None:
    seen: list[int] = []
    for rank in range(3):
        monkeypatch.setattr(
            module, "shard", lambda n, rank=rank: slice(rank * n // 3, (rank + 1) * n // 3)
        )
        dataset = ParticleDataset(read_particles(star[1]), rows=torch.arange(0, 23, 2))
        seen += [int(sample["index"]) for sample in dataset]
    assert seen == list(range(0, 23, 2))


def test_metadata_are_the_star_files() -> None:
    images = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    stack = TensorStack(images, pixel_size=2.0)
    stack.table = pd.DataFrame(  # type: ignore[attr-defined]
        {
            "rlnDefocusU": [9000.0, 12000.0, 15000.0], "rlnDefocusV": [9500.0, 12000.0, 14000.0],
            "rlnDefocusAngle": [0.0, 30.0, 60.0], "rlnVoltage": 300.0,
            "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1,
            "rlnAnglePsi": [10.0, 20.0, 30.0], "rlnOriginXAngst": [2.0, 4.0, 6.0],
            "rlnOriginYAngst": 0.0, "rlnIsFlip": [0, 1, 0],
        }
    )  # fmt: skip
    batch = ParticleDataset(stack, PhaseFlip(), FourierCrop(16)).read([2, 1])
    optics = optics_from_relion(stack.table, None, 2.0)  # type: ignore[attr-defined]
    assert optics is not None
    expected = fourier_resize(phase_flip(images[[2, 1]], optics[[2, 1]]), 16)
    torch.testing.assert_close(batch["image"], expected)
    assert batch["pixel_size"].tolist() == [4.0, 4.0]
    assert batch["angle"].tolist() == [30.0, 20.0]
    assert batch["shift"].tolist() == [[1.5, 0.0], [1.0, 0.0]]
    assert batch["mirror"].tolist() == [False, True]


@pytest.mark.parametrize("known", [True, False])
def test_a_random_pose_is_told(known) -> None:
    made = simulate(6, 1, size=40, snr=float("inf"), max_shift=1.0, seed=0)
    pose = made.pose.to(torch.float32)
    dataset = ParticleDataset(
        TensorStack(made.images), RandomPose(1.5), metadata=vars(pose) if known else {}
    )
    torch.manual_seed(0)
    batch = dataset.read(range(6))
    assert batch["mirror"].any()
    told = Pose(batch["angle"], batch["shift"], batch["mirror"])
    target = made.views.expand(6, -1, -1) if known else made.images
    error = (transform(batch["image"], told) - target).square().mean() / target.square().mean()
    assert error < 0.01
    assert (batch["image"] - made.images).square().mean() / target.square().mean() > 0.1


def test_what_does_not_fit_is_refused() -> None:
    stack = TensorStack(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="2 rows, the stack 3"):
        ParticleDataset(stack, metadata={"angle": torch.zeros(2)})
    with pytest.raises(ValueError, match="PhaseFlip needs defocus_u"):
        ParticleDataset(stack, PhaseFlip())[0]
    with pytest.raises(IndexError, match="sample 3 of 3"):
        ParticleDataset(stack)[3]
    with pytest.raises(TypeError, match="reads several"):
        ParticleDataset(stack)[0:2]  # type: ignore[index]
    with pytest.raises(TypeError, match="read_particles"):
        ParticleDataset("particles.star")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dataset\.stack"):
        ParticleDataset(ParticleDataset(stack))  # type: ignore[arg-type]
    for wrong in ([Normalise(3)], Normalise):
        with pytest.raises(TypeError, match="is no transform"):
            ParticleDataset(stack, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (np.array([0, 3]), ValueError, "row 3 is not in the stack: rows are 0 to 2"),
        ([-1], ValueError, "row -1"),
        (np.ones(2, bool), ValueError, "mask of 2, the stack has 3"),
        (torch.tensor([0.0, 1.0]), TypeError, "whole numbers"),
        (np.zeros((2, 2), int), ValueError, "one-dimensional"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, error, words) -> None:
    with pytest.raises(error, match=words):
        ParticleDataset(torch.zeros(3, 8, 8), rows=rows)


@pytest.mark.parametrize(
    "rows",
    [
        np.array([1, 2]), np.array([2, 1], np.int32)[::-1], [1, 2], range(1, 3),
        np.array([False, True, True]), torch.tensor([False, True, True]),
    ],
)  # fmt: skip
def test_rows_are_numbers_or_a_mask(rows) -> None:
    dataset = ParticleDataset(np.arange(48.0).reshape(3, 4, 4), rows=rows)
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert batch["index"].tolist() == [1, 2]
    assert batch["image"].dtype == torch.float32
    assert batch["image"][:, 0, 0].tolist() == [16.0, 32.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Normalise(-1), "radius must be above 0 px, not -1"),
        (lambda: Mask(0), "radius must be above 0 px"),
        (lambda: Mask(3, -1), "edge must be at least 0 px"),
        (lambda: FourierCrop(0), "size must be a whole number"),
        (lambda: FourierCrop(7.5), "not 7.5"),
        (lambda: RandomPose(-1), "max_shift must be at least 0"),
    ],
)
def test_transforms_refuse_what_they_cannot_do(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()
