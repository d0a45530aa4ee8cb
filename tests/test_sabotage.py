"""The lists of sabotages (`sabotage.py`) fit the code and the tests that they name."""

from collections import Counter
from pathlib import Path

from tests.sabotage import Sabotage, check, fault, read_sabotages


def test_every_sabotage_fits_the_files() -> None:
    entries = read_sabotages()
    assert entries
    assert not [f"{e.name}: {what}" for e in entries if (what := fault(e)) is not None]
    assert not [name for name, count in Counter(e.name for e in entries).items() if count > 1]


def test_what_a_test_does_not_notice_is_told(tmp_path: Path, capsys) -> None:
    """On a package of one function, with tests that notice a change, do not, and always fail."""
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_doubling.py").write_text(
        "from doubling import double\n"
        "def test_two():\n    assert double(2) == 4\n"
        "def test_zero():\n    assert double(0) == 0\n"
        "def test_wrong():\n    assert double(1) == 1\n"
    )

    def entry(name: str, test: str, old: str = "2 * x", new: str = "3 * x") -> Sabotage:
        return Sabotage(name, "doubling.py", old, new, f"test_doubling.py::{test}", "list.yaml")

    assert check([entry("noticed", "test_two")], tmp_path) == 0
    assert check([entry("noticed", "test_two"), entry("not", "test_zero")], tmp_path) == 1
    told = capsys.readouterr().out
    assert told.count("caught") == 4  # two lines and two counts
    assert "PASSED" in told.splitlines()[-2]
    assert check([entry("always", "test_wrong")], tmp_path) == 1
    assert "failed without any change" in capsys.readouterr().out
    assert check([entry("no code", "test_two", new="2 *")], tmp_path) == 1
    assert "BROKEN" in capsys.readouterr().out
    for wrong, words in (
        (entry("text", "test_two", old="x"), "occurs 2 times"),
        (entry("test", "test_three"), "no test"),
    ):
        assert check([wrong], tmp_path) == 1
        assert words in capsys.readouterr().out
    assert (tmp_path / "doubling.py").read_text() == "def double(x):\n    return 2 * x\n"
