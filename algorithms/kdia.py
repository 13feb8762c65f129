"""Knowledge distillation with inequitable aggregation: a teacher from the latest model of every client.

Paper: Ma, KDIA, arXiv 2506.20431, 2025; its code is the ground truth where the paper was not to be had.
Travels down: the model, the teacher, the generator. Travels up: the model. Remembered by the client: nothing.
Differences from the code: labels for generated features are drawn anew at each step, one per real row, not from a
pool of that size; the generator takes the shape of any net's extractor; the divergence has both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness import protocol as fl
from harness.latest import update_rows
from harness.losses import Direction, cross_entropy, taught
from harness.nets import Net, generator
from harness.protocol import Batch, Broadcast, Cohort, Inbox, Server, State, Update, World, trees_of, weights
from harness.trees import Tree, add, flat, scale, stack, unflat


def teacher_weights(t: int, last: Sequence[int], visits: Sequence[int], sizes: Sequence[int], how: str) -> Tensor:
    """Weights [N], double, of the clients' latest models in round t: the mean (geometric or arithmetic) of the shares
    by recency e^-(t - t_k), visits c_k and rows n_k. Their normalisers cancel in the former; unseen clients get 0.
    """
    when, count, size = (torch.tensor(x, dtype=torch.float64) for x in (last, visits, sizes))
    seen = count > 0  # a model that nobody trained must not enter
    if how == "geometric":  # the code's cube root of a product, which underflows
        return torch.where(seen, (when - t + count.log() + size.log()) / 3, -torch.inf).softmax(0)
    mixed = torch.where(seen, (when - t).softmax(0) + count / count.sum() + size / size.sum(), 0.0)
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
    lambda_kd: fl.NonNegative = 0.5  # weight of the divergence, run.sh
    lambda_gen: fl.NonNegative = 1.0  # weight of the generated features, run.sh
    tau: fl.Positive = 2.0  # temperature, run.sh
    kd_direction: Direction = "student_first"  # as in the code
    teacher: Literal["triple", "uniform", "size", "participants", "ema"] = "triple"  # the others are ablations
    frequencies: Literal["geometric", "arithmetic"] = "geometric"  # the mean of the three, for teacher = "triple"
    ema_decay: fl.Decay = 0.717  # exp(-1/3), for teacher = "ema"
    noise: fl.Count = 100  # width of z
    generator_epochs: fl.Times = 20  # per round
    generator_iterations: fl.Count = 100  # steps per generator epoch
    generator_batch: Annotated[int, Ge(2)] = 64
    generator_lr: fl.Positive = 1e-3  # Adam
    generator_weight_decay: fl.NonNegative = 1e-5

    def init(self, world: World, rng: Generator) -> State:
        """The teacher starts as the student; nobody has a latest model yet."""
        state = super().init(world, rng)
        make = generator(world.net(state["net"]), "features", self.noise, style="kdia")
        made = {"generator": make.init(rng)} if self.lambda_gen else {}
        clients = {"rows": [], "last": [-1] * world.clients, "visits": [0] * world.clients}
        return {**state, **made, **clients, "teacher": state["params"], "latest": flat(state["params"])[None, :][:0]}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model and what the loss uses."""
        used = {"teacher": self.lambda_kd, "generator": self.lambda_gen}
        return Broadcast(shared={"params": state["params"], **{key: state[key] for key in used if used[key]}})

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The teacher's logits [B, C]."""
        return {"teacher": net.frozen(inbox["teacher"], x)} if self.lambda_kd else {}

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: Generator) -> Batch:
        """Noise and a uniform label for each row."""
        if not self.lambda_gen:
            return batch
        z = torch.randn(len(batch.x), self.noise, generator=rng, device=rng.device)
        return batch.with_extra(z=z, label=torch.randint(net.classes, (len(z),), generator=rng, device=rng.device))

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """CE + lambda_kd KL(student, teacher) + lambda_gen CE(classifier(generated features), their labels)."""
        teacher = batch.extra.get("teacher")
        value = taught(net(p, batch.x), batch.y, teacher, self.lambda_kd, self.tau, self.kd_direction, batch.mask)
        if self.lambda_gen:
            make, label = generator(net, "features", self.noise, style="kdia"), batch.extra["label"]
            features = make.frozen(inbox["generator"], batch.extra["z"], label)
            value = value + self.lambda_gen * cross_entropy(net.classify(p, features, "features"), label, batch.mask)
        return value, {}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The student first, then the teacher."""
        return {"student": (state["net"], state["params"]), "teacher": (state["net"], state["teacher"])}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """Student, then teacher, then generator: the order of the code."""
        state = super().merge(state, updates, server)
        new = {u.visit.client: u.payload["params"] for u in updates}
        state["visits"] = [count + (client in new) for client, count in enumerate(state["visits"])]
        state["last"] = [server.round if client in new else t for client, t in enumerate(state["last"])]
        state["latest"] = update_rows(state["latest"], state["rows"], new, server.world.clients)
        state["teacher"] = self._teacher(state, server)
        if self.lambda_gen and self.generator_epochs:
            state["generator"] = self._train_generator(state, updates, server)
        return state

    def _teacher(self, state: State, server: Server) -> Tree:
        rows, latest, sizes = state["rows"], state["latest"], server.world.sizes
        if self.teacher == "ema":
            return add(scale(state["teacher"], self.ema_decay), state["params"], 1 - self.ema_decay)
        if self.teacher == "participants":
            return dict(state["params"])
        share = torch.tensor(sizes if self.teacher == "size" else [1] * len(sizes), dtype=torch.float64)
        if self.teacher == "triple":
            share = teacher_weights(server.round, state["last"], state["visits"], sizes, self.frequencies)
        return unflat((share[rows] / share[rows].sum()).to(latest) @ latest, like=state["params"])

    def _train_generator(self, state: State, updates: Sequence[Update], server: Server) -> Tree:
        net, rng, size = server.world.net(state["net"]), server.rng("generator"), self.generator_batch
        make = generator(net, "features", self.noise, style="kdia")
        heads = stack([{k: p[k] for k in ("latent", "head")} for p in trees_of(updates, "params")])
        share = torch.tensor(weights(updates), device=state["latest"].device)

        def batches() -> Iterator[Batch]:
            pool = torch.randint(net.classes, (size * self.generator_iterations,), generator=rng, device=rng.device)
            while True:
                pool = pool[torch.randperm(len(pool), generator=rng, device=rng.device)]
                for y in pool.split(size):
                    yield Batch(torch.randn(size, self.noise, generator=rng, device=rng.device), y)

        def loss(p: Tree, batch: Batch) -> Tensor:
            features = make(p, batch.x, batch.y)
            logits = torch.func.vmap(lambda h: net.classify(h, features, "features", train=False))(heads)
            ensemble = torch.einsum("k,kbc->bc", share / share.sum(), logits)
            return cross_entropy(ensemble, batch.y) + diversity(batch.x, features)

        made, lr, decay = batches(), self.generator_lr, self.generator_weight_decay
        steps = self.generator_epochs * self.generator_iterations
        return server.fit(state["generator"], loss, lambda _: next(made), steps, lr=lr, weight_decay=decay)
