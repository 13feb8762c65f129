"""The tables: what is committed is whole, what is not committed is not seen, and the headline's formulas."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import record
from harness.compaction import compact
from harness.record import SCHEMAS, TABLES, Store, flatten, provenance
from harness.refusal import Refused
from harness.summary import headline, rows_hash


def trial_row(trial_id: str, **more: Any) -> dict[str, Any]:
    config = {"method": "fedavg", "seed": 0, "partition": {"alpha": 0.1}, "hyper": {}}
    return {
        "trial_id": trial_id,
        "status": "done",
        "method": "fedavg",
        "config": json.dumps(config),
        "seed": 0,
    } | more


def round_row(trial_id: str, at: int, role: str = "global", **more: Any) -> dict[str, Any]:
    fixed = {"trial_id": trial_id, "round": at, "role": role, "accuracy": 0.5, "recall": [0.25, 0.75]}
    return fixed | {"up_bytes": 10, "down_bytes": 20} | more


def client_row(trial_id: str, at: int, client: int) -> dict[str, Any]:
    return {"trial_id": trial_id, "round": at, "client": client, "role": "global", "arch": "mlp", "steps": 3}


def event_row(trial_id: str, second: int, kind: str = "host_lost", **more: Any) -> dict[str, Any]:
    return {"trial_id": trial_id, "time": f"2025-01-01T00:00:{second:02}.000+00:00", "kind": kind} | more


def commit(store: Store, trial_id: str, **more: Any) -> None:
    rounds = [round_row(trial_id, at) for at in (1, 0)]
    clients = [client_row(trial_id, 0, c) for c in (2, 1)]
    store.commit(trial_row(trial_id, **more), rounds, clients, [event_row(trial_id, 1, detail="gone", round=0)])


def test_what_is_committed_is_read_back_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for trial_id in ("bb", "aa"):
        commit(store, trial_id)
    assert store.finished() == {"aa": "done", "bb": "done"}
    assert list(store.read("trials")["trial_id"]) == ["aa", "bb"]
    rounds = store.read("rounds")
    assert list(zip(rounds["trial_id"], rounds["round"], strict=True)) == [("aa", 0), ("aa", 1), ("bb", 0), ("bb", 1)]
    assert list(store.read("clients")["client"]) == [1, 2, 1, 2]
    assert list(store.read("events")["detail"]) == ["gone", "gone"]
    assert list(rounds["recall"][0]) == [0.25, 0.75]
    assert store.rows("rounds", "bb") == [row for row in store.rows("rounds") if row["trial_id"] == "bb"]
    assert store.rows("rounds")[0]["loss"] is None


def test_events_are_read_like_any_table_and_have_a_file_only_where_something_happened(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for trial_id in ("bb", "aa"):
        events = [event_row(trial_id, 2, "visit_hung", round=3, client=7), event_row(trial_id, 1)]
        store.commit(trial_row(trial_id), [round_row(trial_id, 0)], [], events)
    store.commit(trial_row("cc"), [round_row("cc", 0)], [])
    assert not (tmp_path / "s" / "events" / "cc.parquet").exists()
    found = store.rows("events")
    assert [(row["trial_id"], row["kind"]) for row in found] == [
        ("aa", "host_lost"),
        ("aa", "visit_hung"),
        ("bb", "host_lost"),
        ("bb", "visit_hung"),
    ]
    assert (found[1]["round"], found[1]["client"], found[0]["client"], found[0]["detail"]) == (3, 7, None, None)
    assert store.rows("events", "aa") == found[:2]
    assert store.rows("events", "cc") == []
    store.commit(trial_row("aa"), [round_row("aa", 0)], [])  # the second time nothing happened
    assert store.rows("events") == found[2:]
    assert not (tmp_path / "s" / "events" / "aa.parquet").exists()
    (tmp_path / "s" / "trials" / "bb.parquet").unlink()
    assert len(store.read("events")) == 0
    with pytest.raises(ValueError, match="rows of"):
        store.commit(trial_row("aa"), [], [], [event_row("bb", 0)])


def test_an_empty_folder_reads_as_empty_tables_with_every_fixed_column(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "deep")
    assert store.finished() == {}
    for table in TABLES:
        frame = store.read(table)
        assert len(frame) == 0
        assert list(frame.columns) == SCHEMAS[table].names
    (tmp_path / "bare").mkdir()
    assert len(Store(tmp_path / "bare", writable=False).read("rounds")) == 0
    assert list((tmp_path / "bare").iterdir()) == []  # reading leaves no trace


def test_numpy_scalars_and_full_float_precision_survive(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    third = np.float64(1) / 3
    row = trial_row(
        "aa", seed=np.int64(7), seconds=np.float32(0.5), global_accuracy_last10=third, clean=np.bool_(True)
    )
    store.commit(row, [round_row("aa", np.int64(0), accuracy=third)], [])
    back = store.rows("trials")[0]
    assert (back["seed"], back["seconds"], back["global_accuracy_last10"], back["clean"]) == (7, 0.5, 1 / 3, True)
    assert store.rows("rounds")[0]["accuracy"] == 1 / 3


def test_methods_with_different_roles_unite(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    # The first trial lacks a value where the second has one: the types must meet all the same.
    rows = {
        "aa": {"global_accuracy_last10": 0.5, "global_rounds_to_0.8": None, "note": None},
        "bb": {"global_accuracy_last10": None, "global_rounds_to_0.8": 3, "note": "text"},
        "cc": {"student_accuracy_last10": 0.25, "teacher_accuracy_last10": 1, "extra": 1},
        "dd": {"student_accuracy_last10": 0.5, "extra": 2.5},
    }
    for trial_id, more in rows.items():
        store.commit(trial_row(trial_id, **more), [round_row(trial_id, 0, loss=None)], [])
    back = {row["trial_id"]: row for row in store.rows("trials")}
    for trial_id, more in rows.items():
        assert {name: back[trial_id][name] for name in more} == more
    assert back["aa"]["teacher_accuracy_last10"] is None
    frame = store.read("trials").set_index("trial_id")
    assert frame.loc["dd", "extra"] == 2.5
    assert math.isnan(frame.loc["aa", "teacher_accuracy_last10"])
    assert store.read("rounds")["loss"].dtype == np.float64  # all null, and still a number's column


def test_fixed_columns_keep_their_types_in_the_file(tmp_path: Path) -> None:
    commit(Store(tmp_path / "s"), "aa")
    for table in TABLES:
        schema = pq.read_schema(tmp_path / "s" / table / "aa.parquet")
        assert {name: schema.field(name).type for name in SCHEMAS[table].names} == {
            field.name: field.type for field in SCHEMAS[table]
        }


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("point", ["replace", "open", "fsync"])
def test_a_failed_commit_leaves_no_row_and_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, point: str
) -> None:
    store = Store(tmp_path / "s")
    commit(store, "aa")
    before = {name: store.rows(name) for name in TABLES}
    written_before = ("rounds", "clients", "events", "trials").index(table)

    def full(original: Callable[..., Any], per_file: int) -> Callable[..., Any]:
        count = itertools.count()

        def call(*args: Any, **more: Any) -> Any:
            if next(count) >= written_before * per_file:
                raise OSError(28, "No space left on device")
            return original(*args, **more)

        return call

    if point == "open":
        monkeypatch.setattr(Path, "open", full(Path.open, 1))
    else:
        # fsync is called on the file, then on its folder
        monkeypatch.setattr(os, point, full(getattr(os, point), 2 if point == "fsync" else 1))
    with pytest.raises(OSError, match="No space left"):
        commit(store, "bb")
    monkeypatch.undo()
    assert store.finished() == {"aa": "done"}
    assert {name: store.rows(name) for name in TABLES} == before
    assert list((tmp_path / "s").rglob(".*")) == []
    commit(store, "bb")  # the disk has room again
    assert store.finished() == {"aa": "done", "bb": "done"}


def test_a_write_cut_short_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    """Killed for real in the middle of a write: SIGKILL runs no clean-up."""
    code = f"""
import os, signal
from harness.record import Store
store = Store({str(tmp_path / "s")!r})
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
store.commit({trial_row("aa")!r}, [{round_row("aa", 0)!r}], [])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(record.__file__).parents[1])
    assert done.returncode == -9
    assert any(file.name.startswith(".aa") for file in (tmp_path / "s").rglob(".*"))
    store = Store(tmp_path / "s")
    assert store.finished() == {}
    assert len(store.read("rounds")) == 0
    commit(store, "aa")
    assert [len(store.read(table)) for table in TABLES] == [1, 2, 2, 1]
    assert list((tmp_path / "s").rglob(".*")) == []


def test_a_second_commit_replaces_the_first_and_a_failed_one_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "s")
    commit(store, "aa", status="failed", reason="out of memory")
    commit(store, "aa")
    assert store.finished() == {"aa": "done"}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        commit(store, "aa", status="failed")
    monkeypatch.undo()
    # rounds of the second attempt must never stand beside the row of the first
    assert store.finished() == {}
    assert len(store.read("rounds")) == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path / "s")
    commit(store, "aa")
    commit(store, "bb")
    file = tmp_path / "s" / "rounds" / "bb.parquet"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"x" * 5000}[damage])
    with pytest.raises(Refused, match=r"rounds/bb\.parquet is damaged"):
        store.read("rounds")
    assert len(store.read("trials")) == 2


def test_columns_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    commit(store, "aa", extra=1)
    commit(store, "bb", extra="text")
    with pytest.raises(Refused, match="do not fit together"):
        store.read("trials")


def test_a_bit_of_another_trial_or_a_path_for_an_id_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for name in ("../up", "", "a/b", ".hidden", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="names files"):
            store.commit(trial_row(name), [], [])
    with pytest.raises(ValueError, match="rows of"):
        store.commit(trial_row("aa"), [round_row("bb", 0)], [])
    with pytest.raises(pa.ArrowException):
        store.commit(trial_row("aa"), [round_row("aa", 0, accuracy="high")], [])
    assert store.finished() == {}
    assert list((tmp_path / "s").rglob("*.parquet")) == []


def test_folders_that_can_not_serve_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loose").mkdir()
    (tmp_path / "in" / "loose" / "trials").symlink_to(tmp_path / "elsewhere")
    refused = {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "below": "can't be written",
        Path("/proc/fedstill"): "can't be written",
        tmp_path / "in" / "link": "is a link to",
        tmp_path / "in" / "loose": "is a link to",
    }
    for path, why in refused.items():
        with pytest.raises(Refused, match=why):
            Store(path)
    with pytest.raises(Refused, match="there is no results folder"):
        Store(tmp_path / "absent", writable=False)
    assert not (tmp_path / "absent").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_that_stays_inside_is_taken(tmp_path: Path) -> None:
    Store(tmp_path / "real")
    (tmp_path / "name").symlink_to(tmp_path / "real")
    commit(Store(tmp_path / "name"), "aa")
    assert Store(tmp_path / "real").finished() == {"aa": "done"}


def test_a_full_disk_is_found_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Refused, match="No space left"):
        Store(tmp_path / "s")


def test_headline_against_numbers_worked_out_by_hand() -> None:
    """Evaluated at rounds 0, 4, 12, 14: .2, .6, .8, .7; the run went on to round 15 without an evaluation.

    last10: the window is rounds 5..14, so (.8 + .7)/2 = .75. auc: 4*.4 + 8*.7 + 2*.75 = 8.7 over 14 rounds.
    Target .6 is first met in round 4: 5 rounds trained, and rounds 0..4 moved 5*(10+20) bytes by the student's rows
    and 5*1 by the teacher's.
    """
    accuracy = {0: 0.2, 4: 0.6, 12: 0.8, 14: 0.7}
    rows = [round_row("aa", at, "student", accuracy=accuracy.get(at), balanced_accuracy=None) for at in range(16)]
    rows += [round_row("aa", at, "teacher", accuracy=0.5 if at == 14 else None, up_bytes=1) for at in range(16)]
    for row in rows[16:]:
        row |= {"down_bytes": 0, "own_label_accuracy": 0.25 if row["round"] == 14 else None}
    found = headline(reversed(rows), [0.6, 0.95])
    student = {name.removeprefix("student_"): value for name, value in found.items() if name.startswith("student_")}
    assert student == {
        "accuracy_last10": pytest.approx(0.75),
        "accuracy_last": 0.7,
        "accuracy_best": 0.8,
        "accuracy_auc": pytest.approx(8.7 / 14),
        "balanced_accuracy_last10": None,
        "own_label_accuracy_last10": None,
        "rounds_to_0.6": 5,
        "bytes_to_0.6": 155,
        "rounds_to_0.95": None,
        "bytes_to_0.95": None,
    }
    assert found["teacher_accuracy_auc"] == 0.5  # one point has no span
    assert found["teacher_own_label_accuracy_last10"] == 0.25
    assert found["teacher_rounds_to_0.6"] is None


def test_headline_of_a_trial_that_was_never_evaluated() -> None:
    found = headline([round_row("aa", 0, accuracy=None), round_row("aa", 1, accuracy=float("nan"))], [0.5])
    assert set(found.values()) == {None}
    assert headline([]) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_headline_of_fully_evaluated_rounds(curve: list[float]) -> None:
    """With every round evaluated the formulas are numpy's: mean of the last ten, trapezoid over the span."""
    found = headline([round_row("aa", at, accuracy=value) for at, value in enumerate(curve)], [0.5])
    assert found["global_accuracy_last10"] == pytest.approx(np.mean(curve[-10:]))
    assert found["global_accuracy_best"] == max(curve)
    if len(curve) > 1:
        assert found["global_accuracy_auc"] == pytest.approx(np.trapezoid(curve) / (len(curve) - 1))
    reached = [at for at, value in enumerate(curve) if value >= 0.5]
    assert found["global_rounds_to_0.5"] == (reached[0] + 1 if reached else None)
    assert found["global_bytes_to_0.5"] == (30 * (reached[0] + 1) if reached else None)


def test_headline_is_the_same_from_the_rows_and_from_the_table(tmp_path: Path) -> None:
    rows = [round_row("aa", at, accuracy=at / 7 if at % 2 else None) for at in range(12)]
    store = Store(tmp_path / "s")
    store.commit(trial_row("aa"), rows, [])
    assert headline(store.rows("rounds")) == headline(rows)
    assert headline(store.read("rounds").to_dict("records")) == headline(rows)


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}}) == {"a.b.c": 1, "a.d": [1, 2]}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_provenance_names_the_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "record.py"
    code.write_text("1")
    monkeypatch.setattr(record, "__file__", str(code))
    assert (provenance()["commit"], provenance()["clean"]) == (None, None)
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "one")
    # a copy of the package installed inside somebody else's repository
    assert (provenance()["commit"], provenance()["clean"]) == (None, None)
    git(tmp_path, "add", "record.py")
    git(tmp_path, "commit", "-qm", "two")
    assert (provenance()["commit"], provenance()["clean"]) == (git(tmp_path, "rev-parse", "HEAD"), True)
    code.write_text("2")
    assert provenance()["clean"] is False


def test_provenance_without_git_and_its_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance()
    assert (found["commit"], found["clean"]) == (None, None)
    versions = json.loads(str(found["versions"]))
    assert versions["pyarrow"] == pa.__version__
    assert {"fedstill", "python", "ray", "torch", "numpy", "pandas", "mlflow"} <= set(versions)


def test_every_fixed_column_is_described_with_the_results() -> None:
    text = (Path(record.__file__).parents[1] / "results" / "README.md").read_text()
    sections = {part.split("`")[1]: part for part in text.split("\n## ") if part.startswith("`")}
    for table in TABLES:
        described = [line.split("|")[1].strip() for line in sections[table].splitlines() if line.startswith("| ")]
        assert sorted(set(SCHEMAS[table].names)) == sorted(
            name for name in described if name != "column" and "&lt;" not in name
        )
    for name in headline([round_row("aa", 0)], [0.5]):
        assert f"| &lt;role&gt;_{name.removeprefix('global_').replace('0.5', '&lt;t&gt;')} |" in sections["trials"]


def test_reading_needs_no_torch() -> None:
    """The board's driver stays light: what costs seconds to import is not imported."""
    code = "import sys, harness.record, harness.tracking, harness.plots, harness.board; " + (
        "print(*sorted({'torch', 'mlflow', 'matplotlib', 'scipy', 'ray', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(record.__file__).parents[1],
    )
    assert done.stdout.split() == []


def test_the_hash_of_rows_is_that_of_their_numbers(tmp_path: Path) -> None:
    """The same for what is handed over and for what is read back, alone, beside others and compacted."""
    rounds = [round_row("aa", at, accuracy=at / 7 if at else None, seconds=1.5, extra=at) for at in range(3)]
    clients = [client_row("aa", 0, c) for c in range(2)]
    told = rows_hash(rounds, clients)
    store = Store(tmp_path / "s")
    store.commit(trial_row("aa"), rounds, clients)
    assert rows_hash(store.rows("rounds", "aa"), store.rows("clients", "aa")) == told
    store.commit(trial_row("bb"), [round_row("bb", 0, extra=0.5, loss=float("nan"))], [client_row("bb", 0, 0)])
    compact(store.path)
    assert rows_hash(store.rows("rounds", "aa"), store.rows("clients", "aa")) == told
    assert rows_hash(reversed(rounds), clients) == told
    later = [row | {"seconds": 2.5, "trial_id": "cc"} for row in rounds]
    assert rows_hash(later, clients) == told
    changes: list[tuple[list[Any], list[Any]]] = [
        ([*rounds[:2], rounds[2] | {"accuracy": np.nextafter(2 / 7, 1)}], clients),
        ([*rounds[:2], rounds[2] | {"role": "teacher"}], clients),
        ([*rounds[:2], rounds[2] | {"recall": [0.25, 0.5]}], clients),
        (rounds[:2], clients),
        (rounds, [*clients, clients[0]]),
        (rounds, [clients[0], clients[1] | {"steps": 4}]),
        ([*rounds, *clients], []),
    ]
    assert len({told, *(rows_hash(*change) for change in changes)}) == 1 + len(changes)
