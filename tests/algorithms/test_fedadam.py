"""FedAdam: Adam on the server, without bias correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from algorithms.fedadam import FedAdam
from harness import trees

if TYPE_CHECKING:
    from tests.conftest import Lab


def two_rounds(lab: Lab, method: FedAdam) -> dict[str, list[float]]:
    """Model, m and v after the mean deltas .5 and -.2 from 0. Two clients of 10 and 30 rows: .2 and .6 make .5."""
    world = lab.world((10, 30))
    state = {"net": "mlp", **{key: {"w": torch.zeros(1)} for key in ("params", "m", "v")}}
    seen: dict[str, list[float]] = {"params": [], "m": [], "v": []}
    for apart in ((0.2, 0.6), (-0.2, -0.2)):
        ends = [trees.tree_map(lambda w, d=d: w + d, state["params"]) for d in apart]  # type: ignore[arg-type]
        updates = [
            lab.update(k, {"params": end}, samples=rows)
            for k, (end, rows) in enumerate(zip(ends, (10, 30), strict=True))
        ]
        state = method.merge(state, updates, lab.bench(world))
        for key, values in seen.items():
            values.append(state[key]["w"].item())  # type: ignore[index]
    return seen


def test_two_rounds_by_hand(lab: Lab) -> None:
    """lr .1, betas .9 and .99, eps 1e-3; D = .5, then -.2.

    m = .1 * .5 = .05, v = .01 * .25 = .0025, step .1 * .05 / (.05 + .001) = .098039;
    m = .045 - .02 = .025, v = .002475 + .0004 = .002875, step .0025 / (.053619 + .001) = .045772: at .143811.
    """
    seen = two_rounds(lab, FedAdam(lr_server=0.1))
    assert seen["m"] == pytest.approx([0.05, 0.025], abs=1e-6)
    assert seen["v"] == pytest.approx([0.0025, 0.002875], abs=1e-6)
    assert seen["params"] == pytest.approx([0.098039, 0.143811], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (FedAdam(lr_server=0.01), 0.0098039),  # a tenth
        (FedAdam(eps=0.05), 0.05),  # .1 * .05 / (.05 + .05)
        (FedAdam(beta1=0.0), 0.980392),  # .1 * .5 / .051
        (FedAdam(beta2=0.0), 0.0099800),  # .1 * .05 / (.5 + .001)
    ],
)
def test_every_hyper_parameter_by_hand(lab: Lab, method: FedAdam, first: float) -> None:
    assert two_rounds(lab, method)["params"][0] == pytest.approx(first, abs=1e-6)


def test_a_trial_pays_as_fedavg_and_starts_with_zero_moments(lab: Lab) -> None:
    """The first step from m = v = 0: lr .1 D / (.1 |D| + .001), which is sign-like: at most .1 * .1 / .1 = .1."""
    plain, server = lab.run("fedavg", rounds=1), lab.run("fedadam", {"lr_server": 0.1}, rounds=1)
    start = server.world.net("mlp").init(trees.stream(0, "init"))
    delta = trees.sub(lab.model(plain), start)
    expected = trees.tree_map(lambda p, d: p + 0.1 * (0.1 * d) / (0.1 * d.abs() + 1e-3), start, delta)
    assert lab.close(lab.model(server), expected, atol=1e-5)
    assert [r["down_kinds"] for r in server.rounds] == [r["down_kinds"] for r in plain.rounds]
