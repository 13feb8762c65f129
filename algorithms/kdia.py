"""Knowledge distillation with inequitable aggregation: a teacher from the latest model of every client.

Paper: Ma, KDIA, arXiv 2506.20431, 2025; its code is the ground truth where the paper was not to be had.
Travels down: the model, the teacher, the generator. Travels up: the model. Remembered by the client: nothing.
Differences from the code: labels for generated features are drawn anew at each step, one per real row, instead of
from a pool of that size; the generator takes the shape of any net's extractor. Both directions of the divergence
are offered: the code puts the student's distribution first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.losses import Direction, cross_entropy, distill
from harness.nets import FeatureGenerator, Net, generator
from harness.protocol import (
    Batch,
    Broadcast,
    Cohort,
    Count,
    Decay,
    Inbox,
    NonNegative,
    Positive,
    Server,
    State,
    Times,
    Update,
    World,
    trees_of,
    weights,
)
from harness.trees import Tree, add, flat, scale, stack, unflat


def teacher_weights(t: int, last: Sequence[int], visits: Sequence[int], sizes: Sequence[int], how: str) -> Tensor:
    """Weights [N], double, of the clients' latest models in round t by recency, number of visits and size.

    geometric: softmax over seen clients of (-(t - t_k) + ln c_k + ln n_k) / 3, which is the cube root of the code's
    three frequencies, normalised, without their underflow. arithmetic: the mean of the three over seen clients.
    """
    gap = t - torch.tensor(last, dtype=torch.float64)
    count, size = torch.tensor(visits, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    seen = count > 0  # a model that nobody trained must not enter
    if how == "geometric":
        return torch.where(seen, (-gap + count.log() + size.log()) / 3, -torch.inf).softmax(0)
    mixed = torch.where(seen, (-gap).softmax(0) + count / count.sum() + size / size.sum(), 0.0)
    return mixed / mixed.sum()


def diversity(z: Tensor, features: Tensor) -> Tensor:
    """1 / (d_G / d_z + 1e-5): mean distances of features [B, ...] and noise [B, Z] between a batch's halves."""
    half = len(z) // 2
    d_g, d_z = ((x[:half] - x[half : 2 * half]).abs().mean() for x in (features, z))
    return 1 / (d_g / d_z + 1e-5)


@dataclass(frozen=True)
class Kdia(FedAvg):
    """Student: FedAvg's mean. Teacher: the weighted mean of every client's latest model. Both are evaluated."""

    identity: ClassVar[Mapping[str, Any]] = {"lambda_kd": 0.0, "lambda_gen": 0.0}

    lambda_kd: NonNegative = 0.5  # weight of the divergence, run.sh
    lambda_gen: NonNegative = 1.0  # weight of the generated features, run.sh
    tau: Positive = 2.0  # temperature, run.sh
    kd_direction: Direction = "student_first"  # as in the code
    teacher: Literal["triple", "uniform", "size", "participants", "ema"] = "triple"  # the others are ablations
    frequencies: Literal["geometric", "arithmetic"] = "geometric"  # the mean of the three, for teacher = "triple"
    ema_decay: Decay = 0.717  # exp(-1/3), for teacher = "ema"
    noise: Count = 100  # width of z
    generator_epochs: Times = 20  # per round
    generator_iterations: Count = 100  # steps per generator epoch
    generator_batch: Annotated[int, Ge(2)] = 64
    generator_lr: Positive = 1e-3  # Adam
    generator_weight_decay: NonNegative = 1e-5

    def _generator(self, net: Net) -> FeatureGenerator:
        return generator(net, "features", self.noise, style="kdia")

    def init(self, world: World, rng: Generator) -> State:
        """The teacher starts as the student; nobody has a latest model yet."""
        state = super().init(world, rng)
        if self.lambda_gen:
            state["generator"] = self._generator(world.net(state["net"])).init(rng)
        latest = flat(state["params"])[None, :][:0]
        clients = {"rows": [], "last": [-1] * world.clients, "visits": [0] * world.clients}
        return {**state, **clients, "teacher": state["params"], "latest": latest}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model and what the loss uses."""
        used = {"teacher": self.lambda_kd, "generator": self.lambda_gen}
        return Broadcast(shared={"params": state["params"], **{key: state[key] for key in used if used[key]}})

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The teacher's logits [B, C]."""
        return {"teacher": net.frozen(inbox["teacher"], x)} if self.lambda_kd else {}

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: Generator) -> Batch:
        """Noise and a uniform label for each row."""
        return self._noise(len(batch.x), net.classes, rng, batch) if self.lambda_gen else batch

    def _noise(self, rows: int, classes: int, rng: Generator, batch: Batch) -> Batch:
        z = torch.randn(rows, self.noise, generator=rng, device=rng.device)
        return batch.with_extra(z=z, label=torch.randint(classes, (rows,), generator=rng, device=rng.device))

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """CE + lambda_kd KL(student, teacher) + lambda_gen CE(classifier(generated features), their labels)."""
        student = net(p, batch.x)
        value = cross_entropy(student, batch.y, batch.mask)
        if self.lambda_kd:
            teacher = batch.extra["teacher"]
            value = value + self.lambda_kd * distill(student, teacher, self.tau, self.kd_direction, batch.mask)
        if self.lambda_gen:
            label = batch.extra["label"]
            features = self._generator(net).frozen(inbox["generator"], batch.extra["z"], label)
            generated = cross_entropy(net.classify(p, features, "features"), label, batch.mask)
            value = value + self.lambda_gen * generated
        return value, {}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The student first, then the teacher."""
        return {"student": (state["net"], state["params"]), "teacher": (state["net"], state["teacher"])}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """Student, then teacher, then generator: the order of the code."""
        state = super().merge(state, updates, server)
        for client in (u.visit.client for u in updates):
            state["visits"][client] += 1
            state["last"][client] = server.round
            if client not in state["rows"]:
                state["rows"].append(client)
        latest = state["latest"].new_empty(len(state["rows"]), state["latest"].shape[1])
        latest[: len(state["latest"])] = state["latest"]
        for u in updates:
            latest[state["rows"].index(u.visit.client)] = flat(u.payload["params"])
        state["latest"] = latest
        state["teacher"] = self._teacher(state, server)
        if self.lambda_gen and self.generator_epochs:
            state["generator"] = self._train_generator(state, updates, server)
        return state

    def _teacher(self, state: State, server: Server) -> Tree:
        sizes = server.world.sizes
        if self.teacher == "ema":
            return add(scale(state["teacher"], self.ema_decay), state["params"], 1 - self.ema_decay)
        if self.teacher == "participants":
            return dict(state["params"])
        share = torch.tensor(sizes if self.teacher == "size" else [1] * len(sizes), dtype=torch.float64)
        if self.teacher == "triple":
            share = teacher_weights(server.round, state["last"], state["visits"], sizes, self.frequencies)
        share = share[state["rows"]]
        return unflat((share / share.sum()).to(state["latest"]) @ state["latest"], like=state["params"])

    def _train_generator(self, state: State, updates: Sequence[Update], server: Server) -> Tree:
        net = server.world.net(state["net"])
        make, rng, size = self._generator(net), server.rng("generator"), self.generator_batch
        heads = stack([{k: p[k] for k in ("latent", "head")} for p in trees_of(updates, "params")])
        share = torch.tensor(weights(updates), device=state["latest"].device)
        share = share / share.sum()
        pool = torch.randint(net.classes, (size * self.generator_iterations,), generator=rng, device=rng.device)

        def draw(step: int) -> Batch:
            nonlocal pool
            at = step % self.generator_iterations
            if at == 0:
                pool = pool[torch.randperm(len(pool), generator=rng, device=rng.device)]
            z = torch.randn(size, self.noise, generator=rng, device=rng.device)
            return Batch(x=z, y=pool[at * size : (at + 1) * size])

        def loss(p: Tree, batch: Batch) -> Tensor:
            features = make(p, batch.x, batch.y)
            logits = torch.func.vmap(lambda h: net.classify(h, features, "features", train=False))(heads)
            return cross_entropy(torch.einsum("k,kbc->bc", share, logits), batch.y) + diversity(batch.x, features)

        steps = self.generator_epochs * self.generator_iterations
        return server.fit(
            state["generator"], loss, draw, steps, lr=self.generator_lr, weight_decay=self.generator_weight_decay
        )
