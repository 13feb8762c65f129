"""Kills the driver of a sweep at random moments, starts it again each time, and compares with a sweep left alone.

    python tests/chaos.py --kills 10 --seed 1 [CARD or its overrides: rounds=20 ...]

Prints the seed and every kill; exit code 0 if the tables are equal in all but their clocks, 1 if not.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.record import TABLES, Store

CLOCKS = {"seconds", "server_seconds", "started", "peak_memory_bytes", "time", "commit", "clean"}
FIRST_S = 3.0  # a driver is left alone for so long: it is still importing


def sweep(results: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness.cli", "sweep", *words, "--results", str(results)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def numbers(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables without clocks. What was lost and found on the way is told by `events`, so those are left out."""
    store = Store(results, writable=False)
    return {
        table: [{key: value for key, value in row.items() if key not in CLOCKS} for row in store.rows(table)]
        for table in TABLES
        if table != "events"
    }


def finish(process: subprocess.Popen[str]) -> float:
    """Waits for a sweep that has to go through; seconds."""
    started = time.monotonic()
    said, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise SystemExit(f"the sweep ended with exit code {process.returncode}:\n{said}")
    return time.monotonic() - started


def kill(results: Path, words: Sequence[str], after: float) -> bool:
    """Runs a sweep for so many seconds; whether it had to be killed."""
    process = sweep(results, words)
    try:
        said, _ = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        raise SystemExit(f"the sweep ended with exit code {process.returncode}:\n{said}")
    return False


def chaos(words: Sequence[str], kills: int, seed: int, folder: Path) -> int:
    """Returns how many of the kills hit a running sweep. Raises AssertionError if a number differs."""
    rng = random.Random(seed)
    alone, killed = folder / "alone" / "results", folder / "killed" / "results"
    took = finish(sweep(alone, words))
    print(f"seed {seed}: left alone, the sweep takes {took:.1f} s", flush=True)
    hit = 0
    for number in range(kills):
        # Short lives, so that there is something left to do after most of them.
        after = FIRST_S + rng.uniform(0, took / 3)
        was_running = kill(killed, words, after)
        hit += was_running
        rows = len(list((killed / "trials").glob("[!.]*.parquet"))) if killed.exists() else 0
        print(f"kill {number + 1} after {after:.1f} s: {rows} rows{'' if was_running else ', had ended'}", flush=True)
    finish(sweep(killed, words))
    left, right = numbers(alone), numbers(killed)
    for table, rows in left.items():
        assert rows == right[table], (
            f"{table}: {len(rows)} rows left alone, {len(right[table])} rows killed; they differ"
        )
        print(f"{table}: {len(rows)} rows, equal")
    return hit


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--kills", type=int, default=10)
    reader.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    reader.add_argument("words", nargs="*", default=["quickstart"])
    given = reader.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedstill-chaos-") as folder:
        try:
            print(f"{chaos(given.words, given.kills, given.seed, Path(folder))} kills hit a running sweep")
        except AssertionError as difference:
            sys.exit(str(difference))


if __name__ == "__main__":
    main()
