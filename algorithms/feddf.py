"""Federated averaging whose mean is distilled from the ensemble of the clients' models.

Paper: Lin et al., Ensemble Distillation for Robust Model Fusion in Federated Learning (FedDF), NeurIPS 2020.
Travels down: the model of the client's net. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: a fixed number of steps per round, so that budgets compare, instead of up to 1e4 with a
stop after 1e3 without gain on a validation set; dropping clients that are no better than chance takes labelled proxy
rows, which then are those distilled on. With several nets there is a mean for each, and each learns from all clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.descent import Course, Draw, consult, divergence, opinions, study
from harness.protocol import (
    Batch,
    Broadcast,
    Cohort,
    Count,
    Positive,
    Role,
    Server,
    State,
    Times,
    Update,
    World,
    trees_of,
    weights,
)
from harness.trees import Tree, mean


@dataclass(frozen=True)
class FedDf(FedAvg):
    """theta = mean_k theta_k, then Adam on KL( softmax(mean_k z_k / tau), softmax(z / tau) ) over proxy rows."""

    identity: ClassVar[Mapping[str, Any]] = {"proxy_steps": 0}

    proxy_steps: Times = 100  # per round and net; ours: the paper's 1e4 are far more than other methods take
    proxy_batch: Count = 128  # the paper's
    proxy_lr: Positive = 1e-3  # the paper's, of Adam, falling along half a cosine
    tau: Positive = 1.0  # the paper's temperature
    drop_worst: bool = False  # leave out of the ensemble who is no better than chance; an option of the paper

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Proxy data to distil on, labelled if clients are judged by it."""
        return frozenset({"labelled_proxy" if self.drop_worst else "proxy"} if self.proxy_steps else ())

    def roles(self, world: World) -> Mapping[str, Role]:
        """One for each net."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """One model for each net."""
        nets = {name: role.net for name, role in self.roles(world).items()}
        return {"nets": nets, "params": {name: world.net(net).init(rng) for name, net in nets.items()}}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """To everybody the model of their net."""
        return Broadcast(by_role={name: {"params": p} for name, p in state["params"].items()})

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """One for each net."""
        return {name: (net, state["params"][name]) for name, net in state["nets"].items()}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """A mean for each net, then distillation of each from all clients."""
        params = dict(state["params"])
        for name in params:
            own = [u for u in updates if u.visit.role == name]
            if own:
                params[name] = mean(trees_of(own, "params"), weights(own))
        if self.proxy_steps:
            draw = self._lessons(state, updates, server)
            params = {name: self._distil(name, state["nets"][name], p, draw, server) for name, p in params.items()}
        return {**state, "params": params}

    def _lessons(self, state: State, updates: Sequence[Update], server: Server) -> Draw:
        """Proxy rows with the ensemble's answers, asked for once for all nets."""
        teachers = [(server.world.net(state["nets"][u.visit.role]), u.payload["params"]) for u in updates]
        if self.drop_worst:
            parts = server.scan(lambda x, y: (opinions(teachers, x).argmax(-1) == y).sum(-1), "proxy")
            hits = torch.stack(parts).sum(0) * server.world.classes  # [K]
            able = (hits > server.world.proxy_rows).tolist()
            teachers = [teacher for teacher, good in zip(teachers, able, strict=True) if good] or teachers
        return consult(
            server,
            lambda x, y: {"target": (opinions(teachers, x).mean(0) / self.tau).softmax(-1)},
            len(state["nets"]) * self.proxy_steps * self.proxy_batch,
        )

    def _distil(self, name: str, net_name: str, start: Tree, draw: Draw, server: Server) -> Tree:
        net = server.world.net(net_name)

        def loss(p: Tree, batch: Batch) -> Tensor:
            return divergence(batch.extra["target"], net(p, batch.x), self.tau, tau_squared=False)

        course = Course(self.proxy_steps, self.proxy_batch, self.proxy_lr, cosine=True)
        return study(server, start, loss, draw, course, server.rng(f"proxy/{name}"))
