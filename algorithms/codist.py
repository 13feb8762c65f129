"""Pools of clients with nets of their own size, whose server models distil from each other.

Paper: Lichtarge et al., Heterogeneous Federated Learning Using Knowledge Codistillation, arXiv 2310.02549, 2023. Only
its abstract and a digest were to be had: names and order are the paper's, formulas and defaults are ours.
Travels down: the pool's model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: any number of pools; each student distils from the mean probability of the other pools'
models. Teachers are frozen at their values before the pass, so that the order of the pools does not matter. Clients
are weighted by their sample counts. A client that can train several nets may be visited once for each in a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness import descent
from harness.averages import mean_of
from harness.nets import Net
from harness.protocol import (
    Batch,
    Broadcast,
    Cohort,
    Count,
    Decay,
    Positive,
    Role,
    Server,
    Share,
    State,
    Times,
    Update,
    World,
)
from harness.trees import Tree, add, scale, sub, zeros


@dataclass(frozen=True)
class Codist(FedAvg):
    """FedAdam in each pool, from (1 - alpha) D + alpha E: the mean delta of its clients and that of a distillation.

    merged: so in every round, E from a pass that starts at the round's models. periodic: alpha is 0, but every
    `period` rounds the models are replaced by what a pass makes of them. separate: no distillation, the control.
    """

    summed: ClassVar[Mapping[str, Any]] = {"params": "samples"}

    mode: Literal["merged", "periodic", "separate"] = "merged"
    pools: Literal["capacity", "domain"] = "capacity"  # who trains a level's net: the levels from it on, or it alone
    cohort: Literal["equal", "share"] = "equal"  # of a pool: as many as the trial's, or its participation of the pool
    alpha: Share = 0.3  # the paper tunes it; 0 is FedAdam, 1 is distillation only; for merged
    period: Times = 0  # p, for periodic; the paper has 200; 0: a fifth of the rounds
    proxy_steps: Times = 0  # s, per pass; the paper has 200 = p; 0: as many as there are rounds from pass to pass
    proxy_batch: Count = 128
    proxy_lr: Positive = 1e-3  # of the distillation's Adam; the paper tunes it
    tau: Positive = 2.0  # temperature; the paper tunes it
    fresh_adam: bool = True  # the distillation's Adam forgets its moments after each pass
    lr_server: Positive = 0.1  # these four of FedAdam on the server, as for fedadam
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    eps: Positive = 1e-3

    @property
    def _distils(self) -> bool:
        return self.mode == "periodic" or (self.mode == "merged" and self.alpha > 0)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Several nets and proxy data, where there is distillation."""
        return frozenset({"fleet", "proxy"} if self._distils else ())

    def roles(self, world: World) -> Mapping[str, Role]:
        """A pool for each level, named after its net."""
        if not world.nets:
            return {"global": Role(world.default_net)}
        every = max(1, int(world.clients * world.participation + 1e-9)) if self.cohort == "equal" else None
        pools: dict[str, Role] = {}
        for level, net in enumerate(world.nets):
            able = [k for k, own in enumerate(world.levels) if own == level or (own > level and self._nested)]
            pools[net if net not in pools else f"{net}-{level}"] = Role(net, tuple(able), every)
        return pools

    @property
    def _nested(self) -> bool:
        return self.pools == "capacity"

    def init(self, world: World, rng: Generator) -> State:
        """A model and its moments for each pool."""
        nets = {pool: role.net for pool, role in self.roles(world).items()}
        params = {pool: world.net(net).init(rng) for pool, net in nets.items()}
        moments = {name: {pool: zeros(p) for pool, p in params.items()} for name in ("m", "v")}
        return {"nets": nets, "params": params, **moments, "adam": {pool: {} for pool in nets}}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The pool's model."""
        return Broadcast(by_role={pool: {"params": p} for pool, p in state["params"].items()})

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """One for each pool."""
        return {pool: (net, state["params"][pool]) for pool, net in state["nets"].items()}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """Federated deltas, the distillation's where it is merged with them, FedAdam, the pass where one is due."""
        start, deltas = state["params"], {}
        for pool, p in start.items():
            own = [u for u in updates if u.visit.role == pool]
            deltas[pool] = sub(mean_of(own, "params"), p) if own else zeros(p)
        if self.mode == "merged" and self.alpha:
            for pool, p in self._distil(start, state, server).items():
                deltas[pool] = add(scale(deltas[pool], 1 - self.alpha), sub(p, start[pool]), self.alpha)
        m, v, params = dict(state["m"]), dict(state["v"]), dict(start)
        rates = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        for pool, delta in deltas.items():
            params[pool], m[pool], v[pool] = descent.adam(
                start[pool], m[pool], v[pool], delta, lr=self.lr_server, **rates
            )
        if self.mode == "periodic" and (server.round + 1) % self._period(server.world) == 0:
            params = self._distil(params, state, server)
        return {**state, "params": params, "m": m, "v": v}

    def _period(self, world: World) -> int:
        return self.period or max(1, world.rounds // 5)

    def _distil(self, params: Mapping[str, Tree], state: State, server: Server) -> dict[str, Tree]:
        """Every pool's model after a pass in which it learns from the others as they are now."""
        nets = {pool: server.world.net(name) for pool, name in state["nets"].items()}
        between = self._period(server.world) if self.mode == "periodic" else 1
        course = descent.Course(self.proxy_steps or between, self.proxy_batch, self.proxy_lr)
        after = {}
        for pool, start in params.items():
            others = [(nets[name], p) for name, p in params.items() if name != pool]

            def teach(x: Tensor, y: Tensor, others: list[tuple[Net, Tree]] = others) -> dict[str, Tensor]:
                return {"target": (descent.opinions(others, x) / self.tau).softmax(-1).mean(0)}

            def loss(p: Tree, batch: Batch, pool: str = pool) -> Tensor:
                logits = nets[pool](p, batch.x)
                return descent.divergence(batch.extra["target"], logits, self.tau, tau_squared=True)

            draw, moments = descent.consult(server, teach, course.rows), state["adam"][pool]
            rng = server.rng(f"proxy/{pool}")
            after[pool] = descent.study(server, start, loss, draw, course, rng, None if self.fresh_adam else moments)
        return after
