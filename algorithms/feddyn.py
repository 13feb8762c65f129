"""Federated learning with dynamic regularisation: every client's objective is bent until all agree on one optimum.

Paper: Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021, Algorithm 1.
Travels down: the model. Travels up: the model. Remembered by the client: h_i, its gradient at its last model.
Differences from the paper: none by default; with per_rows, a is a / (n_k / mean n) for client k, as in the authors'
code. The server keeps drift = -h / a, from which a cancels. Running statistics of BatchNorm are averaged.
No a makes it FedAvg: as a -> 0 clients train as FedAvg's, but the server adds all past drifts to their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness import descent
from harness.averages import mean_of
from harness.nets import Net
from harness.protocol import (
    Batch,
    Broadcast,
    Cohort,
    Inbox,
    Positive,
    Server,
    State,
    Trained,
    Update,
    Visit,
    World,
)
from harness.trees import Tree, add, dot, sq_distance, sub, zeros


@dataclass(frozen=True)
class FedDyn(FedAvg):
    """Loss - <h_i, w> + (a / 2) ||w - theta_g||^2; h_i -= a (w - theta_g); theta_g = mean w - h / a.

    h is the mean of all clients' h_i: h -= (a / N) sum_S (w - theta_g).
    """

    summed: ClassVar[Mapping[str, Any]] = {"params": "equal"}

    a: Positive = 0.01  # alpha; the authors' code on CIFAR-10 (FedNTD's authors use 0.1)
    per_rows: bool = False  # divide a by the client's rows over the mean client's, as the authors' code does

    def init(self, world: World, rng: Generator) -> State:
        """The model, the last mean of the clients, and no drift."""
        state = super().init(world, rng)
        return {**state, "average": state["params"], "drift": zeros(state["params"])}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model and, with per_rows, the factor of a for each client."""
        usual = sum(world.sizes) / len(world.sizes)
        factors: dict[Visit, Inbox] = {
            visit: {"factor": torch.tensor(usual / max(1, world.sizes[visit.client]))} for visit in cohort.visits
        }
        return Broadcast(shared={"params": state["params"]}, personal=factors if self.per_rows else {})

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """h_i = 0."""
        return {"h": zeros(inbox["params"])}

    def _a(self, inbox: Inbox) -> float:
        return self.a * float(inbox["factor"]) if self.per_rows else self.a

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the dynamic regulariser, with the squared norm."""
        value, seen = super().loss(net, p, batch, inbox, memory)
        near = self._a(inbox) / 2 * sq_distance(p, inbox["params"])
        return value - dot(memory["h"], p) + near, seen

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """h_i -= a (w - theta_g)."""
        delta = sub(trained.end, trained.start)
        return {"params": trained.end}, {"h": add(trained.memory["h"], delta, -self._a(trained.inbox))}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """A plain mean, as in the paper, plus the drift of all clients."""
        average = mean_of(updates, "params", "equal")
        delta = sub(average, state["params"])
        drift = add(state["drift"], delta, len(updates) / server.world.clients)
        # mean w + drift = theta_g + (drift + delta): a step of momentum, which knows how to treat BatchNorm
        params, _ = descent.momentum(state["params"], drift, delta, lr=1.0, beta=1.0)
        return {**state, "params": params, "average": average, "drift": drift}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """theta_g, then the mean of the last cohort's models, which the authors' code reports as well."""
        return {"global": (state["net"], state["params"]), "average": (state["net"], state["average"])}
