"""Image files: read as other programs wrote them, refused when damaged, never kept in memory."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from mrcfile.dtypes import HEADER_DTYPE
from torch.utils.data import DataLoader

from cryoalign.io import images as module
from cryoalign.io.formats import read_header, read_images, write_images
from cryoalign.io.problems import InputError
from cryoalign.io.stack import ParticleStack, read_particles
from cryoalign.io.survey import Survey

MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


def _images(dtype: str, shape: tuple[int, ...] = (5, 6, 7), seed: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 30, shape)
    return (np.abs(noise) if dtype.startswith("u") else noise).astype(dtype)


def _write(path: Path, images: np.ndarray, volume: bool = False, pixel: float = 1.5) -> None:
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(images)
        if images.ndim == 3:
            mrc.set_volume() if volume else mrc.set_image_stack()
        mrc.voxel_size = pixel


def _edit(path: Path, **fields: object) -> None:
    """Overwrite fields of an MRC header in place."""
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, HEADER_DTYPE, count=1)
    for name, value in fields.items():
        header[name][0] = value
    path.write_bytes(raw)


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize(("mode", "dtype"), MODES.items())
def test_every_mode_and_flag(tmp_path: Path, mode: int, dtype: str, volume: bool) -> None:
    images, path = _images(dtype), tmp_path / "x.mrcs"
    _write(path, images, volume)
    with mrcfile.open(path) as mrc:
        assert mrc.header.mode == mode
    stack = read_particles(path)
    assert (len(stack), stack.shape) == (5, (6, 7))
    assert stack.pixel_size == pytest.approx(1.5)
    assert stack.table.shape == (5, 0)
    assert stack.optics is None
    np.testing.assert_array_equal(stack.read(slice(None)).numpy(), images.astype("f4"))
    np.testing.assert_array_equal(read_images(path).numpy(), images.astype("f4"))


def test_a_single_image_is_a_stack_of_one(tmp_path: Path) -> None:
    image = _images("f4", (6, 7))
    _write(tmp_path / "x.mrc", image)
    np.testing.assert_array_equal(read_particles(tmp_path / "x.mrc")[0].numpy(), image)
    np.save(tmp_path / "x.npy", image)
    np.testing.assert_array_equal(read_images(tmp_path / "x.npy").numpy(), image[None])


def test_other_byte_order_extended_header_and_lost_stamp(tmp_path: Path) -> None:
    images, path = _images("f4"), tmp_path / "x.mrcs"
    _write(path, images)
    raw = path.read_bytes()
    big = np.frombuffer(raw[:1024], HEADER_DTYPE).astype(HEADER_DTYPE.newbyteorder(">"))
    big["machst"], big["nsymbt"] = [0x11, 0x11, 0, 0], 80
    for stamp in ([0x11, 0x11, 0, 0], [0, 0, 0, 0]):
        big["machst"] = stamp
        path.write_bytes(big.tobytes() + bytes(80) + images.astype(">f4").tobytes())
        np.testing.assert_array_equal(read_images(path).numpy(), images)
        assert read_particles(path).pixel_size == pytest.approx(1.5)


def test_unsigned_bytes_of_imod(tmp_path: Path) -> None:
    images, path = _images("i1"), tmp_path / "x.mrcs"
    _write(path, images)
    for flags, dtype in ((0, "u1"), (1, "i1")):
        _edit(path, extra2=bytes(40) + np.array([1146047817, flags], "i4").tobytes() + bytes(36))
        np.testing.assert_array_equal(read_images(path).numpy(), images.view(dtype))


@pytest.mark.parametrize(
    ("name", "n", "size", "pixel"),
    [
        ("formats/aspire_sample.mrcs", 17, 200, None),
        ("formats/empiar_10076_7.mrc", 7, 320, None),
        ("formats/relion31.mrcs", 5, 256, 1.0),  # no MAP tag and no machine stamp
        ("formats/relion_class2d_it025_classes.mrcs", 10, 90, 3.6111),
        ("real/apoferritin.mrcs", 2000, 96, 1.5),  # float16
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_other_programs_wrote(
    shared_data: Path, name: str, n: int, size: int, pixel: float | None
) -> None:
    stack = read_particles(shared_data / name)
    assert (len(stack), stack.shape) == (n, (size, size))
    assert stack.pixel_size == (None if pixel is None else pytest.approx(pixel, rel=1e-4))
    with mrcfile.mmap(shared_data / name, permissive=True) as mrc:
        for row in (0, n // 2, n - 1):
            np.testing.assert_array_equal(stack[row].numpy(), mrc.data[row].astype("f4"))


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "i2", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_files(tmp_path: Path, dtype: str, order: str) -> None:
    images = np.asarray(_images("f4").astype(dtype), order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "x.npy", images)
    stack = read_particles(tmp_path / "x.npy")
    assert stack.pixel_size is None
    np.testing.assert_array_equal(stack.read([4, 0]).numpy(), images[[4, 0]].astype("f4"))


@pytest.mark.parametrize("suffix", [".mrcs", ".mrc", ".npy"])
def test_written_images_read_back(tmp_path: Path, suffix: str) -> None:
    images = torch.from_numpy(_images("f4"))
    kept, path = images.clone(), tmp_path / f"x{suffix}"
    write_images(path, images.mT, 3.5)
    assert torch.equal(read_images(path), images.mT)
    assert torch.equal(images, kept)
    if suffix != ".npy":
        assert mrcfile.validate(path, print_file=io.StringIO())
        assert read_particles(path).pixel_size == pytest.approx(3.5)
    with pytest.raises(ValueError, match=r"x\.tif.*\.tif"):
        write_images(tmp_path / "x.tif", images)
    with pytest.raises(ValueError, match=r"must be \(n, h, w\)"):
        write_images(path, images[0])


def test_read_keeps_the_order_asked(tmp_path: Path, make_stack: Callable[..., np.ndarray]) -> None:
    images = make_stack("x.mrcs", n=9)
    stack = read_particles(tmp_path / "x.mrcs")
    for rows in (
        [8, 0, 3, 3, -1],
        np.array([5, 2]),
        torch.tensor([7, 1]),
        range(4),
        slice(6, 2, -2),
    ):
        wanted = images[rows if isinstance(rows, slice) else np.asarray(rows)]
        np.testing.assert_array_equal(stack.read(rows).numpy(), wanted)
    assert stack.read([]).shape == (0, 16, 16)
    for wrong in ([9], [-10], [0.5], [True, False]):
        with pytest.raises(IndexError):
            stack.read(wrong)  # type: ignore[arg-type]


def test_pickles_and_serves_a_dataloader(
    tmp_path: Path, make_stack: Callable[..., np.ndarray]
) -> None:
    images = make_stack("x.mrcs", n=10)
    stack = read_particles(tmp_path / "x.mrcs")
    again = pickle.loads(pickle.dumps(stack))
    np.testing.assert_array_equal(again.read([2, 9]).numpy(), images[[2, 9]])
    assert len(pickle.dumps(stack)) < 10_000
    loader = DataLoader(stack, batch_size=4, num_workers=2)
    np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), images)


def test_memory_does_not_grow_with_what_was_read(
    tmp_path: Path, make_stack: Callable[..., np.ndarray]
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's memory is read from /proc, which is Linux's")
    make_stack("x.mrcs", n=1, size=(128, 128))
    _edit(tmp_path / "x.mrcs", nz=8192)
    with (tmp_path / "x.mrcs").open("r+b") as file:
        file.truncate(1024 + 8192 * 128 * 128 * 4)  # 512 MiB, sparse
    program = """
import sys
from cryoalign.io.stack import read_particles
def peak():  # MiB; VmHWM, as ru_maxrss would count the parent's memory too
    return int(next(l for l in open("/proc/self/status") if "VmHWM" in l).split()[1]) / 1024
stack = read_particles(sys.argv[1])
stack.read(range(64))
before = peak()
for start in range(0, len(stack), 64):
    stack.read(range(start, start + 64))
print(peak() - before)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.mrcs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nz": 6}, "truncated"),
        ({"nz": 4}, "longer than its header"),
        ({"nx": 2**31 - 1, "ny": 2**31 - 1, "nz": 2**31 - 1}, "truncated"),
        ({"nx": -7}, "absurd"),
        ({"nz": 0}, "absurd"),
        ({"nsymbt": 2**31 - 1}, "truncated"),
        ({"nsymbt": -1}, "absurd"),
        ({"map": b"JUNK"}, "MAP"),
        ({"mode": 4}, "mode 4"),
        ({"mode": 99}, "mode 99"),
        ({"mapc": 2, "mapr": 1}, "axes"),
        ({"cella": (np.nan, 1, 1)}, "cell size"),
        ({"cella": (np.inf, 1, 1)}, "cell size"),
    ],
)
def test_damaged_headers_are_refused_before_reading(
    tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    path = tmp_path / "damaged.mrcs"
    _write(path, _images("f4"))
    _edit(path, **fields)
    tracemalloc.start()
    try:
        for read in (read_particles, read_images):
            with pytest.raises(ValueError, match=rf"damaged\.mrcs.*{words}.*; "):
                read(path)  # type: ignore[operator]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "x.mrcs", _images("f4"))
    whole = (tmp_path / "x.mrcs").read_bytes()
    np.save(tmp_path / "ok.npy", _images("f4"))
    npy = (tmp_path / "ok.npy").read_bytes()
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.ones((2, 3, 3), "c8"))
    np.save(tmp_path / "flat.npy", np.ones(9))
    contents = {
        "cut.mrcs": whole[:-1],
        "header.mrcs": whole[:1023],
        "empty.mrcs": b"",
        "packed.mrc": b"\x1f\x8b" + whole[2:1024].replace(b"MAP ", b"\x01\x02\x03\x04"),
        "cut.npy": npy[:-1],
        "head.npy": npy[:20],
        "none.npy": b"",
        "x.tif": whole,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "pickled.npy", "complex.npy", "flat.npy"]:
        with pytest.raises(InputError, match=name.replace(".", r"\.")) as told:
            read_particles(tmp_path / name)
        assert told.value.problems[0].remedy
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mrcs"):
        read_particles(tmp_path / "nowhere.mrcs")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mrcs"):
        read_images(tmp_path / "nowhere.mrcs")


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_file_cut_after_its_survey_is_told(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.mrcs"
    _write(path, _images(dtype))
    stack, whole = read_particles(path), path.read_bytes()
    for length in (0, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"x\.mrcs.*rewritten during the run"):
            stack.read([0])
    path.unlink()
    with pytest.raises(InputError, match=r"x\.mrcs.*rewritten during the run"):
        stack.read([0])


@pytest.mark.parametrize("most", [1, 100, 7 * 6 * 4 + 3])
def test_a_run_that_ends_early_is_told_and_short_reads_go_on(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cut while it is read; and a system that reads fewer bytes at a time than asked."""
    images, path = _images("f4", (9, 6, 7)), tmp_path / "x.mrcs"
    _write(path, images)
    stack, end = read_particles(path), path.stat().st_size

    def short(file: int, buffers: list[memoryview], offset: int) -> int:
        got = 0
        for buffer in buffers:
            part = os.pread(
                file, min(len(buffer), most - got, max(0, end - offset - got)), offset + got
            )
            buffer[: len(part)] = part
            got += len(part)
        return got

    monkeypatch.setattr(os, "preadv", short)
    rows = [3, 4, 5, 1, 0, 8, 8]
    np.testing.assert_array_equal(stack.read(rows).numpy(), images[rows])
    end -= 5
    with pytest.raises(InputError, match=r"x\.mrcs.*ends at byte .*rewritten during the run"):
        stack.read(rows)
    assert torch.equal(stack.read([0, 7]), torch.from_numpy(images[[0, 7]]))


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f2", "i2", "u1", "f8"])
def test_any_rows_of_several_files_in_any_order(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs, gaps, repeats, backwards; more images than are converted or read at a time."""
    monkeypatch.setattr(module, "PART", 5 * 6 * 7 * np.dtype(dtype).itemsize)
    monkeypatch.setattr(module, "BUFFERS", 3)
    stacks = [_images(dtype[-2:], (40, 6, 7), seed).astype(dtype) for seed in (1, 2)]
    for name, images in zip("ab", stacks, strict=True):
        np.save(tmp_path / f"{name}.npy", images)
    rng = np.random.default_rng(7)
    file_of, image_of = rng.integers(0, 2, 300), rng.integers(0, 40, 300)
    file_of[:90], image_of[:90] = 0, np.r_[:40, 39:-1:-1, 5:15]
    files = tuple(read_header(tmp_path / f"{name}.npy") for name in "ab")
    stack = ParticleStack(Survey(tmp_path, files=files, file_of=file_of, image_of=image_of))
    wanted = np.stack([stacks[f][i] for f, i in zip(file_of, image_of, strict=True)]).astype("f4")
    for rows in (np.arange(300), np.arange(40), rng.permutation(300), rng.integers(0, 300, 70)):
        np.testing.assert_array_equal(stack.read(rows).numpy(), wanted[rows])
        out = torch.full((len(rows), 6, 7), torch.nan)
        assert stack.read_into(out, rows) is out
        np.testing.assert_array_equal(out.numpy(), wanted[rows])


def test_a_run_of_images_is_one_read(
    tmp_path: Path, make_stack: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stack("x.mrcs", n=200)
    stack = read_particles(tmp_path / "x.mrcs")
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: calls.append(len(given[1])) or real(*given))
    stack.read(range(200))
    stack.read(np.r_[0:50, 60:70, 199])
    assert calls == [1, 1, 1, 1]
    calls.clear()
    stack.read(np.random.default_rng(0).permutation(200))  # into 200 places, from one run
    assert len(calls) == 1


@pytest.mark.parametrize("suffix", [".mrcs", ".npy"])
def test_mutated_headers_never_give_other_images(tmp_path: Path, suffix: str) -> None:
    images, path = _images("f4", (3, 5, 8)), tmp_path / f"fuzz{suffix}"
    np.save(path, images) if suffix == ".npy" else _write(path, images)
    original = path.read_bytes()
    n_header = len(original) - images.nbytes
    rng, accepted = np.random.default_rng(20240607), 0
    for _ in range(400):
        raw = bytearray(original)
        # Half of the mutations in the fields that matter most.
        reach = min(n_header, 256) if rng.random() < 0.5 else n_header
        for place in rng.integers(0, reach, rng.integers(1, 4)):
            raw[place] = rng.integers(0, 256)
        if rng.random() < 0.1:
            raw = raw[: rng.integers(0, len(raw))]
        path.write_bytes(raw)
        fault = _fault(path)
        if fault is not None:
            assert path.name in fault
            continue
        accepted += 1
        # One letter more or less can turn a .npy header into another valid one.
        truth = images if suffix == ".mrcs" else np.load(path).astype("f4")
        np.testing.assert_array_equal(read_images(path).numpy(), truth)
    assert accepted > 0


def _fault(path: Path) -> str | None:
    """What a file is refused for; any other exception is a crash and fails the test."""
    try:
        read_images(path)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None
