"""ISAC end to end on particles with known views, some of them nothing but noise."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import ctf as ctf_formula
from oracle import ctf_average, some_optics
from sklearn.metrics import adjusted_rand_score

from bench.agreement import agreement
from cryoalign.app.run import run
from cryoalign.app.settings import load_config
from cryoalign.io.formats import write_images
from cryoalign.methods.isac import generations as module
from cryoalign.methods.isac import isac as top
from cryoalign.methods.isac.isac import UNSTABLE, StableClasses, classify_stable
from cryoalign.methods.isac.settings import Isac, scale_of
from cryoalign.methods.state import State
from cryoalign.particles.settings import Box, Particle
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.results.alignment import Alignment

GOOD, JUNK, VIEWS = 160, 30, 4
SETTINGS = Isac(images_per_group=40, runs=4, passes=2)
NEAR, FAR = Particle(max_shift="1 px"), Particle(max_shift="2 px")


@pytest.fixture(scope="module")
def made() -> Simulation:
    return simulate(n=GOOD, n_classes=VIEWS, size=40, snr=0.3, max_shift=2.0, seed=1)


@pytest.fixture(scope="module")
def images(made: Simulation) -> torch.Tensor:
    noise = torch.randn(JUNK, 40, 40, generator=torch.Generator().manual_seed(2))
    mixed = torch.cat([made.images, noise * made.images.std()])
    mixed[5] = torch.nan
    return mixed


@pytest.fixture(scope="module")
def truth(made: Simulation) -> np.ndarray:
    return np.concatenate([made.class_number.numpy(), np.zeros(JUNK, np.int64)])


@pytest.fixture(scope="module")
def run_and_states(images: torch.Tensor) -> tuple[StableClasses, list[State]]:
    states: list[State] = []
    found = classify_stable(
        images, particle=FAR, isac=SETTINGS, device="cpu", on_step=states.append
    )
    return found, states


def test_stable_classes_are_pure_and_junk_stays_out(run_and_states, truth) -> None:
    found, _ = run_and_states
    number = found.alignment.class_number.numpy()
    used = number > 0
    good = truth > 0
    assert used[good].mean() > 0.8
    assert used[~good].mean() < 0.3
    assert adjusted_rand_score(truth[used & good], number[used & good]) > 0.9
    assert set(truth[used & good]) == set(range(1, VIEWS + 1))


def test_every_particle_is_accounted_for_or_listed_with_a_reason(run_and_states) -> None:
    found, _ = run_and_states
    alignment = found.alignment
    counts = torch.bincount(alignment.class_number, minlength=len(alignment.averages) + 1)
    assert torch.equal(counts[1:], alignment.class_sizes)
    assert int(alignment.class_sizes.sum()) + len(alignment.rejected) == GOOD + JUNK
    listed = alignment.rejected.set_index("index")["reason"]
    assert set(listed.index) == set((alignment.class_number == 0).nonzero().squeeze(1).tolist())
    assert "NaN" in listed[5]
    assert (listed.drop(5) == UNSTABLE).all()
    assert (found.generation > 0).equal(alignment.class_number > 0)
    assert (found.pixel_error[alignment.class_number > 0] < SETTINGS.threshold).all()
    assert torch.isnan(found.pixel_error[5])
    assert int(alignment.class_sizes.min()) >= SETTINGS.least
    means = [
        found.pixel_error[alignment.class_number == c + 1].mean().item()
        for c in range(len(alignment.averages))
    ]
    assert alignment.class_frame()["pixel_error"].tolist() == pytest.approx(means)
    history = alignment.history
    assert history["accepted"].sum() == len(alignment.averages)
    assert history["accounted"].iloc[-1] == int(alignment.class_sizes.sum())


def test_poses_are_the_true_ones_up_to_each_class_frame(run_and_states, made, truth) -> None:
    alignment = run_and_states[0].alignment
    used = (alignment.class_number[:GOOD] > 0).nonzero().squeeze(1)
    k = len(alignment.averages)
    score = agreement(
        alignment.class_number[used] - 1, alignment.pose[used], made.class_number[used] - 1,
        made.pose[used], k,
    )  # fmt: skip
    assert score.right > 0.95
    assert score.angle < 2.5
    assert score.shift < 0.4


def test_a_kept_generation_is_gone_on_from(tmp_path) -> None:
    made = simulate(n=80, n_classes=2, size=32, snr=0.5, max_shift=1.0, seed=5)
    noise = torch.randn(40, 32, 32, generator=torch.Generator().manual_seed(3))
    images = torch.cat([made.images, noise * made.images.std()])
    settings = {
        "particle": NEAR,
        "isac": Isac(images_per_group=15, runs=3, passes=1),
        "device": "cpu",
    }
    states: list[State] = []
    found = classify_stable(images, **settings, on_step=states.append)
    assert len(states) > 1
    states[0].save(tmp_path / "state.npz")
    first = State.load(tmp_path / "state.npz")
    again = classify_stable(images, **settings, resume=first)
    assert torch.equal(again.alignment.class_number, found.alignment.class_number)
    assert torch.equal(again.generation, found.generation)
    with pytest.raises(ValueError, match="of 120 other particles"):
        classify_stable(images + 1, **settings, resume=first)


def test_repeats_start_from_other_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = simulate(n=60, n_classes=2, size=32, snr=0.2, max_shift=1.0, seed=5)
    labels: list[tuple[int, ...]] = []

    def spy(*args: Any) -> State:
        state = accept(*args)
        labels.append(tuple(state["label"].tolist()))
        return state

    accept = top.accept
    monkeypatch.setattr(top, "accept", spy)
    settings = Isac(images_per_group=15, runs=3, passes=1, repeats=3)
    found = classify_stable(made.images, particle=NEAR, isac=settings, iterations=1, device="cpu")
    assert len(labels) == len(set(labels)) == 3
    assert 0 < found.reproduced < 1
    assert set(found.matched["repeat"]) == {1, 2}


def test_started_by_likelihood_on_phase_flipped_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    made = simulate(n=60, n_classes=2, size=32, snr=2.0, max_shift=1.0, mirror=False, seed=4)
    optics = some_optics(60, pixel_size=4.0)
    transfer = ctf_formula(optics, 32)
    images = torch.fft.irfft2(torch.fft.rfft2(made.images.double()) * transfer).float()
    starts: list[Alignment] = []

    def spy(*args: Any, **more: Any) -> Alignment:
        starts.append(classify(*args, **more))
        return starts[-1]

    classify = module.classify
    monkeypatch.setattr(module, "classify", spy)
    settings = Isac(images_per_group=25, runs=3, passes=1, start="likelihood")
    found = classify_stable(
        images, optics=optics, particle=NEAR, isac=settings, iterations=1, device="cpu"
    )
    alignment = found.alignment
    assert [len(start.averages) for start in starts] == [2]
    used = alignment.class_number > 0
    assert used.double().mean() > 0.7
    number = alignment.class_number[used]
    assert adjusted_rand_score(made.class_number[used], number) > 0.9
    for c in range(len(alignment.averages)):
        own = (alignment.class_number == c + 1).nonzero().squeeze(1)
        expected = ctf_average(images[own], optics[own], alignment.pose[own]).float()
        assert float((alignment.averages[c] - expected).norm() / expected.norm()) < 5e-3


def test_what_does_not_fit_is_refused_before_work() -> None:
    with pytest.raises(ValueError, match="min_group_size 80 is above"):
        Isac(images_per_group=20, min_group_size=80)
    with pytest.raises(ValueError, match="from 4 to 12"):
        scale_of(Isac(), Particle(radius="15 px"), Box(32, None))
    with pytest.raises(ValueError, match=r"fewer than a class needs, isac\.images_per_group 200"):
        classify_stable(torch.randn(20, 32, 32), isac=Isac(), device="cpu")


def test_particles_are_shrunk_to_the_target_and_never_enlarged() -> None:
    scale = scale_of(Isac(), Particle(radius="58 px", max_shift="6 px"), Box(160, None))
    assert (scale.size, scale.factor, scale.last_ring, scale.max_shift) == (80, 2.0, 29, 3.0)
    assert scale_of(Isac(), Particle(radius="20 px"), Box(64, None)).factor == 1.0


def test_noise_alone_has_no_stable_class() -> None:
    noise = torch.randn(60, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = Isac(images_per_group=30, min_group_size=15, passes=1)
    with pytest.raises(ValueError, match="no class has 15 stable members"):
        classify_stable(noise, particle=NEAR, isac=settings, device="cpu")


def test_a_run_writes_stability_and_what_comes_out_again(tmp_path) -> None:
    made = simulate(n=60, n_classes=2, size=32, snr=0.5, max_shift=1.0, seed=4)
    write_images(tmp_path / "stack.mrcs", made.images, 3.0)
    words = [
        f"particles={tmp_path / 'stack.mrcs'}", f"output={tmp_path / 'run'}", "method=isac",
        "isac.images_per_group=25", "particle.max_shift=1 px", "isac.repeats=2", "isac.passes=1",
        "isac.runs=3", "embedding=false", "device=cpu",
    ]  # fmt: skip
    folder = run(load_config(None, words))
    table = pd.read_csv(folder / "stability.csv")
    assert len(table) == 60
    listed = pd.read_csv(folder / "rejected.csv")
    assert set(listed["index"]) == set(table["index"][table["class_number"] == 0])
    pairs = pd.read_csv(folder / "reproducibility.csv")
    assert (pairs["jaccard"] > 0.5).any()
    assert "reproduced" in (folder / "report.html").read_text()
    assert pd.read_csv(folder / "history.csv")["accounted"].iloc[-1] == 60 - len(listed)
