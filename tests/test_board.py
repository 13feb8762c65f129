"""Leaderboards and pictures: known rows give known statistics, and nothing that failed disappears."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import board, diagrams, plots, sheets, tables
from harness.board import read, write
from harness.places import grouped
from harness.plots import Undrawn, learning_curves
from harness.record import Store
from harness.refusal import Refused
from harness.statistics import Summary
from harness.summary import headline


def commit(
    store: Store,
    method: str,
    accuracies: dict[str, float],
    seed: int = 0,
    hyper: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    """A finished trial of 3 rounds whose roles all end at the accuracies given. more: trial columns and alpha."""
    alpha, participation = more.pop("alpha", 0.1), more.pop("participation", 1.0)
    config = {"method": method, "seed": seed, "hyper": hyper or {}, "dataset": "digits", "rounds": 3}
    config |= {"participation": participation, "cohort": int(20 * participation), "partition": {"alpha": alpha}}
    number = len(store.finished())
    trial_id = f"{number:04d}"
    rounds = [
        {"trial_id": trial_id, "round": at, "role": role, "accuracy": value, "up_bytes": 10, "down_bytes": 0}
        for at in range(3)
        for role, value in accuracies.items()
    ]
    row = {
        "trial_id": trial_id,
        "status": "done",
        "method": method,
        "dataset": "digits",
        "seed": seed,
        "seconds": 2.0,
    }
    row |= {"config": json.dumps(config), "up_bytes": 2_000_000, "rules_version": 1} | headline(rounds, [0.7]) | more
    store.commit(row, rounds, [])
    return trial_id


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "sweep")


def table(results: Path, *more: str) -> Summary:
    return read(results, *more).first


def markdown(results: Path) -> str:
    found = read(results)
    return tables.markdown(found.name, found.first, found.others)


def names(found: Summary) -> list[str]:
    return [line.name for line in found.lines]


def texts(found: Summary) -> list[str]:
    """The first column as it is shown."""
    return [line[1] for line in tables.matrix(found)[1:]]


def test_methods_by_settings_with_a_row_for_each_model(store: Store) -> None:
    for seed in (0, 1):
        for alpha, gain in ((1.0, 0.1), (0.05, 0.0)):
            commit(store, "fedavg", {"global": 0.5 + gain + seed / 50}, seed, alpha=alpha)
            commit(store, "kdia", {"student": 0.6 + gain, "teacher": 0.7 + gain}, seed, {"tau": 2}, alpha=alpha)
    found = table(store.path)
    assert found.settings == ("alpha=0.05", "alpha=1.0")
    assert names(found) == ["kdia (teacher)", "kdia (student)", "fedavg"]
    assert [[cell.values for cell in line] for line in found.cells] == [
        [pytest.approx({0: 70.0, 1: 70.0}), pytest.approx({0: 80.0, 1: 80.0})],
        [pytest.approx({0: 60.0, 1: 60.0}), pytest.approx({0: 70.0, 1: 70.0})],
        [pytest.approx({0: 50.0, 1: 52.0}), pytest.approx({0: 60.0, 1: 62.0})],
    ]
    assert any("Fewer than 5 seeds (n = 2)" in note for note in found.notes)


def test_hyper_parameters_that_vary_within_a_method_make_rows(store: Store) -> None:
    for strength in (0.5, 1.0):
        commit(store, "kdia", {"student": strength / 2}, hyper={"lambda_kd": strength, "tau": 2})
    commit(store, "fedavg", {"global": 0.4})
    assert names(table(store.path)) == ["kdia lambda_kd=1.0", "fedavg", "kdia lambda_kd=0.5"]
    assert table(store.path).settings == ("digits",)  # nothing else varies


def test_settings_are_in_the_order_of_their_values(store: Store) -> None:
    for alpha in (10, 0.5, 2.0):
        for participation in (0.5, 0.05):
            commit(store, "fedavg", {"global": 0.5}, alpha=alpha, participation=participation)
    expected = [f"participation={p}, alpha={a}" for p in (0.05, 0.5) for a in (0.5, 2.0, 10)]
    assert list(table(store.path).settings) == expected  # without the cohort, which follows from the participation


def test_keys_that_end_alike_are_spelled_out() -> None:
    rows = [
        {"trial_id": str(at), "method": "a", "dataset": "d", "config": json.dumps({"x": {"lr": at}, "y": {"lr": at}})}
        for at in range(2)
    ]
    assert [place.setting for place in grouped(rows).values()] == ["x.lr=0, y.lr=0", "x.lr=1, y.lr=1"]


def test_a_key_that_only_some_configs_have_makes_a_setting() -> None:
    rows = [
        {"trial_id": "0", "method": "a", "dataset": "d", "config": json.dumps({"seed": 1})},
        {"trial_id": "1", "method": "a", "dataset": "d", "config": json.dumps({"seed": 1, "late": "yes"})},
    ]
    assert {place.setting for place in grouped(rows).values()} == {"late=null", "late=yes"}


def test_failures_are_counted_and_explained(store: Store) -> None:
    commit(store, "fedavg", {"global": 0.5}, 0)
    commit(store, "fedavg", {"global": 0.9}, 1, status="stopped", reason="by the scheduler")
    commit(
        store,
        "kdia",
        {},
        0,
        status="failed",
        reason="diverged | <script>alert(1)</script> [x](javascript:y)\nin round 3",
    )
    commit(store, "kdia", {}, 1, status="failed", reason="out of memory")
    found = table(store.path)
    assert names(found) == ["fedavg", "kdia"]
    assert texts(found) == ["50.00 (n=1, 1 stopped)", "1 failed, 1 diverged"]
    assert sum("1 x kdia failed: out of memory (at digits: trial 0003)" in note for note in found.notes) == 1
    text = markdown(store.path)
    assert "<script" not in text
    assert "diverged \\| &lt;script&gt;" in text
    assert "\\[x\\](javascript" in text
    assert "| kdia | 1 failed, 1 diverged |" in text


def test_a_name_can_not_break_the_table(store: Store) -> None:
    commit(store, "a|b<i>", {"global": 0.5}, 0)
    line = next(line for line in markdown(store.path).splitlines() if "50.00" in line)
    assert line == "| a\\|b&lt;i&gt; | 50.00 (n=1) |"


def test_the_order_follows_the_metric_and_gaps_come_last(store: Store) -> None:
    for alpha in (0.1, 1.0):
        commit(store, "steady", {"global": 0.6}, alpha=alpha, seconds=9.0)
        commit(store, "weak", {"global": 0.5}, alpha=alpha, seconds=3.0)
    commit(store, "easy-only", {"global": 0.9}, alpha=1.0, seconds=1.0)
    assert names(table(store.path)) == ["steady", "weak", "easy-only"]
    assert names(table(store.path, "seconds")) == ["weak", "steady", "easy-only"]
    assert any("No trials: easy-only at alpha=0.1" in note for note in table(store.path).notes)


def test_other_metrics_targets_and_costs(store: Store) -> None:
    commit(store, "kdia", {"student": 0.75, "teacher": 0.6}, 0)
    commit(store, "kdia", {"student": 0.65, "teacher": 0.6}, 1)
    up = table(store.path, "up_bytes")
    assert (names(up), up.cells[0][0].values) == (["kdia"], pytest.approx({0: 2.0, 1: 2.0}))  # one row, in MB
    rounds = table(store.path, "rounds_to_0.7")
    assert dict(zip(names(rounds), texts(rounds), strict=True)) == {
        "kdia (student)": "1.0 (n=1, 1 not reached)",
        "kdia (teacher)": "2 not reached",
    }
    assert any("In 2 cells some seeds did not reach the target" in note for note in rounds.notes)
    assert table(store.path, "bytes_to_0.7").cells[0][0].values == pytest.approx({0: 20e-6})
    with pytest.raises(Refused, match="Did you mean 'accuracy_best'"):
        table(store.path, "acuracy_best")


def test_markdown_has_a_table_per_metric_that_was_measured(store: Store) -> None:
    commit(store, "fedavg", {"global": 0.75})
    text = markdown(store.path)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "Accuracy, mean over the last 10 rounds (%)"
    assert "Rounds until accuracy 0.7 (rounds)" in titles
    assert not [title for title in titles if "Own-label" in title]  # null in every row
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") == 3


def test_write_makes_three_files_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    commit(store, "fedavg", {"global": 0.5})
    assert write(read(store.path)) == [store.path / f"leaderboard.{kind}" for kind in ("md", "csv", "tex")]
    assert (store.path / "leaderboard.md").read_text() == markdown(store.path)
    (store.path / "leaderboard.md").unlink()
    (store.path / "leaderboard.md").mkdir()
    with pytest.raises(Refused, match="can't be written"):
        write(read(store.path))
    assert not list(store.path.glob(".*"))
    write(read(store.path), tmp_path / "deep" / "er")
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())[0] == "leaderboard.csv"


def sheet(results: Path) -> list[dict[str, str]]:
    found = read(results)
    return list(csv.DictReader(StringIO(sheets.cells_text(found.first, found.others))))


def test_csv_has_every_cell_with_its_values(store: Store) -> None:
    for seed in (0, 1):
        commit(store, "fedavg", {"global": 0.5 + seed / 10}, seed)
        commit(store, "kdia", {"student": 0.7, "teacher": 0.75 - seed / 10}, seed)
    lines = sheet(store.path)
    first = {line["row"]: line for line in lines if line["metric"] == "accuracy_last10"}
    assert (first["fedavg"]["values"], first["fedavg"]["n"], first["fedavg"]["unit"]) == ("0=50.0 1=60.0", "2", "%")
    assert float(first["kdia (student)"]["difference"]) == pytest.approx(15)
    assert (first["kdia (student)"]["baseline"], first["fedavg"]["difference"]) == ("fedavg", "")
    assert {line["metric"] for line in lines} >= {"accuracy_best", "up_bytes", "rounds_to_0.7"}


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://x","y")'])
def test_no_text_of_the_csv_is_a_formula(store: Store, name: str) -> None:
    commit(store, name, {"global": 0.5})
    commit(store, "fedavg", {"global": 0.6})
    for line in sheet(store.path):
        for column, text in line.items():
            assert text[:1] not in "=+-@" or not text or column.startswith("difference"), (column, text)
    assert f"'{name}" in [line["row"] for line in sheet(store.path)]


def test_no_results_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no trials yet"):
        table(store.path)
    with pytest.raises(Refused, match="there is no results folder"):
        markdown(tmp_path / "absent")
    with pytest.raises(Undrawn, match="no finished trial"):
        learning_curves(store.path, tmp_path / "curves.png")


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(imread(path))


def test_curves_are_means_and_deviations_over_seeds(store: Store, tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.4, 0.6)):
        commit(store, "fedavg", {"global": accuracy}, seed)
        commit(store, "kdia", {"student": accuracy + 0.1, "teacher": 0.9}, seed)
    commit(store, "fedavg", {"global": 0.99}, 2, status="failed", reason="late crash")
    lines = plots._curves(store, "accuracy")
    assert sorted(set(lines["name"])) == ["fedavg", "kdia (student)", "kdia (teacher)"]
    fedavg = lines[lines["name"] == "fedavg"]
    assert list(fedavg["mean"]) == pytest.approx([0.5] * 3)
    assert list(fedavg["std"]) == pytest.approx([np.std([0.4, 0.6], ddof=1)] * 3)
    assert picture(learning_curves(store.path, tmp_path / "curves.png")).size
    with pytest.raises(Refused, match="unknown metric"):
        learning_curves(store.path, tmp_path / "curves.png", "acuracy")


def test_every_picture_that_the_trials_have_something_for(store: Store, tmp_path: Path) -> None:
    commit(store, "fedavg", {"global": 0.5})
    assert [path.name for path in board.draw(read(store.path), tmp_path)] == ["learning-curves.png"]
    for method, gain in (("fedavg", 0.0), ("kdia", 0.1), ("moon", 0.2)):
        for seed in (1, 2):
            for alpha in (0.1, 0.5, 1.0):
                commit(store, method, {"global": 0.5 + gain * alpha + seed / 50}, seed, alpha=alpha)
    drawn = board.draw(read(store.path), tmp_path)
    names = ["critical-difference", "performance-profile", "learning-curves", "by-alpha"]
    assert [path.stem for path in drawn] == names
    for path in drawn:
        assert picture(path).std() > 0.02  # something is there
        assert "<svg" in path.with_suffix(".svg").read_text()[:600]


def test_pictures_are_the_same_when_drawn_again(store: Store, tmp_path: Path) -> None:
    for alpha in (0.1, 1.0):
        commit(store, "fedavg", {"global": 0.5}, alpha=alpha)
    found = read(store.path)
    for folder in ("a", "b"):
        diagrams.along(found.first, found.trials, "partition.alpha", tmp_path / folder / "x")
    assert (tmp_path / "a" / "x.svg").read_bytes() == (tmp_path / "b" / "x.svg").read_bytes()


def test_a_mean_is_drawn_at_its_setting(store: Store) -> None:
    """Participation .1 has alphas .1 and 1, .5 only 1: the column of each number, and none without a number."""
    for participation, alpha in ((0.1, 0.1), (0.1, 1.0), (0.5, 1.0)):
        commit(store, "fedavg", {"global": 0.5}, alpha=alpha, participation=participation)
    found = read(store.path)
    assert diagrams.numbers(found.first, found.trials, "partition.alpha") == {0: 0.1, 1: 1.0, 2: 1.0}
    assert diagrams.drawn(found.first, found.trials) == ["partition.alpha", "participation"]
    assert diagrams.numbers(found.first, found.trials, "dataset") == {}
