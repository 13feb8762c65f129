"""FedAvg with momentum on the server.

Paper: Hsu, Qi and Brown, Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification, 2019.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: none. (A public benchmark sets v = b v + (1 - b) Delta with b = 1, which never moves.)
Running statistics of BatchNorm, where a net has them, are averaged.
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
class FedAvgM(FedAvg):
    """v = beta v + Delta with Delta = mean_k theta_k - theta_g; theta_g += lr_server v."""

    summed = FedAvg.summed

    beta: Decay = 0.9  # b, the paper's usual value
    lr_server: Positive = 1.0  # the paper's eta on the server

    def init(self, world: World, rng: Generator) -> State:
        """The model and a velocity of zero."""
        state = super().init(world, rng)
        return {**state, "velocity": zeros(state["params"])}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """One step of heavy-ball momentum on the server."""
        p = state["params"]
        delta = sub(super().merge(state, updates, server)["params"], p)
        p, velocity = descent.momentum(p, state["velocity"], delta, lr=self.lr_server, beta=self.beta)
        return {**state, "velocity": velocity, "params": p}
