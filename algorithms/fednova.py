"""Normalised averaging: clients that take more steps do not count for more.

Paper: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, NeurIPS
2020.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: no proximal variant and no momentum on the server; local momentum's a_i is covered.
The number of steps travels with every update and is not counted. Running
statistics of BatchNorm, where a net has them, are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from algorithms.fedavg import FedAvg
from harness import descent
from harness.protocol import Server, State, Update, trees_of, weights
from harness.trees import mean, sub, zeros


def steps_norm(steps: int, momentum: float) -> float:
    """||a_i||_1 of heavy-ball momentum rho: the sum over j < steps of (1 - rho^(steps - j)) / (1 - rho).

    Entry j of a_i says how often the gradient of step j was taken, directly and through the velocity; `steps`
    without momentum.
    """
    rho = momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


@dataclass(frozen=True)
class FedNova(FedAvg):
    """theta_g += tau_eff sum_k p_k delta_k / ||a_k||_1, with tau_eff = sum_k p_k ||a_k||_1 and p_k = n_k / sum n."""

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """One step along the mean of the normalised deltas. A client that took no step has none."""
        norms = [steps_norm(u.steps, server.world.momentum) for u in updates]
        rows, start = weights(updates), state["params"]
        shares = [n / norm if norm else 0.0 for n, norm in zip(rows, norms, strict=True)]
        tau_eff = sum(n * norm for n, norm in zip(rows, norms, strict=True)) / sum(rows)
        delta = sub(mean(trees_of(updates, "params"), shares), start)
        factor = tau_eff * sum(shares) / sum(rows)
        params, _ = descent.momentum(start, zeros(start), delta, lr=factor, beta=0.0)
        return {**state, "params": params}
