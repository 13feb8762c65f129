"""A control: FedAvg whose clients distil from the global model that they start from.

Paper: none; tells what any teacher would have done from what a method's own teacher does.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from FedAvg: one term in the loss. The teacher is the model that travels down anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from algorithms.fedavg import FedAvg
from harness.losses import Direction, taught
from harness.nets import Net
from harness.protocol import Batch, Inbox, NonNegative, Positive
from harness.trees import Tree


@dataclass(frozen=True)
class PlainKd(FedAvg):
    """L = CE + lambda_kd KL(theta_g, theta) at temperature tau, no factor tau^2; theta_g: the start of the round."""

    identity: ClassVar[Mapping[str, Any]] = {"lambda_kd": 0.0}

    lambda_kd: NonNegative = 0.5  # as ema-teacher and kdia, so that only the teacher differs
    tau: Positive = 2.0  # temperature, as theirs
    kd_direction: Direction = "teacher_first"  # Hinton et al. 2015; kdia's code has student_first

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """The start model's logits [B, C]."""
        return {"teacher": net.frozen(inbox["params"], x)} if self.lambda_kd else {}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy + lambda_kd KL."""
        teacher = batch.extra.get("teacher")
        value = taught(net(p, batch.x), batch.y, teacher, self.lambda_kd, self.tau, self.kd_direction, batch.mask)
        return value, {}
