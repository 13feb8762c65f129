"""FedAvgM: heavy-ball momentum on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from algorithms.fedavgm import FedAvgM

if TYPE_CHECKING:
    from tests.conftest import Lab


def positions(lab: Lab, method: FedAvgM, deltas: tuple[float, ...]) -> list[float]:
    """Where a model that starts at 0 is after rounds with these mean deltas."""
    world = lab.world((10,))
    state = {"net": "mlp", "params": {"w": torch.zeros(1)}, "velocity": {"w": torch.zeros(1)}}
    seen = []
    for delta in deltas:
        update = lab.update(0, {"params": {"w": state["params"]["w"] + delta}})  # type: ignore[index]
        state = method.merge(state, [update], lab.bench(world))
        seen.append(state["params"]["w"].item())  # type: ignore[index]
    return seen


def test_two_rounds_by_hand(lab: Lab) -> None:
    """Deltas .5 and -.2 at beta .9: v = .5, w = .5; v = .9 * .5 - .2 = .25, w = .75."""
    assert positions(lab, FedAvgM(beta=0.9), (0.5, -0.2)) == pytest.approx([0.5, 0.75])


def test_a_velocity_without_new_deltas_dies_out(lab: Lab) -> None:
    """beta .5: steps 1, .5, .25. (An average v = b v + (1 - b) Delta would halve the first.)"""
    assert positions(lab, FedAvgM(beta=0.5), (1.0, 0.0, 0.0)) == pytest.approx([1.0, 1.5, 1.75])


def test_the_rate_of_the_server_scales_the_step_and_not_the_velocity(lab: Lab) -> None:
    """lr_server 2: w = 2 * .5 = 1; v = .25, w = 1 + 2 * .25 = 1.5."""
    assert positions(lab, FedAvgM(beta=0.9, lr_server=2.0), (0.5, -0.2)) == pytest.approx([1.0, 1.5])


def test_without_momentum_it_is_fedavg(lab: Lab) -> None:
    """Up to the rounding of start + (mean - start)."""
    plain, still = lab.run("fedavg"), lab.run("fedavgm", {"beta": 0.0})
    assert lab.close(lab.model(still), lab.model(plain), atol=1e-6)
    assert not lab.close(lab.model(lab.run("fedavgm")), lab.model(plain), atol=1e-3)


def test_a_trial_starts_at_rest(lab: Lab) -> None:
    """The first round is FedAvg's, and the bill is always FedAvg's."""
    plain, moving = lab.run("fedavg", rounds=1), lab.run("fedavgm", rounds=1)
    assert lab.close(lab.model(moving), lab.model(plain), atol=1e-6)
    assert [r["down_kinds"] for r in moving.rounds] == [r["down_kinds"] for r in plain.rounds]
