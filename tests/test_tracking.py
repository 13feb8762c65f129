"""MLflow holds what the tables hold: once, whole, and without ever holding a sweep up."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness import lock, portrait, projection, tracking
from harness.compaction import compact
from harness.printout import exhibit
from harness.projection import Projection, default_uri
from harness.record import Store
from harness.refusal import Refused, masked
from harness.summary import headline
from harness.tracking import Tracker, sync


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making its tables takes seconds, copying it nothing."""
    folder = tmp_path_factory.mktemp("schema")
    Projection(default_uri(folder / "none"), "none", Store(folder / "none"))
    client = projection._connect(default_uri(folder / "none"))
    for run in runs(client):
        client.delete_run(run.info.run_id)
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, schema: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(schema, tmp_path / "mlflow.db")
    return Store(tmp_path / "sweep")


def runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("fedstill").experiment_id
    return list(client.search_runs([experiment], order_by=["attributes.start_time"]))


def families(store: Store) -> tuple[list[Any], dict[str, Any]]:
    """The parent runs, and the child runs by trial id (one each, or the test fails)."""
    found = runs(projection._connect(default_uri(store.path)))
    parents = [run for run in found if "fedstill.sweep" in run.data.tags]
    children = [run for run in found if "fedstill.sweep" not in run.data.tags]
    named = {run.data.tags["fedstill.trial_id"]: run for run in children}
    assert len(named) == len(children)
    return parents, named


def state(store: Store) -> list[tuple[Any, ...]]:
    """All that a user can see of every run."""
    found = runs(projection._connect(default_uri(store.path)))
    return [(vars(run.info), run.data.metrics, run.data.params, run.data.tags) for run in found]


def commit(
    store: Store, trial_id: str, roles: tuple[str, ...] = ("student", "teacher"), **more: Any
) -> tuple[Any, Any]:
    rounds = [
        {"trial_id": trial_id, "round": at, "role": role, "recall": [0.5, 0.5], "up_kinds": "{}", "up_bytes": 0}
        | {"accuracy": 0.1 * at if at % 2 else None, "down_bytes": 0, "seconds": 0.0}
        | ({"up_bytes": 10, "steps": 5, "seconds": 2.0} if role == roles[0] else {})
        for at in range(4)
        for role in roles
    ]
    config = {"method": "kdia", "hyper": {"lambda_kd": 0.5, "names": ["a", "b"]}, "local": {"lr": 0.01}, "seed": 1}
    fixed = {"trial_id": trial_id, "sweep": "sweep", "status": "done", "method": "kdia", "seed": 1, "alpha": 0.1}
    fixed |= {"config": json.dumps(config), "started": "2025-01-01T00:00:00+00:00", "seconds": 8.5, "net": "mlp"}
    trial = fixed | {"up_bytes": 40, "dataset": "digits"} | headline(rounds, [0.2, 0.9]) | more
    store.commit(trial, rounds, [])
    return trial, rounds


def test_a_sweep_is_one_parent_with_a_run_per_trial(store: Store) -> None:
    tracker = Tracker(None, "sweep", store.path)
    for trial_id in ("aa", "bb"):
        tracker.add(*commit(store, trial_id))
    assert tracker.close() == []
    (parent,), children = families(store)
    assert (parent.info.run_name, parent.info.status) == ("sweep", "FINISHED")
    assert set(children) == {"aa", "bb"}
    run = children["aa"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.params == {
        "method": "kdia",
        "hyper.lambda_kd": "0.5",
        "hyper.names": '["a", "b"]',
        "local.lr": "0.01",
        "seed": "1",
    }
    tags = {"method": "kdia", "dataset": "digits", "alpha": "0.1", "seed": "1", "net": "mlp", "sweep": "sweep"}
    assert tags.items() <= run.data.tags.items()
    assert run.data.metrics["student_accuracy_last10"] == pytest.approx(0.2)
    assert run.data.metrics["student_rounds_to_0.2"] == 4
    assert "student_rounds_to_0.9" not in run.data.metrics  # never reached
    assert run.data.metrics["total/up_bytes"] == 40
    assert (run.info.start_time, run.info.end_time) == (1735689600000, 1735689608500)


def test_metrics_are_by_round_and_their_time_is_the_trials_clock(store: Store) -> None:
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "aa"))
    tracker.close()
    run_id = families(store)[1]["aa"].info.run_id
    client = projection._connect(default_uri(store.path))
    history = client.get_metric_history(run_id, "student/accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (3, pytest.approx(0.3))]
    assert [m.timestamp - 1735689600000 for m in history] == [4000, 8000]
    # costs are of the round, whatever the number of models that were evaluated in it
    assert [m.value for m in client.get_metric_history(run_id, "cost/up_bytes")] == [10.0] * 4
    names = set(client.get_run(run_id).data.metrics)
    assert not names & {"student/round", "student/up_bytes", "student/recall", "student/up_kinds", "seed", "alpha"}


def test_the_first_model_also_goes_by_names_that_all_methods_share(store: Store) -> None:
    """As handed over and as read back, where roles come in alphabetical order: "global" is first here."""
    rows = commit(store, "aa", roles=("global", "average"), data_hash="d" * 64, partition_js=0.3)
    Tracker(None, "sweep", store.path).close()  # from the tables
    seen = []
    for _ in range(2):
        run_id = families(store)[1]["aa"].info.run_id
        client = projection._connect(default_uri(store.path))
        history = client.get_metric_history(run_id, "all/accuracy")
        run = client.get_run(run_id)
        seen.append(
            ([(m.step, m.value) for m in history], run.data.metrics, run.inputs.dataset_inputs[0].dataset.name)
        )
        projection._connect(default_uri(store.path)).delete_run(run_id)
        tracker = Tracker(None, "sweep", store.path)
        tracker.add(*rows)
        assert tracker.close() == []
    assert seen[0] == seen[1]
    assert [step for step, _ in seen[0][0]] == [1, 3]
    assert seen[0][1]["accuracy_last10"] == seen[0][1]["global_accuracy_last10"]
    assert seen[0][2] == "digits"


def test_the_leaderboard_and_its_pictures_are_artifacts_of_the_sweep(store: Store) -> None:
    """Twice: they are replaced, not doubled."""
    commit(store, "aa")
    Tracker(None, "sweep", store.path).close()
    (store.path / "leaderboard.html").write_text("<p>old</p>")
    assert exhibit(store.path) == []
    (store.path / "leaderboard.html").write_text("<p>new</p>")
    assert exhibit(store.path) == []
    client, (parent,) = projection._connect(default_uri(store.path)), families(store)[0]
    names = [file.path for file in client.list_artifacts(parent.info.run_id)]
    assert {"leaderboard.html", "learning-curves.png"} <= set(names) and len(names) == len(set(names))
    kept = Path(client.download_artifacts(parent.info.run_id, "leaderboard.html"))
    assert kept.read_text() == "<p>new</p>"


def test_roles_of_domains_and_of_variants_have_names_that_mlflow_takes(store: Store) -> None:
    """It refuses "@" and "+"."""
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "t1", roles=("mlp+attention", "mlp+attention@verb")))
    assert tracker.close() == []
    _, children = families(store)
    metrics = children["t1"].data.metrics
    assert metrics["mlp.attention.verb/accuracy"] == metrics["mlp.attention/accuracy"] == pytest.approx(0.3)
    assert metrics["mlp.attention.verb_accuracy_last"] == pytest.approx(0.3)


def test_running_twice_changes_nothing(store: Store) -> None:
    rows = [commit(store, "aa"), commit(store, "bb", ("global",), status="failed", reason="diverged in round 3")]
    seen = []
    for handed_over in (rows, rows, []):  # the third time nothing was left to train
        tracker = Tracker(None, "sweep", store.path)
        for row in handed_over:
            tracker.add(*row)
        assert tracker.close() == []
        seen.append(state(store))
    assert len(seen[0]) == 3
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_a_row_from_the_trial_equals_the_row_read_back(store: Store) -> None:
    """With a second method the table has more columns, and integers beside floats: neither is a difference."""
    first, _ = commit(store, "aa", note=3, flag=True)
    commit(store, "bb", ("global",), note=0.5)
    back = store.rows("trials", "aa")[0]
    united = next(row for row in store.rows("trials") if row["trial_id"] == "aa")
    assert portrait.digest(first) == portrait.digest(back) == portrait.digest(united)
    assert portrait.digest(first | {"seconds": 8.6}) != portrait.digest(first)


def test_a_failed_and_a_stopped_trial_say_so(store: Store) -> None:
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "aa", status="failed", reason="out of memory " * 1000))
    tracker.add(*commit(store, "bb", status="stopped", reason="by the scheduler"))
    assert tracker.close() == []
    children = families(store)[1]
    assert (children["aa"].info.status, children["bb"].info.status) == ("FAILED", "KILLED")
    assert children["aa"].data.tags["reason"].startswith("out of memory")
    assert children["bb"].data.tags["reason"] == "by the scheduler"


def test_a_retried_trial_takes_the_place_of_the_failed_one(store: Store) -> None:
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "aa", status="failed", reason="crash"))
    tracker.close()
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "aa", seconds=9.0))
    tracker.close()
    (parent,), children = families(store)
    assert (children["aa"].info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert "reason" not in children["aa"].data.tags


@pytest.mark.parametrize("cut", ["log_batch", "set_tag", "set_terminated", "create_run"])
def test_a_run_half_written_by_a_crash_is_made_whole(store: Store, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    half = Projection(default_uri(store.path), "sweep", store)
    trial, rounds = commit(store, "aa")
    half._open("sweep")
    original = getattr(half._client, cut)

    def crash(*args: Any, **more: Any) -> Any:
        if cut == "create_run":  # the server made the run, its answer was lost
            original(*args, **more)
        raise ConnectionError("gone")

    monkeypatch.setattr(half._client, cut, crash)
    with pytest.raises(ConnectionError):
        half.put(trial, rounds)
    (parent,), children = families(store)
    assert (children["aa"].info.status, parent.info.status) == ("RUNNING", "RUNNING")
    assert Tracker(None, "sweep", store.path).close() == []
    (parent,), children = families(store)
    assert (children["aa"].info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert children["aa"].data.metrics["student_accuracy_last10"] == pytest.approx(0.2)
    assert children["aa"].data.params["hyper.lambda_kd"] == "0.5"
    assert Projection(default_uri(store.path), "sweep", store).reconcile() == (0, 0)


def test_what_is_missing_or_doubled_or_deleted_is_set_right(store: Store) -> None:
    for trial_id in ("aa", "bb", "cc"):
        commit(store, trial_id)
    assert Projection(default_uri(store.path), "sweep", store).reconcile() == (3, 0)
    client = projection._connect(default_uri(store.path))
    (parent,), children = families(store)
    client.delete_run(children["aa"].info.run_id)
    tags = {"fedstill.trial_id": "bb", "mlflow.parentRunId": parent.info.run_id}
    client.create_run(parent.info.experiment_id, tags=tags)
    assert Projection(default_uri(store.path), "sweep", store).reconcile() == (2, 2)
    assert set(families(store)[1]) == {"aa", "bb", "cc"}
    client.delete_experiment(parent.info.experiment_id)
    # MLflow restores an experiment with every run that was ever deleted from it
    Projection(default_uri(store.path), "sweep", store).reconcile()
    assert set(families(store)[1]) == {"aa", "bb", "cc"}
    assert Projection(default_uri(store.path), "sweep", store).reconcile() == (0, 0)


def test_two_results_folders_do_not_share_runs(store: Store) -> None:
    other = Store(store.path.with_name("other"))
    for folder in (store, other):
        commit(folder, "aa")
        assert Tracker(None, "sweep", folder.path).close() == []
    found = runs(projection._connect(default_uri(store.path)))
    assert sorted(run.info.run_name for run in found if "fedstill.sweep" in run.data.tags) == [
        "sweep",
        "sweep (other)",
    ]
    assert [run.data.tags.get("fedstill.trial_id") for run in found].count("aa") == 2


def test_more_metrics_than_a_call_takes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "BATCH", 7)
    commit(store, "aa")
    sizes = []
    small = Projection(default_uri(store.path), "sweep", store)
    original = small._client.log_batch

    def count(run_id: str, metrics: Any = (), **more: Any) -> None:
        sizes.append(len(metrics))
        original(run_id, metrics=metrics, **more)

    monkeypatch.setattr(small._client, "log_batch", count)
    small.reconcile()
    assert max(sizes) == 7
    assert len(sizes) > 3
    run = families(store)[1]["aa"]
    client = projection._connect(default_uri(store.path))
    assert len(client.get_metric_history(run.info.run_id, "cost/seconds")) == 4


def test_local_artifacts_lie_beside_the_database(store: Store) -> None:
    Projection(default_uri(store.path), "sweep", store)
    client = projection._connect(default_uri(store.path))
    place = client.get_experiment_by_name("fedstill").artifact_location
    assert place.endswith("/mlflow-artifacts")
    assert not (Path.cwd() / "mlruns").exists()


def test_each_sweep_of_a_folder_has_its_own_parent_and_each_trial_one_run(store: Store) -> None:
    """Two sweeps that share a results folder: what the second finds done stays the first one's."""
    commit(store, "aa", sweep="one")
    assert Tracker(None, "one", store.path).close() == []
    before = state(store)
    commit(store, "bb", sweep="two")
    assert Tracker(None, "two", store.path).close() == []
    parents, children = families(store)
    owners = {run.info.run_id: run.data.tags["fedstill.sweep"] for run in parents}
    assert sorted(owners.values()) == ["one", "two"]
    assert owners[children["aa"].data.tags["mlflow.parentRunId"]] == "one"
    assert owners[children["bb"].data.tags["mlflow.parentRunId"]] == "two"
    assert [one for one in state(store) if one in before] == before
    assert sync(store.path)[-1].endswith("0 runs written, 0 removed.")


def line(store: Store, written: int, removed: int) -> str:
    runs = "1 run" if written == 1 else f"{written} runs"
    return f"MLflow at {default_uri(store.path)}: {runs} written, {removed} removed."


def seen(store: Store) -> list[Any]:
    """All that a user can see of every run, but ids and the parents' clock."""
    found = []
    for run in runs(projection._connect(default_uri(store.path))):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        times = (run.info.start_time, run.info.end_time) if "fedstill.trial_id" in tags else ()
        found.append([run.info.run_name, run.info.status, times, run.data.metrics, run.data.params, tags])
    return sorted(found, key=str)


@pytest.fixture
def tracked(store: Store) -> Store:
    """Three trials of two sweeps, in the tables and in MLflow."""
    for trial_id, sweep in (("aa", "one"), ("bb", "one"), ("cc", "two")):
        commit(store, trial_id, sweep=sweep)
    assert sync(store.path) == [line(store, 3, 0)]
    assert [run[0] for run in seen(store)] == [
        "kdia seed=1 aa",
        "kdia seed=1 bb",
        "kdia seed=1 cc",
        "one (sweep)",
        "two (sweep)",
    ]
    return store


def damage(database: Path, how: str) -> None:
    if how == "deleted":
        database.unlink()
    elif how in ("half made", "half migrated"):  # as a kill while MLflow makes or changes its tables leaves it
        with closing(sqlite3.connect(database)) as opened:
            opened.execute(
                "DROP TABLE alembic_version" if how == "half made" else "CREATE TABLE _alembic_tmp_runs (x)"
            )
            opened.commit()
    else:
        content = database.read_bytes()
        spoiled = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "text": b"x" * 5000,
            "middle": content[:8192] + bytes(65536) + content[73728:],
        }
        database.write_bytes(spoiled[how])


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_lost_or_broken_database_is_rebuilt_from_the_tables(tmp_path: Path, tracked: Store, how: str) -> None:
    before = seen(tracked)
    # A place of its own: MLflow keeps databases open in this process.
    tracked = Store(shutil.copytree(tracked.path.parent, tmp_path / "broken") / tracked.path.name)
    database = tracked.path.parent / "mlflow.db"
    damage(database, how)
    spoiled = database.read_bytes() if database.exists() else b""
    *aside, done = sync(tracked.path)
    assert done == line(tracked, 3, 0)
    if how != "deleted":
        assert len(aside) == 1 and str(database) in aside[0] and "put aside as .damaged-mlflow.db" in aside[0]
        assert database.with_name(".damaged-mlflow.db").read_bytes()[:4096] == spoiled[:4096]
    assert seen(tracked) == before
    assert sync(tracked.path) == [line(tracked, 0, 0)]


def test_a_sound_database_is_left_alone_also_while_another_process_writes_to_it(tmp_path: Path, schema: Path) -> None:
    database = Path(shutil.copy(schema, tmp_path / "mlflow.db"))
    with closing(sqlite3.connect(database)) as busy:
        busy.execute("BEGIN EXCLUSIVE")
        assert tracking._put_aside(f"sqlite:///{database}") == []
    assert tracking._put_aside(f"sqlite:///{database}") == []
    assert database.exists()


@pytest.mark.parametrize("how", ["cut", "text", "middle", "half made", "half migrated"])
def test_a_broken_database_is_known_for_what_it_is(tmp_path: Path, schema: Path, how: str) -> None:
    database = Path(shutil.copy(schema, tmp_path / "mlflow.db"))
    damage(database, how)
    (said,) = tracking._put_aside(f"sqlite:///{database}")
    assert said.startswith(f"{database} is damaged" if how in ("cut", "text", "middle") else f"{database} was made")
    assert not database.exists()
    assert tracking._put_aside(f"sqlite:///{database}") == tracking._put_aside("http://somewhere:1") == []


def test_runs_that_no_row_stands_for_are_removed(tracked: Store) -> None:
    """Trials that were discarded, with the last one of a sweep also its parent; a run under it that is no trial's."""
    tracked.discard(["bb", "cc"])
    client = projection._connect(default_uri(tracked.path))
    (parent,) = (run for run in families(tracked)[0] if run.data.tags["fedstill.sweep"] == "one")
    client.create_run(parent.info.experiment_id, tags={"mlflow.parentRunId": parent.info.run_id})
    mine = client.create_run(parent.info.experiment_id, run_name="not fedstill's")
    assert sync(tracked.path) == [line(tracked, 0, 4)]
    assert sorted(run.info.run_name for run in runs(client)) == ["kdia seed=1 aa", "not fedstill's", "one (sweep)"]
    client.delete_run(mine.info.run_id)
    assert sync(tracked.path) == [line(tracked, 0, 0)]


def test_a_parent_that_is_there_twice_becomes_one(tracked: Store) -> None:
    """As two processes leave it that made it at the same time."""
    client = projection._connect(default_uri(tracked.path))
    (one, _), children = families(tracked)
    twin = client.create_run(one.info.experiment_id, tags=dict(one.data.tags), run_name=one.info.run_name)
    client.set_tag(children["aa"].info.run_id, "mlflow.parentRunId", twin.info.run_id)
    assert sync(tracked.path) == [line(tracked, 1, 2)]
    assert len(families(tracked)[0]) == 2
    assert sync(tracked.path) == [line(tracked, 0, 0)]


def test_compaction_is_nothing_to_mlflow(tracked: Store) -> None:
    before = state(tracked)
    compact(tracked.path)
    assert sync(tracked.path) == [line(tracked, 0, 0)]
    assert state(tracked) == before


def test_folders_of_one_name_keep_their_runs_apart_on_a_server(
    tmp_path: Path, schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not beside the results may be shared: neither folder takes the other's runs for its own."""
    shared = shutil.copy(schema, tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    folders = [Store(tmp_path / user / "quick") for user in ("ann", "bob")]
    for number, folder in enumerate(folders):
        commit(folder, "aa", seed=number)
    for expected in ("1 run written, 0 removed.", "0 runs written, 0 removed."):
        assert [sync(folder.path)[-1].rpartition(": ")[2] for folder in folders] == [expected] * 2
    moved = Store(folders[0].path.rename(tmp_path / "quick"))
    assert sync(moved.path)[-1].endswith("0 runs written, 0 removed.")


def test_sync_is_refused_where_it_can_not_be(tracked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="there is no results folder"):
        sync(tracked.path / "none")
    (tracked.path.parent / "deep" / "other").mkdir(parents=True)
    with pytest.raises(Refused, match="holds no tables of a sweep"):
        sync(tracked.path.parent / "deep" / "other")
    assert [path.name for path in (tracked.path.parent / "deep").iterdir()] == ["other"]
    with lock.held(tracked.path), pytest.raises(Refused, match="is in use by process"):
        sync(tracked.path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:s3cret@127.0.0.1:{unused_port()}")
    with pytest.raises(Refused, match=r"MLflow at http://\*\*\*@127.+ can't be brought up to date") as refusal:
        sync(tracked.path)
    assert "s3cret" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_looking_changes_nothing_and_tells_each_difference(tracked: Store) -> None:
    def told() -> list[str]:
        look = Projection(default_uri(tracked.path), None, tracked, look=True)
        return [f"{trial_id} {what}" for trial_id, what in look.differences()]

    assert told() == []
    client = projection._connect(default_uri(tracked.path))
    _, children = families(tracked)
    client.delete_run(children["aa"].info.run_id)
    client.set_tag(children["bb"].info.run_id, "fedstill.digest", "x")
    twin = client.create_run(children["cc"].info.experiment_id, tags=dict(children["cc"].data.tags))
    strange = dict(children["cc"].data.tags) | {"fedstill.trial_id": "dd"}
    stranger = client.create_run(children["cc"].info.experiment_id, tags=strange)
    before = state(tracked)
    first, second, third, fourth = told()
    assert first == "aa has no run"
    assert second.startswith("bb its run") and children["bb"].info.run_id in second
    assert third.startswith("cc has 2 runs") and twin.info.run_id in third
    assert fourth.startswith("dd ") and stranger.info.run_id in fourth
    assert state(tracked) == before
    assert sync(tracked.path) == [line(tracked, 3, 4)]
    assert told() == []


class Slow(BaseHTTPRequestHandler):
    """Takes the request, and lets it wait."""

    def do_GET(self) -> None:
        time.sleep(30)

    do_POST = do_GET  # noqa: N815


@pytest.fixture
def slow() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.socket.close()


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_slow_server_holds_nothing_up(tmp_path: Path, slow: int) -> None:
    store = Store(tmp_path / "sweep")
    tracker = Tracker(f"http://ann:s3cret@127.0.0.1:{slow}", "sweep", store.path)
    row = commit(store, "aa")
    start = time.monotonic()
    for _ in range(500):  # far more than the queue holds
        tracker.add(*row)
    assert time.monotonic() - start < 0.5
    problems = tracker.close(timeout=1.0)
    assert time.monotonic() - start < 3
    (problem,) = problems
    assert "no answer for 1 s" in problem
    assert "run the same command again" in problem
    assert "s3cret" not in problem
    assert f"***@127.0.0.1:{slow}" in problem


def test_a_dead_server_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:s3cret@127.0.0.1:{unused_port()}")
    store = Store(tmp_path / "sweep")
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "aa"))
    start = time.monotonic()
    (problem,) = tracker.close(timeout=30)
    assert time.monotonic() - start < 20
    assert "s3cret" not in problem
    assert "the tables are complete" in problem


def test_a_server_that_comes_back_gets_what_it_missed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = projection._connect, []

    def down_once(uri: str) -> Any:
        tries.append(uri)
        if len(tries) == 1:
            raise ConnectionError("refused")
        return real(uri)

    monkeypatch.setattr(projection, "_connect", down_once)
    tracker = Tracker(None, "sweep", store.path)
    tracker.add(*commit(store, "aa"))
    tracker.add(*commit(store, "bb"))
    assert tracker.close() == []
    assert set(families(store)[1]) == {"aa", "bb"}


def test_a_damaged_table_is_a_message_not_a_crash(store: Store) -> None:
    commit(store, "aa")
    (store.path / "trials" / "aa.parquet").write_bytes(b"PAR1")
    (problem,) = Tracker(None, "sweep", store.path).close()
    assert "aa.parquet is damaged" in problem


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:pw@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://u:p/w@db/x", "postgresql://***@db/x"),
        ("at http://u:p@ss@host and http://v:q@other", "at http://***@host and http://***@other"),
        ("mysql://db/x?user=u&password=pw&ssl=1", "mysql://db/x?user=u&password=***&ssl=1"),
        ("http://host?access_token=abc", "http://host?access_token=***"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
    ],
)
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
