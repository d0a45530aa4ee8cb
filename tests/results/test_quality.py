"""Junk, error bars and ranks against the truth of simulated particles."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import curves_by_row
from sklearn.metrics import roc_auc_score

from bench.agreement import pose_errors
from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.settings import Likelihood
from cryoalign.methods.mra import align_multi_reference
from cryoalign.particles.prepare import prepare
from cryoalign.particles.settings import Images, Particle
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Found
from cryoalign.report.page import flags, write_report
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import ClassSums, class_sums
from cryoalign.results.evidence import LEAST_EVIDENCE, ODD, Scope, judge, junk_score, trials_of
from cryoalign.results.quality import (
    Quality,
    compactness,
    effective_classes,
    judge_classes,
    posterior_and_margin,
)

N, K, SIZE = 600, 3, 40
PARTICLE = Particle(radius="15 px", max_shift="2 px")
NEAR = Particle(max_shift="1 px")


def stained() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Particles of which 5 % are noise and 5 % blobs of ice; views; which are which."""
    made = simulate(n=N, n_classes=K, size=SIZE, snr=0.2, max_shift=2.0, seed=1)
    generator = torch.Generator().manual_seed(0)
    noise = made.images[::10].std() * torch.randn(N // 10, SIZE, SIZE, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE) - 14.0, torch.arange(SIZE) - 25.0, indexing="ij")
    noise[1::2] += 1.5 * noise.std() * torch.exp(-(x**2 + y**2) / (2 * 6.0**2))
    images = made.images.clone()
    images[::10] = noise
    kind = torch.full((N,), -1)
    kind[::10] = torch.arange(N // 10) % 2
    return images, made.views, kind, made.class_number


@pytest.fixture(scope="module")
def judged() -> tuple[Alignment, torch.Tensor]:
    images, views, kind, _ = stained()
    return align_multi_reference(images, views, iterations=3, particle=PARTICLE, device="cpu"), kind


def test_noise_and_ice_are_told_from_particles(judged: tuple[Alignment, torch.Tensor]) -> None:
    found, kind = judged
    table = found.to_frame()
    junk = (kind >= 0).numpy()
    marked = (table["junk_score"] > 0).to_numpy()
    assert roc_auc_score(junk, table["junk_score"]) > 0.97
    assert marked[(kind == 0).numpy()].mean() > 0.9  # by evidence
    assert (table["evidence"][(kind == 0).numpy()] < LEAST_EVIDENCE).mean() > 0.9
    # Planes are subtracted from all particles, and ice loses what it has of one.
    assert marked[(kind == 1).numpy()].mean() >= 0.8
    assert (table["oddness"][(kind == 1).numpy()] > ODD).mean() >= 0.8  # by what is left
    assert marked[~junk].mean() < 0.03


class Counting(TensorStack):
    """Counts the images that are read."""

    count = 0

    def read(self, rows: torch.Tensor | slice) -> torch.Tensor:
        images = super().read(rows)
        self.count += len(images)
        return images


def test_judging_reads_every_particle_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the few once more that the noise is measured on."""
    monkeypatch.setattr("cryoalign.results.evidence.SAMPLE", 20)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # the next batch is read ahead
    made = simulate(n=400, n_classes=K, size=24, snr=0.2, max_shift=1.0, seed=1)
    stack = Counting(made.images)
    particles = prepare(stack, Images(cache="none"), device="cpu")
    label = made.class_number - 1
    sums = class_sums(particles, made.pose, label, K)
    scope = Scope(soft_mask(24, 9, 4), Rings(last_ring=9), 1000.0)
    stack.count = 0
    judge(particles, Found(label, made.pose, torch.zeros(400)), sums, scope)
    assert stack.count == 400 + 20


@pytest.mark.gpu
def test_a_gpu_judges_as_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks smaller than a batch."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr("cryoalign.results.evidence.CUDA_CHUNK", 70 * SIZE**2)
    made = simulate(n=N, n_classes=K, size=SIZE, snr=0.2, max_shift=2.0, seed=1)
    label, found = made.class_number - 1, []
    for device in ("cpu", "cuda"):
        particles = prepare(made.images, device=device, batch_size=256)
        sums = class_sums(particles, made.pose, label, K)
        scope = Scope(soft_mask(SIZE, 15, 4, device), Rings(last_ring=15), 1000.0)
        score = torch.zeros(N)
        found.append(judge(particles, Found(label, made.pose, score), sums, scope))
    # A GPU keeps images in half precision. That alone, on a CPU, changes oddness by up to 0.006 and
    # junk scores by up to 0.02.
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=2e-3, atol=3e-2, msg=name)


def test_junk_is_set_aside_and_everything_adds_up() -> None:
    images, views, kind, _ = stained()
    images[3] = torch.nan
    aside = align_multi_reference(
        images,
        views,
        iterations=3,
        particle=PARTICLE,
        quality=Quality(junk="set_aside"),
        device="cpu",
    )
    table, reasons = aside.to_frame(), aside.rejected["reason"]
    out = (aside.class_number == 0).numpy()
    assert int(aside.class_sizes.sum()) + len(aside.rejected) == N
    assert out.sum() == len(aside.rejected)
    assert np.flatnonzero(out).tolist() == aside.rejected["index"].tolist()
    assert table.loc[out].drop(columns=["index", "class_number", "mirror"]).isna().all(axis=None)
    assert (table["junk_score"].dropna() <= 0).all()
    assert out[(kind >= 0).numpy()].mean() > 0.85
    assert {"junk: no more than noise", "junk: unlike the others"} < set(reasons)
    assert (aside.class_frame()["junk_share"] == 0).all()
    # Half-sets are those of the rows, whatever is left out.
    curves = curves_by_row(images, aside, soft_mask(SIZE, 15, 4.0))
    torch.testing.assert_close(aside.frc, curves, atol=1e-3, rtol=0)
    # The averages are of the others alone.
    again = align_multi_reference(
        prepare(images[~out], max_rejected=0, device="cpu"), views, iterations=1, particle=PARTICLE
    )
    first = [list(each.class_quality["reference"]).index(1) for each in (aside, again)]
    likeness = torch.corrcoef(
        torch.stack([aside.averages[first[0]], again.averages[first[1]]]).flatten(1)
    )
    assert float(likeness[0, 1]) > 0.98


def test_intervals_cover_the_truth() -> None:
    made = simulate(n=900, n_classes=3, size=SIZE, snr=0.3, max_shift=2.0, seed=2)
    found = align_multi_reference(made.images, made.views, iterations=3, particle=PARTICLE)
    right, error = pose_errors(found.class_number - 1, found.pose, made.class_number - 1, made.pose)
    assert right.double().mean() > 0.98
    table = found.to_frame()[["angle_sd", "shift_x_sd", "shift_y_sd"]]
    held = error[right].abs() <= 1.96 * torch.tensor(table.to_numpy("float64"))[right]
    share = held.double().mean(0)
    # Two points for what the first order leaves out, three standard deviations of a binomial.
    sampling = 3 * (0.95 * 0.05 / int(right.sum())) ** 0.5
    assert ((share - 0.95).abs() < 0.02 + sampling).all(), share
    spread = error[right].square().mean(0).sqrt()
    assert ((spread / torch.tensor(table.to_numpy("float64"))[right].median(0).values) < 1.3).all()


@pytest.mark.parametrize("box", [None, 32])
def test_error_bars_are_in_pixels_of_the_input(box: int | None) -> None:
    made = simulate(n=200, n_classes=2, size=64, snr=0.3, max_shift=2.0, seed=2)
    found = align_multi_reference(
        made.images, made.views, iterations=1, images=Images(box=box),
        particle=Particle(max_shift="1 px" if box else "2 px"),
    )  # fmt: skip
    right, error = pose_errors(found.class_number - 1, found.pose, made.class_number - 1, made.pose)
    assert right.double().mean() > 0.95
    table = found.to_frame()[["angle_sd", "shift_x_sd", "shift_y_sd"]]
    spread = error[right].square().mean(0).sqrt()
    ratio = spread / torch.tensor(table.to_numpy("float64"))[right].median(0).values
    assert ((ratio > 0.75) & (ratio < 1.33)).all(), ratio


def test_it_is_saved_and_loaded(judged: tuple[Alignment, torch.Tensor], tmp_path) -> None:
    found, _ = judged
    found.save(tmp_path / "a.npz")
    again = Alignment.load(tmp_path / "a.npz")
    pd.testing.assert_frame_equal(again.to_frame(), found.to_frame(), check_exact=True)
    pd.testing.assert_frame_equal(again.class_frame(), found.class_frame(), check_exact=True)
    bare = dataclasses.replace(found, particle_quality=pd.DataFrame(), class_quality=pd.DataFrame())
    bare.save(tmp_path / "b.npz")  # what earlier versions wrote
    assert list(Alignment.load(tmp_path / "b.npz").to_frame()) == list(bare.to_frame())
    with pytest.raises(ValueError, match="as many rows"):
        dataclasses.replace(found, particle_quality=found.particle_quality[:-1])


def test_the_report_shows_it(judged: tuple[Alignment, torch.Tensor], tmp_path) -> None:
    page = write_report(judged[0], tmp_path).read_text(encoding="utf-8")
    for words in (
        "Quality of the particles",
        "marked as junk",
        "effective classes",
        "compactness",
        "rank",
    ):
        assert words in page
    assert "pose error (median standard deviation)" in page


def test_posterior_and_margin() -> None:
    known = posterior_and_margin(torch.tensor([0.6, 1.0]), torch.tensor([0.3, 0.0]))
    assert known["posterior"].tolist() == pytest.approx([0.6, 1.0])
    assert known["margin"].tolist() == pytest.approx([np.log(2), 87.498], abs=1e-3)


def test_classification_tells_how_sure_it_is() -> None:
    made = simulate(n=120, n_classes=3, size=32, snr=0.5, max_shift=1.0, seed=3)
    found = classify(made.images, 3, particle=NEAR, likelihood=Likelihood(cycles=1), device="cpu")
    table = found.to_frame()
    assert table["posterior"].between(0.5, 1.0001).all()
    assert (table["margin"] > 0).all()
    assert table[["evidence", "angle_sd", "junk_score"]].notna().all(axis=None)
    assert sorted(found.class_frame()["rank"]) == [1, 2, 3]


def test_the_junk_score_has_its_zero_at_either_limit() -> None:
    evidence = torch.tensor([LEAST_EVIDENCE, 100.0, 100.0, LEAST_EVIDENCE - 2])
    score = junk_score(evidence, torch.tensor([0.0, ODD, 0.0, 0.0]))
    torch.testing.assert_close(score, torch.tensor([0.0, 0.0, -(ODD**2) / 2, 2.0]))


def test_evidence_keeps_its_promise_of_noise() -> None:
    """Noise alone, aligned to anything: one in twenty at most seems a particle."""
    made = simulate(n=N, n_classes=K, size=SIZE, snr=0.2, max_shift=2.0, seed=1)
    images = torch.randn(N, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    images[0] = torch.nan  # set aside, it moves no other into the other half
    found = align_multi_reference(images, made.views, iterations=1, particle=PARTICLE, device="cpu")
    assert (found.to_frame()["evidence"] > LEAST_EVIDENCE).mean() < 0.05
    assert any("marked as junk" in flag for flag in flags(found))


def test_compactness_is_the_share_of_what_members_share() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = soft_mask(32, 12, 2.0)
    inside = mask > 0
    common = torch.randn(2, 32, 32, generator=generator)
    share, count = 0.25, 100
    members = (
        share**0.5 * common[:, None, None]
        + (1 - share) ** 0.5 * torch.randn(2, 2, count, 32, 32, generator=generator)
    ) * inside
    total = members.sum(2).transpose(0, 1).double()  # (half, class, h, w)
    counts = torch.full((2, 2), count)
    torch.testing.assert_close(
        compactness(ClassSums(total, counts), mask), torch.tensor([share, share]), atol=0.04, rtol=0
    )
    counts[1, 0] = 0
    total[1, 0] = 0
    assert compactness(ClassSums(total, counts), mask).isnan().tolist() == [True, False]


def test_ranks_go_from_good_to_junk_to_empty() -> None:
    label = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    junk = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    table = judge_classes(torch.tensor([0.2, 0.5, 0.3, torch.nan]), label, junk)
    assert table["rank"].tolist() == [2, 3, 1, 4]
    assert table["junk_share"].tolist()[:3] == [0.0, 0.75, 0.0]
    assert np.isnan(table["junk_share"][3])


def test_flags_of_junk_need_junk(judged: tuple[Alignment, torch.Tensor]) -> None:
    found, _ = judged
    assert flags(found) == []  # a tenth is no reason
    table = found.class_quality.assign(junk_share=[0.0, 0.6, 0.0])
    (flag,) = flags(dataclasses.replace(found, class_quality=table))
    assert flag.startswith("Most particles of class 2 are marked as junk")


def test_numbers_of_a_run() -> None:
    assert effective_classes(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert effective_classes(torch.tensor([9, 0, 0])) == pytest.approx(1)
    assert trials_of(2, 1.0, 1 / (2 * np.pi), mirror=True) == pytest.approx(2 * 9 * 2)


def test_few_particles_and_small_classes_are_no_junk() -> None:
    """Four particles have no others to be odd among; an average of one says nothing."""
    four = simulate(n=4, n_classes=1, size=32, snr=1.0, max_shift=1.0, seed=2)
    found = align_multi_reference(
        four.images, four.views, iterations=1, particle=NEAR, device="cpu"
    )
    assert (found.particle_quality["junk_score"] <= 0).all()
    made = simulate(n=60, n_classes=20, size=32, snr=1.0, max_shift=1.0, seed=2)
    found = align_multi_reference(
        made.images, made.views, iterations=1, particle=NEAR, device="cpu"
    )
    table = found.to_frame()
    assert table["evidence"].isna().mean() > 0.9  # three a class: hardly a half has four
    unsaid = table["evidence"].isna()
    odd = (table["oddness"].clip(lower=0) ** 2 - ODD**2) / 2
    np.testing.assert_allclose(table["junk_score"][unsaid], odd[unsaid], rtol=1e-5)


def test_noise_alone_is_flagged_when_it_is_set_aside() -> None:
    noise = torch.randn(60, 32, 32, generator=torch.Generator().manual_seed(4))
    views = simulate(n=1, n_classes=2, size=32, seed=2).views
    found = align_multi_reference(
        noise, views, iterations=2, particle=NEAR,
        quality=Quality(junk="set_aside"), device="cpu",
    )  # fmt: skip
    aside = int((found.class_number == 0).sum())
    assert aside > 45
    assert int(found.class_sizes.sum()) + aside == 60
    assert any("are marked as junk" in flag for flag in flags(found, 1.0))
