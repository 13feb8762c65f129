"""Counts of a model on rows with known labels, and every metric derived from them.

Counts are kept per class: rows, hits, predictions. They are the diagonal and the margins of the confusion matrix,
and all that the metrics here need; they add up exactly, so shards of a test set may be scored anywhere in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.nets import Net
from harness.trees import Tree

BINS = 15  # of the expected calibration error, Guo et al. 2017
LISTED = 1000  # classes up to which every round keeps the recall of each
Vector = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Counts:
    """What was seen on some rows. Per class [C]: rows, hits, predicted. Per confidence bin [15]: rows, hits, sums."""

    rows: Vector
    hits: Vector
    predicted: Vector
    bin_rows: Vector
    bin_hits: Vector
    bin_confidence: Vector
    loss: float  # sum of cross-entropies, nats

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


@torch.no_grad()
def count(net: Net, p: Tree, x: Tensor, y: Tensor) -> Counts:
    """Scores a shard: x [B, ...] ready for the net, y [B]."""
    return count_logits(net.frozen(p, x), y)


@torch.no_grad()
def count_logits(logits: Tensor, y: Tensor) -> Counts:
    """The same from logits [B, C]."""
    classes = logits.shape[1]
    shares = F.log_softmax(logits, 1)
    best, guess = shares.max(1)
    confidence, hit = best.exp(), guess == y
    bins = (confidence * BINS).long().clamp_(0, BINS - 1)

    def tally(index: Tensor, length: int, weight: Tensor | None = None) -> Vector:
        summed = torch.bincount(index, None if weight is None else weight.double(), minlength=length)
        return summed.double().cpu().numpy()

    return Counts(
        rows=tally(y, classes),
        hits=tally(y[hit], classes),
        predicted=tally(guess, classes),
        bin_rows=tally(bins, BINS),
        bin_hits=tally(bins[hit], BINS),
        bin_confidence=tally(bins, BINS, confidence),
        loss=float(-shares.gather(1, y[:, None]).double().sum()) + 0.0,
    )


def metrics(counts: Counts, tail: Mask) -> dict[str, Any]:
    """The metrics of a model on a test set.

    tail: [C] of bool, the classes with the fewest training rows. Shares are in [0, 1], the loss in nats a row.
    Classes without test rows are left out of the means over classes. recall is None for more classes than LISTED.
    """
    there = counts.rows > 0
    total = counts.rows.sum()
    recall = recall_of(counts)
    f1 = 2 * counts.hits[there] / (counts.rows[there] + counts.predicted[there])
    of_tail = recall[there & tail]
    return {
        "accuracy": float(counts.hits.sum() / total),
        "balanced_accuracy": float(recall[there].mean()),
        "macro_f1": float(f1.mean()),
        "worst_recall": float(recall[there].min()),
        "tail_recall": float(of_tail.mean()) if len(of_tail) else None,
        "loss": counts.loss / float(total),
        "ece": float(np.abs(counts.bin_hits - counts.bin_confidence).sum() / total),
        "recall": [float(r) for r in recall] if len(recall) <= LISTED else None,
    }


def validated(counts: Counts) -> dict[str, float]:
    """Those of a model on validation rows. Without any rows there are none, and the result is empty."""
    if not counts.rows.sum():
        return {}
    found = metrics(counts, np.zeros(len(counts.rows), dtype=bool))
    return {f"validation_{name}": found[name] for name in ("accuracy", "balanced_accuracy", "loss")}


def recall_of(counts: Counts) -> Vector:
    """Recall of each class [C]; NaN for classes without rows."""
    return np.divide(counts.hits, counts.rows, out=np.full_like(counts.rows, np.nan), where=counts.rows > 0)


def own_label_metrics(recall: Vector, mixes: Vector) -> dict[str, float]:
    """Accuracy that each client would see on its own label mix, from the global model's recall.

    recall: [C] with NaN for classes without test rows; mixes: [N, C] rows that add up to 1. A client whose labels
    have no test rows is left out; without any client there is no such accuracy, and the result is empty.
    """
    known = ~np.isnan(recall)
    covered = mixes[:, known].sum(1)
    scores = (mixes[:, known] @ recall[known])[covered > 0] / covered[covered > 0]
    return spread(scores) if len(scores) else {}


def spread(scores: Vector) -> dict[str, float]:
    """Mean over clients [N], mean of the worst tenth (at least one client), standard deviation."""
    worst = np.sort(scores)[: max(1, round(len(scores) / 10))]
    return {
        "own_label_accuracy": float(scores.mean()),
        "own_label_worst_decile": float(worst.mean()),
        "own_label_std": float(scores.std()),
    }


def tail_classes(train_rows: Vector, share: float) -> Mask:
    """[C] of bool: the `share` of classes with the fewest training rows, at least one; ties by class number."""
    picked = np.argsort(train_rows, kind="stable")[: max(1, round(share * len(train_rows)))]
    mask = np.zeros(len(train_rows), dtype=bool)
    mask[picked] = True
    return mask
