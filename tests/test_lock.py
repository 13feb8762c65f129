"""A results folder has one owner at a time, and none once that process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import lock
from harness.refusal import Refused

HOLD = """
import sys, time
from pathlib import Path
from harness import lock
lock.take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_has_the_folder_and_gets_it_when_that_one_is_killed(tmp_path: Path) -> None:
    root = Path(lock.__file__).parents[1]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(Refused, match=rf"in use by process {holder.pid} on .+ since 20\d\d-.+ UTC"):
            lock.take(tmp_path)
        lock.give_back(tmp_path)  # it never got it, so there is nothing to give back
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock.held(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_it_is_given_back_whatever_happens(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), lock.held(tmp_path):
            raise KeyError
    with lock.held(tmp_path), pytest.raises(Refused, match=f"in use by process {os.getpid()}"), lock.held(tmp_path):
        raise AssertionError("taken twice")
    with lock.held(tmp_path):
        pass
