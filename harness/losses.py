"""Losses. The direction of a divergence and its temperature factor are explicit, because the papers differ."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
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


def squared_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of a and b: [B, D]."""
    return _mean((a - b).square().mean(-1), mask)


def absolute_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference of a and b: [B, D]."""
    return _mean((a - b).abs().mean(-1), mask)


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


def taught(
    student: Tensor,
    y: Tensor,
    teacher: Tensor | None,
    weight: float,
    tau: float,
    direction: Direction,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy + weight KL (see `distill`); without a teacher's logits only the cross-entropy."""
    value = cross_entropy(student, y, mask)
    return value if teacher is None else value + weight * distill(student, teacher, tau, direction, mask)


def soft_labels(own: Tensor, other: Tensor, tau: float, own_first: bool, mask: Tensor | None = None) -> Tensor:
    """tau^2 KL between a learner and one taken as given, logits [B, C]; own_first: the learner stands first."""
    return tau**2 * distill(own, other.detach(), tau, "student_first" if own_first else "teacher_first", mask)


def mutual(
    soft: float,
    hard_loss: Tensor,
    own: Tensor,
    other: Tensor,
    tau: float = 1.0,
    own_first: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """(1 - soft) hard_loss + soft tau^2 KL: one side of two models that learn from each other.

    No divergence is computed where soft is 0.
    """
    value = (1 - soft) * hard_loss
    return value + soft * soft_labels(own, other, tau, own_first, mask) if soft else value


# How the weight of soft labels changes over rounds: by who knows more, not at all, up in the first rounds, or down.
TradeOff: TypeAlias = Literal["dynamic", "fixed", "linear", "cosine"]


def trade_off(how: TradeOff, top: float, lag: float, t: int, warm: int, rounds: int) -> float:
    """The weight of soft labels in round t, in [0, top].

    dynamic: top * logistic(lag) * min(1, t / warm), lag being how much worse the learner is than its teacher, in any
    unit; linear: without the logistic; cosine: half a cosine from top to zero over all rounds.
    """
    ramp = min(1.0, t / warm)
    cosine = 0.5 + 0.5 * math.cos(math.pi * t / rounds)
    logistic = 0.5 + 0.5 * math.tanh(lag / 2)  # this form does not overflow
    return top * {"dynamic": logistic * ramp, "fixed": 1.0, "linear": ramp, "cosine": cosine}[how]


def by_label(values: Tensor, y: Tensor, classes: int, mask: Tensor | None = None) -> Tensor:
    """Sums of rows over their labels, and in one more column how many there were: [C, D + 1].

    values: [B, D], y: [B]. A product with one-hot rows, so that a GPU gives the same bits each time.
    """
    hot = (y == torch.arange(classes, device=y.device)[:, None]).to(values.dtype)
    hot = hot if mask is None else hot * mask
    return torch.cat([hot @ values, hot.sum(1, keepdim=True)], 1)


def label_prior(counts: Tensor, how: Literal["uniform", "phat"]) -> Tensor:
    """What labels are drawn from, [C], given rows by client and label [K, C]: uniform over the labels that somebody
    has, or in proportion to all rows, which is Zhu et al.'s (2021) estimate of p(y).
    """
    rows = counts.sum(0).float()
    share = rows if how == "phat" else (rows > 0).float()
    return share / share.sum()


def crowding(z: Tensor, made: Tensor) -> Tensor:
    """exp(mean over all pairs i, j of -|z_i - z_j|^2 |G_i - G_j|), FedGen's diversity term: 1 where all are alike.

    z: [B, noise], made: [B, Z]; each norm is a mean over the width. Pairs of a row with itself count, too.
    """
    apart = (z[:, None] - z).square().mean(-1) * (made[:, None] - made).abs().mean(-1)
    return (-apart).mean().exp()


def teaching(logits: Tensor, y: Tensor, counts: Tensor, how: Literal["weighted_ce", "ce_of_mean_logits"]) -> Tensor:
    """How badly K clients together recognise rows as y [B]: logits [K, B, C], their numbers of rows by label [K, C].

    weighted_ce: sum over k of the mean over rows of w_ky CE, where w is a client's share of 1 + counts of a label.
    """
    if how == "ce_of_mean_logits":
        return cross_entropy(logits.mean(0), y)
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view(len(logits), -1)
    share = (1 + counts) / (1 + counts).sum(0)
    return (share[:, y] * each).mean(1).sum()
