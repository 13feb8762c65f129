"""What models score on rows that clients hold out to validate: counted on the union, or by each on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from harness.batches import normalise, rotate
from harness.evaluate import count, metrics
from harness.partitions import shift
from harness.server import Server
from harness.summary import headline
from harness.work import Setup

if TYPE_CHECKING:
    from tests.conftest import Lab

SIZES = (16, 24, 8, 20)
MINE = ("validation_accuracy", "validation_balanced_accuracy", "validation_loss")


def held(lab: Lab, method: str = "fedavg", **trial: Any) -> Setup:
    """Every client keeps the second half of its rows to validate, but for client 2, which keeps none."""
    usual = {"holdout": {"validation": 0.4, "test": 0.2}, "evaluation": {"batch": 7}}
    setup = lab.setup(method, sizes=SIZES, **{**usual, **trial})
    cuts = [len(rows) if client == 2 else len(rows) // 2 for client, rows in enumerate(setup.split.clients)]
    parts = [np.split(rows, [cut]) for rows, cut in zip(setup.split.clients, cuts, strict=True)]
    train, kept = (tuple(part) for part in zip(*parts, strict=True))
    counts = np.stack([np.bincount(setup.arrays.y_train[rows], minlength=4) for rows in train])
    test = tuple(rows[::2] for rows in train)  # for personal models; which rows does not matter here
    return replace(setup, split=replace(setup.split, clients=train, counts=counts, validation=kept, test=test))


def ended(lab: Lab, setup: Setup) -> Server:
    server = lab.server(setup)
    while not server.done:
        server.step()
    return server


def expected(server: Server, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    found = metrics(count(server.world.net("mlp"), server.state["params"], x, y), np.zeros(4, dtype=bool))
    return {f"validation_{name}": found[name] for name in ("accuracy", "balanced_accuracy", "loss")}


def test_a_global_model_is_measured_on_the_union_of_all_clients_rows(lab: Lab) -> None:
    """8 + 12 + 0 + 10 = 30 rows in shards of 7, which cross the clients' bounds: the same as all at once."""
    setup = held(lab)
    server = ended(lab, setup)
    rows = np.concatenate(setup.split.validation)
    assert len(rows) == 30
    host = server.pool.host  # type: ignore[attr-defined]
    x = normalise(torch.tensor(setup.arrays.x_train[rows]), host.card.mean, host.card.std)
    found = {name: server.rounds[-1][name] for name in MINE}
    assert found == pytest.approx(expected(server, x, torch.tensor(setup.arrays.y_train[rows])), abs=1e-6)


def test_a_client_validates_on_rows_as_it_sees_them(lab: Lab) -> None:
    """With rotated clients each one's rows are turned by its own angle, by 15 or 45 degrees to either side."""
    how: Any = {"partition": {"kind": "iid", "shift": "rotation", "shift_level": 60.0}}
    setup = held(lab, **how)
    server = ended(lab, setup)
    angles = shift(setup.trial.partition, 4, setup.trial.seed)
    assert sorted(np.abs(angles)) == pytest.approx([15, 15, 45, 45])
    host, arrays = server.pool.host, setup.arrays  # type: ignore[attr-defined]
    seen = [
        rotate(normalise(torch.tensor(arrays.x_train[rows]), host.card.mean, host.card.std), float(angle))
        for rows, angle in zip(setup.split.validation, angles, strict=True)
    ]
    y = torch.tensor(arrays.y_train[np.concatenate(setup.split.validation)])
    found = {name: server.rounds[-1][name] for name in MINE}
    assert found == pytest.approx(expected(server, torch.cat(seen), y), abs=1e-6)


def test_a_personal_model_is_measured_on_its_own_clients_rows(lab: Lab) -> None:
    """The hits of four models on their own rows over all these rows. Client 2 has none to be measured on."""
    setup = held(lab, "local")
    server = ended(lab, setup)
    host = server.pool.host  # type: ignore[attr-defined]
    hits = 0
    for visit, memory in server.memories.items():
        rows = setup.split.validation[visit.client]
        x = normalise(torch.tensor(setup.arrays.x_train[rows]), host.card.mean, host.card.std)
        guess = server.world.net("mlp").frozen(memory["params"], x).argmax(1).numpy()
        hits += int((guess == setup.arrays.y_train[rows]).sum())
    assert server.rounds[-1]["role"] == "personal"
    assert server.rounds[-1]["validation_accuracy"] == pytest.approx(hits / 30)


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_measuring_it_changes_no_other_number(lab: Lab, method: str) -> None:
    """Against the same trial whose clients lost the rows that they had held out."""
    setup = held(lab, method)
    without = replace(setup, split=replace(setup.split, validation=()))
    clocks = ("seconds", "server_seconds")

    def rest(server: Server) -> list[dict[str, Any]]:
        rows = (*server.rounds, *server.clients)
        return [{k: v for k, v in row.items() if k not in (*MINE, *clocks)} for row in rows]

    measured, blind = ended(lab, setup), ended(lab, without)
    assert rest(measured) == rest(blind)
    assert lab.same(measured.state, blind.state)
    assert all(name in row for row in measured.rounds for name in MINE)
    assert not any(name in row for row in blind.rounds for name in MINE)


def test_only_evaluated_rounds_have_it(lab: Lab) -> None:
    server = ended(lab, held(lab, rounds=5, evaluation={"every": 2}))
    assert [row["round"] for row in server.rounds if "validation_loss" in row] == [1, 3, 4]


def test_the_headline_has_a_column_for_it_where_there_are_such_rows() -> None:
    """The mean of the last ten rounds: 2 to 11 of twelve, with round / 10 as accuracy."""
    row = {"role": "global", "up_bytes": 0, "down_bytes": 0, "accuracy": 0.5}
    rounds = [{**row, "round": at, "validation_accuracy": at / 10} for at in range(12)]
    assert headline(rounds)["global_validation_accuracy_last10"] == pytest.approx(0.65)
    assert "global_validation_accuracy_last10" not in headline([{**row, "round": 0}])
