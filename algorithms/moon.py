"""FedAvg whose clients pull their representation to the global model's and push it from their own last one.

Paper: Li, He and Song, Model-Contrastive Federated Learning, CVPR 2021.
Travels down: the model. Travels up: the model.
Remembered by the client: the model with which it ended its last participation.
Differences from the paper's code: a client's first participation has no contrastive term, as in the code's first
round; there, in later rounds, the previous model of a client that never took part is a random one. The
representation is the input of the last layer: of `kdia-lenet`, the paper's net, it is the projection head's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.fedavg import FedAvg
from harness.losses import cross_entropy
from harness.nets import Net
from harness.protocol import Batch, Inbox, NonNegative, Positive, Trained
from harness.trees import Tree


def contrast(z: Tensor, z_global: Tensor, z_previous: Tensor, tau: float, mask: Tensor | None = None) -> Tensor:
    """-log( e^(cos(z, z_g) / tau) / (e^(cos(z, z_g) / tau) + e^(cos(z, z_prev) / tau)) ), mean over B; all [B, Z]."""
    similar = torch.stack([F.cosine_similarity(z, other) for other in (z_global, z_previous)], 1)
    return cross_entropy(similar / tau, torch.zeros(len(z), dtype=torch.int64, device=z.device), mask)


@dataclass(frozen=True)
class Moon(FedAvg):
    """Loss + mu times the contrastive term."""

    identity: ClassVar[Mapping[str, Any]] = {"mu": 0.0}

    mu: NonNegative = 5.0  # mu; the paper's best on CIFAR-10 (1 on CIFAR-100 and Tiny-ImageNet)
    tau: Positive = 0.5  # temperature, as in the paper

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The representations [B, Z] of the global model and of the client's last one."""
        if not memory:
            return {}
        with torch.no_grad():
            return {
                "z_global": net.embed(inbox["params"], x, train=False),
                "z_previous": net.embed(memory["previous"], x, train=False),
            }

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the contrastive term."""
        if not memory:
            return super().loss(net, p, batch, inbox, memory)
        z = net.embed(p, batch.x)
        apart = contrast(z, batch.extra["z_global"], batch.extra["z_previous"], self.tau, batch.mask)
        return cross_entropy(net.classify(p, z), batch.y, batch.mask) + self.mu * apart, {"contrast": apart.detach()}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """The model up, and kept for the next participation."""
        return {"params": trained.end}, {"previous": trained.end} if self.mu else {}
