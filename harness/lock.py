"""One process per results folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from harness.refusal import Refused

LOOK_S = 0.05
_TAKEN: dict[Path, IO[str]] = {}  # open files hold the locks


def take(results: Path) -> None:
    """Takes a folder for this process until it gives it back or ends. Raises Refused if another one has it."""
    file = (results / ".lock").open("a+")
    try:
        _lock(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise Refused(f"results folder {results} is in use by {holder}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
    file.flush()
    _TAKEN[results] = file


def holder(results: Path) -> str:
    """Who has a folder now, in words; empty: nobody. Nothing is written, and nobody is kept out for longer."""
    try:
        with (results / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return ""


def give_back(results: Path) -> None:
    """Lets others have the folder. Does nothing if this process has not taken it."""
    if results in _TAKEN:
        _TAKEN.pop(results).close()


def in_use(results: Path) -> bool:
    """Whether a process has the folder. Nothing is written."""
    return bool(holder(results))


def _lock(file: IO[str]) -> None:
    """Tries twice: somebody may just be asking who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOK_S)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def held(results: Path) -> Iterator[None]:
    """Takes a folder for a block of code. Raises Refused as `take` does."""
    take(results)
    try:
        yield
    finally:
        give_back(results)
