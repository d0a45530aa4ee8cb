"""Write a file completely or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` on success and is removed on failure.

    The temporary file is in the same folder, which makes the replacement atomic, and has the same
    suffix, because some writers choose the format by it. Readers see either the old file or the
    complete new one.

    Raises FileNotFoundError if the folder does not exist or nothing was written.
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
