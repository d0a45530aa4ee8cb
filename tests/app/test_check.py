"""The preflight lists everything a run would stumble over, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
from rich.console import Console

from cryoalign.app.check import CheckReport, check_stack
from cryoalign.io.problems import InputError
from cryoalign.io.stack import read_particles
from cryoalign.methods.classify.classify import Classification
from cryoalign.methods.isac.isac import StableClassification
from cryoalign.methods.mra import MultiReference
from cryoalign.methods.rfa import ReferenceFree
from cryoalign.particles.settings import Images, Particle

MakeStack = Callable[..., np.ndarray]


def method(radius: int | None, max_shift: float) -> MultiReference:
    radius_px = None if radius is None else f"{radius} px"
    return MultiReference(n_classes=1, particle=Particle(radius_px, f"{max_shift} px"))


def _shown(report: CheckReport) -> str:
    text = StringIO()
    Console(width=400, file=text).print(report.render())
    return text.getvalue()


def _star(path: Path, names: list[str], **columns: object) -> Path:
    starfile.write(pd.DataFrame({"rlnImageName": names, **columns}), path)
    return path


def test_a_good_stack_has_no_problems(shared_data: Path) -> None:
    report = check_stack(shared_data / "real" / "apoferritin.star", method(40, 4))
    assert report.problems == ()
    assert (report.n_particles, report.shape, report.pixel_size) == (2000, (96, 96), 1.5)
    assert [stack.path.name for stack in report.stacks] == ["apoferritin.mrcs"]
    assert 3e8 < report.memory_bytes < 2e9
    text = _shown(report)
    for fact in ("2000", "96 x 96", "1.5 Å", "0.0369 GB", "no problems"):
        assert fact in text


def test_everything_is_listed_with_row_and_remedy(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("a.mrcs", n=4)
    make_stack("small.mrcs", n=4, size=(12, 12))
    (tmp_path / "cut.mrcs").write_bytes((tmp_path / "a.mrcs").read_bytes()[:3000])
    (tmp_path / "odd.tif").write_bytes(b"II*")
    names = ["1@a.mrcs", "0@a.mrcs", "5@a.mrcs", "1@gone.mrcs", "1@small.mrcs", "1@cut.mrcs"]
    star = _star(
        tmp_path / "p.star",
        [*names, "1@odd.tif", "a.mrcs", "2@a.mrcs"],
        rlnAnglePsi=[0, 1, 2, 3, 4, 5, 6, 7, "west"],
    )
    report = check_stack(star, method(6, 3))
    wanted = {
        2: "image 0",
        3: "image 5",
        4: "missing",
        5: "12 x 12",
        6: "truncated",
        7: "'.tif'",
        8: "'a.mrcs'",
        9: "west",
    }
    by_row = {problem.row: problem.what for problem in report.problems}
    assert set(by_row) == {*wanted, None}
    for row, words in wanted.items():
        assert words in by_row[row]
    assert "last_ring 6" in by_row[None]
    assert all(problem.file == star and problem.remedy for problem in report.problems)
    text = _shown(report)
    assert "9 problem(s)" in text
    assert all(problem.what.split(" ")[0] in text for problem in report.problems)


def test_check_and_read_tell_the_same(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("a.mrcs", n=2)
    star = _star(tmp_path / "p.star", [f"{i}@a.mrcs" for i in range(400)])
    with pytest.raises(InputError) as told:
        read_particles(star)
    report = check_stack(star, method(4, 1))
    assert told.value.problems == report.problems
    # 398 rows alike: a hundred one by one, one more for the rest.
    assert len(report.problems) == 101
    assert "297 later rows have the same problem" in report.problems[-1].what


@pytest.mark.parametrize("size", [31, 32])
def test_rings_and_shifts_must_stay_in_the_box(
    tmp_path: Path, make_stack: MakeStack, size: int
) -> None:
    make_stack("a.mrcs", size=(size, size))
    for last_ring in range(2, 17):
        problems = check_stack(tmp_path / "a.mrcs", method(last_ring, 3)).problems
        # Furthest sample from the centre pixel size // 2 towards the nearer edge's last pixel.
        fits = size // 2 + last_ring + 3 <= size - 1
        assert (not problems) == fits, (last_ring, problems)
        if problems:
            assert "particle.radius" in problems[0].remedy


def test_what_the_search_cannot_use(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("flat.mrcs", size=(16, 20))
    assert "not square" in check_stack(tmp_path / "flat.mrcs").problems[0].what
    make_stack("tiny.mrcs", size=(6, 6))
    assert "leaves no ring" in check_stack(tmp_path / "tiny.mrcs", method(None, 3)).problems[0].what
    make_stack("a.mrcs", size=(32, 32))
    small = Images(box=16)
    assert check_stack(tmp_path / "a.mrcs", method(None, 3), small).problems == ()
    (problem,) = check_stack(tmp_path / "a.mrcs", method(10, 3), small).problems
    assert "last_ring 10" in problem.what
    large = check_stack(tmp_path / "a.mrcs", None, Images(box=64))
    assert "images.box" in large.problems[0].what
    assert check_stack(tmp_path / "tiny.mrcs").problems == ()


def test_what_each_method_cannot_use(tmp_path: Path, make_stack: MakeStack) -> None:
    """What a run would refuse, check says: the settings of every method, and their number."""
    make_stack("a.mrcs", n=20, size=(32, 32))
    for made, words in (
        (MultiReference(n_classes=30), "from 1 to the 20 usable particles"),
        (Classification(n_classes=11), "from 1 to half of the 20"),
        (Classification(n_classes=2, particle=Particle(radius="16 px")), "leaves no background"),
        (StableClassification(), "fewer than a class needs, isac.images_per_group 200"),
        (ReferenceFree(n_classes=2), "makes one average"),
    ):
        (problem,) = check_stack(tmp_path / "a.mrcs", made).problems
        whole = f"{problem.what}: {problem.remedy}"
        assert words in whole


def test_inputs_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.star").mkdir()
    for name, words in (("gone.star", "no such file"), ("folder.star", "not a file")):
        report = check_stack(tmp_path / name)
        assert [words in problem.what for problem in report.problems] == [True]
        assert (report.n_particles, report.shape) == (0, None)
        assert words in _shown(report)


def test_large_lists_need_memory_for_their_table(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("a.mrcs", n=2)
    few, many = ([f"{1 + i % 2}@a.mrcs" for i in range(n)] for n in (10, 20_000))
    small = check_stack(_star(tmp_path / "few.star", few)).memory_bytes
    large = check_stack(_star(tmp_path / "many.star", many)).memory_bytes
    kept = 4 * (20_000 - 10) * 16**2  # bytes of the prepared images, which stay in memory
    assert 2e6 < large - small - kept < 2e7


def test_images_that_are_there_twice_are_told(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("a.mrcs", n=3, size=(32, 32))
    make_stack("b.mrcs", n=3, size=(32, 32))
    names = ["1@a.mrcs", "1@b.mrcs", "2@a.mrcs", "2@b.mrcs", "3@a.mrcs"]
    assert check_stack(_star(tmp_path / "once.star", names)).warnings == ()
    (one,) = check_stack(_star(tmp_path / "twice.star", [*names, "1@b.mrcs"])).warnings
    assert (one.row, one.what) == (6, "this row names the image of row 2")
    more = [*names, "2@b.mrcs", "3@b.mrcs", "1@a.mrcs", "2@b.mrcs"]
    (many,) = check_stack(_star(tmp_path / "more.star", more)).warnings
    assert many.row == 6
    assert many.what.endswith("of row 4, and 2 more name an image that a row above them names")


def test_the_ctf_is_examined(tmp_path: Path, make_stack: MakeStack) -> None:
    """Impossible values are problems, unusual ones and wrong headers are warnings."""
    make_stack("a.mrcs", n=4, size=(32, 32))  # of 2.5 A in its header
    names = [f"{i}@a.mrcs" for i in range(1, 5)]
    columns: dict[str, object] = {
        "rlnDefocusU": [1.5e4] * 4, "rlnDefocusV": [1.6e4] * 4, "rlnDefocusAngle": [3.0] * 4,
        "rlnVoltage": [300.0] * 4, "rlnSphericalAberration": [2.7] * 4,
        "rlnAmplitudeContrast": [0.1] * 4,
    }  # fmt: skip

    def checked(use: str = "auto", **more: object) -> CheckReport:
        star = _star(tmp_path / "p.star", names, **{**columns, **more})
        return check_stack(star, MultiReference(n_classes=1, particle=Particle(ctf=use)))

    good = checked()
    assert (good.problems, good.warnings, good.pixel_size) == ((), (), 2.5)
    assert good.ctf.startswith("CTF: phases flipped")
    assert "phases flipped, averages weighted by CTF^2 (p.star has defocus)" in _shown(good)
    zero = checked(rlnVoltage=[300.0, 300.0, 0.0, 0.0])
    (problem,) = zero.problems
    assert (problem.row, zero.ctf) == (3, "")
    assert "rlnVoltage = 0 is impossible in 2 of 4 rows" in problem.what
    assert problem.remedy.endswith("or set particle.ctf=none")
    assert checked("none", rlnVoltage=[0.0] * 4).problems == ()
    nanometres = checked(rlnDefocusU=[1500.0] * 4)
    assert nanometres.problems == ()
    assert [each.row for each in nanometres.warnings] == [1]
    assert "it looks like nanometres" in nanometres.warnings[0].remedy
    assert "1 warning(s)" in _shown(nanometres)
    assert "no problems found" in _shown(nanometres)
    threefold = checked(rlnPixelSize=[0.8] * 4)
    (warning,) = threefold.warnings
    assert "has a pixel size of 2.5 A, the STAR file 0.8 A (1 of 1 stacks)" in warning.what
    assert warning.what.endswith("0.8 A is used")
    assert checked(rlnPixelSize=[2.51] * 4).warnings == ()
