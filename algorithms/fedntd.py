"""FedAvg whose clients keep what the global model says about the classes that are not true.

Paper: Lee et al., Preservation of the Global Knowledge by Not-True Distillation in Federated Learning, NeurIPS 2022.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: none. With two classes one is left after dropping the true one, so the term is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from algorithms.fedavg import FedAvg
from harness.losses import cross_entropy, kl
from harness.nets import Net
from harness.protocol import Batch, Inbox, NonNegative, Positive
from harness.trees import Tree


def not_true(logits: Tensor, y: Tensor) -> Tensor:
    """Logits [B, C] without those of the true classes y [B]: [B, C - 1], the others in order."""
    index = torch.arange(logits.shape[1] - 1, device=y.device).expand(len(y), -1)
    return logits.gather(1, index + (index >= y[:, None]))


@dataclass(frozen=True)
class FedNtd(FedAvg):
    """Loss + beta tau^2 KL( softmax(not-true global logits / tau) || softmax(not-true local logits / tau) )."""

    identity: ClassVar[Mapping[str, Any]] = {"beta": 0.0}

    beta: NonNegative = 1.0  # beta, the configuration of the authors' code
    tau: Positive = 1.0  # temperature, the configuration of the authors' code (its class has 3)

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The global model's logits [B, C]."""
        return {"teacher": net.frozen(inbox["params"], x)} if self.beta else {}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the divergence over the classes that are not true."""
        student = net(p, batch.x)
        value = cross_entropy(student, batch.y, batch.mask)
        if self.beta:
            first, second = (not_true(logits, batch.y) for logits in (batch.extra["teacher"], student))
            value = value + self.beta * kl(first, second, self.tau, tau_squared=True, mask=batch.mask)
        return value, {}
