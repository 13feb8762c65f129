"""Federated mutual learning: every client's private model and a small shared one teach each other.

Paper: Shen et al., Federated Mutual Learning, arXiv 2006.16765, 2020.
Travels down: the shared ("meme") model. Travels up: the shared model. Remembered by the client: its private model.
Differences from the paper: both models start at random and apart. The public re-implementation (PFLlib) clips the
norm of each model's gradient at 10: local.clip does so here, for both together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Generator, Tensor

from harness.losses import cross_entropy, mutual
from harness.nets import Net, build, sibling
from harness.protocol import (
    Algorithm,
    Batch,
    Broadcast,
    Cohort,
    Inbox,
    Role,
    Server,
    Share,
    State,
    Trained,
    Update,
    World,
    trees_of,
    weights,
)
from harness.trees import Tree, mean


@dataclass(frozen=True)
class FML(Algorithm):
    """Private: a CE + (1 - a) KL(p_shared || p_private). Shared: b CE + (1 - b) KL(p_private || p_shared)."""

    needs: ClassVar[frozenset[str]] = frozenset({"private_test"})

    alpha: Share = 0.5  # a, the paper's balance of hard and soft labels for the private model
    beta: Share = 0.5  # b, the same for the shared model
    shared_net: str = ""  # of the shared model; empty: the trial's net
    weighting: Literal["uniform", "samples"] = "uniform"  # of the mean of shared models; the paper's is uniform

    def __post_init__(self) -> None:
        """A net that does not exist is refused before the trial starts."""
        if self.shared_net:
            build(self.shared_net, (3, 32, 32), 2)

    def roles(self, world: World) -> Mapping[str, Role]:
        """Private models may be of different nets."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """The shared model."""
        net = self.shared_net or world.default_net
        return {"net": net, "params": world.net(net).init(rng)}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The shared model to everybody."""
        return Broadcast(shared={"shared": state["params"], "net": state["net"]})

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A private model, the client's own from the start."""
        return {"params": net.init(rng)}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """Both are trained, in one step."""
        return {"private": memory["params"], "shared": inbox["shared"]}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both losses; each takes the other model's answers as given."""
        private, shared = net(p["private"], batch.x), sibling(net, inbox["net"])(p["shared"], batch.x)
        private_ce, shared_ce = (cross_entropy(z, batch.y, batch.mask) for z in (private, shared))
        value = mutual(1 - self.alpha, private_ce, private, shared, mask=batch.mask)
        value = value + mutual(1 - self.beta, shared_ce, shared, private, mask=batch.mask)
        return value, {"private_ce": private_ce.detach(), "shared_ce": shared_ce.detach()}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """The shared model goes back, the private one stays."""
        return {"shared": trained.end["shared"]}, {"params": trained.end["private"]}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean of the shared models."""
        share = weights(updates) if self.weighting == "samples" else [1.0] * len(updates)
        return {**state, "params": mean(trees_of(updates, "shared"), share)}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The shared model; private ones are measured at the clients."""
        return {"shared": (state["net"], state["params"])}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The private model."""
        params: Tree = memory["params"]
        return params
