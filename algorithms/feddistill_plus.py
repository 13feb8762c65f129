"""FedAvg whose clients also share their mean logits for each label, and distil from everybody's.

Paper: the baseline FedDistill+ of Zhu, Hong, Zhou (FedGen), ICML 2021, which adds FedAvg to Jeong et al.'s FD, 2018.
Travels down: the model, and one vector of logits per label, [C, C]. Travels up: the same. Remembered by the client:
the sums of its logits by label.
Differences from the code: none known; there it is called FedDistill-FL. `history` offers the means of one visit, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.losses import by_label, cross_entropy, kl
from harness.nets import Net
from harness.protocol import Batch, Broadcast, Cohort, Inbox, NonNegative, Server, State, Trained, Update, World
from harness.trees import Tree


@dataclass(frozen=True)
class FedDistillPlus(FedAvg):
    """CE + lambda KL(softmax(Z[y]) || f(x)), Z the mean over participants of their mean logits for each label."""

    summed = FedAvg.summed

    identity: ClassVar[Mapping[str, Any]] = {"lambda_kd": 0.0}

    lambda_kd: NonNegative = 1.0  # code: reg_alpha
    history: Literal["all", "round"] = "all"  # what a client's means are over: all its visits (code) or one

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model, and the logits once there are any."""
        return Broadcast(shared={key: state[key] for key in ("params", "logits") if key in state})

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """No logits seen."""
        return {"seen": torch.zeros(net.classes, net.classes + 1)} if self.lambda_kd else {}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and divergence; the logits are summed up by label on the way."""
        logits = net(p, batch.x)
        value = cross_entropy(logits, batch.y, batch.mask)
        if not self.lambda_kd:
            return value, {}
        if "logits" in inbox:
            value = value + self.lambda_kd * kl(inbox["logits"][batch.y], logits, mask=batch.mask)
        return value, {"seen": by_label(logits.detach(), batch.y, net.classes, batch.mask)}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """The model and its mean logits by label, whose counts start from 1."""
        if not self.lambda_kd:
            return super().reply(trained)
        before = trained.memory["seen"] * float(self.history == "all")
        seen = before + (trained.metrics["seen"].sum(0) if trained.steps else 0)
        return {"params": trained.end, "logits": seen[:, :-1] / (1 + seen[:, -1:])}, {"seen": seen}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """FedAvg's mean of models, and the plain mean of logits over participants."""
        state = super().merge(state, updates, server)
        if not self.lambda_kd:
            return state
        return {**state, "logits": torch.stack([u.payload["logits"] for u in updates]).mean(0)}
