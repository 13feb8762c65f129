"""The control with more local epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from algorithms.fedavg_matched import FedAvgMatched

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.mark.parametrize(("factor", "steps"), [(1.0, 8), (2.0, 16), (1.5, 12), (0.5, 4)])
def test_steps_are_multiplied(lab: Lab, factor: float, steps: int) -> None:
    """16 rows in batches of 4 are 4 steps a pass; 2 epochs are 8, times the factor."""
    server = lab.run(
        "fedavg-matched", {"factor": factor}, sizes=(16,), rounds=1, local={"batch": 4, "epochs": 2, "lr": 0.1}
    )
    assert server.clients[0]["steps"] == steps


def test_twice_as_often_is_fedavg_with_twice_the_epochs(lab: Lab) -> None:
    matched = lab.run("fedavg-matched", {"factor": 2.0}, local={"epochs": 1})
    assert lab.same(lab.model(matched), lab.model(lab.run("fedavg", local={"epochs": 2})))


def test_parts_of_a_pass_add_up_over_epochs(lab: Lab) -> None:
    """1.5 times 3 epochs are 4.5 passes."""
    (phase,) = FedAvgMatched(factor=1.5).plan(lab.world(epochs=3), {}, {})
    assert phase.epochs == 4.5
