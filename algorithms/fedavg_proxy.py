"""A control: FedAvg whose mean is trained further on the server's labelled data.

Paper: none; what a method with labelled data on the server must beat, because that data alone may explain its gain.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from FedAvg: some steps of Adam on the cross-entropy of proxy rows after every mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from algorithms.fedavg import FedAvg
from harness.descent import Course, consult, study
from harness.losses import cross_entropy
from harness.protocol import Batch, Count, Positive, Server, State, Times, Update
from harness.trees import Tree


@dataclass(frozen=True)
class FedAvgProxy(FedAvg):
    """FedAvg, then proxy_steps of Adam on CE: what fedakd is without attention and divergence."""

    summed = FedAvg.summed

    needs: ClassVar[frozenset[str]] = frozenset({"one_net", "labelled_proxy"})
    identity: ClassVar[Mapping[str, Any]] = {"proxy_steps": 0}

    proxy_steps: Times = 100  # per round; ours, as all of these
    proxy_batch: Count = 128
    proxy_lr: Positive = 1e-3  # Adam

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean, then cross-entropy on proxy rows."""
        state = super().merge(state, updates, server)
        net = server.world.net(state["net"])
        if not self.proxy_steps:
            return state

        def loss(p: Tree, batch: Batch) -> Tensor:
            return cross_entropy(net(p, batch.x), batch.y)

        course = Course(self.proxy_steps, self.proxy_batch, self.proxy_lr)
        draw = consult(server, lambda x, y: {}, course.rows)
        return {**state, "params": study(server, state["params"], loss, draw, course, server.rng("proxy"))}
