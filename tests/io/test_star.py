"""STAR files: RELION's layouts read and written without loss, damage refused with file and row."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch

from cryoalign.io.formats import write_images
from cryoalign.io.problems import InputError
from cryoalign.io.relion import read_pose, write_class_averages_star, write_particles_star
from cryoalign.io.stack import ParticleStack, read_particles
from cryoalign.io.star import StarTable, StarTables, as_texts, read_star, write_star
from cryoalign.pose import Pose

MakeStack = Callable[..., np.ndarray]

STAR = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnImagePixelSize #3
_rlnImageSize #4
1 opticsGroup1 2.500000 16
2 unused 1.000000 32


# version 30001

data_particles

loop_
_rlnImageName #1
_rlnMicrographName #2
_rlnCoordinateX #3
_rlnDefocusU #4
_rlnOpticsGroup #5
_rlnAnglePsi #6
_rlnOriginXAngst #7
_rlnOriginYAngst #8
_rlnBeamTiltName #9
_rlnComment #10
000003@b.mrcs 007 100 15301.123456 1 12.500000 -1.250000 3.75 None nan
000001@a.mrcs 007 101 15302.5000001234 1 -170.000000 0.000000 0.000000 None 1.50
000002@b.mrcs 008 102 1.53e4 1 0.125000 7.500000 -2.500000 None None
000004@a.mrcs 008 103 15304.0 1 3e-7 0 0 None "two words"
000001@b.mrcs 1.50 104 15305.0 1 90.000000 1.000000 1.000000 None <NA>

data_extra
_rlnSomething  1.50
_rlnPhrase  "a b"
"""


@pytest.fixture
def star(tmp_path: Path, make_stack: MakeStack) -> Path:
    """Five particles out of two stacks of four, rows in neither's order."""
    make_stack("a.mrcs", seed=1)
    make_stack("b.mrcs", seed=2, dtype="i2")
    path = tmp_path / "particles.star"
    path.write_text(STAR)
    return path


def _edited(star: Path, *changes: tuple[str, str]) -> Path:
    text = STAR
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    star.write_text(text)
    return star


def _problems(path: Path, **options: object) -> list[tuple[int | None, str]]:
    with pytest.raises(ValueError, match=re.escape(path.name)) as told:
        read_particles(path, **options)  # type: ignore[arg-type]
    assert isinstance(told.value, InputError)
    assert all(problem.remedy for problem in told.value.problems)
    return [(problem.row, problem.what) for problem in told.value.problems]


def _alike(text: str, value: object) -> bool:
    """Whether a cell says the same as its text, to the last digit."""
    try:
        return text == str(value) or float(text) == float(str(value))
    except ValueError:
        return False


# ---- reading


def test_rows_over_several_stacks_in_their_order(star: Path) -> None:
    stack = read_particles(star)
    assert (len(stack), stack.shape, stack.pixel_size) == (5, (16, 16), 2.5)
    draws = {
        name: np.random.default_rng(seed).normal(0, 40, (4, 16, 16)).round()
        for name, seed in (("a", 1), ("b", 2))
    }
    wanted = [
        draws[name][index]
        for name, index in ("b2", "a0", "b1", "a3", "b0")
        for index in [int(index)]
    ]
    np.testing.assert_array_equal(stack.read([0, 1, 2, 3, 4]).numpy(), wanted)
    np.testing.assert_array_equal(stack.read([3, 0]).numpy(), [wanted[3], wanted[0]])


def test_numbers_are_numbers_and_text_stays(star: Path) -> None:
    table = read_particles(star).table
    assert table["rlnMicrographName"].tolist() == ["007", "007", "008", "008", "1.50"]
    assert table["rlnComment"].tolist() == ["nan", "1.50", "None", "two words", "<NA>"]
    assert table["rlnBeamTiltName"].tolist() == ["None"] * 5
    assert table["rlnCoordinateX"].dtype == np.int64
    assert table["rlnDefocusU"].tolist() == [
        15301.123456,
        15302.5000001234,
        15300.0,
        15304.0,
        15305.0,
    ]


def test_line_ends_comments_and_byte_order_mark(star: Path) -> None:
    plain = read_particles(star).table
    text = STAR.replace("data_optics", "# a comment\ndata_optics").replace(
        " nan\n", " nan  # told by nobody\n# between rows\n\n"
    )
    star.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    pd.testing.assert_frame_equal(read_particles(star).table, plain)


@pytest.mark.parametrize(
    ("name", "stacks", "pixel_size", "n"),
    [
        ("aspire_sample_particles_relion30.star", ["sample.mrcs"], 5e4 / 37369.207031, 17),
        ("aspire_sample_particles_relion31.star", ["sample.mrcs"], 1.4, 17),
        ("cryodrgn_relion5.star", ["toy_images_a.mrcs", "toy_images_b.mrcs"], 0.89, 17),
        ("relion_class2d_it025_data.star", ["data/e0.1.mrcs"], 3.611111, 1000),
    ],
)
def test_layouts_that_other_programs_wrote(
    shared_data: Path,
    tmp_path: Path,
    make_stack: MakeStack,
    name: str,
    stacks: list[str],
    pixel_size: float,
    n: int,
) -> None:
    sizes = {"toy_images_a.mrcs": 448, "toy_images_b.mrcs": 448, "data/e0.1.mrcs": 90}
    for stack_name in stacks:
        if stack_name == "sample.mrcs":
            (tmp_path / "sample.mrcs").symlink_to(shared_data / "formats" / "aspire_sample.mrcs")
        else:
            size = sizes[stack_name]
            make_stack(stack_name, n=1000 if size == 90 else 20, size=(size, size), dtype="i1")
    source = shared_data / "formats" / name
    stack = read_particles(source, root=tmp_path)
    assert len(stack) == n
    assert stack.pixel_size == pytest.approx(pixel_size, rel=1e-6)
    blocks = starfile.read(source, always_dict=True)
    truth = blocks["particles"] if "particles" in blocks else next(iter(blocks.values()))
    assert list(stack.table) == list(truth)
    # The pose as RELION's formula has it, v' = R(psi) (v + origin), from starfile's table.
    psi = np.radians(truth["rlnAnglePsi"].to_numpy())
    pixels = "rlnOriginX" in truth
    origin = [truth[f"rlnOrigin{c}" if pixels else f"rlnOrigin{c}Angst"].to_numpy() for c in "XY"]
    x, y = (o / (1 if pixels else pixel_size) for o in origin)
    matrix = read_pose(stack).matrix().numpy()
    np.testing.assert_allclose(matrix[:, 0, 2], np.cos(psi) * x - np.sin(psi) * y, atol=1e-5)
    np.testing.assert_allclose(matrix[:, 1, 2], np.sin(psi) * x + np.cos(psi) * y, atol=1e-5)
    np.testing.assert_allclose(matrix[:, 1, 0], np.sin(psi), atol=1e-6)


def test_files_that_lie_beside_their_stacks(shared_data: Path) -> None:
    formats = shared_data / "formats"
    assert read_particles(formats / "cryodrgn_relion31.star")[4].std() > 0
    stack = read_particles(formats / "cryodrgn_empiar_10076_7.star")  # 3.0, names like 1@x.mrc
    assert stack.pixel_size == pytest.approx(5e4 / 38168)
    assert torch.equal(stack[6], read_particles(formats / "empiar_10076_7.mrc")[6])
    assert len(read_particles(shared_data / "real" / "apoferritin.star")) == 2000
    scales = _problems(formats / "cryodrgn_relion31.6opticsgroups.star")[0]
    assert scales[0] == 25
    assert "1.24 A, where row 1 has 1.25 A" in scales[1]
    assert "line 20: 5 values for 4 labels" in _problems(formats / "aspire_sample.star")[0][1]
    assert "rlnImageName" in _problems(formats / "relion_class2d_it025_optimiser.star")[0][1]


def test_a_single_block_without_pixel_size(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("a.mrcs")
    path = tmp_path / "p.star"
    table = pd.DataFrame({"rlnImageName": ["2@a.mrcs", "1@a.mrcs"], "rlnAnglePsi": [5.0, 6.0]})
    starfile.write(table, path)
    assert read_particles(path).pixel_size == 2.5  # the header's
    assert read_particles(path).optics is None
    for column in ("rlnImagePixelSize", "rlnPixelSize"):
        starfile.write(table.assign(**{column: 2.51}), path)
        assert read_particles(path).pixel_size == 2.51
    starfile.write(table.assign(rlnPixelSize=1.25), path)
    with pytest.warns(UserWarning, match=r"has a pixel size of 2.5 A, the STAR file 1.25 A"):
        assert read_particles(path).pixel_size == 1.25
    with mrcfile.open(tmp_path / "a.mrcs", "r+") as mrc:
        mrc.voxel_size = 0.0
    starfile.write(table, path)
    assert read_particles(path).pixel_size is None
    starfile.write(table.assign(rlnOriginXAngst=1.0), path)
    assert "no data_optics" in _problems(path)[0][1]


def _long_table(n: int, ends: str = "\n") -> tuple[str, dict[str, list[str]]]:
    """A table in RELION's layout with blanks of every kind, and its cells by label."""
    rng = np.random.default_rng(3)
    cells = {
        "rlnImageName": [f"{i % 4 + 1:06d}@a.mrcs" for i in range(n)],
        "rlnMicrographName": [f"mic{i // 50:03d}.mrc" for i in range(n)],
        "rlnAnglePsi": [f"{v:.6f}" for v in rng.normal(0, 60, n)],
        "rlnDefocusU": [f"{v:.3e}" for v in rng.uniform(1e4, 3e4, n)],
        "rlnMicrographId": [f"{i % 7:04d}" for i in range(n)],
        "rlnComment": ["data_x" if i % 5 else "nan" for i in range(n)],
    }
    gaps = [" ", "  ", "\t", " \t   "]
    lines = ["# version 30001", "data_particles", "loop_"]
    lines += [f"_{label} #{i}" for i, label in enumerate(cells, 1)]
    for i, row in enumerate(zip(*cells.values(), strict=True)):
        lines.append("  " * (i % 3) + gaps[i % 4].join(row) + " \t"[: i % 3])
    return ends.join([*lines, "", "data_extra", "_rlnSomething 1.50", ""]), cells


@pytest.mark.parametrize("block", [2**20, 5000])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_table_keeps_every_cell(
    tmp_path: Path, block: int, ends: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long table, lines are parsed at once; the cells are those of the lines."""
    monkeypatch.setattr("cryoalign.io.star.BLOCK", block)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    text, cells = _long_table(3000, ends)
    (tmp_path / "p.star").write_bytes(text.encode())
    tables = read_star(tmp_path / "p.star")
    assert tables.version == 30001
    assert list(tables.blocks) == ["particles", "extra"]
    for label, wanted in cells.items():
        assert tables.table.text(label).to_pylist() == wanted, label
    frame = tables.particles
    assert frame["rlnMicrographId"].tolist() == [int(cell) for cell in cells["rlnMicrographId"]]
    assert frame["rlnDefocusU"].tolist() == [float(cell) for cell in cells["rlnDefocusU"]]
    assert frame["rlnComment"].tolist() == cells["rlnComment"]
    write_star(tmp_path / "q.star", tables)
    again = starfile.read(tmp_path / "q.star", parse_as_string=list(cells))["particles"]
    del cells["rlnComment"]  # starfile takes the text "nan" for a number
    for label, wanted in cells.items():
        assert again[label].tolist() == wanted, label


def test_a_table_of_one_column_ends_at_the_next_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows and the line of the next block are all one word."""
    monkeypatch.setattr("cryoalign.io.star.BLOCK", 30)
    rows = "1@a.mrcs\n" * 200
    text = f"data_particles\nloop_\n_rlnImageName\n{rows}data_extra\nloop_\n_rlnX\n7\n8\n"
    (tmp_path / "p.star").write_text(text)
    tables = read_star(tmp_path / "p.star")
    assert list(tables.blocks) == ["particles", "extra"]
    assert tables.table.text("rlnImageName").to_pylist() == ["1@a.mrcs"] * 200


@pytest.mark.parametrize("threads", [1, 3])
def test_damage_in_a_long_table_is_told_with_row_and_line(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryoalign.io.star.BLOCK", 5000)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    lines = _long_table(3000)[0].split("\n")
    first = 3 + 6  # lines before the first row
    lines[first + 2000] += " one_more"
    lines[first + 2500] = lines[first + 2500].replace("mic", 'm"ic')
    (tmp_path / "p.star").write_text("\n".join(lines))
    found = _problems(tmp_path / "p.star")
    assert [row for row, _ in found] == [2001, 2501]
    assert found[0][1] == f"line {first + 2001}: 7 values for 6 labels"
    assert "a quote inside a value" in found[1][1]
    lines[first + 1500] += "\x00"
    (tmp_path / "p.star").write_text("\n".join(lines))
    assert f"line {first + 1501} contains the character" in _problems(tmp_path / "p.star")[0][1]


def test_what_relion_reads_too(tmp_path: Path, make_stack: MakeStack) -> None:
    """Comments among labels, tables of one row as pairs, values that begin like labels."""
    make_stack("a.mrcs")
    path = tmp_path / "p.star"
    optics = "data_optics\n_rlnOpticsGroup 1\n_rlnImagePixelSize 2.50\n"
    path.write_text(optics + "data_particles\n_rlnImageName 2@a.mrcs\n_rlnOpticsGroup 1\n")
    stack = read_particles(path)
    assert (len(stack), stack.pixel_size) == (1, 2.5)
    write_star(tmp_path / "q.star", stack.star)  # type: ignore[arg-type]
    assert read_particles(tmp_path / "q.star").pixel_size == 2.5
    labels = "_rlnMicrographName\n# a comment\n\n_rlnImageName\n_rlnComment\n"
    rows = "data_1.mrc 1@a.mrcs loop_\n_2.mrc 2@a.mrcs x\ndata_3.mrc 3@a.mrcs _y\n"
    path.write_text(f"data_\nloop_\n{labels}{rows}")
    names = ["data_1.mrc", "_2.mrc", "data_3.mrc"]
    table = read_particles(path).table
    assert table["rlnMicrographName"].tolist() == names
    write_star(tmp_path / "q.star", read_particles(path).star)  # type: ignore[arg-type]
    again = read_particles(tmp_path / "q.star").table
    pd.testing.assert_frame_equal(again, table)


def test_cells_that_need_quotes_get_them(tmp_path: Path) -> None:
    cells = {
        "rlnFirst": ["_x", "data_", "loop_", "#1", "", "plain"],
        "rlnImageName": ["1@two words.mrcs", "2@a", "'b", "#c", "", "_d"],
    }
    written = StarTables({"particles": StarTable.of(cells)}, "particles")
    write_star(tmp_path / "p.star", written)
    table = read_star(tmp_path / "p.star").table
    for label, wanted in cells.items():
        assert table.text(label).to_pylist() == wanted, label


def test_numbers_are_written_with_six_decimals_or_all_digits() -> None:
    values = np.array([1.0, -0.25, 12.345678, 1 / 3, 3e-7, np.nan, -np.inf, 1e15, 0.1 + 0.2])
    wanted = ["1.000000", "-0.250000", "12.345678", "0.3333333333333333", "3e-7", "nan", "-inf"]
    texts = as_texts(values).to_pylist()
    assert texts[:7] == wanted
    assert [float(text) for text in texts[7:]] == [1e15, 0.1 + 0.2]
    assert as_texts(np.array([7, -3])).to_pylist() == ["7", "-3"]
    many = np.random.default_rng(0).normal(0, 1000, 2000).round(6)
    assert as_texts(many).to_pylist() == [f"{value:.6f}" for value in many.tolist()]


# ---- what is refused


@pytest.mark.parametrize(
    ("old", "new", "row", "words"),
    [
        ("000001@a", "000000@a", 2, "image 0 of"),
        ("000004@a", "000005@a", 4, "image 5 of"),
        ("000002@b.mrcs", "b.mrcs", 3, "'b.mrcs' does not name an image"),
        ("000002@b.mrcs", "x2@b.mrcs", 3, "does not name an image"),
        ("000004@a.mrcs", "000004@gone.mrcs", 4, "'gone.mrcs' is missing"),
        ("000004@a.mrcs", "000004@particles.star", 4, "format '.star'"),
        ("-170.000000", "-17o.000000", 2, "rlnAnglePsi = '-17o.000000'"),
        ("-170.000000", "inf", 2, "rlnAnglePsi = 'inf'"),
        ("1.53e4", "nan", 3, "rlnDefocusU = 'nan'"),
        (" 1 90.000000", " 3 90.000000", 5, "rlnOpticsGroup 3 is not in data_optics"),
        (" 1 90.000000", " 2 90.000000", 5, "pixel size of 1 A, where row 1 has 2.5 A"),
        ("1 opticsGroup1 2.500000", "1 opticsGroup1 0", 1, "pixel size of 0 A"),
        ("2 unused", "1 unused", None, "lists a group twice"),
        ("2.500000 16", "2.500000 18", None, "images of 18 pixels"),
        ("_rlnImagePixelSize", "_rlnPixelSize", None, "no column rlnImagePixelSize"),
        ("data_optics", "data_0ptics", None, "no data_optics"),
        ("_rlnDefocusU", "_rlnCoordinateX", None, "_rlnCoordinateX appears twice"),
        ("_rlnDefocusU #4\n", "", 1, "10 values for 9 labels"),
        ("15304.0 1", "15304.0", 4, "9 values for 10 labels"),
        ("15304.0 1", "15304.0 1 1", 4, "11 values for 10 labels"),
        ('"two words"', '"two words', 4, "a quote inside a value"),
        ('"two words"', 'two"words', 4, "a quote inside a value"),
        ("data_extra", "data_particles", None, "data_particles appears twice"),
        ("data_extra", "loop_", None, "second loop_"),
        ("loop_\n_rlnImageName", "l00p_\n_rlnImageName", None, "not a label and not in"),
        ("None nan", "None n\x00n", None, "line 30 contains the character"),
        ("_rlnSomething  1.50", "_rlnSomething", None, "followed by one value"),
    ],
)
def test_what_is_wrong_is_told_with_its_row(
    star: Path, old: str, new: str, row: int | None, words: str
) -> None:
    found = _problems(_edited(star, (old, new)))
    assert any(at == row and words in what for at, what in found), found


def test_all_problems_are_told_together(star: Path, make_stack: MakeStack) -> None:
    make_stack("wide.mrcs", size=(16, 20))
    (star.parent / "cut.mrcs").write_bytes((star.parent / "a.mrcs").read_bytes()[:-5])
    rows = [
        "0@a.mrcs",
        "9@b.mrcs",
        "1@gone.mrcs",
        "2@wide.mrcs",
        "1@a.mrcs",
        "1@cut.mrcs",
        "2@gone.mrcs",
    ]
    table = pd.DataFrame({"rlnImageName": rows, "rlnAnglePsi": [0, 1, 2, 3, "up", 5, 6]})
    starfile.write(table, star)
    found = _problems(star)
    assert sorted(row for row, _ in found if row) == [1, 2, 3, 4, 5, 6]
    assert any("'gone.mrcs' is missing" in what and "2 rows use it" in what for _, what in found)
    assert any("wide.mrcs are 16 x 20" in what for _, what in found)
    assert any("cut.mrcs: truncated" in what for _, what in found)
    with pytest.raises(InputError, match=r"(?s)6 problems .*and 1 more"):
        read_particles(star)


def test_files_that_are_no_particle_lists(tmp_path: Path) -> None:
    for name, content, words in (
        ("empty.star", b"", "no data_ block"),
        ("binary.star", bytes(range(256)), "not a text file"),
        ("latin.star", "data_\n# \xc5\n".encode("latin-1"), "byte 8 is not UTF-8"),
        ("words.star", b"hello\n", "before the first data_"),
        ("none.star", b"data_particles\nloop_\n_rlnImageName\n", "no particles"),
        ("two.star", 2 * b"data_%d\nloop_\n_rlnImageName\n1@a.mrcs\n" % (1, 2), "several"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in _problems(tmp_path / name)[0][1]
    with pytest.raises(FileNotFoundError, match=r"gone\.star"):
        read_particles(tmp_path / "gone.star")
    (tmp_path / "folder.star").mkdir()
    assert "not a file" in _problems(tmp_path / "folder.star")[0][1]


def _one_row(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    starfile.write(pd.DataFrame({"rlnImageName": [f"1@{name}"]}), path)
    return path


def test_where_stacks_are_looked_for(
    tmp_path: Path, make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_stack("project/Extract/a.mrcs", seed=5)[0]
    star = _one_row(tmp_path / "project" / "Class2D" / "job1" / "p.star", "Extract/a.mrcs")
    np.testing.assert_array_equal(read_particles(star)[0].numpy(), first)  # a folder above
    lone = _one_row(tmp_path / "elsewhere" / "p.star", "Extract/a.mrcs")
    assert "is missing" in _problems(lone)[0][1]
    np.testing.assert_array_equal(read_particles(lone, root=tmp_path / "project")[0].numpy(), first)
    monkeypatch.chdir(tmp_path / "project")
    np.testing.assert_array_equal(read_particles(lone)[0].numpy(), first)  # the current folder
    make_stack("elsewhere/Extract/a.mrcs", seed=6)
    assert not np.array_equal(read_particles(lone)[0].numpy(), first)  # the nearest comes first


def test_names_that_lead_outside_need_leave(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("secret/a.mrcs")
    for name in ("../secret/a.mrcs", str(tmp_path / "secret" / "a.mrcs"), "x/../../secret/a.mrcs"):
        star = _one_row(tmp_path / "mine" / "p.star", name)
        with pytest.raises(InputError, match=r"p\.star, data row 1.*outside.*allow_outside.*root"):
            read_particles(star)
        assert len(read_particles(star, allow_outside=True)) == 1
        assert len(read_particles(star, root=tmp_path)) == 1
    make_stack("mine/a.mrcs")
    assert len(read_particles(_one_row(tmp_path / "mine" / "p.star", "./x/../a.mrcs"))) == 1
    assert len(read_particles(_one_row(star, str(tmp_path / "mine" / "a.mrcs")))) == 1
    # A link is somebody's own decision: names are judged as they are written.
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "secret")
    assert len(read_particles(_one_row(star, "link/a.mrcs"))) == 1


@pytest.mark.parametrize("block", [2**20, 50])
def test_mutated_files_are_refused_or_read_as_they_stand(
    star: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, and several lines parsed at once."""
    monkeypatch.setattr("cryoalign.io.star.BLOCK", block)
    images = {
        name: read_particles(star.parent / name).read(slice(None)) for name in ("a.mrcs", "b.mrcs")
    }
    rng, accepted = np.random.default_rng(7), 0
    for _ in range(500):
        text = _mutated(STAR, rng)
        star.write_bytes(text.encode("latin-1"))
        try:
            stack = read_particles(star)
        except (ValueError, FileNotFoundError) as error:
            if "particles.star" not in str(error):
                raise
            continue
        accepted += 1
        labels, rows = _naive_particles(text)
        assert list(stack.table) == labels
        assert len(stack) == len(rows)
        for row, cells in enumerate(rows):
            values = stack.table.iloc[row].tolist()
            assert all(map(_alike, cells, values)), (cells, values)
            number, name = cells[labels.index("rlnImageName")].split("@")
            assert torch.equal(stack[row], images[name][int(number) - 1])
    assert 50 < accepted < 450


def _mutated(text: str, rng: np.random.Generator) -> str:
    """A text with a few characters or one line changed, or cut off."""
    lines = text.splitlines(keepends=True)
    kind, line = rng.integers(0, 10), rng.integers(0, len(lines))
    if kind == 0:
        return text[: rng.integers(0, len(text))]
    if kind == 1:
        return "".join(lines[:line] + lines[line + 1 :])
    if kind == 2:
        return "".join([*lines[:line], lines[line], *lines[line:]])
    if kind == 3:
        other = rng.integers(0, len(lines))
        lines[line], lines[other] = lines[other], lines[line]
        return "".join(lines)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(text)))
        new = (
            chr(rng.integers(0, 256))
            if rng.random() < 0.3
            else rng.choice(list(" \n\t#_@.-e0129\"'l"))
        )
        text = (
            text[:at] + ("" if rng.random() < 0.2 else str(new)) + text[at + rng.integers(0, 2) :]
        )
    return text


def _naive_particles(text: str) -> tuple[list[str], list[list[str]]]:
    """Labels and cells of the table with rlnImageName, by nothing but splitting lines."""
    block = next(b for b in re.split(r"^\s*data_", text, flags=re.M) if "_rlnImageName" in b)
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", block)[1:]]
    lines = [re.split(r"\s#", line)[0] for line in lines if line and not line.startswith("#")]
    labels = [line.split()[0][1:] for line in lines if line.startswith("_")]
    rows = [line for line in lines if not line.startswith("_") and line != "loop_"]
    cells = [re.findall(r"\"[^\"]*\"(?=\s|$)|'[^']*'(?=\s|$)|\S+", row) for row in rows]
    quoted = re.compile(r"\"([^\"]*)\"|'([^']*)'")
    return labels, [
        [quoted.sub(r"\1\2", c) if quoted.fullmatch(c) else c for c in r] for r in cells
    ]


# ---- writing


def _poses(n: int, seed: int = 0) -> Pose:
    generator = torch.Generator().manual_seed(seed)
    return Pose(
        torch.rand(n, generator=generator) * 360 - 180,
        torch.randn(n, 2, generator=generator) * 4,
        torch.rand(n, generator=generator) > 0.5,
    )


def _save(path: Path, stack: ParticleStack, pose: Pose, keep: object = None) -> None:
    n = len(stack)
    rows = torch.ones(n, dtype=torch.bool) if keep is None else keep
    write_particles_star(
        path,
        stack,
        pose,
        torch.arange(n) % 3 + 1,
        rows,
        torch.linspace(0, 1, n),  # type: ignore[arg-type]
    )


def _assert_same_pose(read: Pose, written: Pose) -> None:
    turn = torch.remainder(read.angle - written.angle + 180, 360) - 180
    assert turn.abs().max() < 1e-5
    assert (read.shift - written.shift).abs().max() < 1e-5
    assert torch.equal(read.mirror, written.mirror)


@pytest.mark.parametrize("layout", ["3.0", "3.1", "mrcs", "npy"])
def test_poses_come_back_in_every_layout(
    tmp_path: Path, star: Path, make_stack: MakeStack, layout: str
) -> None:
    source = {"3.1": star, "mrcs": tmp_path / "a.mrcs", "npy": tmp_path / "a.npy"}.get(layout)
    if layout == "3.0":
        source = tmp_path / "old.star"
        names = [f"{i}@b.mrcs" for i in (3, 1, 2)]
        old = pd.DataFrame({"rlnImageName": names, "rlnMagnification": 40000.0})
        starfile.write(old.assign(rlnDetectorPixelSize=5.0, rlnOriginX=1.0), source)
    elif layout == "npy":
        write_images(tmp_path / "a.npy", torch.randn(6, 8, 8))
    assert source is not None
    stack = read_particles(source)
    pose = _poses(len(stack))
    output = tmp_path / "runs" / "first"
    output.mkdir(parents=True)
    if layout == "npy":  # nothing in it tells the pixel size
        with pytest.warns(UserWarning, match="pixel size is not known"):
            _save(output / "p.star", stack, pose)
        assert "pixel size is not known" in (output / "p.star").read_text()
    else:
        _save(output / "p.star", stack, pose)
    again = read_particles(output / "p.star")
    _assert_same_pose(read_pose(again), pose)
    assert again.pixel_size == (1.0 if layout == "npy" else pytest.approx(stack.pixel_size))
    assert torch.equal(again.read(slice(None)), stack.read(slice(None)))
    blocks = starfile.read(output / "p.star", always_dict=True)  # and by the field's own reader
    assert ("optics" in blocks) == (layout != "3.0")
    table = blocks["particles" if layout != "3.0" else ""]
    assert table["rlnClassNumber"].tolist() == [i % 3 + 1 for i in range(len(stack))]
    assert table["rlnIsFlip"].tolist() == pose.mirror.int().tolist()
    np.testing.assert_allclose(table["cryoalignScore"], np.linspace(0, 1, len(stack)), atol=1e-6)
    length, unit = ("", 1.0) if layout == "3.0" else ("Angst", again.pixel_size)
    np.testing.assert_allclose(table[f"rlnOriginX{length}"], pose.shift[:, 0] * unit, atol=1e-5)
    assert f"rlnOriginX{'Angst' if layout == '3.0' else ''}" not in table


def test_every_column_and_block_is_kept_as_text(star: Path, tmp_path: Path) -> None:
    stack = read_particles(star)
    before = stack.table.copy()
    _save(tmp_path / "out.star", stack, _poses(5))
    pd.testing.assert_frame_equal(stack.table, before)
    text = (tmp_path / "out.star").read_text()
    assert text.startswith("# version 30001\n")
    again = read_particles(tmp_path / "out.star")
    kept = [c for c in before if c not in ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst")]
    pd.testing.assert_frame_equal(again.table[kept], before[kept], check_exact=True)
    pd.testing.assert_frame_equal(again.optics, stack.optics)  # the unused group too
    assert again.star is not None
    assert again.star.blocks["extra"] == {"rlnSomething": "1.50", "rlnPhrase": "a b"}
    for cell in ("007", "1.50", "15301.123456", "1.53e4", "None", "nan", "<NA>", "103"):
        assert re.search(rf"(?m)(^|\t){re.escape(cell)}(\t|$)", text), cell


def test_relions_own_result_goes_round_unchanged(
    shared_data: Path, tmp_path: Path, make_stack: MakeStack
) -> None:
    make_stack("data/e0.1.mrcs", n=1000, size=(90, 90), dtype="i1")
    source = shared_data / "formats" / "relion_class2d_it025_data.star"
    stack = read_particles(source, root=tmp_path)
    pose, n = read_pose(stack), len(stack)
    classes = torch.as_tensor(stack.table["rlnClassNumber"].to_numpy().copy())
    write_particles_star(
        tmp_path / "out.star", stack, pose, classes, torch.ones(n, dtype=torch.bool), torch.zeros(n)
    )
    again = read_particles(tmp_path / "out.star")
    _assert_same_pose(read_pose(again), pose)
    truth = starfile.read(source)["particles"]
    ours = starfile.read(tmp_path / "out.star")["particles"]
    for label in truth:
        if truth[label].dtype.kind in "if":
            np.testing.assert_allclose(ours[label], truth[label], rtol=0, atol=2e-6, err_msg=label)
        else:
            assert ours[label].tolist() == truth[label].tolist()
    assert set(ours) - set(truth) == {"rlnIsFlip", "cryoalignScore"}


def test_only_kept_rows_are_written(star: Path, tmp_path: Path) -> None:
    stack, pose, out = read_particles(star), _poses(5), tmp_path / "out.star"
    angle = pose.angle.clone()
    angle[1] = torch.nan  # set aside
    pose = Pose(angle, pose.shift, pose.mirror)
    _save(out, stack, pose, keep=np.array([True, False, True, False, True]))
    names = stack.table["rlnImageName"].tolist()
    assert read_particles(out).table["rlnImageName"].tolist() == [names[0], names[2], names[4]]
    _save(out, stack, pose, keep=[4, 0])
    again = read_particles(out)
    assert again.table["rlnImageName"].tolist() == [names[4], names[0]]
    assert again.table["rlnClassNumber"].tolist() == [2, 1]
    _assert_same_pose(read_pose(again), pose[torch.tensor([4, 0])])
    for keep, words in (
        (None, "row 1 is not finite"),
        ([5], "rows from 0 to 4"),
        (np.ones(4, bool), "keep"),
    ):
        with pytest.raises(ValueError, match=rf"other\.star.*{words}"):
            _save(tmp_path / "other.star", stack, pose, keep)
    with pytest.raises(ValueError, match="5 particles, but"):
        _save(tmp_path / "other.star", stack, _poses(4))
    assert not (tmp_path / "other.star").exists()


def test_a_stale_origin_of_another_unit_is_set_too(tmp_path: Path, make_stack: MakeStack) -> None:
    make_stack("a.mrcs")
    table = pd.DataFrame({"rlnImageName": ["1@a.mrcs"], "rlnImagePixelSize": 2.0})
    starfile.write(table.assign(rlnOriginXAngst=9.0, rlnOriginYAngst=9.0), tmp_path / "p.star")
    pose = _poses(1)
    _save(tmp_path / "q.star", read_particles(tmp_path / "p.star"), pose)
    _assert_same_pose(read_pose(read_particles(tmp_path / "q.star")), pose)


def test_a_stack_is_named_so_that_it_is_found_again(
    tmp_path: Path, make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stack("data/a.mrcs")
    monkeypatch.chdir(tmp_path)
    stack = read_particles("data/a.mrcs")
    for folder, name in (("data", "a.mrcs"), ("runs/1", "data/a.mrcs")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        _save(Path(folder) / "p.star", stack, _poses(4))
        monkeypatch.chdir(os.sep)
        again = read_particles(tmp_path / folder / "p.star")
        assert again.table["rlnImageName"][0] == f"000001@{name}"
        assert torch.equal(again[3], stack_of(tmp_path)[3])
        monkeypatch.chdir(tmp_path)
    # Where a nearer file has the same name, the whole path is written.
    make_stack("runs/data/a.mrcs", seed=9)
    _save(tmp_path / "runs" / "1" / "p.star", stack, _poses(4))
    again = read_particles("runs/1/p.star", allow_outside=True)
    assert again.table["rlnImageName"][0] == f"000001@{tmp_path}/data/a.mrcs"
    assert torch.equal(again[3], stack[3])


def stack_of(folder: Path) -> ParticleStack:
    return read_particles(folder / "data" / "a.mrcs")


def test_class_averages_star(tmp_path: Path) -> None:
    path = tmp_path / "class_averages.star"
    sizes, resolution = torch.tensor([30, 0, 10]), torch.tensor([8.5, torch.inf, 12.25])
    write_class_averages_star(path, "class_averages.mrcs", sizes, resolution, 2.0)
    blocks = starfile.read(path)
    classes = blocks["model_classes"]
    assert blocks["model_general"] == {
        "rlnReferenceDimensionality": 2, "rlnNrClasses": 3, "rlnPixelSize": 2.0
    }  # fmt: skip
    assert classes["rlnReferenceImage"].tolist()[2] == "000003@class_averages.mrcs"
    assert classes["rlnClassDistribution"].tolist() == [0.75, 0, 0.25]
    assert classes["rlnEstimatedResolution"].tolist() == [8.5, np.inf, 12.25]
    assert classes["cryoalignClassSize"].tolist() == [30, 0, 10]
    write_class_averages_star(path, "class_averages.mrcs", sizes, resolution)
    assert "is in pixels" in path.read_text()
