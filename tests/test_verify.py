"""`fedstill verify`: a good folder passes, every kind of damage is found by the check that is meant for it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import claims, lock, parquet, projection, repeat, sweep
from harness.audit import Check, audit
from harness.axes import load_sweep
from harness.compaction import compact
from harness.projection import default_uri
from harness.record import Store
from harness.refusal import Refused
from harness.tracking import sync
from harness.verify import mlflow_agrees, verify

pytestmark = pytest.mark.cluster
CARD = """
methods = ["fedavg", "scaffold"]
seeds = 1
[base]
clients = 6
participation = 0.5
rounds = 4
net = "mlp"
local = { epochs = 1, batch = 32, lr = 0.1 }
evaluation = { targets = [0.2] }
schedule = ["2 local.lr=0.05"]
"""
CHECKS = "files belongs config rows_hash rounds totals headline command data partition mlflow".split()  # noqa: SIM905
Row = dict[str, Any]


@pytest.fixture(scope="module")
def made(cluster: None, tmp_path_factory: pytest.TempPathFactory, diary_of: Any) -> Path:
    """Two trials, as a sweep leaves them in the tables and in MLflow."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.toml").write_text(CARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = sweep.run(load_sweep(folder / "small.toml"), folder / "small", diary_of())
    assert (outcome.done, outcome.problems) == (2, [])
    return folder / "small"


@pytest.fixture
def results(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copytree(made.parent, tmp_path / "copy") / "small"


def checks(results: Path) -> dict[str, Check]:
    found = [*audit(results), mlflow_agrees(Store(results, writable=False))]
    assert [check.name for check in found] == CHECKS
    return {check.name: check for check in found}


def wrong(results: Path) -> dict[str, list[str]]:
    return {name: check.faults for name, check in checks(results).items() if check.faults}


def trial_of(results: Path, method: str = "fedavg") -> str:
    (name,) = (row["trial_id"] for row in Store(results, writable=False).rows("trials") if row["method"] == method)
    return str(name)


def rewrite(results: Path, table: Any, change: Callable[[list[Row]], Any]) -> str:
    """Changes the rows of fedavg's trial in its file, which is a good file again."""
    name = trial_of(results)
    rows = Store(results, writable=False).rows(table, name)
    change(rows)
    parquet.file_of(results, table, name).write_bytes(parquet.encode(table, rows))
    return name


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("compacted", [False, True])
def test_a_good_folder_passes_and_stays_as_it_is(
    results: Path, capsys: pytest.CaptureFixture[str], compacted: bool
) -> None:
    """2 trials, 4 rounds with one role, 3 clients in each: 2 * (4 + 12) rows belong to trials."""
    if compacted:
        compact(results)
    before = everything(results.parent)
    assert verify(results)
    assert everything(results.parent) == before
    said = capsys.readouterr().out
    assert said.endswith("Nothing disagrees.\n")
    looked = {words[0]: words[1:] for words in (line.replace("│", " ").split() for line in said.splitlines()[2:13])}
    assert looked == {
        **{name: ["2", "0", "0"] for name in CHECKS},
        "files": ["3" if compacted else "6", "0", "0"],
        "belongs": ["32", "0", "0"],
    }


def test_the_folder_of_a_search_that_was_stopped_early_and_of_a_crash_passes(results: Path) -> None:
    """A row without rounds, as of a trial whose process died, and one that a rule stopped after its second round."""

    def crashed(row: Row) -> None:
        totals = dict.fromkeys(claims.TOTALS, 0) | dict.fromkeys(("rounds_done", *claims.SKEW))
        headlines = {key: None for key in row if "_accuracy_" in key or "_to_0.2" in key}
        row |= {"status": "failed", "reason": "crashed: x"} | totals | headlines
        row["rows_hash"] = claims.rows_hash([], [])

    rewrite(results, "trials", lambda rows: crashed(rows[0]))
    for table in ("rounds", "clients"):
        (results / table / f"{trial_of(results)}.parquet").unlink()
    store, other = Store(results), trial_of(results, "scaffold")
    (row,), rounds, clients = (store.rows(table, other) for table in ("trials", "rounds", "clients"))
    kept = [[r for r in part if r["round"] < 2] for part in (rounds, clients)]
    row |= {"status": "stopped", "reason": "stopped by asha after round 2 of 4", "stage": "search", "rounds_done": 2}
    row |= {key: sum(r[key] for r in kept[0]) for key in claims.TOTALS} | claims.headline(kept[0], [0.2])
    store.commit(row | {"rows_hash": claims.rows_hash(*kept)}, *kept)
    sync(results)
    assert wrong(results) == {}


def altered(column: str, value: Any, at: int = 0) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        assert rows[at][column] != value
        rows[at][column] = value

    return change


def another_seed(rows: list[Row]) -> None:
    rows[0]["config"] = json.dumps(json.loads(rows[0]["config"]) | {"seed": 7})


DAMAGE: dict[str, tuple[str, Callable[[list[Row]], Any], dict[str, str]]] = {
    "an accuracy": (
        "rounds",
        altered("accuracy", 0.123, 2),
        {"rows_hash": "rows_hash is .*come to", "headline": "global_accuracy_auc is .*, but its rounds come to"},
    ),
    "a round doubled": (
        "rounds",
        lambda rows: rows.append(rows[1]),
        {"rows_hash": "", "rounds": "rounds has round 1, role global 2 times", "totals": "steps", "headline": ""},
    ),
    "a round gone": (
        "rounds",
        lambda rows: rows.pop(),
        {"rows_hash": "", "rounds": "rounds_done is 4, .*has 3, from 0 to 2", "totals": "", "headline": ""},
    ),
    "a visit gone": (
        "clients",
        lambda rows: rows.pop(),
        {"rows_hash": "", "totals": "steps of round 3 is .*its clients add up to"},
    ),
    "a client's loss": ("clients", altered("train_loss", 1.0), {"rows_hash": ""}),
    "a headline": (
        "trials",
        altered("global_accuracy_last10", 0.99),
        {"headline": "global_accuracy_last10 is 0.99, but"},
    ),
    "a headline of nothing": ("trials", altered("note", 1.0), {"headline": "note is 1.0"}),
    "a total": ("trials", altered("up_bytes", 5), {"totals": "up_bytes is 5, but its rounds"}),
    "a config": (
        "trials",
        another_seed,
        {"config": "config_hash", "partition": "dealt again"},
    ),
    "a seed": ("trials", altered("seed", 7), {"config": "seed is 7, but 0 in its config"}),
    "a command": (
        "trials",
        altered("command", "fedstill run fedavg rounds=9"),
        {"command": "command runs [0-9a-f]{16} instead"},
    ),
    "a partition": ("trials", altered("partition_hash", "00"), {"partition": "partition_hash is 00"}),
    "a skew": ("trials", altered("partition_js", 0.5), {"partition": "partition_js is 0.5"}),
    "the data": ("trials", altered("data_hash", "00"), {"data": "data_hash is 00, but digits here"}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_changed_is_found(results: Path, what: str) -> None:
    table, change, expected = DAMAGE[what]

    def with_note(rows: list[Row]) -> None:
        for row in rows:
            row.setdefault("note", None)
        change(rows)

    name = rewrite(results, table, with_note if what == "a headline of nothing" else change)
    found = {check.name: check.faults for check in audit(results) if check.faults}
    assert found.keys() == expected.keys()
    for check, pattern in expected.items():
        assert all(fault.startswith(f"trial {name}: ") and "\n" not in fault for fault in found[check])
        assert any(re.search(pattern, fault) for fault in found[check]), found[check]


def test_a_rounds_file_that_is_missing_is_found(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "rounds" / f"{trial_of(results)}.parquet").unlink()
    assert wrong(results).keys() == {"rows_hash", "rounds", "totals", "headline"}
    assert not verify(results)
    said = capsys.readouterr().out.splitlines()
    assert f"rounds: trial {trial_of(results)}: rounds_done is 4, but the table of rounds has none of it" in said
    assert said[-1].startswith("Disagreements: ")


@pytest.mark.parametrize("table", ["trials", "rounds", "clients"])
@pytest.mark.parametrize("compacted", [False, True])
def test_a_torn_file_is_found_and_the_others_are_checked_all_the_same(
    results: Path, table: str, compacted: bool
) -> None:
    if compacted:
        compact(results)
    file = next((results / table).glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-30])
    found = checks(results)
    assert [name for name, check in found.items() if check.faults] == ["files"]
    assert all(f"{file} is damaged" in fault for fault in found["files"].faults)
    assert found["rows_hash"].looked == (0 if compacted else 1)
    assert found["mlflow"].left or table != "trials"


def test_rows_without_a_trial_are_found_unless_a_sweep_is_at_work(results: Path) -> None:
    name = trial_of(results)
    (results / "trials" / f"{name}.parquet").unlink()
    found = wrong(results)
    assert {f"{results}/{table}/{name}.parquet belongs to no row of trials" for table in ("rounds", "clients")} == {
        *found["belongs"]
    }
    assert found["mlflow"][0].startswith(f"trial {name}: the trial of run ")
    with lock.held(results):
        busy = checks(results)
    assert not busy["belongs"].faults and busy["belongs"].left and busy["mlflow"].left


def test_a_row_that_mlflow_has_otherwise_is_found(results: Path) -> None:
    name = rewrite(results, "trials", altered("global_accuracy_last10", 0.99))
    (fault,) = wrong(results)["mlflow"]
    assert fault.startswith(f"trial {name}: its run ") and fault.endswith(" is not of this row, or not complete")


def test_mlflow_runs_that_are_missing_or_doubled_are_found_and_sync_mends_them(results: Path) -> None:
    client = projection._connect(default_uri(results))
    experiment = client.get_experiment_by_name("fedstill")
    runs = {run.data.tags.get("fedstill.trial_id"): run for run in client.search_runs([experiment.experiment_id])}
    first, second = trial_of(results), trial_of(results, "scaffold")
    client.delete_run(runs[first].info.run_id)
    twin = client.create_run(experiment.experiment_id, tags=dict(runs[second].data.tags))
    faults = wrong(results)
    assert faults.keys() == {"mlflow"} and len(faults["mlflow"]) == 2
    assert f"trial {first}: has no run" in faults["mlflow"]
    (doubled,) = (fault for fault in faults["mlflow"] if fault.startswith(f"trial {second}: has 2 runs"))
    assert twin.info.run_id in doubled and runs[second].info.run_id in doubled
    assert sync(results)[-1].endswith("2 runs written, 2 removed.")
    assert wrong(results) == {}
    assert sync(results)[-1].endswith("0 runs written, 0 removed.")


def test_without_mlflow_or_data_the_rest_is_checked_and_that_is_said(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (results.parent / "mlflow.db").unlink()

    def gone(*_: Any, **__: Any) -> None:
        raise Refused("no files of digits: put them somewhere")

    monkeypatch.setattr(claims, "load", gone)
    assert verify(results)
    said = capsys.readouterr().out
    assert f"- mlflow: 1 not checked: there is no MLflow database {results.parent / 'mlflow.db'}" in said
    for name in ("data", "partition"):
        assert f"- {name}: 2 not checked: data set digits can't be read here: no files of digits" in said
    assert not (results.parent / "mlflow.db").exists()


def test_a_broken_mlflow_database_is_found_and_stays_as_it_is(results: Path) -> None:
    database = results.parent / "mlflow.db"
    database.write_bytes(b"x" * 5000)
    assert "is damaged: fedstill sync" in wrong(results)["mlflow"][0]
    assert database.read_bytes() == b"x" * 5000


def test_bad_input_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no results folder"):
        verify(tmp_path / "none")
    with pytest.raises(Refused, match="holds no tables of a sweep"):
        verify(tmp_path)
    with pytest.raises(Refused, match="--seed chooses what --rerun runs again"):
        verify(results, seed=3)


@pytest.mark.long
def test_trials_run_again_come_out_the_same(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both of them, with a schedule; a trial that a rule has stopped is never chosen."""
    store, name = Store(results), trial_of(results)
    (row,), rounds, clients = (store.rows(table, name) for table in ("trials", "rounds", "clients"))
    stopped = {"trial_id": "bb", "status": "stopped", "stage": "search"}
    store.commit(row | stopped, *([r | {"trial_id": "bb"} for r in part] for part in (rounds, clients)))
    before = everything(results)
    verify(results, rerun=5, seed=3)
    said = capsys.readouterr().out
    assert "run again: " in said and "(of 2 finished trials, chosen by --seed 3)" in said
    assert [line.replace("│", " ").split() for line in said.splitlines() if line.startswith("rerun ")] == [
        ["rerun", "2", "0", "0"]
    ]
    assert everything(results) == before


@pytest.mark.long
def test_a_number_that_does_not_come_out_again_is_named_with_what_was_different(
    results: Path, diary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(rows: list[Row]) -> None:
        rows[0]["versions"] = json.dumps(json.loads(rows[0]["versions"]) | {"torch": "1.0"})
        rows[0]["threads"] = 8

    rewrite(results, "clients", altered("train_loss", 0.5, 4))
    rewrite(results, "rounds", altered("accuracy", 0.123, 2))
    name = rewrite(results, "trials", other)
    store = Store(results, writable=False)
    found, notes = repeat.repeat(store, 2, 0, diary)
    assert found.looked == 2 and len(found.faults) == 2
    assert found.faults[0].startswith(f"trial {name}: rounds: accuracy of round 2, role global was 0.123, is 0.")
    assert found.faults[1].startswith(f"trial {name}: clients: train_loss of round 1, client ")
    assert "(made with threads 8, here 1; torch 1.0, here " in found.faults[0]
    assert [note for note in notes if "bits are promised only" in note] == [notes[-1]] and name in notes[-1]
