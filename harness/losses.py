"""Losses. The direction of a divergence and its temperature factor are explicit, because the papers differ."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor


def _mean(per_row: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the batch [B]; with a mask only over the rows that are 1 (0 if there are none)."""
    return per_row.mean() if mask is None else (per_row * mask).sum() / mask.sum().clamp(min=1)


def cross_entropy(logits: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats. logits: [B, C], y: [B] class numbers, mask: [B] of 0 and 1 or None."""
    if mask is None:
        return F.cross_entropy(logits, y)
    return _mean(F.cross_entropy(logits, y, reduction="none"), mask)


def kl(
    first: Tensor, second: Tensor, tau: float = 1.0, *, tau_squared: bool = False, mask: Tensor | None = None
) -> Tensor:
    """KL( softmax(first / tau) || softmax(second / tau) ), mean over B, in nats; both are logits [B, C].

    Usual distillation is kl(teacher, student): the teacher's distribution is the first. Nothing is detached here.
    `tau_squared` multiplies by tau^2, which keeps the gradient's size as tau grows (Hinton et al. 2015).
    """
    log_p = F.log_softmax(first / tau, dim=-1)
    log_q = F.log_softmax(second / tau, dim=-1)
    value = _mean((log_p.exp() * (log_p - log_q)).sum(-1), mask)
    return value * tau**2 if tau_squared else value


# Which distribution stands first in the divergence: the teacher's (Hinton et al. 2015) or the student's.
Direction: TypeAlias = Literal["student_first", "teacher_first"]


def distill(student: Tensor, teacher: Tensor, tau: float, direction: Direction, mask: Tensor | None = None) -> Tensor:
    """KL between student and teacher, both logits [B, C], with the named one first; no tau^2 factor."""
    first, second = (student, teacher) if direction == "student_first" else (teacher, student)
    return kl(first, second, tau, mask=mask)
