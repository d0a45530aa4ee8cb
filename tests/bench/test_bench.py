"""The bench's own arithmetic: bound, agreement, truth files, plain formulation, command."""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import accuracy, classes, coverage, peers, plain
from bench.__main__ import ENTRIES, main, parser
from bench.agreement import agreement
from bench.aligners import ALIGNERS, Aligner, align_cryoalign
from bench.bound import expected_medians, pose_covariance
from bench.data import read_set
from bench.result import Result, record
from cryoalign.images.geometry import pixel_grid
from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.io.formats import write_images
from cryoalign.operators.correlation import correlation_peaks
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, compose


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the bench has it; small products gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ellipse(amplitude: float, a: float, b: float) -> torch.Tensor:
    """(1, 64, 64) Gaussian of widths a along x, b along y."""
    x, y = pixel_grid((64, 64), torch.empty(0, dtype=torch.float64)).unbind(-1)
    return (amplitude * torch.exp(-0.5 * (x / a).square() - 0.5 * (y / b).square()))[None]


def test_bound_of_an_ellipse_is_its_integrals():
    amplitude, a, b = 1.7, 4.0, 6.0
    covariance = pose_covariance(ellipse(amplitude, a, b))[0]
    turn = (amplitude * (a**-2 - b**-2)) ** 2 * math.pi * (a * b) ** 3 / 4
    along_x, along_y = (amplitude**2 * math.pi * q / 2 for q in (b / a, a / b))
    exact = torch.diag(1 / torch.tensor([turn, along_x, along_y], dtype=torch.float64))
    torch.testing.assert_close(covariance, exact, rtol=1e-6, atol=1e-9)


def test_expected_medians_of_normal_errors():
    views = ellipse(1.7, 4.0, 4.4)
    sigma = pose_covariance(views)[0].diagonal().sqrt()
    medians = expected_medians(views, torch.zeros(5, dtype=torch.int64))
    assert medians.angle == pytest.approx(math.degrees(0.67449 * float(sigma[0])), rel=0.01)
    # Nearly equal deviations: the length of the error is Rayleigh's, median sigma sqrt(2 ln 2).
    mean = float(sigma[1:].square().mean().sqrt())
    assert medians.shift == pytest.approx(mean * math.sqrt(2 * math.log(2)), rel=0.01)


def random_pose(n: int, generator: torch.Generator) -> Pose:
    return Pose(
        360 * torch.rand(n, generator=generator) - 180,
        6 * torch.rand(n, 2, generator=generator) - 3,
        torch.rand(n, generator=generator) < 0.5,
    )


def test_agreement_knows_no_names_and_no_gauge():
    generator = torch.Generator().manual_seed(3)
    n, views = 400, 5
    view = torch.arange(n) % views
    truth, gauge = random_pose(n, generator), random_pose(views, generator)
    pose = compose(truth, gauge[view])
    label = torch.tensor([4, 2, 0, 1, 5])[view]  # class 3 of 6 stays empty
    perfect = agreement(label, pose, view, truth, 6)
    assert (perfect.rand_index, perfect.empty, perfect.views_found, perfect.right) == (1, 1, 5, 1)
    assert perfect.angle < 1e-3
    assert perfect.shift < 1e-4
    spoilt = torch.arange(n) < 100  # spread evenly over the classes
    turned = Pose(pose.angle + 30.0 * spoilt, pose.shift, pose.mirror)
    flipped = Pose(pose.angle, pose.shift, pose.mirror ^ spoilt)
    moved = Pose(pose.angle, pose.shift + 3.0 * spoilt[:, None], pose.mirror)
    for wrong in (turned, flipped, moved):
        assert agreement(label, wrong, view, truth, 6).right == 0.75
    wrong_class = torch.where(spoilt, label[(torch.arange(n) + 1) % n], label)
    score = agreement(wrong_class, pose, view, truth, 6)
    assert score.right <= 0.75
    assert score.rand_index < 0.7


def test_truth_files_take_particles_onto_views(tmp_path: Path):
    generator = torch.Generator().manual_seed(5)
    pose = random_pose(20, generator).to(torch.float64)
    matrix, shift = pose.inverse().matrix()[:, :2, :2], pose.inverse().matrix()[:, :2, 2]
    write_images(tmp_path / "a.mrcs", torch.randn(20, 16, 16))
    write_images(tmp_path / "a_views.mrcs", torch.randn(2, 16, 16))
    label = torch.arange(20) % 2
    np.savez(tmp_path / "a_truth.npz", label=label, B=matrix, shift=shift)
    known = read_set(tmp_path / "a")
    torch.testing.assert_close(known.pose.matrix(), pose.matrix())
    assert torch.equal(known.view, label)


def test_plain_formulation_finds_the_same_pose():
    # With one shift the normalisation changes no particle's best hand and angle.
    generator = torch.Generator().manual_seed(7)
    images, views = torch.randn(2, 6, 40, 40, generator=generator)
    rings, shifts = Rings(1, 15), torch.tensor([[1.0, -2.0]])
    _, place = correlation_peaks(
        ring_spectra(images, rings, shifts), ring_spectra(views, rings)[:, 0]
    )
    grid, here = (plain.points(1, 15, 256, s, 40) for s in (shifts, torch.zeros(1, 2)))
    references = plain.weigh(plain.features(views, here)[:, 0], 1)
    references[..., 0] = 0  # a constant has no angle, but it would prefer neither hand
    _, plain_place = plain.peaks(plain.features(images, grid), references)
    assert torch.equal(place, plain_place)


def test_every_entry_explains_itself(capsys: pytest.CaptureFixture[str]):
    main(["list"])
    listed = capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--help"])
    assert stopped.value.code == 0
    for name in ENTRIES:
        assert name in listed
        with pytest.raises(SystemExit) as stopped:
            parser().parse_args([name, "--help"])
        assert stopped.value.code == 0


def test_accuracy_meets_the_bound_on_a_small_set():
    (row,) = accuracy.run(n=300, views=3, size=48, snr=(0.3,)).rows
    assert row["class and mirror right %"] == 100
    # The median of 300 errors is itself uncertain by about 7 %.
    assert 0.8 < row["angle / bound"] < 1.25
    assert 0.8 < row["shift / bound"] < 1.25


def test_joint_accuracy_meets_the_bound_on_a_small_set():
    rows = accuracy.run(n=200, views=3, size=48, snr=(0.3,), joint=True).rows
    assert [row["method"] for row in rows] == ["search", "gauss-newton"]
    for row in rows[1:]:
        assert row["right %"] == 100
        for what in ("angle", "shift", "magnification", "defocus"):
            # 200 errors: 5 % of a root mean square; three of those, and 10 % for second order.
            assert 0.8 < row[f"{what} rms / bound"] < 1.25
    assert rows[0]["shift rms / bound"] > 1.3  # the CTF is in the bound, not in the search


def test_nothing_is_kept_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kept = []
    monkeypatch.setattr(
        "bench.result.Record.keep", lambda made: kept.append(made.entry) or Path("x.json")
    )
    command = ["interpolation", "--n", "4", "--size", "48", "--repeats", "1"]
    main(command)
    assert "bicubic" in capsys.readouterr().out
    assert not kept
    main([*command, "--keep"])
    assert kept == ["interpolation"]


def test_a_kept_result_names_no_folders(tmp_path: Path):
    made = record("blind", {"data": Path("/a/secret/place/e0.1")}, Result([{"x": 1.0}]))
    kept = made.keep(tmp_path)
    assert json.loads(kept.read_text())["result"]["rows"] == [{"x": 1.0}]
    assert "secret" not in kept.read_text()
    assert "e0.1" in kept.read_text()


def test_classes_scores_a_set_with_junk(tmp_path: Path):
    made = simulate(n=90, n_classes=3, size=32, snr=1.0, max_shift=1.0, mirror=False, seed=4)
    write_images(tmp_path / "a.mrcs", made.images)
    lines = "\n".join(f"{i + 1:06d}@a.mrcs" for i in range(90))
    (tmp_path / "a.star").write_text(f"data_\n\nloop_\n_rlnImageName #1\n{lines}\n")
    inverse = made.pose.inverse().matrix().double()
    label = made.class_number - 1
    label[:5] = -1
    np.savez(tmp_path / "a_truth.npz", label=label, B=inverse[:, :2, :2], shift=inverse[:, :2, 2])
    rows = classes.run(data=(tmp_path / "a",), seeds=(0, 1)).rows
    assert [row["seed"] for row in rows] == [0, 1, "mean"]
    assert rows[-1]["ARI"] > 0.9
    assert rows[-1]["views"] == rows[-1]["K"] == 3


def test_coverage_forgives_what_a_class_has_in_common():
    """A turn and a shift of every reference, and nothing else: no error is left."""
    generator = torch.Generator().manual_seed(0)
    n = 60
    truth = Pose(
        torch.rand(n, generator=generator).double() * 360 - 180,
        torch.rand(n, 2, generator=generator).double() * 4 - 2,
        torch.arange(n) % 3 == 0,
    )
    label = torch.arange(n) % 2
    turn, shift = torch.tensor([0.02, -0.01]), torch.tensor([[0.5, 0.2], [-0.3, 0.4]])
    gauge = Pose(turn.double()[label], shift.double()[label], torch.zeros(n, dtype=torch.bool))
    pose = compose(truth, gauge)
    root = torch.randn(n, 3, 3, generator=generator)
    covariance = root @ root.mT + torch.eye(3)
    error = coverage._errors(pose, truth)
    left = coverage._without_gauge(error, covariance, pose, label)
    assert error[:, 1:].norm(dim=1).min() > 0.3
    assert left.abs().max() < 1e-3  # a small turn is a turn to first order


def test_coverage_covers():
    rows = coverage.run(n=300, views=3, size=48, snr=(0.3,), last_ring=18).rows
    assert [row["set"] for row in rows] == [
        f"simulated SNR 0.3, {kind}" for kind in ("true views", "averages")
    ]
    for row in rows:
        for name in ("angle", "x", "y"):
            assert 90 < row[f"{name} covered"] < 99  # 95, three binomial deviations of 300, 1 more


SMALL = {"n": 60, "views": 3, "size": 48, "snr": (0.3,), "clean": 8}


def test_the_end_of_a_run_is_measured_part_by_part():
    made = ENTRIES["finish"](n=(120,), judged=60, k=2, size=32)
    parts = {row["part"]: row["of"] for row in made.rows}
    assert parts == {
        "read STAR": 120, "averages": 60, "quality": 60, "write STAR": 120, "tables": 120,
        "pictures": 120, "embedding": 120, "report": 120,
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["CPU seconds"] > 0 for row in made.rows)


def test_peers_that_are_absent_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.peers.importlib.util.find_spec", lambda name: None)
    made = peers.run(**SMALL)
    assert len(made.rows) == 1 + len(ALIGNERS)
    free, own, *absent = made.rows
    for row in (free, own):  # half the particles were mirrored
        assert row["right %"] == row["noise-free right %"] == 100
        assert row["angle °"] < 1
        assert row["noise-free shift px"] < 0.05
    assert {row["given"] for row in absent} == {
        "kornia is not installed",
        "aspire is not installed",
    }
    assert all(row.keys() == free.keys() and row["n"] is None for row in absent)
    assert "pip install" in made.notes[-1]


def test_a_peer_of_another_convention_is_refused(monkeypatch: pytest.MonkeyPatch):
    def other_way(images: torch.Tensor, reference: torch.Tensor, max_shift: float) -> Pose:
        pose = align_cryoalign(images, reference, max_shift)
        return Pose(-pose.angle, pose.shift, pose.mirror)

    peer = Aligner("other way", "cryoalign", other_way)
    monkeypatch.setattr("bench.peers.ALIGNERS", (ALIGNERS[0], peer))
    with pytest.raises(RuntimeError, match="its convention is another"):
        peers.run(**SMALL)


@pytest.mark.long
@pytest.mark.parametrize("package", ["kornia", "aspire"])
def test_peers_find_poses(package: str, monkeypatch: pytest.MonkeyPatch):
    """Their conventions: noise-free poses to their grids, which `peers.run` asks for too."""
    if importlib.util.find_spec(package) is None:  # importing ASPIRE would leave a log folder
        pytest.skip(f"{package} is not installed")
    some = (ALIGNERS[0], *(peer for peer in ALIGNERS if peer.package == package and peer.wide))
    monkeypatch.setattr("bench.peers.ALIGNERS", some)
    for row in peers.run(**SMALL).rows[1:]:
        # Their grids: angles every degree, Reddy-Chatterji's every 7.5 in 48 px.
        assert row["noise-free angle °"] < (7.5 if "Reddy" in row["aligner"] else 1.0)
        assert row["noise-free shift px"] < (1.0 if package == "aspire" else 0.1)
