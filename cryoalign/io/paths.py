"""Find the stacks that a STAR file names."""

import os
from pathlib import Path

from cryoalign.io.problems import Problem, input_error


def resolve(name: str, star: Path, root: Path | None, allow_outside: bool) -> Path:
    """The stack that the STAR file ``star`` means by ``name``.

    A relative name is tried in ``root``, in the folder of the STAR file, in the folders above it
    (RELION's names start at the project folder), and in the current folder. An absolute name, or
    one that leaves its starting folder by ``..``, must lead into ``root`` or the folder of the STAR
    file, unless ``allow_outside``. Symbolic links are not followed for this test: they are taken
    as the user's intention.

    Raises InputError (a ValueError) if the stack is missing or outside.
    """
    folder = plain(star).parent
    homes = [folder] if root is None else [plain(root), folder]
    # Not the root of the file system, because "tmp/x" does not mean "/tmp/x".
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
        remedy = "if this is intended, set allow_outside=true, or root to a folder that contains it"
    else:
        looked = [candidate] if Path(name).is_absolute() else bases
        what = f"the stack '{name}' is missing (searched in {', '.join(map(str, looked))})"
        remedy = "restore it, or set root to the folder where its name starts (RELION's project)"
    raise input_error([Problem(star, None, what, remedy)])


def plain(path: Path) -> Path:
    """The absolute path without ``..``; symbolic links are not resolved."""
    return Path(os.path.normpath(path.absolute()))
