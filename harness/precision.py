"""The arithmetic of local training. Parameters, optimizers, means and evaluation are float32 in any case."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from harness.fit import VisitLoss
from harness.nets import Net
from harness.protocol import Batch, Inbox
from harness.refusal import Refused
from harness.trees import Tree

Precision: TypeAlias = Literal["float32", "bfloat16"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself, and does not only pretend to, slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    told: Any = torch.cpu
    return bool(told._is_avx512_bf16_supported() or told._is_amx_tile_supported())


def check(precision: Precision, device: torch.device) -> None:
    """Raises Refused if a device has no arithmetic of this precision."""
    if precision == "bfloat16" and not has_bfloat16(device):
        raise Refused(f"precision = bfloat16: this {device.type} has no bfloat16 arithmetic; allowed here: float32")


def in_precision(precision: Precision, loss: VisitLoss, device: torch.device) -> VisitLoss:
    """The loss with matrix products and convolutions in a precision (torch's autocast); its value is float32."""
    if precision == "float32":
        return loss

    def lower(net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16):
            value, metrics = loss(net, p, batch, inbox, memory)
        return value.float(), {name: metric.float() for name, metric in metrics.items()}

    return lower
