"""The control that trains on the server's labelled rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from algorithms.fedavg_proxy import FedAvgProxy
from harness import registry
from harness.batches import Rows
from harness.refusal import Refused
from harness.trees import stream

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_one_step_of_adam_on_the_cross_entropy_of_the_mean(lab: Lab) -> None:
    """Clients' logits (0, 0) and (2, 2) average to (1, 1) with equal sizes; label 0: gradient (-.5, .5), and Adam's
    first step is the rate against its sign: (1.1, .9). A second merge starts afresh: (1, 1) again gives (1.1, .9).
    """
    net = lab.Table(classes=2)
    world = lab.world(net=net, proxy_rows=1)
    method = FedAvgProxy(proxy_steps=1, proxy_batch=1, proxy_lr=0.1)
    state = method.init(world, stream("test"))
    updates = [lab.update(k, {"params": {"logits": torch.full((1, 2), 2.0 * k)}}) for k in range(2)]
    for round in range(2):
        bench = lab.bench(world, round, proxy=Rows(torch.zeros(1, dtype=torch.int64), torch.tensor([0]), None))
        state = method.merge(state, updates, bench)
        assert state["params"]["logits"][0].tolist() == pytest.approx([1.1, 0.9], abs=1e-6)
        assert bench.steps == 1


def test_labelled_rows_are_needed() -> None:
    assert "labelled_proxy" in registry.make("fedavg-proxy", {}).needs


def test_a_trial_without_server_data_is_refused(lab: Lab) -> None:
    with pytest.raises(Refused, match="data on the server"):
        lab.setup("fedavg-proxy")
