"""A control: FedAvg whose clients distil from an exponential moving average of the global model.

Paper: none; the plain counterpart of KDIA, whose teacher is nearly such an average with decay exp(-1/3) per round.
Travels down: the model and the teacher. Travels up: the model. Remembered by the client: nothing.
Differences from KDIA: no client models are stored, no generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.losses import Direction, taught
from harness.nets import Net
from harness.protocol import (
    Batch,
    Broadcast,
    Cohort,
    Decay,
    Inbox,
    NonNegative,
    Positive,
    Server,
    State,
    Update,
    World,
)
from harness.trees import Tree, add, scale


@dataclass(frozen=True)
class EmaTeacher(FedAvg):
    """teacher = decay teacher + (1 - decay) theta_g; the loss adds lambda_kd KL between student and teacher."""

    summed = FedAvg.summed

    identity: ClassVar[Mapping[str, Any]] = {"lambda_kd": 0.0}

    lambda_kd: NonNegative = 0.5  # as in KDIA's code
    tau: Positive = 2.0  # temperature, as in KDIA's code
    kd_direction: Direction = "student_first"  # as in KDIA's code
    decay: Decay = 0.717  # exp(-1/3): the decay per round of KDIA's teacher weights

    def init(self, world: World, rng: Generator) -> State:
        """The teacher starts as the model."""
        state = super().init(world, rng)
        return {**state, "teacher": state["params"]}

    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """The model and, if it is used, the teacher."""
        teacher = {"teacher": state["teacher"]} if self.lambda_kd else {}
        return Broadcast(shared={"params": state["params"], **teacher})

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The teacher's logits [B, C]."""
        return {"teacher": net.frozen(inbox["teacher"], x)} if self.lambda_kd else {}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy + lambda_kd KL."""
        teacher = batch.extra.get("teacher")
        value = taught(net(p, batch.x), batch.y, teacher, self.lambda_kd, self.tau, self.kd_direction, batch.mask)
        return value, {}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """FedAvg, then the moving average."""
        state = super().merge(state, updates, server)
        return {**state, "teacher": add(scale(state["teacher"], self.decay), state["params"], 1 - self.decay)}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The student first, then the teacher."""
        return {"student": (state["net"], state["params"]), "teacher": (state["net"], state["teacher"])}
