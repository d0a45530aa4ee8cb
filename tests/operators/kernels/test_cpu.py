"""The compiled CPU operators against float64 and against those in PyTorch."""

from __future__ import annotations

import itertools
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cryoalign.images.polar import Rings, reference_spectra, ring_spectra
from cryoalign.images.templates import templates_of
from cryoalign.operators.correlation import (
    correlation_peaks,
    correlation_table,
    table_peaks,
    unravel_place,
)
from cryoalign.operators.image_search import image_peaks
from cryoalign.operators.kernels import CRYOALIGN_NO_KERNELS, build, cpu
from cryoalign.operators.pose_refinement import refine_poses
from cryoalign.operators.ring_products import ring_factors
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.search.match import best_poses, match, prepare_target
from cryoalign.search.settings import Search


@pytest.fixture(autouse=True, scope="module")
def library() -> Iterator[Path]:
    """The library of these sources, in use."""
    if build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    made = build.build_cpu()
    cpu._load.cache_clear()  # it may have been looked for before it was there
    assert cpu.usable()
    yield made
    cpu._load.cache_clear()


def data(n: int, k: int, last_ring: int, snr: float = 0.1) -> Simulation:
    size = max(24, 2 * last_ring + 7)
    return simulate(n, k, size=size, snr=snr, max_shift=2.0, seed=n + k)


def grid(s: int) -> Tensor:
    """(s, 2) shifts, whole and fractional, some far enough for rings to leave the box."""
    generator = torch.Generator().manual_seed(s)
    shifts = (8 * torch.rand(s, 2, generator=generator) - 4) * 1.5
    shifts[::2] = shifts[::2].round()
    return shifts


def assert_peaks(table: Tensor, score: Tensor, place: Tensor) -> None:
    """Score (n, k) is the maximum of table (n, k, s, hands, a) in float64; place is where."""
    flat = table.flatten(2)
    best, where = flat.max(-1)
    torch.testing.assert_close(score.double(), best, rtol=0, atol=2e-6)
    held = flat.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(held, best, rtol=0, atol=2e-6)  # near equals are told by rounding
    assert (place == where).double().mean() > 0.9


# n, k, s, last ring, ring step, angles: all radices, one ring, odd remainders.
SIZES = [
    (1, 1, 1, 1, 1, 8),
    (17, 5, 3, 7, 1, 30),
    (3, 4, 9, 36, 1, 256),
    (16, 3, 2, 11, 2, 250),
    (2, 9, 2, 47, 1, 320),
    (5, 2, 3, 60, 3, 384),
    (33, 2, 1, 12, 1, 18),
    (2, 3, 2, 5, 1, 10),
]


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_peaks_against_float64(size, mirror) -> None:
    n, k, s, last_ring, step, angles = size
    made, rings, shifts = data(n, k, last_ring), Rings(1, last_ring, step, angles), grid(s)
    x64 = ring_spectra(made.images.double(), rings, shifts.double())
    y64 = reference_spectra(made.views.double(), rings)
    table = correlation_table(x64, y64, mirror)
    spectra = y64.to(torch.complex64)

    score, place = cpu.image_peaks(made.images, spectra, rings, shifts, mirror)
    assert score.shape == place.shape == (n, k, 1 + mirror)
    for hand in range(1 + mirror):
        alone = table[:, :, :, hand : hand + 1]
        at = unravel_place(place[..., hand], angles, mirror)
        assert torch.equal(at.mirror, torch.full_like(at.mirror, hand))
        assert_peaks(alone, score[..., hand], at.shift * angles + at.angle)

    assert cpu.spectra_peaks(x64.to(torch.complex64), spectra, mirror) is not None
    assert_peaks(table, *correlation_peaks(x64.to(torch.complex64), spectra, mirror))


def test_batches_and_threads_change_no_bit() -> None:
    made, rings, shifts = data(37, 3, 12), Rings(1, 12, angles=64), grid(5)
    spectra = reference_spectra(made.views, rings)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = cpu.image_peaks(made.images, spectra, rings, shifts, True)
        parts = [
            cpu.image_peaks(p, spectra, rings, shifts, True) for p in made.images.split((1, 20, 16))
        ]
        torch.set_num_threads(2)
        shared = cpu.image_peaks(made.images, spectra, rings, shifts, True)
    finally:
        torch.set_num_threads(before)
    for i in range(2):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
        assert torch.equal(shared[i], whole[i])


@pytest.mark.parametrize("mode", ["exhaustive", "adaptive"])
def test_the_choice_is_that_of_pytorch(mode, monkeypatch) -> None:
    made = simulate(60, 6, size=64, snr=0.05, seed=5)
    target = prepare_target(made.views, Search(max_shift=3, last_ring=25, mode=mode))
    label, pose, score = best_poses(made.images, target)
    monkeypatch.setenv(CRYOALIGN_NO_KERNELS, "1")
    assert not cpu.usable()
    slow_label, slow_pose, slow_score = best_poses(made.images, target)
    assert torch.equal(label, slow_label)
    assert torch.equal(pose.mirror, slow_pose.mirror)
    # The adaptive search in PyTorch, on half the angles first, here and there starts to refine from
    # another shift of its grid, half a grid step off.
    few = 1.0 if mode == "exhaustive" else 0.95
    same = ((score - slow_score).abs() < 1e-5) & ((pose.shift - slow_pose.shift).abs() < 1e-2).all(
        1
    )
    assert same.double().mean() >= few
    torch.testing.assert_close(pose.shift, slow_pose.shift, rtol=0, atol=0.15)


def test_images_without_signal_and_broken_ones() -> None:
    """A constant image scores 0 at the first place, as in PyTorch; NaN stays with its particle."""
    made, search = data(4, 2, 12), Search(max_shift=1, last_ring=12)
    whole = match(made.images, made.views, search)
    images = made.images.clone()
    images[1] = 0.1
    images[2, 15, 15] = torch.nan
    rings, shifts = search.rings(images.shape[-1]), search.shifts()
    spectra = reference_spectra(made.views, rings)
    score, place = cpu.image_peaks(images, spectra, rings, shifts, True)
    assert torch.equal(score[1], torch.zeros(2, 2))
    assert torch.equal(place[1], torch.tensor([[0, rings.n_angles]] * 2))
    assert score[2].isnan().all()
    assert torch.equal(score[[0, 3]].amax(-1), whole.score[[0, 3]])


def test_nan_where_one_shift_alone_meets_it() -> None:
    """A shift whose score is not a number loses every comparison, and must still be told."""
    made, rings = data(3, 2, 12), Rings(1, 12, angles=64)
    spectra = reference_spectra(made.views, rings)
    shifts = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    images = made.images.clone()
    images[1, 15, 0] = torch.nan  # centre 15: 15 px left of it, and the rings end at 12 + 3
    alone, _ = cpu.image_peaks(images, spectra, rings, shifts[[0, 2]], True)
    assert alone.isfinite().all()
    score, _ = cpu.image_peaks(images, spectra, rings, shifts, True)
    assert score[1].isnan().all()
    assert score[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_spectra_that_are_no_numbers(value: float) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 4, 5, 9, dtype=torch.complex64, generator=generator)
    y = torch.randn(2, 5, 9, dtype=torch.complex64, generator=generator)
    whole, _ = correlation_peaks(x, y)
    x[1, 2, 3, 4] = value
    score, found = cpu.spectra_peaks(x, y, True)
    slow, _ = table_peaks(x, ring_factors(y))
    assert score[1].isnan().all()
    assert not slow[1].isfinite().any()
    assert torch.equal(score[[0, 2]].amax(-1), whole[[0, 2]])
    assert ((found >= 0) & (found < 4 * 2 * 16)).all()


def test_a_weak_signal_on_a_large_constant_is_seen() -> None:
    """Its variance is eight times what counts as rounding."""
    made, rings, shifts = data(4, 2, 7), Rings(1, 7, angles=64), torch.zeros(1, 2)
    signal = made.images / made.images.std((1, 2), keepdim=True)
    images = (1 + 0.004 * signal).float()
    y64 = reference_spectra(made.views.double(), rings)
    x64 = ring_spectra(images.double(), rings, shifts.double())
    best = correlation_table(x64, y64, True).flatten(4).amax((2, 4))  # (n, k, hands)
    score, _ = cpu.image_peaks(images, y64.to(torch.complex64), rings, shifts, True)
    assert best.abs().max() > 0.3
    torch.testing.assert_close(score.double(), best, rtol=0, atol=1e-3)


def test_shifts_that_are_no_numbers_are_refused() -> None:
    made, rings = data(2, 2, 12), Rings(1, 12, angles=64)
    spectra = reference_spectra(made.views, rings)
    for bad in (torch.nan, torch.inf):
        shifts = torch.tensor([[0.0, 0.0], [bad, 0.0]])
        with pytest.raises(ValueError, match="finite"):
            image_peaks(made.images, spectra, shifts, 1, 1, 12, 64, True, None)
        # Past the check: no crash, the particle's own scores or NaN.
        score, _ = cpu.image_peaks(made.images, spectra, rings, shifts, True)
        assert score.shape == (2, 2, 2)


def test_the_operator_with_kernels_is_an_operator() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 5, 9, dtype=torch.complex64, generator=generator)
    y = torch.randn(2, 5, 9, dtype=torch.complex64, generator=generator)
    torch.library.opcheck(torch.ops.cryoalign.correlation_peaks, (x, y, True))
    lazily = correlation_peaks(x.transpose(0, 1).conj(), y.flip(0).conj())
    plainly = correlation_peaks(
        x.transpose(0, 1).conj_physical().contiguous(), y.flip(0).conj_physical().contiguous()
    )
    for lazy, plain in zip(lazily, plainly, strict=True):
        assert torch.equal(lazy, plain)


def test_references_of_zeros_score_zero() -> None:
    x = torch.randn(3, 2, 5, 9, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    score, place = correlation_peaks(x, torch.zeros(2, 5, 9, dtype=torch.complex64))
    assert torch.equal(score, torch.zeros(3, 2))
    assert torch.equal(place, torch.zeros(3, 2, dtype=torch.int64))


def test_equals_go_to_the_first_place() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 3, 9, dtype=torch.complex64, generator=generator).expand(2, 4, 3, 9)
    y = torch.randn(2, 3, 9, dtype=torch.complex64, generator=generator)
    _, place = cpu.spectra_peaks(x, y, True)
    assert (unravel_place(place, 16, True).shift == 0).all()


def test_what_the_kernels_do_not_serve_is_left_to_pytorch() -> None:
    made, shifts = data(3, 2, 9), grid(2)
    seven = Rings(1, 9, angles=28)
    assert (
        cpu.image_peaks(made.images, reference_spectra(made.views, seven), seven, shifts, True)
        is None
    )
    wide = reference_spectra(made.views.double(), Rings(1, 9))
    assert cpu.image_peaks(made.images.double(), wide, Rings(1, 9), shifts, True) is None


def refinement(n: int, k: int, size: int, last_ring: int, first_ring: int = 1) -> tuple:
    """Arguments of `refine_poses`, but the steps: starts about as far off as a search leaves them,
    so that the discs of some particles leave the box."""
    made = simulate(n, k, size=size, snr=0.1, max_shift=3.0, seed=n + k)
    generator = torch.Generator().manual_seed(n)
    angle = made.pose.angle + torch.randn(n, generator=generator)
    shift = made.pose.shift + 0.4 * torch.randn(n, 2, generator=generator)
    label = made.class_number - 1
    mirror = made.pose.mirror
    return made.images, templates_of(made.views), label, angle, shift, mirror, first_ring, last_ring


def widened(arguments: tuple) -> tuple:
    return tuple(a.double() if getattr(a, "dtype", None) == torch.float32 else a for a in arguments)


def loops_score(image: Tensor, reference: Tensor, pose: Pose, first: int, last: int) -> float:
    """The correlation coefficient over the disc, pixel by pixel, in float64."""
    size, linear = len(image), pose.linear().double().tolist()
    (dx, dy), rows = pose.shift.double().tolist(), []
    for y, x in itertools.product(range(size), repeat=2):
        ux, uy = x - size // 2 + dx, y - size // 2 + dy
        radius = math.hypot(ux, uy)
        weight = min(max(last + 1 - radius, 0.0), 1.0)
        weight *= min(max(radius - (first - 1), 0.0), 1.0) if first > 1 else 1.0
        at = [a * ux + b * uy + size // 2 for a, b in linear]
        column, row = math.floor(at[0]), math.floor(at[1])
        value = 0.0
        for j, i in itertools.product((0, 1), repeat=2):
            if weight and 0 <= row + j < size and 0 <= column + i < size:
                share = (1 - abs(at[0] - column - i)) * (1 - abs(at[1] - row - j))
                value += share * float(reference[row + j, column + i])
        rows.append((weight, float(image[y, x]), value))
    weight, a, b = np.array(rows).T
    a, b = a - np.average(a, weights=weight), b - np.average(b, weights=weight)
    return float((weight * a * b).sum() / np.sqrt((weight * a * a).sum() * (weight * b * b).sum()))


@pytest.mark.parametrize(("size", "last_ring", "first_ring"), [(31, 11, 1), (32, 14, 5)])
def test_scores_are_those_of_the_formula(size: int, last_ring: int, first_ring: int) -> None:
    arguments = refinement(6, 2, size, last_ring, first_ring)
    images, templates, label, angle, shift, mirror, *_ = arguments
    found, moved, score = refine_poses(*arguments, 0)
    torch.testing.assert_close(found, wrap_degrees(angle))
    torch.testing.assert_close(moved, shift)
    for i in range(6):
        pose = Pose(angle[i], shift[i], mirror[i])
        truth = loops_score(images[i], templates[label[i], 0], pose, first_ring, last_ring)
        assert abs(float(score[i]) - truth) < 1e-6


# Boxes, last rings and first rings: even and odd, a ring of pixels, discs larger than the box.
DISCS = [(90, 36, 1), (45, 18, 1), (64, 28, 9), (33, 3, 1), (41, 25, 1)]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("size", "last_ring", "first_ring"), DISCS)
def test_refined_poses_are_float64s(size, last_ring, first_ring, steps) -> None:
    arguments = refinement(41, 3, size, last_ring, first_ring)
    found = cpu.refine_poses(*arguments, steps)
    assert found is not None
    expected = refine_poses(*widened(arguments), steps)
    # In degrees and pixels; angles to 180 degrees are rounded by 1.5e-5.
    for one, other, rounding in zip(found, expected, (5e-5, 5e-6, 1e-6), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=rounding)
    moved = (found[1] - arguments[4]).abs().max() > 0.1
    assert bool(moved) == (steps > 0)


def test_refinement_is_the_same_in_any_batch_and_number_of_threads() -> None:
    arguments = refinement(37, 4, 48, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = cpu.refine_poses(*arguments, 2)
        rows = torch.tensor([30, 2, 11])
        few = cpu.refine_poses(
            arguments[0][rows], arguments[1], *(t[rows] for t in arguments[2:6]), 1, 20, 2
        )
        torch.set_num_threads(3)
        shared = cpu.refine_poses(*arguments, 2)
    finally:
        torch.set_num_threads(before)
    for one, other, part in zip(whole, shared, few, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[rows], part)


def test_refinement_leaves_its_input_and_takes_any_strides() -> None:
    images, templates, label, angle, shift, mirror, *rings = refinement(9, 2, 32, 12)
    kept = angle.clone(), shift.clone()
    plain = cpu.refine_poses(images, templates, label, angle, shift, mirror, *rings, 1)
    assert torch.equal(angle, kept[0])
    assert torch.equal(shift, kept[1])
    strided = cpu.refine_poses(
        images.mT.contiguous().mT, templates.flip(0).flip(0), label, angle.repeat(2, 1).T[:, 0],
        shift.T.contiguous().T, mirror.repeat_interleave(2)[::2], *rings, 1,
    )  # fmt: skip
    for one, other in zip(plain, strided, strict=True):
        assert torch.equal(one, other)


def test_refinement_of_particles_and_poses_that_are_no_numbers_or_far_away() -> None:
    images, templates, label, angle, shift, mirror, *rings = refinement(8, 2, 32, 12)
    plain = cpu.refine_poses(images, templates, label, angle, shift, mirror, *rings, 2)
    images, angle, shift = images.clone(), angle.clone(), shift.clone()
    images[0, 16, 16], images[1, 16, 16] = torch.nan, torch.inf
    angle[2], shift[3, 0], shift[4, 1] = torch.nan, torch.nan, torch.inf
    shift[5], shift[6] = 1e9, -1e30
    found = cpu.refine_poses(images, templates, label, angle, shift, mirror, *rings, 2)
    assert found[2][:5].isnan().all()
    assert torch.equal(found[2][5:7], torch.zeros(2))
    assert torch.equal(found[1][:2], shift[:2])
    assert torch.equal(found[1][5:7], shift[5:7])
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one[7:], other[7:])


def test_refinement_that_is_not_served_or_refused() -> None:
    arguments = refinement(3, 2, 32, 12)
    assert cpu.refine_poses(*widened(arguments), 1) is None
    images, templates, label, *others = arguments
    for wrong in (label + 1, label - 2):
        with pytest.raises(ValueError, match="2 references"):
            refine_poses(images, templates, wrong, *others, 1)


def copy_sources(folder: Path) -> None:
    for path in (*build.cpu_sources(), *build.SOURCES.glob("*.h")):
        shutil.copy(path, folder)


def test_a_stale_library_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_sources(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    library = tmp_path / build.cpu_library_name()
    library.touch()
    for name in ("peaks.cpp", "refine.cpp", "vectors.h"):
        source = (tmp_path / name).read_text()
        assert build.find_cpu_library() == library
        (tmp_path / name).write_text(source + "\n")
        assert build.find_cpu_library() is None
        (tmp_path / name).write_text(source)


def test_a_library_that_does_not_load_is_said_and_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_sources(tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    library = tmp_path / build.cpu_library_name()
    library.write_bytes(b"half a library")
    cpu._load.cache_clear()
    with pytest.warns(UserWarning, match="do not load.*rebuild them"):
        assert not cpu.usable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.usable()  # said once
    assert build.build_cpu() == library
    cpu._load.cache_clear()
    assert cpu.usable()


def test_stale_libraries_are_removed_beside_the_sources_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(command: list[str], verbose: bool) -> None:
        Path(command[-1]).touch()

    monkeypatch.setattr(build, "_run", fake)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    for folder, kept in ((tmp_path / "sources", False), (tmp_path / "cache", True)):
        folder.mkdir()
        (folder / "_cpu_old.so").touch()
        monkeypatch.setattr(build, "SOURCES", folder if not kept else tmp_path / "missing")
        assert build._link([], "_cpu_new.so", "_cpu_*.so", False) == folder / "_cpu_new.so"
        assert (folder / "_cpu_old.so").exists() == kept


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(build, "find_cpu_library", lambda: None)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(build.NoCompilerError, match=r"C\+\+ compiler"):
        build.build_cpu()
