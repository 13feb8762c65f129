"""Searches under a real Tune: they run, are killed, go on, and end with tables that agree with each other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.axes import load_sweep
from harness.config import Trial, trial_id
from harness.record import Store
from harness.space import score

pytestmark = [pytest.mark.cluster, pytest.mark.long]
CARD = """
methods = ["fedavg", "fedprox"]
seeds = 2
[base]
clients = 6
participation = 0.5
rounds = 12
net = "mlp"
local = {{ epochs = 1, batch = 32 }}
holdout = {{ validation = 0.2 }}
[search]
{search}
[search.space]
"local.lr" = {{ loguniform = [0.001, 0.5] }}
[search.fedprox]
mu = {{ uniform = [0, 1] }}
[execution]
mlflow = false
checkpoint_every = 2
"""
KINDS = {
    "random": "trials = 4",
    "optuna": 'sampler = "optuna"\nahead = 1\ntrials = 6',
    "asha": 'scheduler = "asha"\ngrace = 2\nreduction = 2\ntrials = 6',
    "median": 'scheduler = "median"\ngrace = 2\nreduction = 2\ntrials = 6',
    "pbt": 'scheduler = "pbt"\ntrials = 4\ninterval = 4',
}
CLOCKS = {"seconds", "server_seconds", "started", "peak_memory_bytes", "time", "commit", "clean"}
REPEATED = ("random", "optuna", "pbt")  # whose trials do not depend on which one was faster


def start(card: Path, results: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "harness.cli", "sweep", str(card), "--results", str(results)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def numbers(results: Path) -> dict[str, list[dict[str, Any]]]:
    store = Store(results, writable=False)
    return {
        table: [{k: v for k, v in row.items() if k not in CLOCKS} for row in store.rows(table)]
        for table in ("trials", "rounds", "clients")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_runs_is_killed_and_goes_on(tmp_path: Path, kind: str) -> None:
    """SIGKILL once two rows are there."""
    card, killed, alone = tmp_path / "small.toml", tmp_path / "killed", tmp_path / "alone"
    card.write_text(CARD.format(search=KINDS[kind]))
    first = start(card, killed)
    end = time.monotonic() + 400
    while len(list(killed.glob("trials/*.parquet"))) < 2:
        assert first.poll() is None and time.monotonic() < end, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = start(card, killed)
    said = second.communicate(timeout=900)[0]
    assert second.returncode == 0, said
    consistent(card, killed, kind)
    assert not (killed / "checkpoints").exists()
    again = start(card, killed)
    assert "0 trials to run" in again.communicate(timeout=300)[0]
    if kind in REPEATED:
        assert start(card, alone).wait(900) == 0
        assert numbers(killed) == numbers(alone)


def consistent(card: Path, results: Path, kind: str) -> None:
    """Each draw has one row, with the rounds that it says; the finals are the best draw on the fresh seeds."""
    plan = load_sweep(card).search
    assert plan is not None
    found = numbers(results)
    assert {row["stage"] for row in found["trials"]} == {"search", "final"}
    count = Counter(row["trial_id"] for row in found["trials"])
    assert set(count.values()) == {1}
    rounds = Counter(row["trial_id"] for row in found["rounds"])
    for row in found["trials"]:
        cell = Trial.model_validate_json(row["config"])
        assert trial_id(cell) == row["trial_id"]
        assert (
            rounds[row["trial_id"]] == row["rounds_done"] == (12 if row["status"] == "done" else row["rounds_done"])
        )
        assert row["status"] == "done" or (row["stage"] == "search" and row["status"] == "stopped" and row["reason"])
    for group in plan.groups:
        own = [row for row in found["trials"] if json.loads(row["search"])["group"] == group.key]
        draws, finals = ([row for row in own if row["stage"] == stage] for stage in ("search", "final"))
        if kind != "pbt":
            assert sorted(json.loads(row["search"])["number"] for row in draws) == list(range(plan.how.trials))
        through = [row for row in draws if row["status"] == "done"]
        of = {row["trial_id"]: [r for r in found["rounds"] if r["trial_id"] == row["trial_id"]] for row in through}
        best = max(through, key=lambda row: score(of[row["trial_id"]], plan.how) or -1)
        assert [row["seed"] for row in sorted(finals, key=lambda row: row["seed"])] == [0, 1]
        for row in finals:
            mine, theirs = json.loads(row["config"]), json.loads(best["config"])
            assert {**mine, "seed": 0} == {**theirs, "seed": 0}
    if kind == "asha":
        assert any(row["status"] == "stopped" for row in found["trials"]), "two of three are stopped at each rung"
