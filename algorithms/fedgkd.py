"""FedAvg whose clients distil from the mean of the last global models.

Paper: Yao et al., FedGKD: Toward Heterogeneous Federated Learning via Global Knowledge Distillation, IEEE
Transactions on Computers, 2024 (arXiv 2107.00051).
Travels down: the model and, for a buffer of more than one, the teacher. Travels up: the model.
Remembered by the client: nothing.
Differences from the paper: the divergence has the weight gamma of the authors' code, not gamma / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.losses import cross_entropy, kl
from harness.nets import Net
from harness.protocol import (
    Batch,
    Broadcast,
    Cohort,
    Count,
    Inbox,
    NonNegative,
    Positive,
    Server,
    State,
    Update,
    World,
)
from harness.trees import Tree, mean


@dataclass(frozen=True)
class FedGkd(FedAvg):
    """Loss + gamma tau^2 KL(teacher || student); the teacher is the parameter mean of the last M global models."""

    summed = FedAvg.summed

    identity: ClassVar[Mapping[str, Any]] = {"gamma": 0.0}

    gamma: NonNegative = 0.1  # gamma, README of the authors' code; 0.2 is used as well
    tau: Positive = 1.0  # temperature, the authors' code
    buffer: Count = 5  # M, README of the authors' code
    start_round: Count = 1  # the first round, from 0, that distils; the code's. Before it there is no past to mean

    def init(self, world: World, rng: Generator) -> State:
        """The model; the past begins with the first aggregate."""
        return {**super().init(world, rng), "past": {}}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model, and the teacher where it is another one."""
        distil = bool(self.gamma) and cohort.round >= self.start_round
        teacher = {"teacher": mean(state["past"].values())} if distil and self.buffer > 1 else {}
        return Broadcast(shared={"params": state["params"], "distil": distil, **teacher})

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The teacher's logits [B, C]."""
        if not inbox["distil"]:
            return {}
        return {"teacher": net.frozen(inbox["teacher" if "teacher" in inbox else "params"], x)}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the divergence from the teacher."""
        student = net(p, batch.x)
        value = cross_entropy(student, batch.y, batch.mask)
        if inbox["distil"]:
            apart = kl(batch.extra["teacher"], student, self.tau, tau_squared=True, mask=batch.mask)
            value = value + self.gamma * apart
        return value, {}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """FedAvg; the result joins the last M."""
        state = super().merge(state, updates, server)
        kept = [*state["past"].values(), state["params"]][-self.buffer :]
        return {**state, "past": {str(i): params for i, params in enumerate(kept)}}
