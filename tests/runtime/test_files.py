"""Files are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryoalign.runtime.files import replacing


def test_success_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "result.star"
    path.write_text("old")
    with replacing(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".star")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "result.star"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_and_nothing_written_are_told(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"none.*does not exist"),
        replacing(tmp_path / "none" / "x.npy"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match=r"nothing was written.*x\.npy"),
        replacing(tmp_path / "x.npy"),
    ):
        pass


def test_a_result_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
