"""What `fedstill show` and `fedstill partition` print."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import axes, cards, nets, registry, show


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


LISTS = {
    "methods": registry.names,
    "datasets": lambda: cards.names("datasets"),
    "nets": nets.names,
    "sweeps": lambda: cards.names("sweeps"),
}


@pytest.mark.parametrize("what", LISTS)
def test_a_list_has_every_name(capsys: pytest.CaptureFixture[str], what: str) -> None:
    show.PAGES[what](None)
    first = [line.split("│")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert [name for name in LISTS[what]() if name not in first] == []


@pytest.mark.parametrize(
    ("what", "part"), [("methods", "Travels up:"), ("datasets", "licence"), ("sweeps", "methods =")]
)
def test_every_page_can_be_shown(capsys: pytest.CaptureFixture[str], what: str, part: str) -> None:
    for name in LISTS[what]():
        show.PAGES[what](name)
        assert part in capsys.readouterr().out


def test_a_method_shows_its_paper_and_its_hyper_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    show.PAGES["methods"]("kdia")
    out = capsys.readouterr().out
    assert "2506.20431" in out
    assert "lambda_kd" in out and "0.5" in out


def test_a_net_shows_its_parameters_where_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The KDIA authors' LeNet: 92,626 parameters on 3x32x32."""
    show.PAGES["nets"]("kdia-lenet")
    assert "92,626" in capsys.readouterr().out


def test_partitions_say_what_they_read(capsys: pytest.CaptureFixture[str]) -> None:
    show.PAGES["partitions"]("shards")
    out = capsys.readouterr().out
    assert "shards_per_client" in out and "alpha" not in out


def test_a_partition_prints_its_numbers_and_draws_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 clients with 2 classes each: a column of the shading has 2 dark cells, a row of a class some."""
    trial = axes.resolve_setting(["partition.kind=shards", "clients=12", "seed=3"])
    show.partition_page(trial, tmp_path / "map.png")
    out = capsys.readouterr().out
    assert "digits, 12 clients, shards, seed 3: 1442 rows dealt, 0 left over" in out
    shaded = [line[8:20].ljust(12) for line in out.splitlines() if line.strip().split(" ")[0] in NUMBERS]
    assert len(shaded) == 10
    held = [sum(row[client] != " " for row in shaded) for client in range(12)]
    assert min(held) >= 1 and max(held) <= 4, "two shards of sorted rows touch at most four classes"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_more_clients_than_the_line_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    show.partition_page(axes.resolve_setting(["clients=100", "min_samples=1"]), tmp_path / "map.png")
    assert "(the first 51 clients and 10 classes)" in capsys.readouterr().out
