"""FedAvg whose clients distil from each of the last global models, the better ones with more weight.

Paper: Yao et al., FedGKD: Toward Heterogeneous Federated Learning via Global Knowledge Distillation, IEEE
Transactions on Computers, 2024 (arXiv 2107.00051), the variant FedGKD-VOTE.
Travels down: the model, the M - 1 global models before it, and M weights. Travels up: the model.
Remembered by the client: nothing.
Differences from the authors' code: there the whole term is computed with gradients off, so that it changes no
model; here it trains the student. As there, the validation loss of a global model is measured by the server once,
when it is made, on labelled rows of its own: the trial's proxy data. FedGKD itself needs no such data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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
from harness.trees import Tree


@dataclass(frozen=True)
class FedGkdVote(FedAvg):
    """Loss + gamma sum_m w_m tau^2 KL(teacher_m || student) with w = softmax(-validation loss / loss_tau)."""

    summed = FedAvg.summed

    needs: ClassVar[frozenset[str]] = frozenset({"one_net", "labelled_proxy"})
    identity: ClassVar[Mapping[str, Any]] = {"gamma": 0.0}

    gamma: NonNegative = 0.1  # gamma, README of the authors' code
    tau: Positive = 1.0  # temperature of the logits, the authors' code
    loss_tau: Positive = 1.0  # temperature T of the vote; the authors' code names it without a value
    buffer: Count = 5  # M, README of the authors' code
    start_round: Count = 1  # the first round, from 0, that distils; the code's. Before it no model was validated

    def init(self, world: World, rng: Generator) -> State:
        """The model; the past begins with the first aggregate."""
        return {**super().init(world, rng), "past": {}, "losses": []}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model and, if they vote, its predecessors from old to new and everybody's weight, the model's last."""
        if not self.gamma or cohort.round < self.start_round:
            return super().broadcast(state, cohort, world)
        *old, _ = state["past"].items()
        vote = (-torch.tensor(state["losses"], dtype=torch.float64) / self.loss_tau).softmax(0).float()
        return Broadcast(shared={"params": state["params"], "past": dict(old), "vote": vote})

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """Every teacher's logits [B, M, C]."""
        if "vote" not in inbox:
            return {}
        return {"teachers": torch.stack([net.frozen(p, x) for p in (*inbox["past"].values(), inbox["params"])], 1)}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the weighted divergences from the teachers."""
        student = net(p, batch.x)
        value = cross_entropy(student, batch.y, batch.mask)
        if "vote" in inbox:
            teachers = batch.extra["teachers"].unbind(1)
            apart = [kl(teacher, student, self.tau, tau_squared=True, mask=batch.mask) for teacher in teachers]
            value = value + self.gamma * (inbox["vote"] * torch.stack(apart)).sum()
        return value, {}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """FedAvg; the result is validated and joins the last M."""
        state = super().merge(state, updates, server)
        if not self.gamma:
            return state
        net, params = server.world.net(state["net"]), state["params"]
        said = server.scan(lambda x, y: (len(y), len(y) * cross_entropy(net.frozen(params, x), y).double()), "proxy")
        loss = float(sum(part for _, part in said)) / sum(rows for rows, _ in said)
        kept = [*state["past"].values(), params][-self.buffer :]
        losses = [*state["losses"], loss][-self.buffer :]
        return {**state, "past": {str(i): p for i, p in enumerate(kept)}, "losses": losses}
