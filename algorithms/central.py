"""An upper bound: one model trained on the rows of all clients in one place.

Paper: none; known as centralised or pooled training.
Travels down: the model, to the one place. Travels up: the model. These bytes are no method's cost of communication.
Remembered by the client: nothing.
Differences from federated methods: the rows are not dealt. A round passes over epochs x participation of all rows,
the samples that a cohort of average size would have seen; the local optimizer begins anew every round, as theirs do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from algorithms.fedavg import FedAvg
from harness.protocol import Inbox, Phase, Role, World
from harness.trees import Tree


@dataclass(frozen=True)
class Central(FedAvg):
    """FedAvg with a single client that holds everything."""

    needs: ClassVar[frozenset[str]] = frozenset({"one_net", "pooled"})

    def roles(self, world: World) -> Mapping[str, Role]:
        """The one client, in every round."""
        return {"global": Role(world.default_net, clients=(0,), cohort=1)}

    def plan(self, world: World, inbox: Inbox, memory: Tree) -> tuple[Phase, ...]:
        """As many rows as a cohort."""
        return (Phase(epochs=world.epochs * world.participation),)
