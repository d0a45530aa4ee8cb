import pickle

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from cryoalign import dataset as module
from cryoalign.ctf import optics_from_relion, phase_flip
from cryoalign.dataset import FourierCrop, Mask, Normalise, ParticleDataset, PhaseFlip, RandomPose
from cryoalign.filters import fourier_resize, normalise, soft_mask
from cryoalign.geometry import transform
from cryoalign.io import read_particles
from cryoalign.particles import TensorStack
from cryoalign.pose import Pose
from cryoalign.synthetic import simulate, write_simulation


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
