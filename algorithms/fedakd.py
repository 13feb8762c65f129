"""Federated averaging with an attention on the features and distillation from the clients' models.

Paper: Federated Learning with Attention-Guided Knowledge Distillation for Imbalanced Data (FedAKD), an unpublished
text without experiments; not the FedAKD of Gad and Fadlullah 2023. It gives a = softmax(W f), the mean of the
clients' models, and L = CE + lambda KL(p_i, q) for the global model q; all else is ours.
Travels down: the model, W included. Travels up: the model. Remembered by the client: in the variant client_side its
model of its last visit, else nothing.
Differences from the paper: none where it speaks. Ours: W is d x d without bias, starts at zero and is averaged with
the rest; features are d a f, so that the net starts as the plain one (attention = "plain" leaves the factor out).
server_labelled learns from labelled proxy rows, server_unlabelled from the same without CE; client_side has no server
data: clients distil from their own last model. The divergences from all clients have the gradient of one from their
mixture, which is what is computed. Attention, divergence (lambda_kd = 0) and cross-entropy (server_unlabelled) can be
turned off one by one; server_labelled without the first two is fedavg-proxy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.descent import Course, Teach, consult, divergence, opinions, study
from harness.losses import cross_entropy, kl
from harness.nets import Net
from harness.protocol import (
    Batch,
    Count,
    Inbox,
    NonNegative,
    Positive,
    Role,
    Server,
    State,
    Times,
    Trained,
    Update,
    World,
    trees_of,
)
from harness.refusal import Refused
from harness.trees import Tree

ENDINGS = {"rescaled": "+attention", "plain": "+attention-plain", "off": ""}


def shares(counts: Tensor, y: Tensor) -> Tensor:
    """Weights [K, B] of the clients for rows with labels y [B]: count_{i,y} / sum_j count_{j,y}; counts: [K, C].

    Equal where nobody has the label.
    """
    own = counts[:, y].double()
    total = own.sum(0)
    return torch.where(total > 0, own / total.clamp(min=1), 1 / len(counts)).float()


@dataclass(frozen=True)
class FedAkd(FedAvg):
    """theta = mean_k theta_k, then Adam on CE(q, y) + lambda_kd tau^2 sum_i omega_i KL(p_i, q) over proxy rows."""

    identity: ClassVar[Mapping[str, Any]] = {"attention": "off", "lambda_kd": 0.0, "variant": "server_unlabelled"}

    variant: Literal["server_labelled", "server_unlabelled", "client_side"] = "server_labelled"
    attention: Literal["rescaled", "plain", "off"] = "rescaled"
    lambda_kd: NonNegative = 1.0  # lambda
    tau: Positive = 2.0  # temperature
    omega: Literal["uniform", "per_label"] = "uniform"  # weights of the clients; per_label: by their label counts
    proxy_steps: Times = 100  # per round; these three for the variants on the server
    proxy_batch: Count = 128
    proxy_lr: Positive = 1e-3  # Adam

    def __post_init__(self) -> None:
        if self.omega == "per_label" and self.variant != "server_labelled":
            raise Refused(f"omega = per_label needs the labels of variant = server_labelled, not of {self.variant}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """By variant and weights."""
        more = {"label_counts"} if self.omega == "per_label" else set()
        if self._learns and self.proxy_steps:
            more |= {"labelled_proxy" if self.variant == "server_labelled" else "proxy"}
        return frozenset({"one_net"} | more)

    @property
    def _learns(self) -> bool:
        """Whether there is a loss for the server."""
        return self.variant == "server_labelled" or (self.variant == "server_unlabelled" and self.lambda_kd > 0)

    def roles(self, world: World) -> Mapping[str, Role]:
        """Everybody trains the net with its attention."""
        return {"global": Role(world.default_net.partition("+")[0] + ENDINGS[self.attention])}

    def init(self, world: World, rng: Generator) -> State:
        """One model."""
        name = self.roles(world)["global"].net
        return {"net": name, "params": world.net(name).init(rng)}

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """Logits [B, C] of the client's last model, if it has one."""
        return {"teacher": net.frozen(memory["last"], x)} if "last" in memory else {}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """CE; in the variant client_side + lambda_kd tau^2 KL(last model, model) from the second visit on."""
        student = net(p, batch.x)
        value = cross_entropy(student, batch.y, batch.mask)
        if (teacher := batch.extra.get("teacher")) is not None:
            value = value + self.lambda_kd * kl(teacher, student, self.tau, tau_squared=True, mask=batch.mask)
        return value, {}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """The model; it is remembered where it will teach."""
        keeps = self.variant == "client_side" and self.lambda_kd > 0
        return {"params": trained.end}, {"last": trained.end} if keeps else {}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean, then the server's training."""
        state = super().merge(state, updates, server)
        if not (self._learns and self.proxy_steps):
            return state
        net = server.world.net(state["net"])
        course = Course(self.proxy_steps, self.proxy_batch, self.proxy_lr)
        draw = consult(server, self._teacher(net, updates, server), course.rows)

        def loss(p: Tree, batch: Batch) -> Tensor:
            return self.server_loss(net(p, batch.x), batch)

        return {**state, "params": study(server, state["params"], loss, draw, course, server.rng("proxy"))}

    def server_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of the global model's logits [B, C], with the mixture of the clients as batch.extra["target"]."""
        terms = [cross_entropy(logits, batch.y)] if self.variant == "server_labelled" else []
        if self.lambda_kd:
            terms.append(self.lambda_kd * divergence(batch.extra["target"], logits, self.tau, tau_squared=True))
        return sum(terms[1:], terms[0])

    def _teacher(self, net: Net, updates: Sequence[Update], server: Server) -> Teach:
        teachers = [(net, p) for p in trees_of(updates, "params")]
        clients = [u.visit.client for u in updates]

        def teach(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            said = (opinions(teachers, x) / self.tau).softmax(-1)
            if self.omega == "uniform":
                return {"target": said.mean(0)}
            counts = torch.from_numpy(server.world.label_counts[clients]).to(y.device)
            return {"target": torch.einsum("kb,kbc->bc", shares(counts, y), said)}

        return teach if self.lambda_kd else lambda x, y: {}
