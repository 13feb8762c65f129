"""FedAvg with a proximal term that holds local models near the global one.

Paper: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: every client runs the same number of epochs unless the trial says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from algorithms.fedavg import FedAvg
from harness.nets import Net
from harness.protocol import Batch, Inbox, NonNegative
from harness.trees import Tree, sq_distance


@dataclass(frozen=True)
class FedProx(FedAvg):
    """Loss + (mu / 2) ||w - theta_g||^2, the squared norm, with theta_g frozen."""

    identity: ClassVar[Mapping[str, Any]] = {"mu": 0.0}

    mu: NonNegative = 0.01  # mu; MOON's best on CIFAR-10, KDIA's baseline

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the proximal term."""
        value, seen = super().loss(net, p, batch, inbox, memory)
        if self.mu == 0:
            return value, seen
        return value + self.mu / 2 * sq_distance(p, inbox["params"]), seen
