"""Whether the tests notice when a feature is off: `python tests/sabotage.py [NAME or FILE ...]`.

tests/sabotages/*.yaml list one-line changes of the package, each with the test that must fail then:

    - name: what is off
      file: path of the changed file from the repository's root
      old: text that occurs exactly once in it
      new: what replaces it
      test: pytest's node id

The repository's tracked files are copied once, as they lie in the working tree. Every named test
runs there first as it is, then with its change, the one test alone. The exit code is 1 if a test
passes with the feature off, fails without any change, or if an entry does not fit the files.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
LISTS = Path(__file__).resolve().parent / "sabotages"
LIMIT = 600  # seconds of a test; a change may make it run forever


class Sabotage(NamedTuple):
    """One entry of the lists; ``listed`` is the list's file name."""

    name: str
    file: str
    old: str
    new: str
    test: str
    listed: str


def read_sabotages(folder: Path = LISTS) -> list[Sabotage]:
    """All entries of a folder's lists, in order.

    Raises:
        ValueError: an entry has other keys than those above, or values that are no text.
    """
    entries = []
    for path in sorted(folder.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []:
            keys = set(Sabotage._fields) - {"listed"}
            if set(entry) != keys or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError(f"{path.name}: give the texts {sorted(keys)}, not {entry}")
            entries.append(Sabotage(**entry, listed=path.name))
    return entries


def fault(entry: Sabotage, root: Path = ROOT) -> str | None:
    """What of an entry does not fit the files under ``root``, or None."""
    path = root / entry.file
    if not path.is_file():
        return f"there is no file {entry.file}"
    if (count := path.read_text(encoding="utf-8").count(entry.old)) != 1:
        return f"the old text occurs {count} times in {entry.file}, not once"
    if entry.new == entry.old:
        return "the new text is the old one"
    where, _, function = entry.test.partition("::")
    test = root / where
    function = function.partition("[")[0]
    if not test.is_file() or not re.search(
        rf"^def {re.escape(function)}\(", test.read_text(encoding="utf-8"), re.MULTILINE
    ):
        return f"there is no test {entry.test}"
    return None


def selected(entries: Sequence[Sabotage], patterns: Sequence[str]) -> list[Sabotage]:
    """Those whose name, file, list or test has one of the patterns in it, or matches it."""

    def fits(entry: Sabotage, pattern: str) -> bool:
        texts = (entry.name, entry.file, entry.listed, entry.test)
        return any(pattern in text or fnmatch.fnmatch(text, pattern) for text in texts)

    return [e for e in entries if not patterns or any(fits(e, p) for p in patterns)]


def copy_tree(target: Path, root: Path = ROOT) -> None:
    """Copy the tracked files of a repository as they lie in its working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():  # a file may be removed, and not yet from the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_test(test: str, folder: Path) -> tuple[str, float]:
    """Run one test in a copy: "passed", "failed", or in words what else became of it; seconds."""
    started = time.perf_counter()
    # No bytecode: it is taken for fresh where a file changes twice in a second.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=LIMIT, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end after {LIMIT} s", time.perf_counter() - started
    outcome = {0: "passed", 1: "failed"}.get(done.returncode)
    judged = re.search(r"^E +(assert\b|AssertionError|Failed:)", done.stdout, re.MULTILINE)
    if outcome == "failed" and not judged:
        outcome = "failed by an error"
    if outcome == "passed" and " passed" not in done.stdout:
        outcome = "skipped"
    return outcome or f"pytest's exit code {done.returncode}", time.perf_counter() - started


def check(entries: Sequence[Sabotage], folder: Path) -> int:
    """Run entries in a copy of the repository; tells what is found and returns the exit code."""
    bad = [(entry, what) for entry in entries if (what := fault(entry, folder)) is not None]
    for entry, what in bad:
        print(f"{entry.listed}: {entry.name}: {what}")
    if bad:
        return 1
    broken = set()
    for test in dict.fromkeys(entry.test for entry in entries):
        outcome, seconds = run_test(test, folder)
        if outcome != "passed":
            broken.add(test)
            print(f"{outcome} without any change  {seconds:5.1f} s  {test}", flush=True)
    counts = {"caught": 0, "PASSED": 0, "BROKEN": len(broken)}
    for entry in entries:
        if entry.test in broken:
            continue
        path = folder / entry.file
        intact = path.read_text(encoding="utf-8")
        path.write_text(intact.replace(entry.old, entry.new), encoding="utf-8")
        try:
            outcome, seconds = run_test(entry.test, folder)
        finally:
            path.write_text(intact, encoding="utf-8")
        told = {"passed": "PASSED", "failed": "caught"}.get(outcome, "BROKEN")
        if told == "BROKEN" and outcome.startswith(("no end", "failed by")):
            told = "caught"
        counts[told] += 1
        why = f"  ({outcome})" if outcome not in ("passed", "failed") else ""
        print(f"{told}  {seconds:5.1f} s  {entry.name}{why}", flush=True)
    print(", ".join(f"{count} {told}" for told, count in counts.items()))
    return int(counts["PASSED"] > 0 or counts["BROKEN"] > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="of names, files, lists or tests; all without")
    entries = selected(read_sabotages(), parser.parse_args(arguments).patterns)
    if not entries:
        print("no such sabotage")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        folder.mkdir()
        copy_tree(folder)
        shared = ROOT.parent / "shared"
        if shared.is_dir():  # tests look for it beside the repository
            (folder.parent / "shared").symlink_to(shared)
        return check(entries, folder)


if __name__ == "__main__":
    sys.exit(main())
