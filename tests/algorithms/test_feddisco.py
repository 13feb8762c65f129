"""FedDisco: discrepancies and weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.feddisco import FedDisco, discrepancies

if TYPE_CHECKING:
    from tests.conftest import Lab

COUNTS = torch.tensor([[20, 0], [15, 15], [75, 25]])  # mixes (1, 0), (.5, .5), (.75, .25)


def test_discrepancies_by_hand() -> None:
    """KL to (.5, .5): ln 2 = .693147, 0, .75 ln 1.5 + .25 ln .5 = .130812; over their sum .823959."""
    assert discrepancies(COUNTS) == pytest.approx([0.841240, 0.0, 0.158760], abs=1e-6)


def test_weights_by_hand() -> None:
    """f = (.2, .3, .5), a .5, b .1: .2 - .420620 + .1 < 0, .3 + .1 = .4, .5 - .079380 + .1 = .520620.

    Over .920620: (0, .434490, .565510), whatever the scale of the rows.
    """
    for rows in ([20.0, 30.0, 50.0], [2.0, 3.0, 5.0]):
        raw = FedDisco(a=0.5, b=0.1).shares(rows, COUNTS)
        assert [w / sum(raw) for w in raw] == pytest.approx([0.0, 0.434490, 0.565510], abs=1e-6)


def test_the_mean_by_hand(lab: Lab) -> None:
    """Models 1, 2, 3 of clients 0, 2, 3 of four: .434490 * 2 + .565510 * 3 = 2.565510. The counts are theirs."""
    counts = np.insert(COUNTS.numpy(), 1, [7, 0], axis=0)
    world = replace(lab.world((20, 7, 30, 50)), counts=counts)
    models = {0: (1.0, 20), 2: (2.0, 30), 3: (3.0, 50)}
    updates = [lab.update(k, {"params": {"w": torch.tensor([w])}}, samples=n) for k, (w, n) in models.items()]
    merged = FedDisco().merge({"net": "mlp"}, updates, lab.bench(world))
    assert merged["params"]["w"].item() == pytest.approx(2.565510, abs=1e-6)


def test_uniform_mixes_have_no_discrepancy() -> None:
    """Shares f + b: (.25 + .1, .75 + .1) of 1.2, up to the common factor of the rows."""
    even = torch.tensor([[3, 3, 3], [9, 9, 9]])
    assert discrepancies(even) == [0.0, 0.0]
    assert FedDisco().shares([10.0, 30.0], even) == pytest.approx([14.0, 34.0])


def test_where_no_weight_is_positive_rows_decide() -> None:
    """a 10, b 0 and two clients of one class each: f - 5 < 0 for both. The authors' code fails here."""
    assert FedDisco(a=10.0, b=0.0).shares([10.0, 30.0], torch.tensor([[10, 0], [0, 30]])) == [10.0, 30.0]


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any), min_size=1, max_size=8))
@settings(max_examples=60)
def test_weights_are_weights(counts: list[list[int]]) -> None:
    rows = [float(sum(row)) for row in counts]
    raw, d = FedDisco().shares(rows, torch.tensor(counts)), discrepancies(torch.tensor(counts))
    assert min(raw) >= 0 < sum(raw)
    assert sum(d) == pytest.approx(1) or not any(d)
    assert min(d) >= 0


def test_a_and_b_zero_is_fedavg_bit_for_bit(lab: Lab) -> None:
    settings: dict[str, Any] = {"rounds": 3, "participation": 0.75, "local": {"epochs": 2}}
    plain = lab.run("fedavg", **settings)
    assert lab.same(lab.model(lab.run("feddisco", {"a": 0.0, "b": 0.0}, **settings)), lab.model(plain))
    assert not lab.same(lab.model(lab.run("feddisco", **settings)), lab.model(plain))
