"""The benchmark of peers, as far as it goes without any of them: the work that is dealt, the table, the refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import config
from harness.batches import ready
from harness.data import card, load
from harness.protocol import State
from harness.refusal import Refused
from harness.server import Server
from harness.work import make_setup

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"
MODULES = ("deal", "fl_bench", "run", "table", "work")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules. They import each other by bare names, which are gone again afterwards."""
    monkeypatch.syspath_prepend(str(PEERS))
    yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def row(text: str, peer: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if f"| {peer}" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_medians_ranges_and_ratios(peers: SimpleNamespace) -> None:
    """Ours: 1, 2, 3, 4, 10, median 3. Theirs: 4, 5, 7, 9, median (5 + 7) / 2 = 6: twice. Others': no ratio."""
    made = peers.table.Measured
    ours = made("usual", "fedstill", "2 x 1 thread", [[4.0, 1.0, 10.0], [2.0, 3.0]], [0.70, 0.74], {"ray": "2.60"})
    tried = {"2 x 1 thread": 5.5, "1 x 2 threads": 8.25}
    theirs = made("usual", "flower", "2 x 1 thread", [[9.0, 5.0], [4.0, 7.0]], [0.71, 0.71], tried=tried)
    others = made("usual", "kdia", "its own", [[30.0]], [None], same=False)
    text = peers.table.table([ours, theirs, others])
    assert row(text, "fedstill")[1:] == [
        *("fedstill (ray 2.60)", "2 x 1 thread", "3.000 [1.000, 10.000]", "5", "1.00", "0.720"),
    ]
    assert row(text, "flower")[3:] == ["6.000 [4.000, 9.000]", "4", "2.00", "0.710"]
    assert row(text, "kdia")[3:] == ["30.000 [30.000, 30.000]", "1", "other work", "not told"]
    assert text.count("was tried as") == 1
    assert "usual, flower was tried as (seconds a round): 2 x 1 thread: 5.500; 1 x 2 threads: 8.250.\n" in text


def test_another_accuracy_is_other_work(peers: SimpleNamespace) -> None:
    made = peers.table.Measured
    ours = made("usual", "fedstill", "", [[1.0], [1.0]], [0.70, 0.74])
    peers.table.check([ours, made("usual", "flower", "", [[1.0], [1.0]], [0.74, 0.70])])
    peers.table.check([ours, made("usual", "kdia", "", [[1.0], [1.0]], [None, None], same=False)])
    for wrong in (0.68, None, float("nan")):
        with pytest.raises(peers.table.OtherWork, match="pfl, usual"):
            peers.table.check([ours, made("usual", "pfl", "", [[1.0], [1.0]], [0.70, wrong])])


def test_a_wrong_peer_is_refused_with_the_nearest(peers: SimpleNamespace) -> None:
    assert peers.run.known([]) == ["flower", "pfl"]
    assert peers.run.known(["pfl", "pfl"]) == ["pfl"]
    with pytest.raises(Refused, match=r"unknown peer 'flwer'. Did you mean 'flower'\?"):
        peers.run.known(["flwer"])


def test_every_peer_has_its_driver_and_pinned_requirements(peers: SimpleNamespace) -> None:
    for peer in peers.run.PEERS.values():
        assert (PEERS / peer.driver).exists()
        lines = (PEERS / f"requirements-{peer.requirements}.txt").read_text().split()
        assert lines and all("==" in line for line in lines)


def test_the_folder_holds_what_the_trial_deals(peers: SimpleNamespace, tmp_path: Path) -> None:
    about = card("digits")
    trial = config.resolve({"method": "fedavg", "dataset": "digits", "net": "mlp", "clients": 7, "rounds": 1})
    arrays = load(about)
    setup, _ = make_setup(trial, arrays)
    peers.deal.deal(trial, tmp_path)

    kept = np.load(tmp_path / "rows.npz")
    dealt = np.split(kept["order"], np.cumsum(kept["sizes"])[:-1])
    assert [own.tolist() for own in dealt] == [own.tolist() for own in setup.split.clients]
    assert (kept["x_train"] == arrays.x_train).all() and (kept["y_test"] == arrays.y_test).all()

    work = peers.work.Work(tmp_path, "channels_last")
    assert (work.clients, work.cohort, work.lr) == (7, trial.cohort, trial.local.lr)
    for (x, y), own in zip(work.rows, setup.split.clients, strict=True):
        assert torch.allclose(x, ready(torch.from_numpy(arrays.x_train[own]), about), atol=1e-6)
        assert y.tolist() == arrays.y_train[own].tolist()
    start = first_of(setup)["params"]
    for name, parameter in work.net().state_dict().items():
        stage, _, leaf = name.partition(".")
        assert torch.equal(parameter, start[stage][leaf])


def first_of(setup: object) -> State:
    """The state that fedstill's own server begins with."""
    return Server(setup, pool=None).state  # type: ignore[arg-type]


def test_the_shipped_settings_are_trials(peers: SimpleNamespace) -> None:
    assert {name: (t.clients, t.cohort) for name in peers.deal.SETTINGS if (t := peers.deal.trial_of(name))} == {
        **{"usual": (100, 10), "small": (1200, 50), "large": (1200, 50)}
    }
    words = peers.deal.command(peers.deal.trial_of("usual"))
    assert {"fedavg", "dataset=fashion-mnist", "local.epochs=5", "local.lr=0.02", "partition.kind=iid"} <= set(words)


def test_a_log_tells_rounds_as_json(peers: SimpleNamespace, tmp_path: Path) -> None:
    log = peers.work.Log({"torch": "2"})
    with pytest.raises(RuntimeError, match="before the first"):
        log.round(0.5)
    log.start()
    log.round(0.5)
    log.write(tmp_path / "log.json")
    told = json.loads((tmp_path / "log.json").read_text())
    assert (
        told["accuracy"] == [0.5] and len(told["seconds"]) == 1 and set(told) == {"versions", "seconds", "accuracy"}
    )


def test_research_code_is_told_the_same_numbers(peers: SimpleNamespace) -> None:
    work = {"clients": 100, "cohort": 10, "epochs": 5, "batch": 64, "lr": 0.02}
    assert set(peers.fl_bench.CODES) == set(peers.run.CODES)
    said = {name: " ".join(words(work, 9)) for name, words in peers.fl_bench.CODES.items()}
    assert all("0.02" in text and "64" in text and "9" in text for text in said.values())
