"""FedAvg with Adam on the server.

Paper: Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 2 (FedAdam), without bias correction.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: clients are weighted by their sample counts, as in the paper's experiments. Running
statistics of BatchNorm, where a net has them, are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator

from algorithms.fedavg import FedAvg
from harness import descent
from harness.protocol import Decay, Positive, Server, State, Update, World
from harness.trees import sub, zeros


@dataclass(frozen=True)
class FedAdam(FedAvg):
    """m = b1 m + (1 - b1) D; v = b2 v + (1 - b2) D^2; theta_g += lr m / (sqrt(v) + eps), D the mean delta."""

    summed = FedAvg.summed

    lr_server: Positive = 0.1  # eta; the paper tunes it, 1e-1 and 1e-2 are its usual values
    beta1: Decay = 0.9  # beta_1
    beta2: Decay = 0.99  # beta_2
    eps: Positive = 1e-3  # tau, the paper's adaptivity

    def init(self, world: World, rng: Generator) -> State:
        """The model and both moments, zero."""
        state = super().init(world, rng)
        return {**state, "m": zeros(state["params"]), "v": zeros(state["params"])}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """One step of Adam on the mean delta."""
        p, rates = state["params"], {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        delta = sub(super().merge(state, updates, server)["params"], p)
        p, m, v = descent.adam(p, state["m"], state["v"], delta, lr=self.lr_server, **rates)
        return {**state, "m": m, "v": v, "params": p}
