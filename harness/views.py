"""What a page lets its readers look at: metrics, and what they are measured on."""

from __future__ import annotations

from typing import Any

from harness.arrangement import Arrangement
from harness.series import METRICS

HIGH, LOW = True, False
# Column of the table of rounds -> title, unit, scale, whether more is better, digits.
TITLES: dict[str, tuple[str, str, float, bool, int]] = {
    "accuracy": ("Accuracy", "%", 100, HIGH, 2),
    "balanced_accuracy": ("Balanced accuracy", "%", 100, HIGH, 2),
    "macro_f1": ("Macro F1", "%", 100, HIGH, 2),
    "worst_recall": ("Recall of the worst class", "%", 100, HIGH, 2),
    "tail_recall": ("Recall of the tail classes", "%", 100, HIGH, 2),
    "loss": ("Loss", "nats", 1, LOW, 3),
    "ece": ("Calibration error", "%", 100, LOW, 2),
    "own_label_accuracy": ("Accuracy, mean over clients", "%", 100, HIGH, 2),
    "own_label_worst_decile": ("Accuracy, worst tenth of the clients", "%", 100, HIGH, 2),
    "own_label_std": ("Spread between clients (standard deviation)", "%", 100, LOW, 2),
    "validation_accuracy": ("Accuracy", "%", 100, HIGH, 2),
    "validation_balanced_accuracy": ("Balanced accuracy", "%", 100, HIGH, 2),
    "validation_loss": ("Loss", "nats", 1, LOW, 3),
    "train_loss": ("Training loss", "nats", 1, LOW, 3),
}
TARGETS = {"rounds": ("Rounds until accuracy", "rounds", 1.0), "bytes": ("Traffic until accuracy", "MB", 1e-6)}
TEST = METRICS[:7]
OWN = METRICS[7:10]
# What is measured on what: key, title, whose models, metrics.
VIEWS = (
    ("global", "Global test set", "global", TEST),
    ("own", "Global models on each client's label mix", "global", OWN),
    ("personal", "Personal models on their client's test rows", "personal", (*TEST, *OWN)),
    ("domain", "Domains of the test set", "domain", TEST),
    ("validation", "Clients' validation rows", "any", METRICS[10:13]),
    ("training", "Clients' training rows", "any", ("train_loss",)),
)


def viewed(plan: Arrangement) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The views with something to show, and how their metrics are shown, by name."""
    views: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, Any]] = {}
    for key, title, kind, names in VIEWS:
        found = [name for name in names if any(plan.measured(kind, name))]
        if found:
            views.append({"key": key, "title": title, "models": kind, "metrics": found})
            for name in found:
                what, unit, scale, high, digits = TITLES[name]
                metrics[name] = {"title": what, "unit": unit, "scale": scale, "high": high, "digits": digits}
    if targets := plan.targets():
        views.append({"key": "targets", "title": "What a target costs", "models": "any", "metrics": targets})
    for name in targets:
        what, _, target = name.partition("_to_")
        title, unit, scale = TARGETS[what]
        metrics[name] = {"title": f"{title} {target}", "unit": unit, "scale": scale, "high": LOW, "digits": 1}
    return views, metrics
