"""Clients share nothing but their mean logits for each label, and distil from everybody's.

Paper: Jeong et al., Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation under
Non-IID Private Data, 2018 (FD). The defaults are those of FedDistill in the code of FedGen (Zhu et al., ICML 2021).
Travels down: one vector of logits per label, [C, C]. Travels up: the same. Remembered by the client: its model, and
the sums of its logits by label.
Differences from the paper: as in FedGen's code the sums go on over all visits (`history`), counts start from 1, means
are over all participants (`leave_one_out`), and the divergence is KL. Models of one net start alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness import protocol as fl
from harness.losses import by_label, cross_entropy, kl
from harness.nets import Net
from harness.protocol import Batch, Bench, Broadcast, Cohort, Inbox, Role, Server, State, Trained, Update, World
from harness.trees import Tree, stream


def mean_logits(seen: Tensor) -> Tensor:
    """Means [C, C] of sums and counts [C, C + 1], where counts start from 1: a label never seen has zeros."""
    return seen[:, :-1] / (1 + seen[:, -1:])


@dataclass(frozen=True)
class FedDistill(fl.Algorithm):
    """CE + lambda KL(softmax(Z[y]) || f(x)), Z the mean over participants of their mean logits for each label."""

    needs: ClassVar[frozenset[str]] = frozenset({"private_test"})

    lambda_kd: fl.NonNegative = 1.0  # code: reg_alpha
    history: Literal["all", "round"] = "all"  # what a client's means are over: all its visits (code) or one (paper)
    leave_one_out: bool = False  # a client's own means are taken out of what it learns from: paper

    def roles(self, world: World) -> Mapping[str, Role]:
        """One per net: logits fit all."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """No logits yet. merged: the last round that brought any, from how many clients."""
        start = int(torch.randint(2**31, (), generator=rng))
        return {"start": start, "logits": torch.zeros(world.classes, world.classes), "merged": -1, "members": 0}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """Where models start, and the logits once there are any."""
        told = state if state["members"] and self.lambda_kd else {"start": state["start"]}
        return Broadcast(shared=dict(told))

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A new model, and no logits seen."""
        params = net.init(stream("start", inbox["start"]))
        return {"params": params, "seen": torch.zeros(net.classes, net.classes + 1), "round": -1}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """The client's own model."""
        params: Tree = memory["params"]
        return params

    def prepare(self, net: Net, inbox: Inbox, memory: Tree, bench: Bench) -> Inbox:
        """The logits of the others, if this client's are in the mean and are to be left out."""
        if not self.leave_one_out or "logits" not in inbox or memory["round"] != inbox["merged"]:
            return inbox
        members = inbox["members"]
        if members == 1:
            return {key: value for key, value in inbox.items() if key != "logits"}
        return {**inbox, "logits": (members * inbox["logits"] - mean_logits(memory["seen"])) / (members - 1)}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and divergence; the logits are summed up by label on the way."""
        logits = net(p, batch.x)
        value = cross_entropy(logits, batch.y, batch.mask)
        if "logits" in inbox:
            value = value + self.lambda_kd * kl(inbox["logits"][batch.y], logits, mask=batch.mask)
        return value, {"seen": by_label(logits.detach(), batch.y, net.classes, batch.mask)}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """Mean logits by label up; the model stays."""
        before = trained.memory["seen"] * float(self.history == "all")
        seen = before + (trained.metrics["seen"].sum(0) if trained.steps else 0)
        return {"logits": mean_logits(seen)}, {"params": trained.end, "seen": seen, "round": trained.round}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The plain mean over participants."""
        logits = torch.stack([u.payload["logits"] for u in updates]).mean(0)
        return {**state, "logits": logits, "merged": server.round, "members": len(updates)}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """There is no global model."""
        return {}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The client's model."""
        params: Tree = memory["params"]
        return params
