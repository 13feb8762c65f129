"""`fedstill bench`: what it writes, what it refuses, and that its floors do the work that they are measured by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import bench, timings
from harness.config import Execution
from harness.data import card, load
from harness.floor import FLOORS, FedAvgFloor
from harness.refusal import Refused
from harness.stand import Floor, ServerStand, sparse
from harness.work import make_setup

DIGITS: dict[str, Any] = {
    **{"dataset": "digits", "net": "lenet5", "clients": 8, "cohort": 4, "rounds": 10**6},
    **{"partition": {"kind": "iid"}, "local": {"epochs": 1, "batch": 16, "lr": 0.1}},
    "proxy": {"source": "train", "rows": 200},
}
FEW: dict[str, dict[str, Any]] = {
    "kdia": {"generator_epochs": 1, "generator_iterations": 2},
    "fedgen": {"generator_steps": 2},
    "feddf": {"proxy_steps": 2},
}


def small(method: str) -> Any:
    return timings.cell(method, DIGITS, hyper=FEW.get(method, {}))


def floor(method: str, layout: Any = "channels_last") -> FedAvgFloor:
    trial = small(method)
    torch.manual_seed(0)
    return FLOORS[method](make_setup(trial, load(card("digits")))[0], layout)


@pytest.mark.parametrize("method", FLOORS)
def test_a_floor_trains_and_serves(method: str) -> None:
    """After 20 visits to clients in turn, each from where the last one ended, it knows more than half the digits."""
    made = floor(method)
    assert made.evaluate(0, 1) < 120
    for visit in range(20):
        made.visit(visit % 8)
        made.start = [p.detach().clone() for p in made.model.parameters()]
    made.teacher.load_state_dict(made.model.state_dict())
    assert made.evaluate(0, 1) > 0.5 * len(made.truth)
    assert made.served(4) >= 0


def test_the_shares_of_the_evaluation_add_up() -> None:
    made = floor("fedavg", "contiguous")
    assert made.evaluate(0, 2) + made.evaluate(1, 2) == made.evaluate(0, 1)


def test_overlapping_rows_make_populations_of_any_size() -> None:
    """100 clients of 60 rows on 1,437 rows of digits; the counts are those of the rows."""
    setup = sparse(timings.cell("fedavg", DIGITS, clients=100, cohort=10))
    assert [len(rows) for rows in setup.split.clients] == [60] * 100
    labels = setup.arrays.y_train
    assert setup.split.counts.sum(1).tolist() == [60] * 100
    assert setup.split.counts[99].tolist() == [int((labels[setup.split.clients[99]] == c).sum()) for c in range(10)]


def test_a_server_stand_counts_and_measures() -> None:
    ours = ServerStand(small("kdia"), Execution(hosts=0))
    assert ours.rounds(2) > 0
    assert ours.samples() >= sum(row["samples"] for row in ours.server.clients) > 0
    assert 0 < ours.served(2) < 60
    assert ours.memory()["server"]["peak_bytes"] > ours.memory()["server"]["private_bytes"] // 2 > 0


@pytest.mark.long
@pytest.mark.cluster
def test_ours_and_the_floor_take_turns(cluster: None) -> None:
    found = timings.against_floor(small("fedavg"), 1, 2)
    assert 0 < found["lowest"] <= found["efficiency"] <= found["highest"]
    assert found["samples_per_s"] == pytest.approx(4 * (1437 - 200) / 8 / found["round_s"], rel=0.1)
    two = Floor(small("fedavg"), "contiguous", 2)
    assert two.rounds(3) > 0
    assert two.at == 12
    two.close()


def test_figures_become_a_table_and_a_file(tmp_path: Path) -> None:
    figures = [{"method": "fedavg", "efficiency": 0.91234, "cohort": 50}, {"method": "moon", "wide": 12345.6}]
    assert bench.markdown(figures).splitlines() == [
        "| method | efficiency | cohort | wide |",
        "| --- | --- | --- | --- |",
        "| fedavg | 0.912 | 50 |  |",
        "| moon |  |  | 12,346 |",
    ]
    bench.write(tmp_path / "new", "loop", figures, "fedstill bench loop", bench.machine())
    text = (tmp_path / "new" / "loop.md").read_text()
    assert "`fedstill bench loop`" in text and "torch 2" in text and "| fedavg | 0.912" in text
    assert json.loads((tmp_path / "new" / "loop.json").read_text())["loop"] == figures


def test_the_digest_has_efficiencies_and_starts() -> None:
    rows = (("usual", "moon", 0.9), ("small", "kdia", 0.8))
    found: dict[str, Any] = {
        "loop": [{"setting": setting, "method": name, "efficiency": value} for setting, name, value in rows],
        "start": [{"first_s": 9.0, "reused_s": 0.1, "lowest": 0.1}],
    }
    made = bench.digest(found)
    assert made["efficiency"] == {"usual": {"moon": 0.9}, "small": {"kdia": 0.8}}
    assert (made["first_s"], made["reused_s"]) == (9.0, 0.1)
    assert made["figures"] == found


def test_wrong_names_and_hosts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"unknown benchmark 'lop'.*loop"):
        bench.run_all(["lop"], 1, 1, None, tmp_path / "out")
    with pytest.raises(Refused, match="--hosts 100000 is more than the"):
        bench.run_all(["loop"], 100_000, 1, None, tmp_path / "out")
    with pytest.raises(Refused, match="unknown device 'gpu'"):
        bench.run_all(["loop"], 1, 1, None, tmp_path / "out", "gpu")
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_used_where_there_is_one_and_by_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="--device cuda: there is no GPU here"):
        bench.chosen(["loop"], "cuda")
    assert bench.chosen([], "cpu") == list(bench.BENCHES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.chosen([], "cuda") == ["loop", "rounds", "scale", "server", "clients"]
    with pytest.raises(Refused, match="--device cuda: start, sweep is measured on the CPU; there are loop"):
        bench.chosen(["loop", "sweep", "start"], "cuda")
