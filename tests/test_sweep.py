"""A sweep from its card to its tables: each cell once, whatever was there before and whatever interrupts it."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from harness import axes, config, sweep, tracking
from harness.data import card, load
from harness.record import Store
from harness.refusal import Refused

CARD = """
methods = ["fedavg", "scaffold"]
seeds = 2
[base]
clients = 5
rounds = {rounds}
net = "mlp"
local = {{ epochs = 1, batch = 32, lr = 0.1 }}
[grid]
"partition.alpha" = [0.3, 3.0]
"""
CLOCKS = {"seconds", "server_seconds", "started", "peak_memory_bytes", "sweep"}


def tables(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables without what the clock says."""
    store = Store(results, writable=False)
    return {
        table: [{key: value for key, value in row.items() if key not in CLOCKS} for row in store.rows(table)]
        for table in ("trials", "rounds", "clients")
    }


def files(results: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file of the tables."""
    return {str(p.relative_to(results)): (p.read_bytes(), p.stat().st_mtime_ns) for p in results.rglob("*.parquet")}


@dataclass
class Done:
    """A sweep of eight trials that went through."""

    card: Path
    results: Path
    outcome: sweep.Outcome
    watcher: Any

    @property
    def planned(self) -> axes.Sweep:
        return axes.load_sweep(self.card)


@pytest.fixture(scope="module")
def done(cluster: None, tmp_path_factory: pytest.TempPathFactory, diary_of: Callable[[], Any]) -> Done:
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "tiny.toml"
    path.write_text(CARD.format(rounds=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        watcher = diary_of()
        outcome = sweep.run(axes.load_sweep(path), folder / "results" / "tiny", watcher)
    return Done(path, folder / "results" / "tiny", outcome, watcher)


def mlflow_runs(results: Path) -> list[tuple[str, str, str | None]]:
    """(id, status, parent) of every run in the database beside a results folder."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking.default_uri(results))
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(ids, max_results=1000)
    return [(run.info.run_id, run.info.status, run.data.tags.get("mlflow.parentRunId")) for run in found]


@pytest.mark.cluster
def test_a_sweep_has_a_row_a_run_and_all_rounds_for_each_cell(done: Done) -> None:
    cells = {config.trial_id(cell): cell for cell in done.planned.cells}
    assert len(cells) == 2 * 2 * 2
    assert (done.outcome.done, done.outcome.failed, done.outcome.already, done.outcome.problems) == (8, 0, 0, [])
    found = tables(done.results)
    assert {row["trial_id"]: row["status"] for row in found["trials"]} == dict.fromkeys(cells, "done")
    assert Counter(row["trial_id"] for row in found["rounds"]) == dict.fromkeys(cells, 3)
    assert Counter(row["trial_id"] for row in found["clients"]) == dict.fromkeys(cells, 3 * 5)
    for row in found["trials"]:
        assert config.Trial.model_validate_json(row["config"]) == cells[row["trial_id"]]
        assert row["data_hash"] == load(card("digits")).checksum()
        assert row["command"] == sweep.command_of(cells[row["trial_id"]])
        own = [r for r in found["rounds"] if r["trial_id"] == row["trial_id"]]
        assert row["up_bytes"] == sum(r["up_bytes"] for r in own) > 0
        assert row["global_accuracy_last"] == own[-1]["accuracy"]
    assert len({row["partition_hash"] for row in found["trials"]}) == 4, "by alpha and seed, not by method"


@pytest.mark.cluster
def test_mlflow_has_a_finished_run_for_each_trial_under_one_parent(done: Done) -> None:
    runs = mlflow_runs(done.results)
    (parent,) = (run for run, _, above in runs if above is None)
    assert Counter((status, above) for _, status, above in runs) == {("FINISHED", None): 1, ("FINISHED", parent): 8}


@pytest.mark.cluster
def test_a_second_run_trains_nothing_and_changes_nothing(
    done: Done, diary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sweep, "_tune", lambda *_: pytest.fail("it trains"))
    before, runs = files(done.results), mlflow_runs(done.results)
    outcome = sweep.run(done.planned, done.results, diary)
    assert (outcome.done, outcome.already, diary.todo, diary.already) == (0, 8, 0, 8)
    assert files(done.results) == before
    assert mlflow_runs(done.results) == runs


@pytest.mark.long
@pytest.mark.cluster
def test_what_failed_is_tried_again_and_what_diverged_is_not(
    done: Done, tmp_path: Path, diary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of a copy are replaced by failures, as they are written; one cell is taken away."""
    copy = tmp_path / "results"
    shutil.copytree(done.results, copy)
    store = Store(copy)
    crashed, diverged, missing, *_ = rows = store.rows("trials")
    for row, reason in ((crashed, "crashed: its process died"), (diverged, "diverged: the update of client 1")):
        store.commit({**row, "status": "failed", "reason": reason}, [], [])
    (copy / "trials" / f"{missing['trial_id']}.parquet").unlink()
    before = files(copy)
    planned = axes.load_sweep(done.card, ["mlflow=false"])
    outcome = sweep.run(planned, copy, diary)
    assert (outcome.done, outcome.failed, outcome.already) == (2, 0, 6)
    assert {row["trial_id"] for row in diary.ended} == {crashed["trial_id"], missing["trial_id"]}
    after = {row["trial_id"]: row for row in tables(copy)["trials"]}
    assert after[diverged["trial_id"]]["status"] == "failed"
    undone = {str(row["trial_id"]) for row in (crashed, missing)}
    untouched = {name: file for name, file in before.items() if Path(name).stem not in undone}
    assert untouched.items() <= files(copy).items()
    for table, found in tables(done.results).items():
        same = [row for row in found if row["trial_id"] != diverged["trial_id"]]
        assert [row for row in tables(copy)[table] if row["trial_id"] != diverged["trial_id"]] == same
    assert len(rows) == 8


@pytest.mark.long
@pytest.mark.cluster
def test_only_the_driver_writes(done: Done, tmp_path: Path, diary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the driver's pen taken away nothing is written at all, and the callback leaves it no copy of itself.

    Nor do trials save anything in Tune's folder, which other nodes do not have.
    """
    written: list[str] = []
    monkeypatch.setattr(sweep.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "scratch"))
    monkeypatch.setattr(sweep.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(Store, "commit", lambda _, row, *tables: written.append(row["trial_id"]))
    outcome = sweep.run(axes.load_sweep(done.card, ["mlflow=false", "seed=0", "alpha=3.0"]), tmp_path / "r", diary)
    assert (len(written), outcome.done) == (2, 2)
    assert list((tmp_path / "r").rglob("*.parquet")) == []
    assert list((tmp_path / "scratch").iterdir())
    assert list((tmp_path / "scratch").rglob("checkpoint_*")) == []
    scribe = sweep.Scribe(done.planned, Store(done.results), None, diary, outcome, {})
    assert not isinstance(pickle.loads(pickle.dumps(scribe)), sweep.Scribe)


@pytest.mark.cluster
def test_a_ray_that_was_there_stays(done: Done) -> None:
    import ray

    assert ray.is_initialized()


def command(*words: str, folder: Path) -> subprocess.Popen[str]:
    """The real command, in a session of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.parametrize("whom", ["process", "group"])
def test_ctrl_c_keeps_what_has_ended_and_the_same_command_goes_on(tmp_path: Path, done: Done, whom: str) -> None:
    """The signal comes to the command alone, then to all its processes, as a terminal sends it."""
    (tmp_path / "tiny.toml").write_text(CARD.format(rounds=3))
    words = ("sweep", "tiny.toml", "parallel=1")
    first = command(*words, folder=tmp_path)
    assert first.stdout is not None
    said = ""
    while "[1/8]" not in said:
        line = first.stdout.readline()
        assert line, f"it ended early: {said} {first.communicate()[1]}"
        said += line
    (os.kill if whom == "process" else os.killpg)(first.pid, signal.SIGINT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 130, err
    assert "the same command goes on" in out
    assert "Traceback" not in out + err
    kept = files(tmp_path / "results" / "tiny")
    rows = tables(tmp_path / "results" / "tiny")["trials"]
    assert 1 <= len(rows) < 8
    assert {row["status"] for row in rows} == {"done"}
    if whom == "group":
        return
    second = command(*words, folder=tmp_path)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert f"{8 - len(rows)} trial{'s' * (len(rows) < 7)} to run, {len(rows)} already there." in out
    assert err == ""
    assert kept.items() <= files(tmp_path / "results" / "tiny").items()
    assert tables(tmp_path / "results" / "tiny") == tables(done.results)
    assert all(status == "FINISHED" for _, status, _ in mlflow_runs(tmp_path / "results" / "tiny"))
    assert len(mlflow_runs(tmp_path / "results" / "tiny")) == 9


OWN = '''
from dataclasses import dataclass
from algorithms.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    """Hyper-parameters of every type, one without a default."""

    rate: float
    count: int = 3
    flag: bool = True
    word: str = "plain"
    levels: tuple[float, ...] = (0.5, 1.0)
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("my methods") / "my_method.py"
    path.write_text(OWN)
    return str(path)


def numbers(low: float, high: float, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **more)


WORDS = st.text("abcXYZ019 _-.,=[]'#é", max_size=8) | st.sampled_from(
    ["true", "inf", "nan", "1e5", "0x1", "2026-01-01"]
)
HYPER = {
    "count": st.integers(-(10**9), 10**9),
    "flag": st.booleans(),
    "word": WORDS,
    "levels": st.lists(numbers(-1e3, 1e3), max_size=3),
}
SETTINGS = {
    "dataset": st.sampled_from(["digits", "fashion-mnist", "cifar10"]),
    "net": st.sampled_from(["mlp", "lenet5", "resnet8"]),
    "clients": st.integers(1, 10**6),
    "participation": numbers(0, 1, exclude_min=True),
    "rounds": st.integers(1, 10**6),
    "seed": st.integers(0, 2**63 - 1),
    "partition": st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(["iid", "dirichlet", "shards", "pathological", "quantity-dirichlet"]),
            "alpha": numbers(1e-3, 1e3),
            "fraction": numbers(0.01, 1),
            "long_tail": numbers(1, 100),
            "shift": st.sampled_from(["none", "rotation", "noise"]),
            "shift_level": numbers(0, 360),
        },
    ),
    "local": st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.integers(1, 100),
            "lr": numbers(1e-12, 1e6),
            "momentum": numbers(0, 1, exclude_max=True),
            "augment": st.booleans(),
        },
    ),
    "evaluation": st.fixed_dictionaries(
        {},
        optional={"targets": st.lists(numbers(0.01, 0.99), max_size=3), "every": st.integers(1, 9)},
    ),
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_the_command_of_a_trial_is_that_trial(own: str, data: st.DataObject) -> None:
    """Whatever was set, by participation or by cohort: the command in its row, read back, has its id."""
    raw = data.draw(st.fixed_dictionaries({}, optional=SETTINGS))
    method = data.draw(st.sampled_from(["fedavg", "kdia", "fedprox", own]))
    if method == own:
        raw["hyper"] = data.draw(st.fixed_dictionaries({"rate": numbers(-1e9, 1e9)}, optional=HYPER))
    elif method == "kdia":
        raw["hyper"] = {"tau": data.draw(numbers(1e-6, 1e6)), "kd_direction": "teacher_first"}
    if "participation" not in raw and data.draw(st.booleans()):
        raw["cohort"] = data.draw(st.integers(1, raw.get("clients", 20)))
    try:
        trial = config.resolve({**raw, "method": method})
    except Refused:
        assume(False)
    words = shlex.split(sweep.command_of(trial))
    assert words[:3] == ["fedstill", "run", trial.method]
    again = axes.run_sweep(words[2], words[3:]).cells
    assert [config.trial_id(cell) for cell in again] == [config.trial_id(trial)]
    assert again == (trial,)


@pytest.mark.parametrize(
    ("address", "why"),
    [("127.0.0.1:1", "refused"), ("nonsense", "HOST:PORT or auto"), ("auto", "running Ray instance")],
)
def test_a_cluster_that_is_not_there_is_refused_at_once(
    tmp_path: Path, diary: Any, monkeypatch: pytest.MonkeyPatch, address: str, why: str
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    if address == "auto":
        monkeypatch.setattr(
            ray, "init", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no running Ray instance"))
        )
    began = time.monotonic()
    with pytest.raises(Refused, match=f"no Ray cluster at execution.address = '{address}'.*{why}"):
        sweep.run(axes.run_sweep("fedavg", [f"address={address}"]), tmp_path / "results", diary)
    assert time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []
