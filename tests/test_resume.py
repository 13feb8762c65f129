"""A trial that is stopped between any two rounds and goes on from its checkpoint ends with the same numbers."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from harness import config
from harness.checkpoint import Shelf, pack, unpack
from harness.data import card, load
from harness.inline import InlinePool
from harness.ledger import Ledger
from harness.record import Store
from harness.server import Server
from harness.work import make_setup

CLOCKS = ("seconds", "server_seconds")
ROUNDS = 6
HYPER = {"kdia": {"generator_epochs": 1, "generator_iterations": 3, "noise": 8}}
METHODS = ("fedavg", "scaffold", "kdia", "fedadam")


@cache
def trial(method: str) -> config.Trial:
    settings = {
        "clients": 8,
        "cohort": 3,
        "rounds": ROUNDS,
        "local": {"epochs": 1, "batch": 16, "lr": 0.05, "momentum": 0.5},
        "evaluation": {"every": 4},
        "hyper": HYPER.get(method, {}),
    }
    return config.resolve({"method": method, **settings})


def server(method: str) -> Server:
    setup, mixes = make_setup(trial(method), load(card("digits")))
    pool = InlinePool()
    pool.load(setup)
    return Server(setup, pool, mixes=mixes)


def tables(done: Server) -> list[list[dict[str, Any]]]:
    return [[{k: v for k, v in row.items() if k not in CLOCKS} for row in t] for t in (done.rounds, done.clients)]


@cache
def undisturbed(method: str) -> list[list[dict[str, Any]]]:
    whole = server(method)
    while not whole.done:
        whole.step()
    return tables(whole)


@pytest.mark.parametrize("stop", range(ROUNDS + 1))
@pytest.mark.parametrize("method", METHODS)
def test_stop_and_go_on_after_any_round(method: str, stop: int) -> None:
    """6 rounds, evaluated in rounds 3 and 5, interrupted after each number of rounds: the same bits every time."""
    first = server(method)
    for _ in range(stop):
        first.step()
    content = pack(first.snapshot())
    second = server(method)
    second.restore(unpack(content))
    assert second.round == stop
    while not second.done:
        second.step()
    assert tables(second) == undisturbed(method)


def test_taking_a_snapshot_changes_nothing() -> None:
    watched = server("kdia")
    while not watched.done:
        watched.snapshot()
        watched.step()
    assert tables(watched) == undisturbed("kdia")


def fedstill(results: Path, *words: str) -> subprocess.Popen[str]:
    settings = [
        "rounds=60",
        "clients=8",
        "local.epochs=1",
        "local.batch=8",
        "mlflow=false",
        "checkpoint_every=3",
        *words,
    ]
    command = [sys.executable, "-m", "harness.cli", "run", "scaffold", *settings, *words, "--results", str(results)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def numbers(results: Path) -> list[list[dict[str, Any]]]:
    store = Store(results, writable=False)
    return [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in store.rows(t)] for t in ("rounds", "clients")
    ]


@pytest.mark.long
@pytest.mark.cluster
def test_a_driver_that_is_killed_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """SIGKILL once a checkpoint is on the disk; the same command again ends with the tables of a run left alone.

    That it went on, and did not start over, is seen from the checkpoints: the second run writes none of the rounds
    before those that the first had reached.
    """
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    first = fedstill(killed)
    try:
        wait_for(lambda: rounds_of(killed), first)
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    reached = max(rounds_of(killed))
    assert Store(killed, writable=False).finished() == {}
    second = fedstill(killed)
    later: set[int] = set()
    while second.poll() is None:
        later |= rounds_of(killed)
        time.sleep(0.02)
    assert second.returncode == 0, second.communicate()[0]
    assert all(round >= reached - 3 for round in later)  # two are kept
    third = fedstill(alone)
    assert third.wait() == 0
    assert numbers(killed) == numbers(alone)
    assert not (killed / "checkpoints").exists()


def rounds_of(results: Path) -> set[int]:
    return {int(file.name.split("-")[1]) for file in (results / "checkpoints").glob("*/round-*")}


def wait_for(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 180
    while not found():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)


def test_a_driver_killed_between_a_row_and_its_checkpoint_leaves_no_checkpoint(tmp_path: Path) -> None:
    """What has a row for good is never resumed; what failed may be."""
    store, shelf = Store(tmp_path), Shelf(tmp_path)
    for name, status in (("a" * 16, "done"), ("b" * 16, "failed")):
        store.commit({"trial_id": name, "status": status, "reason": "crashed", "steps": 1}, [], [], [])
        shelf.put(name, 1, b"1")
    ledger = Ledger(store, shelf, [])
    assert shelf.names() == ["a" * 16, "b" * 16], "who only reads, such as `fedstill plan`, changes nothing"
    ledger.tidy()
    assert shelf.names() == ["b" * 16]


@pytest.mark.cluster
def test_two_runs_of_one_folder_are_kept_apart(tmp_path: Path) -> None:
    results = tmp_path / "one"
    results.mkdir()
    with (results / ".lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("process 1 on elsewhere since yesterday")
        held.flush()
        late = fedstill(results)
        said, _ = late.communicate(timeout=180)
    assert late.returncode == 2
    assert "is in use by process 1 on elsewhere since yesterday" in said
