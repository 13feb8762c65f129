"""A generator of latent vectors, trained on the server, regularises the clients: no proxy data.

Paper: Zhu, Hong, Zhou, Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML 2021.
Travels down: the model, later the generator and a prior of labels, too. Travels up: the model, rows drawn by label.
Remembered by the client: nothing; its own model where some of it is private (`share`, `bn`).
Differences from the paper and its code: flags, with the code's defaults but for `bn`. Weights by label are per row;
the code's shapes broadcast to all pairs. Uniform labels are those seen so far, not all users'; no stop at 20 epochs;
means by rows as in the code. The paper's accuracy, on the labels that a user owns, is in the own_label columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness import protocol as fl
from harness.descent import Course, tutor
from harness.losses import by_label, cross_entropy, crowding, kl, label_prior, teaching
from harness.nets import Net, generator
from harness.protocol import Batch, Broadcast, Cohort, Inbox, Role, Server, State, Trained, Update, World
from harness.refusal import Refused
from harness.trees import Tree, leaves, mean, noise, overlay, part, stack, stream


@dataclass(frozen=True)
class FedGen(FedAvg):
    """CE + a_t CE(h(G(z, y')), y') + b_t KL(h(G(z, y)) || f(x)); h the last layer, y' drawn, y the row's label."""

    identity: ClassVar[Mapping[str, Any]] = {"lambda_gen": 0.0, "local_latent_kl": False}
    lambda_gen: fl.NonNegative = 10.0  # a_0, code
    lambda_kl: fl.NonNegative = 10.0  # b_0, code (MNIST, CelebA; 1 for EMNIST)
    local_latent_kl: bool = True  # the KL term: code, not paper
    decay: bool = True  # a_t = max(1e-4, a_0 0.98^t), b_t too: code, not paper
    generator_loss: Literal["weighted_ce", "ce_of_mean_logits"] = "weighted_ce"  # code; the other is Eq. 4
    label_prior: Literal["uniform", "phat"] = "uniform"  # code; phat: paper
    noise: Literal["uniform", "normal"] = "uniform"  # in [0, 1): code
    share: Literal["all", "predictor"] = "all"  # predictor: only the last layer, below which nets may differ
    bn: Literal["averaged", "local", "groupnorm"] = "averaged"  # running statistics; code: local; groupnorm: has none
    noise_width: fl.Count = 32  # this and what follows: code, MNIST
    hidden: fl.Count = 256  # width of the generator
    generated_batch: fl.Times = 0  # B_G; 0: as many as real rows
    diversity: fl.NonNegative = 1.0  # eta
    generator_steps: fl.Times = 50  # per round
    generator_batch: fl.Count = 32
    generator_lr: fl.Positive = 3e-4  # Adam
    generator_lr_decay: fl.Share = 0.98  # per round
    generator_weight_decay: fl.NonNegative = 1e-2
    fresh_adam: bool = False  # Adam forgets its moments after each round

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """A model with private parts is measured where it is."""
        private = {"private_test"} if self.share == "predictor" or self.bn == "local" else set()
        return frozenset({"same_latent" if self.share == "predictor" else "one_net"} | private)

    def roles(self, world: World) -> Mapping[str, Role]:
        """One per net where nets may differ."""
        return world.roles_by_net() if self.share == "predictor" else super().roles(world)

    def init(self, world: World, rng: Generator) -> State:
        """The shared part of a model, a generator, and no labels seen. Raises Refused for a bn that does not fit."""
        nets = [world.net(role.net) for role in self.roles(world).values()]
        norm = any(path.endswith("running_mean") for net in nets for path, _ in leaves(net.init(stream("norm"))))
        if {"groupnorm": norm, "local": not norm, "averaged": norm and self.share == "predictor"}[self.bn]:
            raise Refused(f"fedgen.bn={self.bn} is not for {nets[0].name}: {'local' if norm else 'averaged'} is")
        params = part(nets[0].init(rng), self.share == "predictor", self.bn != "local")
        make = generator(nets[0], "latent", self.noise_width, self.hidden, "fedgen")
        made = {"generator": make.init(rng), "adam": {}, "start": int(torch.randint(2**31, (), generator=rng))}
        drawn = torch.zeros(world.clients, world.classes, dtype=torch.int64)
        return {"net": nets[0].name, "params": params, "drawn": drawn, **made}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The shared part, from the second round on with the generator. Private parts all start from one number."""
        down = {"params": state["params"], "start": state["start"]}
        terms = {"gen": self.lambda_gen, "kl": self.lambda_kl * self.local_latent_kl}
        if any(terms.values()) and state["drawn"].any():
            down |= {k: max(1e-4, w * 0.98**cohort.round) if w and self.decay else w for k, w in terms.items()}
            down |= {"generator": state["generator"], "labels": label_prior(state["drawn"], self.label_prior)}
        return Broadcast(shared=down)

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A whole model where part of it is private."""
        return {"own": net.init(stream("start", inbox["start"]))} if "private_test" in self.needs else {}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """What was received, over what is the client's own."""
        return overlay(memory["own"], inbox["params"]) if memory else dict(inbox["params"])

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: Generator) -> Batch:
        """What the generator makes for labels of the prior, and for the rows' own."""
        if "generator" not in inbox:
            return batch
        make = generator(net, "latent", self.noise_width, self.hidden, "fedgen")
        size = self.generated_batch or len(batch.y)
        y = torch.cat([torch.multinomial(inbox["labels"], size, True, generator=rng), batch.y])
        made = make.frozen(inbox["generator"], noise(len(y), self.noise_width, self.noise, rng), y)
        return batch.with_extra(label=y[:size], made=made[:size], same=made[size:])

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, then both terms. A term of B_G rows weighs B_G / B."""
        logits, extra, mask = net(p, batch.x), batch.extra, batch.mask
        value = cross_entropy(logits, batch.y, mask)
        if inbox.get("gen"):
            told, label, own = net.classify(p, extra["made"]), extra["label"], None if self.generated_batch else mask
            value = value + inbox["gen"] * len(label) / len(batch.y) * cross_entropy(told, label, own)
        if inbox.get("kl"):
            value = value + inbox["kl"] * kl(net.classify(p, extra["same"]).detach(), logits, mask=mask)
        return value, {"drawn": by_label(logits.detach()[:, :0], batch.y, net.classes, mask)[:, 0]}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """The shared part and how often each label was drawn."""
        drawn = trained.metrics["drawn"].sum(0).long() if trained.steps else 0 * trained.bench.label_counts
        payload = {"params": part(trained.end, self.share == "predictor", self.bn != "local"), "label_counts": drawn}
        return payload, {"own": trained.end} if trained.memory else {}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean; the generator learns from the clients' last layers as they were before it."""
        parts = [overlay(state["params"], p) for p in fl.trees_of(updates, "params")]
        drawn = torch.stack([u.payload["label_counts"] for u in updates])
        state["drawn"][[u.visit.client for u in updates]] = drawn
        state = {**state, "params": mean(parts, fl.weights(updates))}
        if not (self.lambda_gen or self.lambda_kl * self.local_latent_kl) or not drawn.any():
            return state
        net, heads = server.world.net(state["net"]), stack([{"head": p["head"]} for p in parts])
        make = generator(net, "latent", self.noise_width, self.hidden, "fedgen")

        def loss(z: Tensor, made: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.vmap(lambda head: net.classify(head, made, train=False))(heads)
            value = teaching(logits, y, drawn, self.generator_loss)
            return value + self.diversity * crowding(z, made) if self.diversity else value

        labels = label_prior(drawn if self.label_prior == "uniform" else state["drawn"], self.label_prior)
        lr, decay = self.generator_lr * self.generator_lr_decay**server.round, self.generator_weight_decay
        course = Course(self.generator_steps, self.generator_batch, lr)
        adam = {} if self.fresh_adam else state["adam"]
        state["generator"] = tutor(server, make, state["generator"], loss, labels, self.noise, course, decay, adam)
        return state

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The global model, if there is a whole one."""
        return {} if "private_test" in self.needs else super().models(state)

    def keeps(self, net: Net, memory: Tree) -> Tree | None:
        """The client's model after its last training."""
        return memory.get("own")
