"""Files written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, else it is removed.

    The temporary file has the same folder (so that the rename is atomic) and the same suffix (so
    that writers which look at it behave alike). A reader therefore sees the old file or the new
    one, never half of either.

    Raises FileNotFoundError if the folder does not exist or the body wrote nothing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
