"""FedAvg with control variates that correct the drift of the clients.

Paper: Karimireddy et al., SCAFFOLD, ICML 2020, Algorithm 1 with option II for the client's control variate.
Travels down: the model and the server's control variate c. Travels up: the model and the change of c_i.
Remembered by the client: its control variate c_i.
Differences from the paper: with local momentum the number of steps K is replaced by the length that momentum gives
them (as the FedNTD authors do); K counts steps, not epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
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
    World,
)
from harness.trees import Tree, add, dot, sub, tree_map, zeros


def effective_steps(steps: int, momentum: float) -> float:
    """K' with local momentum rho: (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho); K itself without momentum."""
    rho = momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """The step is w -= lr (grad - c_i + c); theta_g += lr_server mean(w - theta_g); c += (m / N) mean(c_i' - c_i)."""

    summed: ClassVar[Mapping[str, Any]] = {"params": "equal", "c_delta": "equal"}

    lr_server: Positive = 1.0  # eta_g of the paper

    def init(self, world: World, rng: Generator) -> State:
        """The model and c = 0."""
        state = super().init(world, rng)
        return {**state, "c": zeros(state["params"]), "clients": world.clients}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model and c."""
        return Broadcast(shared={"params": state["params"], "c": state["c"]})

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """c_i = 0."""
        return {"c_i": zeros(inbox["c"])}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy + <w, c - c_i>, whose gradient is exactly the correction."""
        value, seen = super().loss(net, p, batch, inbox, memory)
        return value + dot(p, sub(inbox["c"], memory["c_i"])), seen

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """Option II: c_i' = c_i - c + (theta_g - w) / (K lr)."""
        if not trained.steps:  # nothing was learnt about this client's drift
            return {"params": trained.end, "c_delta": zeros(trained.inbox["c"])}, trained.memory
        per_step = 1 / (effective_steps(trained.steps, trained.momentum) * trained.lr)
        drift = sub(trained.start, trained.end)
        change = tree_map(lambda d, c: d * per_step - c, drift, trained.inbox["c"])
        return {"params": trained.end, "c_delta": change}, {"c_i": add(trained.memory["c_i"], change)}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """Plain means, as in the paper."""
        delta = sub(mean_of(updates, "params", "equal"), state["params"])
        share = len(updates) / state["clients"]
        return {
            **state,
            "params": add(state["params"], delta, self.lr_server),
            "c": add(state["c"], mean_of(updates, "c_delta", "equal"), share),
        }
