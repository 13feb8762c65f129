"""Group mutual distillation: clients learn from teachers that fit their label mixes, and from the peers of a group.

Paper: none; after the questions of Li, Anagnostopoulos and Bryson's poster, Optimization of Knowledge Distillation in
Heterogeneous Federated Problems (University of Glasgow). Its two mutual losses are used as they stand.
Travels down: the level's model (students averaged), or the client's own if copies of it were trained elsewhere; its
teacher's and peers' latest models. Travels up: its model, the teacher's copy, records of dropped peers.
Remembered by the client: its model, running cross-entropies, revenues.
Differences from the poster: it has no algorithm; score, schedules, groups and revenue are ours. The server knows all
label counts. FML by samples is: shared teacher, personal students, fixed 0.5 and 0.5, target_first, gamma 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness import protocol as fl
from harness.losses import TradeOff, cross_entropy, mutual, soft_labels, trade_off
from harness.mixes import mixes, neighbours, scores, teachers
from harness.nets import Net, sibling
from harness.peers import peer_weights, probe, running
from harness.protocol import Batch, Count, Decay, Inbox, NonNegative, Positive, Share, State, Update, World
from harness.trees import Tree, means


@dataclass(frozen=True)
class GroupMD(fl.Algorithm):
    """L_S = (1 - alpha) CE + alpha KL(p_S || p_T) + gamma sum_j omega_j KL(p_S || p_j); L_T is alike, with beta."""

    needs: ClassVar[frozenset[str]] = frozenset({"label_counts", "validation", "private_test"})
    identity: ClassVar[Mapping[str, Any]] = {"students": "averaged", "tradeoff": "fixed", "alpha_max": 0, "gamma": 0}
    matching: Literal["score", "random", "shared"] = "score"  # random: a control; shared: one teacher for all
    weights: tuple[NonNegative, NonNegative, NonNegative] = (1 / 3, 1 / 3, 1 / 3)  # w1..3; all defaults are ours
    students_per_teacher: Count = 3  # M_T
    students: Literal["averaged", "personal"] = "averaged"  # a model for each level, or for each client
    kl_order: Literal["own_first", "target_first"] = "own_first"  # the poster's, or the usual one
    tau: Positive = 1.0  # temperature; divergences are multiplied by its square
    tradeoff: TradeOff = "dynamic"  # the others are controls
    alpha_max: Share = 0.8
    beta_max: Share = 0.5
    kappa: Positive = 0.5  # nats
    warm_rounds: Count = 10  # t_warm
    decay: Decay = 0.9  # of running cross-entropies (by steps) and revenues (by probes)
    group: Count = 5  # g
    gamma: NonNegative = 0.3  # weight of the peers
    revenue_temperature: Positive = 0.1  # T_r
    probe_steps: Count = 10
    patience: Count = 3  # probes in a row that leave the revenue at 0 or below: the peer is dropped

    def roles(self, world: World) -> Mapping[str, fl.Role]:
        """A role for each level."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """Models of the levels, scores [N, N], groups; no client has a model yet."""
        roles, default = self.roles(world), world.default_net
        nets = {name: role.net for name, role in roles.items()} | {"shared": default}
        nets |= {str(k): world.nets[level] if world.nets else default for k, level in enumerate(world.levels)}
        params = {k: world.net(role.net).init(rng) for k, role in roles.items() if self.students == "averaged"}
        models = {"shared": world.net(default).init(rng)} if self.matching == "shared" else {}
        fit = scores(mixes(world.label_counts), self.weights)
        score = torch.rand(fit.shape, generator=rng) if self.matching == "random" else torch.tensor(fit)
        peers = {str(i): [str(j) for j in others] for i, others in neighbours(score.numpy(), self.group).items()}
        return {"params": params, "models": models, "nets": nets, "score": score, "peers": peers, "changed": []}

    def broadcast(self, state: State, cohort: fl.Cohort, world: World) -> fl.Broadcast:
        """To each its teacher and the peers that still pay, with the names of their nets."""
        models, students, q = state["models"], [visit.client for visit in cohort.visits], mixes(world.label_counts)
        score, able = state["score"].cpu().numpy(), [int(k) for k in models if k != "shared"]
        found = teachers(score, q, world.levels, students, able, self.students_per_teacher)
        shared, personal = {"shared"} & {*models}, dict[fl.Visit, Inbox]()
        for visit in cohort.visits:
            k = str(visit.client)
            who = shared or {str(t) for s, t in found.items() if s == visit.client}
            inbox: Inbox = {"teacher": {t: models[t] for t in who}}
            inbox["peers"] = {j: models[j] for j in state["peers"][k] if self.gamma and j in models}
            inbox["nets"] = {j: state["nets"][j] for j in (*inbox["teacher"], *inbox["peers"])}
            own = {"params": models[k]} if self.students == "personal" and k in state["changed"] else {}
            personal[visit] = {**inbox, **own, "rounds": world.rounds, "batch": world.batch}
        return fl.Broadcast(by_role={role: {"params": p} for role, p in state["params"].items()}, personal=personal)

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A model of its own if it gets none; no experience."""
        return {"ce": {}, "revenue": {}, **({} if "params" in inbox else {"params": net.init(rng)})}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """The student and the copy of its teacher, if it has one, are trained together."""
        return {"student": inbox["params"] if "params" in inbox else memory["params"], "teacher": inbox["teacher"]}

    def prepare(self, net: Net, inbox: Inbox, memory: Tree, bench: fl.Bench) -> Inbox:
        """alpha, beta and omega of this round."""
        own, other = memory["ce"].get("".join(inbox["teacher"]), (0.0, 0.0))
        lag, when = float(own - other) / self.kappa, (inbox["round"], self.warm_rounds, inbox["rounds"])
        alpha = trade_off(self.tradeoff, self.alpha_max, lag, *when)
        soft = {"alpha": alpha, "beta": trade_off(self.tradeoff, self.beta_max, -lag, *when)}
        return {**inbox, **soft, "omega": peer_weights(memory["revenue"], inbox["peers"], self.revenue_temperature)}

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The peers' logits [B, C]."""
        return {j: sibling(net, inbox["nets"][j]).frozen(p, x) for j, p in inbox["peers"].items()}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """L_S, and L_T if there is a teacher; each takes the other's answers as given."""
        how, seen = (self.tau, self.kl_order == "own_first", batch.mask), dict[str, Tensor]()
        own = net(p["student"], batch.x)
        value = ce = cross_entropy(own, batch.y, batch.mask)
        for who, copy in p["teacher"].items():
            other = sibling(net, inbox["nets"][who])(copy, batch.x)
            other_ce = cross_entropy(other, batch.y, batch.mask)
            value = mutual(inbox["alpha"], ce, own, other, *how) + mutual(inbox["beta"], other_ce, other, own, *how)
            seen = {"student_ce": ce.detach(), "teacher_ce": other_ce.detach()}
        for j, share in inbox["omega"].items():
            value = value + self.gamma * share * soft_labels(own, batch.extra[j], *how)
        return value, seen

    def reply(self, trained: fl.Trained) -> tuple[Tree, Tree]:
        """What was trained; and a probe of one peer, on a copy."""
        p, ce, names = trained.end, trained.memory["ce"], ("student_ce", "teacher_ce")
        hidden = self.students == "personal" and self.matching == "shared" and not self.gamma  # nobody else uses it
        run = {t: running(trained.metrics, names, self.decay, ce.get(t)) for t in p["teacher"] if trained.steps}
        how = (self.tau, self.kl_order == "own_first")
        revenue, dropped = probe(trained, p["student"], how, self.probe_steps, self.decay, self.patience)
        payload = {"teacher": p["teacher"], "dropped": dropped} | ({} if hidden else {"params": p["student"]})
        return payload, {"params": p["student"], "ce": ce | run, "revenue": revenue}

    def merge(self, state: State, updates: Sequence[Update], server: fl.Server) -> State:
        """A client's model: the mean of all its copies. A level's: that of its students. Weights are rows."""
        own = [(u.visit, u.payload["params"], float(u.samples)) for u in updates if "params" in u.payload]
        taught = [(who, copy, float(u.samples)) for u in updates for who, copy in u.payload["teacher"].items()]
        state["models"] |= means([(str(visit.client), p, n) for visit, p, n in own] + taught)
        state["params"] |= means((visit.role, p, n) for visit, p, n in own if visit.role in state["params"])
        fresh = {str(u.visit.client): u.payload["dropped"] for u in updates}
        state["peers"] |= {k: [j for j in state["peers"][k] if j not in gone] for k, gone in fresh.items()}
        state["changed"] = sorted(({*state["changed"]} - {*fresh}) | {who for who, *_ in taught})
        if self.matching == "random":
            state["score"].uniform_(generator=server.rng("score"))
        return state

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The levels' models and the server's teacher, where there are such."""
        shown = {**state["params"], **{k: p for k, p in state["models"].items() if k == "shared"}}
        return {name: (state["nets"][name], p) for name, p in shown.items()}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The client's model after its last visit."""
        return dict(memory["params"])
