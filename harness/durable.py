"""Files that are there whole or not at all, whatever dies in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write(target: Path, content: Any) -> None:
    """Complete or absent: see `writing`. content: bytes, or anything else that has a buffer."""
    with writing(target) as file:
        file.write(content)


@contextmanager
def writing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `target` at the end of the block, or is gone if that fails.

    Readers skip the dot-file, and the rename happens once the bytes are on the disk. Raises OSError; what was there
    before then stays.
    """
    draft = target.with_name(f".{target.stem}.draft")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
