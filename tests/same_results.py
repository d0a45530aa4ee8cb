"""Do two commits give the same results? Runs the four methods and compares all that they write.

    python tests/same_results.py run FOLDER            with the package of this checkout
    python tests/same_results.py compare FOLDER_A FOLDER_B

The columns of the tables of the first folder and every pixel of the class averages are compared bit
by bit; times, ranks and new columns are left out. Classes that have other numbers in the other
folder are matched by their members first, and that is said. Two of the 300 simulated images are
unusable. Exit code 1: something differs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd

SIMULATE = ["n=300", "n_classes=4", "size=48", "snr=0.2", "seed=5"]
RUNS = {
    "mra": ["method=mra", "n_classes=4", "iterations=5"],
    "mra-exhaustive": ["method=mra", "n_classes=4", "iterations=2", "search.mode=exhaustive"],
    "mra-equal": ["method=mra", "n_classes=4", "iterations=3", "assign.strategy=equal"],
    "mra-soft": ["method=mra", "n_classes=4", "iterations=14", "assign.strategy=soft"],
    "mra-box": ["method=mra", "n_classes=4", "iterations=3", "images.box=36"],
    "rfa": ["method=rfa", "iterations=3"],
    "rfa-starts": ["method=rfa", "iterations=2", "schedule.starts=2", "schedule.kicks=1"],
    "classify": ["method=classify", "n_classes=4", "quality.junk=set_aside"],
    "classify-invariants": ["method=classify", "n_classes=4", "likelihood.start=invariants"],
    "classify-box": ["method=classify", "n_classes=4", "images.box=36"],
    "isac": ["method=isac", "isac.images_per_group=60", "iterations=2", "isac.repeats=2"],
}
TABLES = (
    "particles.csv", "classes.csv", "history.csv", "rejected.csv", "stability.csv",
    "frc_iterations.csv",
)  # fmt: skip
STACKS = ("class_averages.mrcs", "class_averages_unfiltered.mrcs", "average_iterations.mrcs")
NOT_COMPARED = {"seconds", "index"}


def run_all(folder: Path) -> None:
    """Simulate one stack and run every method on it, on one CPU thread."""
    cryoalign = [sys.executable, "-m", "cryoalign"]
    data = folder / "data"
    if not data.exists():
        subprocess.run([*cryoalign, "simulate", str(data), *SIMULATE], check=True)
        with mrcfile.open(next(data.glob("*.mrcs")), "r+") as stack:
            stack.data[7], stack.data[100] = np.nan, 3.0
    for name, words in RUNS.items():
        shared = [f"particles={data}/particles.star", "embedding=false", "device=cpu", "threads=1"]
        output = [f"output={folder / name}", "overwrite=true", "seed=3"]
        subprocess.run([*cryoalign, "run", *words, *shared, *output], check=True)


def compare(a: Path, b: Path) -> list[str]:
    """What differs between two folders that `run_all` wrote."""
    found = []
    for name in RUNS:
        numbers = _renumbered(a / name, b / name)
        if numbers is None:
            found.append(f"{name}: the classes have other members")
            continue
        if (numbers != np.arange(len(numbers))).any():
            print(f"{name}: classes have other numbers, their members are the same")
        for table in TABLES:
            if (a / name / table).exists() and not (b / name / table).exists():
                found.append(f"{name}: {table} is missing")
            elif (a / name / table).exists():
                found += [f"{name}: {f}" for f in _tables(a / name, b / name, table, numbers)]
        for stack in STACKS:
            if (a / name / stack).exists():
                ours, theirs = (_images(x / name / stack) for x in (a, b))
                if stack.startswith("class"):
                    theirs = theirs[numbers[1:] - 1]
                if not np.array_equal(ours, theirs):
                    found.append(f"{name}: {stack} differs by {np.abs(ours - theirs).max():.3g}")
    return found


def _images(path: Path) -> np.ndarray:
    """(k, h, w) of a stack; the library gives one image as (h, w)."""
    images = mrcfile.read(path)
    return images[None] if images.ndim == 2 else images


def _renumbered(a: Path, b: Path) -> np.ndarray | None:
    """Number of the class of b that has the members of class i of a; None: there is none such."""
    ours, theirs = (pd.read_csv(x / "particles.csv")["class_number"].to_numpy() for x in (a, b))
    k = len(pd.read_csv(a / "classes.csv"))
    numbers = np.arange(k + 1)
    for i in range(k + 1):
        partner = np.unique(theirs[ours == i])
        if len(partner) > 1 or (len(partner) and (theirs == partner[0]).sum() != (ours == i).sum()):
            return None
        if len(partner):
            numbers[i] = partner[0]
    return numbers


def _tables(a: Path, b: Path, table: str, numbers: np.ndarray) -> list[str]:
    ours, theirs = (pd.read_csv(x / table) for x in (a, b))
    if table == "classes.csv":
        theirs = theirs.iloc[numbers[1:] - 1].reset_index(drop=True)
        ours, theirs = (
            t.drop(columns=["class_number", "rank"], errors="ignore") for t in (ours, theirs)
        )
    elif "class_number" in ours:
        ours = ours.assign(class_number=numbers[ours["class_number"]])
    if len(ours) != len(theirs):
        return [f"{table} has {len(ours)} rows and {len(theirs)}"]
    found = [f"{table} lost {c}" for c in ours if c not in theirs and c not in NOT_COMPARED]
    for column in [c for c in ours if c in theirs and c not in NOT_COMPARED]:
        if not ours[column].equals(theirs[column]):
            found.append(f"{table}, column {column} differs")
    return found


if __name__ == "__main__":
    verb, *folders = sys.argv[1:]
    if verb == "run":
        run_all(Path(folders[0]).resolve())
    else:
        differences = compare(*map(Path, folders))
        print("\n".join(differences) or "the results are the same, bit for bit")
        sys.exit(bool(differences))
