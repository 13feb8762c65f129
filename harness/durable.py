"""Files that are there whole or not at all, whatever dies in between."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write(target: Path, content: Any) -> None:
    """Complete or absent: readers skip the dot-file, and the rename happens once the bytes are on the disk.

    content: bytes, or anything else that has a buffer. Raises OSError; what was there before then stays.
    """
    draft = target.with_name(f".{target.stem}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
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
