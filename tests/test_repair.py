"""What is damaged is put aside with the rows that rest on it; what is whole stays; leftovers go."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from harness import compaction, parquet
from harness.compaction import compact
from harness.record import TABLES, Store
from harness.refusal import Refused


def commit(store: Store, trial_id: str, **more: Any) -> None:
    rounds = [{"trial_id": trial_id, "round": at, "role": "global", "accuracy": at / 7} for at in range(3)]
    clients = [{"trial_id": trial_id, "round": at, "client": 1, "train_loss": at / 3} for at in range(3)]
    events = [{"trial_id": trial_id, "time": "2025-01-01", "kind": "host_lost", "detail": "gone"}]
    store.commit({"trial_id": trial_id, "status": "done"} | more, rounds, clients, events)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "s")
    for trial_id in ("aa", "bb", "cc", "dd"):
        commit(store, trial_id)
    return store


def spoil(file: Path, how: str) -> None:
    whole = file.read_bytes()
    middle = len(whole) // 4  # among the pages
    spoiled = {
        "cut": whole[: len(whole) // 2],
        "footer": whole[:-1],
        "empty": b"",
        "bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "other": b"x" * 500,
    }
    file.write_bytes(spoiled[how])


def everything(store: Store) -> dict[str, Any]:
    return {table: store.rows(table) for table in TABLES}


def names(store: Store) -> list[str]:
    return sorted(str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file())


@pytest.mark.parametrize("how", ["cut", "footer", "empty", "bit", "other"])
@pytest.mark.parametrize("table", TABLES)
def test_a_damaged_trial_is_put_aside_whole_and_can_run_again(store: Store, table: Any, how: str) -> None:
    before = everything(store)
    damaged = store.path / table / "bb.parquet"
    spoil(damaged, how)
    spoiled = damaged.read_bytes()
    with pytest.raises(Refused, match=rf"{table}/bb\.parquet is damaged .+ run its sweep again"):
        store.rows(table)  # who only reads is told, and changes nothing
    assert damaged.read_bytes() == spoiled
    (line,) = store.quarantine()
    assert line.startswith(f"{damaged} is damaged (") and "trial bb" in line and "\n" not in line
    assert store.finished() == {"aa": "done", "cc": "done", "dd": "done"}
    assert damaged.with_name(".damaged-bb.parquet").read_bytes() == spoiled
    assert [name for name in names(store) if "bb" in name] == [f"{t}/.damaged-bb.parquet" for t in sorted(TABLES)]
    assert everything(store) == {t: [r for r in rows if r["trial_id"] != "bb"] for t, rows in before.items()}
    assert store.quarantine() == []
    commit(store, "bb")
    assert everything(store) == before
    assert store.quarantine() == []


def test_a_flipped_bit_is_never_read_as_another_number(store: Store) -> None:
    """Every third byte of a file of rounds. Names of columns have no checksum: such a column is missing then."""
    file = store.path / "rounds" / "bb.parquet"
    whole, before = file.read_bytes(), store.rows("rounds", "bb")
    read = 0
    for at in range(4, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            rows = store.rows("rounds", "bb")
        except Refused:
            continue
        read += 1
        for old, new in zip(before, rows, strict=True):
            assert all(new[key] in (value, None) for key, value in old.items()), at
    assert read < len(range(4, len(whole), 3)) / 2


def test_nothing_damaged_nothing_done(store: Store) -> None:
    before = names(store)
    assert store.quarantine() == []
    assert names(store) == before
    compact(store.path)
    before = names(store)
    assert store.quarantine() == []
    assert names(store) == before


def test_a_copy_under_another_name_is_no_trial(store: Store) -> None:
    """It would count twice in every mean."""
    shutil.copy(store.path / "trials" / "aa.parquet", store.path / "trials" / "aa copy.parquet")
    with pytest.raises(Refused, match=r"aa copy\.parquet is damaged \(it holds rows of aa\)"):
        store.read("trials")
    (line,) = store.quarantine()
    assert "aa copy.parquet" in line
    assert list(store.finished()) == ["aa", "bb", "cc", "dd"]


def test_leftovers_of_killed_writers_go_and_nothing_else(store: Store) -> None:
    kept = everything(store)
    strange = [store.path / "leaderboard.md", store.path / "trials" / "notes.txt", store.path / "trials" / ".hidden"]
    for file in strange:
        file.write_text("mine")
    for table in ("rounds", "clients", "events"):
        shutil.copy(store.path / table / "aa.parquet", store.path / table / "zz.parquet")  # its row never came
        (store.path / table / ".yy.draft").write_bytes(b"PAR1")
    shutil.copy(store.path / "rounds" / "aa.parquet", store.path / "rounds" / "compacted+000007.parquet")
    assert store.quarantine() == []
    assert everything(store) == kept
    assert all(file.exists() for file in strange)
    left = [name for name in names(store) if "zz" in name or "draft" in name or "compacted" in name]
    assert left == []


def page_of(file: Path, group: int) -> int:
    """The last byte of a page: that of the trial ids in a row group."""
    with parquet.pq.ParquetFile(file) as opened:
        about = opened.metadata.row_group(group).column(0)
        return int(about.dictionary_page_offset or about.data_page_offset) + int(about.total_compressed_size) - 1


@pytest.fixture
def compacted(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same four trials in parts with a trial in each row group."""
    monkeypatch.setattr(compaction, "GROUP", {"trials": 1, "rounds": 3, "clients": 3, "events": 1})
    compact(store.path)
    return store


@pytest.mark.parametrize("table", TABLES)
def test_of_a_damaged_part_the_sound_trials_are_kept(compacted: Store, table: Any) -> None:
    before = everything(compacted)
    part = compacted.path / table / "compacted+000001.parquet"
    data = bytearray(part.read_bytes())
    data[page_of(part, 2)] ^= 0x40  # the third trial's
    part.write_bytes(data)
    (line,) = compacted.quarantine()
    assert str(part) in line and "3 of its trials could be kept" in line
    assert everything(compacted) == {t: [r for r in rows if r["trial_id"] != "cc"] for t, rows in before.items()}
    assert part.with_name(f".damaged-{part.name}").read_bytes() == bytes(data)
    assert compacted.quarantine() == []
    commit(compacted, "cc")
    assert everything(compacted) == before


@pytest.mark.parametrize("table", TABLES)
def test_a_part_without_a_footer_is_put_aside(compacted: Store, table: Any) -> None:
    before = everything(compacted)
    commit(compacted, "ee")
    spoil(compacted.path / table / "compacted+000001.parquet", "cut")
    (line,) = compacted.quarantine()
    assert "0 of its trials could be kept" in line
    assert compacted.finished() == {"ee": "done"}
    assert compacted.quarantine() == []
    for trial_id in ("aa", "bb", "cc", "dd"):
        commit(compacted, trial_id)
    assert {t: [r for r in rows if r["trial_id"] != "ee"] for t, rows in everything(compacted).items()} == before


def test_a_kill_while_it_puts_things_aside_loses_no_sound_trial(
    tmp_path: Path, compacted: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged trial in a part, one in a file of its own; killed at every rename, flush, unlink; then once more."""
    commit(compacted, "ee")
    sound = {t: [r for r in rows if r["trial_id"] not in ("cc", "ee")] for t, rows in everything(compacted).items()}
    part = compacted.path / "rounds" / "compacted+000001.parquet"
    data = bytearray(part.read_bytes())
    data[page_of(part, 2)] ^= 0x40
    part.write_bytes(data)
    spoil(compacted.path / "clients" / "ee.parquet", "cut")
    for moment in count():
        copy = Store(shutil.copytree(compacted.path, tmp_path / f"killed{moment}"), writable=False)
        steps, ended = count(), True
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(f"os.{name}", cut(getattr(__import__("os"), name), steps, moment))
            try:
                copy.quarantine()
            except KeyboardInterrupt:
                ended = False
        copy.quarantine()
        assert everything(copy) == sound, f"killed at step {moment}"
        if ended:
            break
        shutil.rmtree(copy.path)
    assert moment > 15


def cut(original: Any, steps: Any, moment: int) -> Any:
    def call(*args: Any, **more: Any) -> Any:
        if next(steps) >= moment:
            raise KeyboardInterrupt
        return original(*args, **more)

    return call
