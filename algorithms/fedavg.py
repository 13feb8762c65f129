"""Federated averaging: the size-weighted mean of the clients' models.

Paper: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: none; running statistics of BatchNorm, where a net has them, are averaged like weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from harness.averages import mean_of
from harness.losses import cross_entropy
from harness.nets import Net
from harness.protocol import (
    Algorithm,
    Batch,
    Broadcast,
    Cohort,
    Inbox,
    Server,
    State,
    Update,
    World,
)
from harness.trees import Tree


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """theta_g = sum_k (n_k / sum_j n_j) theta_k over the round's participants."""

    summed: ClassVar[Mapping[str, Any]] = {"params": "samples"}

    def init(self, world: World, rng: Generator) -> State:
        """One model."""
        return {"net": world.default_net, "params": world.net(world.default_net).init(rng)}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model to everybody."""
        return Broadcast(shared={"params": state["params"]})

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy."""
        return cross_entropy(net(p, batch.x), batch.y, batch.mask), {}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean by sample counts."""
        return {**state, "params": mean_of(updates, "params")}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The global model."""
        return {"global": (state["net"], state["params"])}
