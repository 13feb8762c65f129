from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.batches import Rows
from harness.nets import build
from harness.peers import booked, ema, peer_weights, probe, running, validation_loss
from harness.trees import clone, stream, tree_map


def test_ema_begins_with_the_first_value_or_goes_on() -> None:
    """1, then .9 * 1 + .1 * 2 = 1.1; going on from 3: .9 * 3 + .1 * 1 = 2.8, then .9 * 2.8 + .1 * 2 = 2.72."""
    assert ema([1.0, 2.0], 0.9) == pytest.approx(1.1)
    assert ema([1.0, 2.0], 0.9, 3.0) == pytest.approx(2.72)
    assert math.isnan(ema([], 0.9))


def test_running_averages_go_on_from_the_last_visit() -> None:
    metrics = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, 1.0])}
    first = running(metrics, ("a", "b"), 0.9, None)
    assert first.tolist() == pytest.approx([1.1, 0.1])
    assert running(metrics, ("a", "b"), 0.9, first).tolist() == pytest.approx([1.181, 0.181])


def test_weights_of_peers_without_a_record_are_those_of_no_revenue() -> None:
    records = {"3": torch.tensor([-1.0, 1, 1])}
    assert peer_weights(records, ["3", "4"], 0.1) == {"3": 0.5, "4": 0.5}
    assert peer_weights({}, [], 0.1) == {}


def test_a_record_counts_poor_probes_in_a_row() -> None:
    """-.1, then .9 * -.1 + .1 * .5 = -.04 and poor again, then .9 * -.04 + .1 * 1 = .064: the count starts anew."""
    first = booked(None, -0.1, 0.9)
    second = booked(first, 0.5, 0.9)
    third = booked(second, 1.0, 0.9)
    assert first.tolist() == pytest.approx([-0.1, 1, 1])
    assert second.tolist() == pytest.approx([-0.04, 2, 2])
    assert third.tolist() == pytest.approx([0.064, 3, 0])
    assert booked(third, math.nan, 0.9).tolist() == third.tolist()


@pytest.fixture
def visit(lab: Any) -> dict[str, Any]:
    """A trained visit with 12 private and 12 validation rows, all of class 1, and a peer who always answers 1."""
    net = build("mlp", (1, 8, 8), 4)
    own = net.init(stream("own"))
    knows = tree_map(torch.zeros_like, own)
    knows["head"]["fc3.bias"] = torch.tensor([0.0, 9.0, 0.0, 0.0])
    wrong = clone(knows)
    wrong["head"]["fc3.bias"] = torch.tensor([9.0, 0.0, 0.0, 0.0])
    rows = Rows(torch.randn(12, 1, 8, 8, generator=stream("rows")), torch.ones(12, dtype=torch.int64))
    bench = lab.bench(private=rows, validation=rows)
    inbox = {"peers": {"5": knows, "2": wrong}, "nets": {"5": "mlp", "2": "mlp"}, "batch": 8}
    return {"net": net, "own": own, "inbox": inbox, "bench": bench, "rows": rows}


def probing(lab: Any, visit: dict[str, Any], revenue: dict[str, torch.Tensor], patience: int = 3) -> Any:
    own = visit["own"]
    trained = lab.trained(own, own, visit["inbox"], {"revenue": revenue}, net=visit["net"], bench=visit["bench"])
    return probe(trained, own, (1.0, True), steps=10, decay=0.9, patience=patience)


def test_validation_loss_is_the_mean_over_the_rows(lab: Any, visit: dict[str, Any]) -> None:
    """A net that always says (0, 9, 0, 0) loses ln(1 + 3 e^-9) nats on rows of class 1."""
    knows = visit["inbox"]["peers"]["5"]
    assert validation_loss(visit["bench"], visit["net"], knows) == pytest.approx(
        math.log1p(3 * math.exp(-9)), rel=1e-3
    )
    none = Rows(visit["rows"].x[:0], visit["rows"].y[:0])
    assert math.isnan(validation_loss(lab.bench(validation=none), visit["net"], knows))


def test_a_probe_pays_for_a_peer_who_knows_and_not_for_one_who_is_wrong(lab: Any, visit: dict[str, Any]) -> None:
    before = clone(visit["own"])
    records, dropped = probing(lab, visit, {})
    assert list(records) == ["5"] and records["5"][0] > 0.05 and records["5"][1:].tolist() == [1, 0]
    assert dropped == {}
    records, dropped = probing(lab, visit, records)
    assert records["2"][0] < 0 and records["2"][1:].tolist() == [1, 1]
    assert dropped == {}
    assert lab.same(visit["own"], before), "the copy was thrown away"
    assert visit["bench"].steps == 20, "ten steps each, charged to the method"


def test_a_peer_is_dropped_when_patience_ends(lab: Any, visit: dict[str, Any]) -> None:
    seen = {"5": torch.tensor([1.0, 9, 0]), "2": torch.tensor([-0.5, 2, 2])}
    records, dropped = probing(lab, visit, seen)
    assert list(dropped) == ["2"] and records["2"][1:].tolist() == [3, 3]
    assert probing(lab, visit, seen, patience=4)[1] == {}
