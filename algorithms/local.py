"""A control: every client trains alone, on its own rows, a model that never travels.

Paper: none; known as SOLO or local-only training.
Travels down: nothing. Travels up: nothing. Remembered by the client: its model.
Differences from federated methods: a client trains only in the rounds in which it takes part, so that it takes as
many steps as it would there. Clients start from models of their own, since nobody could send them a common one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from harness.losses import cross_entropy
from harness.nets import Net
from harness.protocol import Algorithm, Batch, Broadcast, Cohort, Inbox, Role, Server, State, Trained, Update, World
from harness.trees import Tree, to


@dataclass(frozen=True)
class Local(Algorithm):
    """No communication. Nets may differ; there is no global model, only personal ones."""

    needs: ClassVar[frozenset[str]] = frozenset({"private_test"})

    def roles(self, world: World) -> Mapping[str, Role]:
        """One per net."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """The server has nothing."""
        return {}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """Nothing."""
        return Broadcast()

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A new model."""
        return {"params": to(net.init(rng), rng.device)}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """The client's own model."""
        params: Tree = memory["params"]
        return params

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy."""
        return cross_entropy(net(p, batch.x), batch.y, batch.mask), {}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """Nothing up; the model is kept."""
        return {}, {"params": trained.end}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """Nothing to merge."""
        return state

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """None."""
        return {}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The client's model."""
        params: Tree = memory["params"]
        return params
