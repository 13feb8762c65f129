"""FedNova: normalised deltas, with and without local momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.fednova import FedNova, steps_norm
from harness import trees
from harness.trees import Tree

if TYPE_CHECKING:
    from tests.conftest import Lab


def one(value: float) -> Tree:
    return {"w": torch.tensor([value])}


def test_norms_by_hand() -> None:
    """rho .5, 3 steps: a = (1.75, 1.5, 1), 4.25. rho .9, 50 steps: 410.4638. No momentum: the steps."""
    assert steps_norm(3, 0.5) == pytest.approx(4.25)
    assert steps_norm(50, 0.9) == pytest.approx(410.4638, abs=5e-5)
    assert steps_norm(7, 0.0) == 7
    assert steps_norm(0, 0.9) == 0


@given(st.integers(0, 100), st.floats(0, 0.99))
@settings(max_examples=50)
def test_norms_are_the_code_s_counter(steps: int, rho: float) -> None:
    """counter = rho counter + 1 at every step; the norm is the sum of the counters."""
    counter = total = 0.0
    for _ in range(steps):
        counter = rho * counter + 1
        total += counter
    assert steps_norm(steps, rho) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 0.5625), (0.5, 0.535638)])
def test_two_rounds_by_hand(lab: Lab, momentum: float, expected: float) -> None:
    """Both clients move from 1 to .6: one with 10 rows in 2 steps, one with 30 in 4; FedAvg would end at .6.

    p = (.25, .75), tau_eff = .5 + 3 = 3.5: 1 - 3.5 (.25 * .4 / 2 + .75 * .4 / 4) = 1 - 3.5 * .125 = .5625.
    Momentum .5: norms 2.5 and 1.875 + 1.75 + 1.5 + 1 = 6.125, tau_eff 5.21875: 1 - 5.21875 (.04 + .048980) = .535638.
    There is no state: the same deltas lead as far again.
    """
    world = lab.world((10, 30), momentum=momentum)
    state = {"net": "mlp", "params": one(1.0)}
    for t in range(2):
        end = one(state["params"]["w"].item() - 0.4)  # type: ignore[index]
        updates = [lab.update(0, {"params": end}, 10, 2), lab.update(1, {"params": end}, 30, 4)]
        state = FedNova().merge(state, updates, lab.bench(world, t))
        assert state["params"]["w"].item() == pytest.approx(1 + (t + 1) * (expected - 1), abs=1e-5)


def test_a_client_without_steps_does_not_move_the_model(lab: Lab) -> None:
    """Its share of the rows stays: 1 - tau_eff p d / norm = 1 - (.5 * 4) (.5 * .4 / 4) = .9."""
    updates = [lab.update(0, {"params": one(1.0)}, 10, 0), lab.update(1, {"params": one(0.6)}, 10, 4)]
    merged = FedNova().merge({"net": "mlp", "params": one(1.0)}, updates, lab.bench(lab.world((10, 10))))
    assert merged["params"]["w"].item() == pytest.approx(0.9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equal_steps_are_fedavg(lab: Lab, momentum: float) -> None:
    """9 to 16 rows in batches of 8 are two steps, whatever the rows weigh. Unequal steps are not FedAvg."""
    settings = {"rounds": 3, "local": {"momentum": momentum, "epochs": 2, "lr": 0.05}}
    plain, nova = (lab.run(name, sizes=(12, 16, 9), **settings) for name in ("fedavg", "fednova"))
    assert lab.close(lab.model(nova), lab.model(plain), atol=1e-5)
    plain, nova = (lab.run(name, sizes=(12, 32, 9), **settings) for name in ("fedavg", "fednova"))
    assert not lab.close(lab.model(nova), lab.model(plain), atol=1e-3)


def test_a_trial_is_the_paper_s_formula(lab: Lab) -> None:
    """One round of sizes 12, 40, 8: 2, 5 and 1 steps."""
    server = lab.run("fednova", sizes=(12, 40, 8), rounds=1)
    start = server.world.net("mlp").init(trees.stream(0, "init"))
    steps, shares = [2, 5, 1], [12 / 60, 40 / 60, 8 / 60]
    assert [row["steps"] for row in server.clients] == steps
    tau_eff = sum(p * tau for p, tau in zip(shares, steps, strict=True))
    expected = start
    for sent, tau, p in zip(sorted(server.pool.log, key=lambda s: s.order.visit), steps, shares, strict=True):  # type: ignore[attr-defined]
        expected = trees.add(expected, trees.sub(sent.payload["params"], start), tau_eff * p / tau)
    assert lab.close(lab.model(server), expected, atol=1e-6)


def test_running_statistics_are_averaged(lab: Lab) -> None:
    """A step beyond the mean could make a variance negative. Here 1 -> .1 in 1 and 9 steps, factor 25 / 9."""
    names = ("w", "norm.running_var")
    end = dict.fromkeys(names, torch.tensor([0.1]))
    updates = [lab.update(0, {"params": end}, 10, 1), lab.update(1, {"params": end}, 10, 9)]
    state = {"net": "mlp", "params": dict.fromkeys(names, torch.ones(1))}
    params = FedNova().merge(state, updates, lab.bench(lab.world((10, 10))))["params"]
    assert params["norm.running_var"].item() == pytest.approx(0.1)
    assert params["w"].item() == pytest.approx(1 - 0.9 * 25 / 9)
