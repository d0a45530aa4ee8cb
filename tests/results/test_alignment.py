"""`Alignment`: what is saved is what is loaded, and what is not ours is refused."""

import dataclasses
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cryoalign.pose import Pose
from cryoalign.results.alignment import Alignment

SEED = 8
REASONS = (
    "3 of 64 pixels are NaN or infinite",
    'a, "quoted", reason; with commas',
    "two\nlines",
    "NA",
    "",
    "nan",
    " spaces ",
    "Å and °",
)
TENSORS = ("class_number", "score", "averages", "frc", "resolution", "class_sizes")


def made_up(n: int = 12, k: int = 3) -> Alignment:
    """An alignment with particles set aside, awkward reasons and awkward numbers."""
    rng = np.random.default_rng(SEED)
    aside = list(range(len(REASONS)))
    angle = torch.from_numpy(rng.uniform(-180, 180, n)).float()
    shift = torch.from_numpy(rng.normal(size=(n, 2))).float()
    score = torch.from_numpy(rng.uniform(size=n)).float()
    class_number = torch.from_numpy(rng.integers(1, k + 1, n))
    angle[aside], shift[aside], score[aside], class_number[aside] = (
        torch.nan,
        torch.nan,
        torch.nan,
        0,
    )
    return Alignment(
        pose=Pose(angle, shift, torch.from_numpy(rng.integers(2, size=n).astype(bool))),
        class_number=class_number,
        score=score,
        averages=torch.from_numpy(rng.normal(size=(k, 6, 6))).float(),
        frc=torch.from_numpy(rng.uniform(size=(k, 4))).float(),
        resolution=torch.tensor([7.25, torch.inf, 1 / 3]),
        class_sizes=torch.tensor([3, 0, 1]),
        history=pd.DataFrame(
            {
                "iteration": [1, 2, 3],
                "mean_score": rng.uniform(size=3) / 3,  # all 53 bits are in use
                "reassigned": [1.0, 1e-17, np.nan],
            }
        ),
        rejected=pd.DataFrame({"index": aside, "reason": REASONS}),
        pixel_size=1.3700000000000001,
        scale=96 / 70,
    )


def same(a: Alignment, b: Alignment) -> None:
    """Everything equal to the last bit, with dtype, NaN being equal to NaN."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in TENSORS]
    pairs += [
        (getattr(a.pose, name), getattr(b.pose, name)) for name in ("angle", "shift", "mirror")
    ]
    for x, y in pairs:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.numpy(), y.numpy())
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)
    pd.testing.assert_frame_equal(a.rejected, b.rejected)
    assert (a.pixel_size, a.scale) == (b.pixel_size, b.scale)


@pytest.mark.parametrize("name", ["alignment.npz", "alignment.result", "alignment"])
def test_saved_is_loaded(tmp_path: Path, name: str):
    there = made_up()
    there.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing left beside it
    same(there, Alignment.load(tmp_path / name))
    there.save(str(tmp_path / name))  # again, over it
    same(there, Alignment.load(str(tmp_path / name)))


def test_nothing_rejected_no_history_no_pixel_size(tmp_path: Path):
    full = made_up()
    fields = {name: getattr(full, name) for name in (*TENSORS, "pose")}
    bare = Alignment(**fields, history=pd.DataFrame())
    bare.save(tmp_path / "a.npz")
    back = Alignment.load(tmp_path / "a.npz")
    same(bare, back)
    assert back.pixel_size is None
    assert back.rejected.columns.tolist() == ["index", "reason"]
    assert back.rejected["index"].dtype == np.int64


def test_no_pickle_is_written(tmp_path: Path):
    made_up().save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype.kind in "fiubU" for name in archive.files)


class Boom:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_garbage_and_pickles_are_refused(tmp_path: Path):
    good = tmp_path / "good.npz"
    made_up().save(good)
    with np.load(good) as archive:
        data = dict(archive)
    mark = tmp_path / "mark"
    bad: dict[str, bytes | dict] = {
        "empty": b"",
        "text": b"index,angle\n0,1.0\n",
        "pickle": pickle.dumps(Boom(mark)),
        "truncated": good.read_bytes()[:-200],
        "cut short": good.read_bytes()[:1000],
        "flipped": good.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX", 3),
        "missing": {name: value for name, value in data.items() if name != "shift"},
        "pickled inside": {**data, "history": np.array([Boom(mark)], dtype=object)},
        "another length": {**data, "class_number": data["class_number"][:-1]},
        "no mirror": {**data, "mirror": data["mirror"].astype(float)},
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.npz"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)
        with pytest.raises(ValueError, match=f"{name}.npz: not an alignment"):
            Alignment.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array\.npy: not an alignment"):
        Alignment.load(tmp_path / "array.npy")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as other:
        other.writestr("notes.txt", "nothing")
    with pytest.raises(ValueError, match=r"other\.npz: not an alignment"):
        Alignment.load(tmp_path / "other.npz")
    assert not mark.exists()
    with pytest.raises(FileNotFoundError):
        Alignment.load(tmp_path / "absent.npz")


def test_to_frame_is_one_row_per_particle():
    alignment = made_up()
    frame = alignment.to_frame()
    assert frame.columns.tolist() == [
        "index", "class_number", "angle", "shift_x", "shift_y", "mirror", "score",
    ]  # fmt: skip
    assert frame["index"].tolist() == list(range(12))
    for i, row in frame.iterrows():
        assert row["class_number"] == alignment.class_number[i]
        expected = [alignment.pose.angle[i], *alignment.pose.shift[i], alignment.score[i]]
        found = row[["angle", "shift_x", "shift_y", "score"]].to_numpy(dtype=float)
        np.testing.assert_array_equal(found, torch.stack(expected).double().numpy())
        assert row["mirror"] == int(alignment.pose.mirror[i])
    assert frame["mirror"].dtype == np.int64
    assert frame.loc[frame["class_number"] == 0, ["angle", "score"]].isna().all(axis=None)


def test_a_class_of_few_is_filtered_as_the_others_are():
    """By the mean curve of classes with 8 members or more, and members in both halves."""
    made = made_up()
    curves = torch.tensor([[1, 0.8, 0.5, 0.2], [1, 0.9, 0.9, 0.9], [1, 0.0, 0.0, 0.0]])
    sizes = torch.tensor([40, 7, 40])
    found = dataclasses.replace(made, frc=curves, class_sizes=sizes).filtered_averages()
    # Rings 1 and 2 of the smoothed first curve, 2 F / (1 + F); a 6 x 6 box ends at ring 3.
    smooth = np.array([(1 + 0.8 + 0.5) / 3, (0.8 + 0.5 + 0.2) / 3])
    expected = 2 * smooth / (1 + smooth)
    for c in range(3):
        plain, filtered = (np.fft.rfft2(x[c].numpy()) for x in (made.averages, found))
        for ring in (1, 2):
            np.testing.assert_allclose(
                filtered[ring, 0] / plain[ring, 0], expected[ring - 1], rtol=1e-4
            )


def test_frame_is_a_copy():
    """Whoever writes into the table does not change the alignment."""
    alignment = made_up()
    frame = alignment.to_frame()
    frame.loc[:, "angle"] = 0.0
    assert alignment.pose.angle[-1] != 0


def test_class_frame():
    alignment = made_up()
    frame = alignment.class_frame()
    assert frame["class_number"].tolist() == [1, 2, 3]
    assert frame["size"].tolist() == [3, 0, 1]
    for c in (1, 2, 3):
        members = alignment.class_number == c
        expected = alignment.score[members].double().mean() if members.any() else torch.nan
        np.testing.assert_allclose(frame["mean_score"][c - 1], expected, rtol=1e-6)
