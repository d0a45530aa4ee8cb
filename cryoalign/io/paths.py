"""Where the stacks that a STAR file names are."""

from __future__ import annotations

import os
from pathlib import Path

from cryoalign.io.problems import Problem, input_error


def resolve(name: str, star: Path, root: Path | None, allow_outside: bool) -> Path:
    """The file that a STAR file at ``star`` means by ``name``.

    Relative names are tried against ``root``, the STAR file's folder, its ancestors (RELION names
    files from the project's folder), and the current folder. A name that is absolute, or whose
    ``..`` climb out of the folder it starts from, must lie inside ``root`` or the STAR file's
    folder unless ``allow_outside``. Paths are compared as written: symbolic links are a user's
    own, on purpose.

    Raises InputError (a ValueError) if it is missing or outside.
    """
    folder = plain(star).parent
    homes = [folder] if root is None else [plain(root), folder]
    # The file system's own root is left out: there "tmp/x" would mean the absolute "/tmp/x".
    bases = dict.fromkeys([*homes, *folder.parents[:-1], plain(Path())])
    outside = False
    for base in bases:
        candidate = plain(base / name)
        if not allow_outside and not any(candidate.is_relative_to(h) for h in (base, *homes)):
            outside = True
        elif candidate.is_file():
            return candidate
        if Path(name).is_absolute():
            break
    if outside:
        what = f"the stack '{name}' leads outside {homes[0]}"
        remedy = "if that is meant, set allow_outside, or set root to a folder that holds it"
    else:
        looked = [candidate] if Path(name).is_absolute() else bases
        what = f"the stack '{name}' is missing (looked in {', '.join(map(str, looked))})"
        remedy = "restore it, or set root to the folder its name starts from (RELION's project)"
    raise input_error([Problem(star, None, what, remedy)])


def plain(path: Path) -> Path:
    """Absolute and without ``..``, but through symbolic links as written."""
    return Path(os.path.normpath(path.absolute()))
