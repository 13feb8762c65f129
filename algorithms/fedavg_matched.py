"""A control: FedAvg with more local epochs, for methods that compute more than FedAvg does.

Paper: none; McMahan et al. 2017 with another number of epochs.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from FedAvg: the clients pass `factor` times as often over their rows. Set it to the ratio of steps, or of
seconds, between the method in question and FedAvg, as the table of rounds has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from algorithms.fedavg import FedAvg
from harness.protocol import Inbox, Phase, Positive, World
from harness.trees import Tree


@dataclass(frozen=True)
class FedAvgMatched(FedAvg):
    """FedAvg with factor * epochs local epochs; a part of a pass is that share of its batches."""

    identity: ClassVar[Mapping[str, Any]] = {"factor": 1.0}

    factor: Positive = 2.0  # ours: a teacher in every step costs about as much again

    def plan(self, world: World, inbox: Inbox, memory: Tree) -> tuple[Phase, ...]:
        """One longer phase."""
        return (Phase(epochs=world.epochs * self.factor),)
