"""Clients share nothing but the mean latent vector of each class, and keep their own ones near everybody's.

Paper: Tan et al., FedProto: Federated Prototype Learning across Heterogeneous Clients, AAAI 2022.
Travels down: a prototype per class, [C, Z], and which there are. Travels up: the client's prototypes and its rows of
each class. Remembered by the client: its model, its rows of each class, and the prototypes that it answers with.
Differences from the code: prototypes are computed after training, as in the paper, not averaged over the last epoch.
A prototype that nobody in a round has stays as it was. The distance in the loss is the mean square over Z, as in the
code. A client answers with the prototypes that it last received, or its own where there were none, and of its own
classes only: on others its loss is without meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness import protocol as fl
from harness.losses import by_label, cross_entropy, squared_error
from harness.nets import Net
from harness.protocol import Batch, Broadcast, Cohort, Inbox, Role, Server, State, Trained, Update, World
from harness.trees import Tree, unflat

NEVER = -1e6  # logit of a class that a client does not have


def nearest(prototypes: Tensor, there: Tensor) -> Tensor:
    """The last layer, weight and bias in one vector, whose largest logit is the nearest prototype.

    prototypes: [C, Z], there: [C] of bool. |z - c|^2 = |z|^2 - (2 c z - |c|^2), so weight 2 c and bias -|c|^2.
    """
    weight = 2 * prototypes * there[:, None]
    return torch.cat([weight.flatten(), torch.where(there, -prototypes.square().sum(1), NEVER)])


@dataclass(frozen=True)
class FedProto(fl.Algorithm):
    """CE + lambda |z - C_y|^2 / Z, z a row's latent vector and C_y the prototype of its class, if there is one."""

    needs: ClassVar[frozenset[str]] = frozenset({"same_latent", "private_test"})

    lambda_proto: fl.NonNegative = 1.0  # lambda, code: ld
    weighting: Literal["clients", "rows"] = "clients"  # of a mean prototype: code; rows: as the sizes in Eq. 6
    answer: Literal["prototypes", "head"] = "prototypes"  # the nearest prototype, or the net's last layer

    def roles(self, world: World) -> Mapping[str, Role]:
        """One per net."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """No prototypes."""
        name = next(iter(self.roles(world).values())).net
        empty = torch.zeros(world.classes, world.net(name).latent_width)
        return {"prototypes": empty, "there": torch.zeros(world.classes, dtype=torch.bool)}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The prototypes, once there are any."""
        return Broadcast(shared=dict(state) if state["there"].any() else {})

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A new model."""
        empty = torch.zeros(net.classes, net.latent_width)
        return {"params": net.init(rng), "prototypes": empty, "label_counts": empty[:, 0]}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """The client's own model."""
        params: Tree = memory["params"]
        return params

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, and the distance to the prototypes; rows of a class without one count as 0."""
        z = net.embed(p, batch.x)
        value = cross_entropy(net.classify(p, z), batch.y, batch.mask)
        if self.lambda_proto and "prototypes" in inbox:
            goal = torch.where(inbox["there"][batch.y, None], inbox["prototypes"][batch.y], z.detach())
            value = value + self.lambda_proto * squared_error(z, goal, batch.mask)
        return value, {}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """Prototypes of the trained model, in evaluation mode, on the client's own rows."""
        net, inbox = trained.net, trained.inbox
        seen = sum(
            trained.bench.scan(lambda x, y: by_label(net.embed(trained.end, x, train=False), y, net.classes)),
            start=torch.zeros(()),
        )
        counts = seen[:, -1]
        own = seen[:, :-1] / counts.clamp(min=1)[:, None]
        known = torch.where(inbox["there"][:, None], inbox["prototypes"], own) if "there" in inbox else own
        payload = {"prototypes": own, "label_counts": counts}
        return payload, {"params": trained.end, "prototypes": known, "label_counts": counts}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean over the clients that have a class."""
        own, counts = (torch.stack([u.payload[key] for u in updates]) for key in ("prototypes", "label_counts"))
        share = counts if self.weighting == "rows" else (counts > 0).to(own.dtype)
        total, there = share.sum(0), counts.sum(0) > 0
        mean = (share[:, :, None] * own).sum(0) / torch.where(there, total, 1.0)[:, None]
        return {
            "prototypes": torch.where(there[:, None], mean, state["prototypes"]),
            "there": state["there"] | there,
        }

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """There is no global model."""
        return {}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The client's model; its last layer is exchanged for the prototypes where they answer."""
        params: Tree = memory["params"]
        if self.answer == "head":
            return params
        head = nearest(memory["prototypes"], memory["label_counts"] > 0)
        return {**params, "head": unflat(head, like=params["head"])}
