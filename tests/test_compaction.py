"""Compaction changes files, never tables: not when it ends, not when it is cut off, not for who reads meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from harness import compaction, lock, parquet
from harness.compaction import compact
from harness.record import TABLES, Store
from harness.refusal import Refused


def commit(store: Store, trial_id: str, status: str = "done", reason: str | None = None, **more: Any) -> None:
    """A trial of three rounds; its numbers follow from its name, so that a mix-up shows."""
    mark = sum(map(ord, trial_id))
    rounds = [
        {"trial_id": trial_id, "round": at, "role": role, "accuracy": (mark + at) / 1000, "recall": [0.5, at / 3]}
        for at in range(3)
        for role in ("student", "teacher")
    ]
    clients = [{"trial_id": trial_id, "round": at, "client": c, "steps": mark} for at in range(3) for c in range(2)]
    events = [{"trial_id": trial_id, "time": "2025-01-01", "kind": "host_lost"}] if trial_id != "bb" else []
    row = {"trial_id": trial_id, "status": status, "reason": reason, "seed": mark} | more
    store.commit(row, rounds, clients, events)


def content(path: Path) -> dict[str, Any]:
    """All that a reader can see: every table, and single trials (these without other methods' columns)."""
    store = Store(path, writable=False)
    found: dict[str, Any] = {table: store.rows(table) for table in TABLES}
    for trial_id in ("aa", "cc"):
        for table in TABLES:
            rows = store.rows(table, trial_id)
            found[f"{table} of {trial_id}"] = [{k: v for k, v in row.items() if v is not None} for row in rows]
    return found


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*.parquet"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Five trials: three done, one diverged, one crashed."""
    store = Store(tmp_path / "s")
    commit(store, "aa", student_accuracy_last10=0.5)
    commit(store, "bb", teacher_accuracy_last10=None, extra=3)
    commit(store, "cc", extra=0.5)
    commit(store, "dd", "failed", "diverged: in round 2")
    commit(store, "ee", "failed", "crashed: out of memory")
    return tmp_path / "s"


class Killed(BaseException):
    """What a kill looks like from inside: nothing works from then on, clean-up neither."""


@contextmanager
def killed_at(moment: int) -> Iterator[None]:
    """Kills at the n-th write, flush, rename or unlink. Does nothing if there are fewer."""
    steps = count()

    def cut(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if next(steps) >= moment:
                raise Killed
            return original(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((os, "replace"), (os, "unlink"), (os, "fsync"), (Path, "open")):
            patch.setattr(place, name, cut(getattr(place, name)))
        yield


def test_one_file_per_table_and_the_same_tables(results: Path) -> None:
    before = content(results)
    said = compact(results)
    assert content(results) == before
    assert files(results) == [
        "clients/compacted+000001.parquet",
        "clients/ee.parquet",
        "events/compacted+000001.parquet",
        "events/ee.parquet",
        "rounds/compacted+000001.parquet",
        "rounds/ee.parquet",
        "trials/compacted+000001.parquet",
        "trials/ee.parquet",
    ]
    assert "4 trials" in said and "1 that may run again" in said and "\n" not in said


def test_a_second_time_changes_nothing_and_says_so(results: Path) -> None:
    compact(results)
    before = {file: (results / file).read_bytes() for file in files(results)}
    assert compact(results).startswith("Nothing to compact")
    assert {file: (results / file).read_bytes() for file in files(results)} == before


def test_later_trials_join_and_one_that_ran_again_does_too(results: Path) -> None:
    compact(results)
    store = Store(results)
    commit(store, "ab")
    commit(store, "ee")
    before = content(results)
    compact(results)
    assert content(results) == before
    assert {file.split("/")[1] for file in files(results)} == {"compacted+000002.parquet"}


def test_a_trials_own_file_wins_over_the_part_and_takes_its_place(results: Path) -> None:
    """As after a copy from elsewhere, or a commit of a trial that had been compacted."""
    compact(results)
    store = Store(results)
    store.commit({"trial_id": "bb", "status": "done", "seed": 7}, [{"trial_id": "bb", "round": 0, "role": "r"}], [])
    assert [row["seed"] for row in store.rows("trials") if row["trial_id"] == "bb"] == [7]
    assert len(store.rows("rounds", "bb")) == len([r for r in store.rows("rounds") if r["trial_id"] == "bb"]) == 1
    assert store.rows("clients", "bb") == store.rows("events", "bb") == []
    before = content(results)
    compact(results)
    assert content(results) == before


def test_a_commit_that_is_cut_off_leaves_a_compacted_trial_as_it_was(results: Path) -> None:
    compact(results)
    before = content(results)
    for moment in range(12):  # rounds, clients: open, flush, rename, open, flush; then the row's open and flush
        with killed_at(moment), pytest.raises(Killed):
            Store(results, writable=False).commit(
                {"trial_id": "bb", "status": "done"}, [{"trial_id": "bb", "round": 9, "role": "r"}], []
            )
        assert content(results) == before


@pytest.mark.parametrize("parts", [0, 1])
def test_a_kill_at_any_moment_changes_no_table(tmp_path: Path, results: Path, parts: int) -> None:
    """Every step of a compaction, and of one that replaces an older part, with the compaction after it."""
    if parts:
        compact(results)
        commit(Store(results), "ff")
        commit(Store(results), "cc", "done", extra=2.5)  # lies in the part too
    before = content(results)
    for moment in count():
        copy = tmp_path / f"killed{moment}"
        shutil.copytree(results, copy)
        with killed_at(moment):
            try:
                compact(copy)
                ended = True
            except Killed:
                ended = False
        lock.give_back(copy)
        assert content(copy) == before, f"killed at step {moment}"
        compact(copy)
        assert content(copy) == before, f"killed at step {moment}, then done again"
        assert len([file for file in files(copy) if "compacted" in file]) == 4
        assert {Path(file).stem for file in files(copy)} == {"ee", "compacted+" + Path(files(copy)[0]).stem[10:]}
        if ended:
            break
        shutil.rmtree(copy)
    assert moment > 25


@pytest.mark.parametrize("table", TABLES)
def test_who_reads_while_it_works_sees_the_same_table(
    results: Path, monkeypatch: pytest.MonkeyPatch, table: Any
) -> None:
    """The folder is compacted between the reader's look at the names and its reading of the files."""
    before, original, todo = Store(results).rows(table), parquet._gather, ["once"]

    def late(*args: Any) -> Any:
        if todo:
            todo.pop()
            compact(results)
        return original(*args)

    monkeypatch.setattr(parquet, "_gather", late)
    assert Store(results).rows(table) == before
    assert not todo


def test_one_trial_is_read_without_the_rest_of_the_part(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two trials a row group, damage among the last trials is none of the first one's business."""
    monkeypatch.setattr(compaction, "GROUP", {"trials": 1, "rounds": 6, "clients": 6, "events": 1})
    before = Store(results).rows("rounds", "aa")
    compact(results)
    part = results / "rounds" / "compacted+000001.parquet"
    data = bytearray(part.read_bytes())
    with parquet.pq.ParquetFile(part) as opened:
        assert opened.num_row_groups == 4
        at = opened.metadata.row_group(3).column(0).data_page_offset
    data[at + 40] ^= 0xFF
    part.write_bytes(data)
    assert Store(results).rows("rounds", "aa") == before
    with pytest.raises(Refused, match=r"rounds/compacted\+000001.parquet is damaged"):
        Store(results).rows("rounds")


def test_trials_larger_than_a_row_group_stay_whole(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "GROUP", {"trials": 3, "rounds": 4, "clients": 5, "events": 1})
    monkeypatch.setattr(compaction, "BATCH", 2)
    before = content(results)
    compact(results)
    assert content(results) == before


@pytest.mark.parametrize("names", [["aa", "ee"], ["ee"], ["aa", "bb", "cc", "dd"], ["zz"]])
def test_what_is_discarded_is_gone_and_the_rest_stays(results: Path, names: list[str]) -> None:
    compact(results)
    store = Store(results)
    before = {table: store.rows(table) for table in TABLES}
    store.discard(names)
    for table, rows in before.items():
        left = [[(k, v) for k, v in r.items() if v is not None] for r in rows if r["trial_id"] not in names]
        assert [[(k, v) for k, v in r.items() if v is not None] for r in store.rows(table)] == left


def test_a_discard_that_is_cut_off_leaves_every_trial_whole_or_gone(tmp_path: Path, results: Path) -> None:
    """One trial in the part, one in files of its own."""
    compact(results)
    before = content(results)
    for moment in count():
        copy = Store(shutil.copytree(results, tmp_path / f"killed{moment}"), writable=False)
        with killed_at(moment):
            try:
                copy.discard(["bb", "ee"])
                ended = True
            except Killed:
                ended = False
        left = set(copy.finished())
        assert left >= {"aa", "cc", "dd"}
        for table in TABLES:
            assert copy.rows(table) == [row for row in before[table] if row["trial_id"] in left]
        if ended:
            break
        shutil.rmtree(copy.path)
    assert left == {"aa", "cc", "dd"}
    assert moment > 15


def test_nothing_happens_to_a_folder_in_use_or_that_is_none(results: Path) -> None:
    before = files(results)
    with lock.held(results), pytest.raises(Refused, match="is in use by process"):
        compact(results)
    assert files(results) == before
    with pytest.raises(Refused, match="there is no results folder"):
        compact(results / "none")


def test_what_is_damaged_is_named_and_nothing_is_taken_away(results: Path) -> None:
    file = results / "clients" / "bb.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    before = files(results)
    with pytest.raises(Refused, match=r"clients/bb.parquet is damaged"):
        compact(results)
    assert files(results) == before


def test_a_full_disk_leaves_everything_as_it_was(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, original, flushed = files(results), os.fsync, count()

    def full(file: int) -> None:
        if next(flushed) == 4:  # rounds and their folder, clients and theirs, then the events
            raise OSError(28, "No space left on device")
        original(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        compact(results)
    assert files(results) == before
    assert list(results.rglob(".*.draft")) == []


def test_an_empty_folder(tmp_path: Path) -> None:
    Store(tmp_path / "s")
    assert "0 trials" in compact(tmp_path / "s")
    assert files(tmp_path / "s") == []
