"""Clients with models of any kind meet on public data: they digest the mean of their logits, then revisit their own.

Paper: Li and Wang, FedMD: Heterogenous Federated Learning via Model Distillation, NeurIPS workshop, 2019.
Travels down: the consensus on some public rows; which rows it is on and which are next, where these are not all.
Travels up: logits on the next rows. Remembered by the client: its model.
Differences from the paper: a client pre-trains at its first visit, for given numbers of passes instead of until
convergence, on all public rows with their labels, then on its own. It answers at the end of a visit, for the next
round, so that each round has one meeting; the first round has nothing to digest or revisit. The trial's local
optimizer is used throughout, where the public code takes Adam at 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness.losses import absolute_error, cross_entropy, squared_error
from harness.nets import Net
from harness.protocol import (
    Algorithm,
    Batch,
    Broadcast,
    Cohort,
    Inbox,
    NonNegative,
    Phase,
    Positive,
    Role,
    Server,
    State,
    Times,
    Trained,
    Update,
    World,
)
from harness.trees import Tree


@dataclass(frozen=True)
class FedMD(Algorithm):
    """Digest: mean |z - mean_k z_k| on public rows; revisit: cross-entropy on private rows."""

    needs: ClassVar[frozenset[str]] = frozenset({"labelled_proxy", "private_test"})

    public_epochs: Times = 20  # of pre-training on public rows; the public code's most
    private_epochs: Times = 25  # of pre-training on private rows; the same
    alignment: Times = 5000  # public rows of a round; 0 or more than there are: all
    digest_epochs: NonNegative = 1.0
    digest_lr_factor: Positive = 1.0  # times the local rate
    revisit_epochs: NonNegative = 0.0  # 0: the trial's own number; the public code: 4 to 10
    digest_loss: Literal["absolute", "squared"] = "absolute"  # the public code's; FL-bench takes the square

    def roles(self, world: World) -> Mapping[str, Role]:
        """Any nets."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """No consensus yet; the rows of the first one."""
        some = 0 < self.alignment < world.proxy_rows
        return {"next": torch.randperm(world.proxy_rows, generator=rng)[: self.alignment]} if some else {}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """All of it to everybody."""
        return Broadcast(shared=state)

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A model of its own, not yet trained."""
        return {"params": net.init(rng)}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """The client's own model."""
        return dict(memory["params"])

    def plan(self, world: World, inbox: Inbox, memory: Tree) -> tuple[Phase, ...]:
        """Transfer learning at the first visit; digest and revisit once there is a consensus."""
        first = (Phase("public", self.public_epochs, "proxy"), Phase("private", self.private_epochs))
        digest = Phase("digest", self.digest_epochs, "proxy", self.digest_lr_factor, inbox.get("rows"))
        later = (digest, Phase("revisit", self.revisit_epochs or None))
        return (() if "met" in memory else first) + (later if "consensus" in inbox else ())

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance from the consensus in the phase of that name, cross-entropy in all others."""
        logits = net(p, batch.x)
        if batch.phase != "digest":
            return cross_entropy(logits, batch.y, batch.mask), {}
        distance = absolute_error if self.digest_loss == "absolute" else squared_error
        return distance(logits, inbox["consensus"][batch.extra["row"]], batch.mask), {}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """Logits [A, C] on the next rows; the model stays."""
        x = torch.cat(trained.bench.scan(lambda x, y: x, "proxy"))
        x = x[trained.inbox["next"]] if "next" in trained.inbox else x
        logits = torch.cat([trained.net.frozen(trained.end, part) for part in torch.split(x, 256)])
        return {"logits": logits}, {"params": trained.end, "met": 1}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The consensus is the mean over this round's clients, all alike."""
        state = {**state, "consensus": torch.stack([u.payload["logits"] for u in updates]).mean(0)}
        if "next" in state:
            order = torch.randperm(server.world.proxy_rows, generator=(rng := server.rng("next")), device=rng.device)
            state |= {"rows": state["next"], "next": order[: self.alignment]}
        return state

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """There is no global one."""
        return {}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The client's own model."""
        return dict(memory["params"])
