"""Faults of clients, hosts and servers in the middle of a sweep on real hosts: F1, F2, F8, F12 to F19 and F24.

A method file of ours does the harm, beside an unharmed method. Each time both cells end with one row: with the
numbers of a sweep left alone, or with the reason; the other one is never touched.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import sweep
from harness.axes import load_sweep
from harness.record import Store
from harness.sweep import Outcome

pytestmark = [pytest.mark.cluster, pytest.mark.long]
CLOCKS = {"seconds", "server_seconds", "started", "peak_memory_bytes", "hosts", "time", "sweep", "commit", "clean"}
NAMED = {"trial_id", "config", "config_hash", "command"}  # other for a method's own file
HARMFUL = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
import torch
from algorithms.scaffold import Scaffold
from harness.trees import tree_map

MARKS = Path({marks!r})

def once():
    try:
        (MARKS / "once").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

@dataclass(frozen=True)
class Harmful(Scaffold):
    def reply(self, trained):
        payload, memory = super().reply(trained)
        client, round = trained.visit.client, trained.round
        {reply}
        return payload, memory

    def merge(self, state, updates, server):
        state = super().merge(state, updates, server)
        {merge}
        return state
"""
CARD = """
methods = {methods}
seeds = 1
[base]
clients = 6
participation = 0.5
rounds = 8
net = "mlp"
local = {{ epochs = 1, batch = 32, lr = 0.1 }}
[execution]
mlflow = false
hosts = 2
cpus_per_host = 0.5
parallel = 1
checkpoint_every = 2
visit_timeout_s = 5.0
"""
Tables = dict[str, list[dict[str, Any]]]


def tables(results: Path, method: str) -> Tables:
    """The rows of the one trial of a method, without clocks and without what a method's own file changes."""
    store = Store(results, writable=False)
    [trial_id] = [row["trial_id"] for row in store.rows("trials") if row["method"] == method]
    found = {table: store.rows(table, trial_id) for table in ("trials", "rounds", "clients")}
    return {
        table: [{k: v for k, v in row.items() if k not in CLOCKS | NAMED} for row in rows]
        for table, rows in found.items()
    }


class Sweep:
    """A sweep of a harmful SCAFFOLD and of FedAvg."""

    def __init__(self, folder: Path, diary: Any) -> None:
        self.folder, self.results, self.diary = folder, folder / "r", diary
        (folder / "marks").mkdir()

    def run(self, *overrides: str, reply: str = "pass", merge: str = "pass") -> Outcome:
        """Runs what is missing of it. reply, merge: the harm, on a host or on the server."""
        return sweep.run(load_sweep(self.write(reply, merge), overrides), self.results, self.diary)

    def write(self, reply: str, merge: str) -> Path:
        """Its card, and the method's file unless that is there."""
        own, card = self.folder / "scaffold.py", self.folder / "card.toml"
        if not own.exists():
            own.write_text(HARMFUL.format(marks=str(self.folder / "marks"), reply=reply, merge=merge))
        card.write_text(CARD.format(methods=[str(own), "fedavg"]))
        return card

    def row(self, method: str = "scaffold") -> dict[str, Any]:
        """Its one row of a method."""
        [row] = [row for row in Store(self.results, writable=False).rows("trials") if row["method"] == method]
        return row

    def events(self) -> list[dict[str, Any]]:
        """Of the harmful method."""
        return Store(self.results, writable=False).rows("events", self.row()["trial_id"])

    def kinds(self) -> set[str]:
        """What happened to the harmful method."""
        return {event["kind"] for event in self.events()}


@pytest.fixture
def harmed(cluster: None, tmp_path: Path, diary: Any) -> Sweep:
    return Sweep(tmp_path, diary)


@pytest.fixture(scope="module")
def alone(cluster: None, tmp_path_factory: pytest.TempPathFactory, diary_of: Any) -> Path:
    """The same sweep without any harm."""
    left = Sweep(tmp_path_factory.mktemp("alone"), diary_of())
    assert left.run().done == 2
    return left.results


def unharmed(harmed: Sweep, alone: Path, *methods: str) -> None:
    """Asserts that these ended as if nothing had been."""
    for method in methods:
        assert tables(harmed.results, method) == tables(alone, method)


KILLS = """
        if round >= {after} and len(list(MARKS.iterdir())) < {times}:
            (MARKS / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("times", [1, 2], ids=["f1-one", "f2-every-one"])
def test_hosts_that_are_killed_change_no_number(harmed: Sweep, alone: Path, times: int) -> None:
    """SIGKILL from within a visit, until so many hosts have died; there are two at a time."""
    assert harmed.run(reply=KILLS.format(after=3, times=times)).done == 2
    unharmed(harmed, alone, "scaffold", "fedavg")
    assert len(list((harmed.folder / "marks").iterdir())) >= times
    assert harmed.kinds() == {"host_lost"} and len(harmed.events()) >= times


def test_f8_a_folder_that_vanishes_ends_the_sweep(
    harmed: Sweep, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is taken away after round 4: what is written then fails as it does on one that is read-only."""
    before = harmed.diary.round

    def vanish(trial: Any, rounds_done: int, accuracy: float | None) -> None:
        before(trial, rounds_done, accuracy)
        if rounds_done >= 4:
            shutil.rmtree(harmed.results, ignore_errors=True)
            harmed.results.write_text("no folder any more")

    monkeypatch.setattr(harmed.diary, "round", vanish)
    with pytest.raises(OSError) as error:
        harmed.run()
    assert error.value.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
    assert str(harmed.results) in str(error.value)
    monkeypatch.undo()
    harmed.results.unlink()
    assert harmed.run().done == 2
    unharmed(harmed, alone, "scaffold", "fedavg")


NAN = "payload = tree_map(lambda x: x * float('nan'), payload) if round == 5 and client % 2 else payload"


def test_f12_an_update_that_is_not_finite_fails_the_trial(harmed: Sweep, alone: Path) -> None:
    outcome = harmed.run(reply=NAN)
    assert (outcome.done, outcome.failed) == (1, 1)
    assert harmed.row()["status"] == "failed" and harmed.row()["rounds_done"] == 5
    assert harmed.row()["reason"].startswith("diverged: the update of client ")
    assert harmed.row()["reason"].endswith(" in round 5 is not finite")
    unharmed(harmed, alone, "fedavg")
    assert harmed.run().done == 0, "it would only diverge again"


def test_f12_or_is_left_out_where_that_is_wanted(harmed: Sweep, alone: Path) -> None:
    assert harmed.run("faults.nonfinite=skip", reply=NAN).done == 2
    assert harmed.kinds() == {"client_skipped"} and {event["round"] for event in harmed.events()} == {5}
    assert tables(harmed.results, "scaffold")["rounds"][:5] == tables(alone, "scaffold")["rounds"][:5]


def test_f13_a_model_that_is_not_finite_is_a_result(harmed: Sweep, alone: Path) -> None:
    outcome = harmed.run(
        merge="state['params'] = tree_map(lambda x: x / 0, state['params']) if server.round == 5 else state['params']"
    )
    assert (outcome.done, outcome.failed) == (1, 1)
    assert harmed.row()["reason"] == "diverged: the global model is not finite after round 5"
    unharmed(harmed, alone, "fedavg")


def test_f14_clients_of_a_few_rows_and_of_one_class(harmed: Sweep) -> None:
    """20 clients at alpha 0.02: shards of a single row, 1.8 classes a client on average."""
    assert harmed.run("alpha=0.02", "partition.min_samples=1", "clients=20", "participation=1.0").done == 2
    assert {row["samples"] for row in Store(harmed.results, writable=False).rows("clients")} >= {1}
    assert {row["partition_classes"] < 2 for row in Store(harmed.results).rows("trials")} == {True}


RAISES = "raise RuntimeError(f'client {client} is down')"


def test_f15_rounds_from_which_nothing_comes_back_fail_the_trial(harmed: Sweep, alone: Path) -> None:
    """And F24: what every client said is there, whatever Ray folds away in its logs."""
    outcome = harmed.run("faults.client=skip", "faults.empty_rounds=3", reply=RAISES)
    assert (outcome.done, outcome.failed) == (1, 1)
    assert harmed.row()["reason"].endswith("3 rounds in a row, rounds 0 to 2 (faults.empty_rounds)")
    skipped = [event for event in harmed.events() if event["kind"] == "client_skipped"]
    assert len(skipped) == 9 and len({event["client"] for event in skipped}) > 1
    assert all(event["detail"].endswith(f"client {event['client']} is down") for event in skipped)
    assert [event["round"] for event in harmed.events() if event["kind"] == "empty_round"] == [0, 1, 2]
    unharmed(harmed, alone, "fedavg")


def test_f15_a_client_that_raises_fails_the_trial_loudly(harmed: Sweep, alone: Path) -> None:
    outcome = harmed.run(reply=RAISES)
    assert (outcome.done, outcome.failed) == (1, 1)
    assert " in round 0: RuntimeError: client " in harmed.row()["reason"]
    unharmed(harmed, alone, "fedavg")


SHORTAGES = {
    "f16-memory": "if round >= 3 and once(): raise MemoryError('made up')",
    "f17-gpu": "if round >= 3 and once(): raise torch.cuda.OutOfMemoryError('made up')",
}


@pytest.mark.parametrize("reply", SHORTAGES.values(), ids=SHORTAGES)
def test_a_host_short_of_memory_is_spared_and_no_number_changes(harmed: Sweep, alone: Path, reply: str) -> None:
    assert harmed.run(reply=reply).done == 2
    unharmed(harmed, alone, "scaffold", "fedavg")
    [event] = harmed.events()
    assert event["kind"] == "out_of_memory" and "1 of 2 hosts work from now on" in event["detail"]


HOARDS = """
        if round >= 3 and once():
            hoard = bytearray(os.urandom(2**20)) * 4096
            time.sleep(20)
"""


def test_f16_rays_own_memory_monitor_ends_a_host_and_the_sweep_goes_on(harmed: Sweep, alone: Path) -> None:
    """Ray is told to call the memory full 2 GB from now, and a visit takes 4 GB, once. Ray chooses whom it ends."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(told[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    if free < 6:
        pytest.skip(f"6 GB of free memory are needed, there are {free:.1f}")
    card = harmed.write(HOARDS, "pass")
    card.write_text(card.read_text().replace("visit_timeout_s = 5.0", "visit_timeout_s = 120.0"))
    limits = {"RAY_memory_usage_threshold": f"{1 - (free - 2) / total:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    words = [sys.executable, "-m", "harness.cli", "sweep", str(card), "--results", str(harmed.results)]
    done = subprocess.run(
        words, env={**os.environ, **limits}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    unharmed(harmed, alone, "scaffold", "fedavg")
    assert "out_of_memory" in harmed.kinds(), harmed.events()


def test_f18_a_visit_that_hangs_is_given_to_another_host(harmed: Sweep, alone: Path) -> None:
    """It sleeps for ten minutes; after 5 s (visit_timeout_s) its host is replaced."""
    assert harmed.run(reply="time.sleep(600) if round >= 3 and once() else None").done == 2
    unharmed(harmed, alone, "scaffold", "fedavg")
    assert harmed.kinds() == {"visit_hung"}


def test_f19_stragglers_change_no_number(harmed: Sweep, alone: Path) -> None:
    """Answers come in another order than they were asked for."""
    assert harmed.run(reply="time.sleep((client * 37 + round) % 5 / 20)").done == 2
    unharmed(harmed, alone, "scaffold", "fedavg")
    assert harmed.events() == []
