"""What a page keeps of a trial's rounds: summaries, thinned curves, recalls; and how they travel in little room."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
WINDOW = 10  # rounds of the headline's mean
POINTS = 200  # of a curve, at most
FEWEST = 20  # to which curves are thinned before metrics are left out
VALUES = 2_500_000  # of all curves together, at most: about 3 MB of the page
LEVELS = 10_000  # steps of a value's range: four digits
MISSING = 0xFFFF
METRICS = (  # columns of the table of rounds
    *("accuracy", "balanced_accuracy", "macro_f1", "worst_recall", "tail_recall", "loss", "ece"),
    *("own_label_accuracy", "own_label_worst_decile", "own_label_std"),
    *("validation_accuracy", "validation_balanced_accuracy", "validation_loss", "train_loss"),
)
COLUMNS = ("trial_id", "round", "role", "recall", *METRICS)
SUMMARIES = ("last10", "last", "best", "auc")


@dataclass(frozen=True, eq=False)
class Seen:
    """The evaluated rounds of one model of a trial.

    rounds: [T] from 0; values: metric -> [T], NaN where it was not measured; recall: [C] by class, mean over the last
    10 rounds, or None where it was not kept.
    """

    role: str
    rounds: Ints
    values: Mapping[str, Floats]
    recall: Floats | None


def seen(rounds: Mapping[str, np.ndarray]) -> dict[str, list[Seen]]:
    """By trial: its models, by role. rounds: columns of that table, of any number of trials; see `Store.arrays`."""
    if "accuracy" not in rounds or not len(rounds["accuracy"]):
        return {}
    trials, own = np.unique(rounds["trial_id"].astype(str), return_inverse=True)
    roles, kind = np.unique(rounds["role"].astype(str), return_inverse=True)
    order = np.lexsort((rounds["round"], kind, own))
    order = order[~np.isnan(rounds["accuracy"][order])]  # a round that was not evaluated has no point on a curve
    places = own[order] * len(roles) + kind[order]
    found: dict[str, list[Seen]] = {}
    for part in np.split(order, np.flatnonzero(np.diff(places)) + 1) if len(order) else ():
        at = rounds["round"][part].astype(np.int64)
        values = {name: rounds[name][part] for name in METRICS if name in rounds}
        kept = {name: value for name, value in values.items() if not np.isnan(value).all()}
        late = [one for one in rounds["recall"][part[at > at[-1] - WINDOW]] if one is not None and len(one)]
        recall = np.mean(late, axis=0) if late and len({len(one) for one in late}) == 1 else None
        found.setdefault(str(trials[own[part[0]]]), []).append(Seen(str(roles[kind[part[0]]]), at, kept, recall))
    return found


def summary(model: Seen, metric: str, high: bool = True) -> dict[str, float]:
    """The four summaries of a curve, as `headline` has them for accuracy; those that are finite numbers."""
    values = model.values.get(metric)
    if values is None:
        return {}
    there = ~np.isnan(values)
    at, value = model.rounds[there], values[there]
    span = float(at[-1] - at[0])
    area = float(np.trapezoid(value, at)) / span if span else float(value[0])
    found = {
        "last10": float(value[at > at[-1] - WINDOW].mean()),
        "last": float(value[-1]),
        "best": float(value.max() if high else value.min()),
        "auc": area,
    }
    return {name: number for name, number in found.items() if np.isfinite(number)}


def points(series: int, metrics: int) -> tuple[int, int]:
    """How many points of a curve, and how many of the metrics, a page has room for."""
    each = VALUES // max(1, series * metrics)
    return min(POINTS, max(FEWEST, each)), max(1, min(metrics, VALUES // max(1, series * FEWEST)))


def thin(length: int, most: int) -> Ints:
    """Which of so many points are kept: evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(np.int64))


def levels(values: Floats, whole: bool) -> tuple[float, float, npt.NDArray[np.uint16]]:
    """Values [T] as low + step * level; MISSING for NaN. whole: of fractions, whose low is 0 and step 1/LEVELS."""
    known = values[np.isfinite(values)]
    if whole and len(known) and known.min() >= 0 and known.max() <= 1:
        low, step = 0.0, 1 / LEVELS
    else:
        low = float(known.min()) if len(known) else 0.0
        step = (float(known.max()) - low) / LEVELS if len(known) else 0.0
    scaled = np.rint((values - low) / (step or 1.0))
    return low, step, np.where(np.isfinite(values), scaled, MISSING).astype(np.uint16)


def pack_curves(curves: Mapping[int, tuple[float, float, npt.NDArray[np.uint16]]]) -> str:
    """Levels by the number of their curve, for the page, little-endian: how many (uint32), their numbers (uint32),
    lows and steps (float32), then the differences between levels, all low bytes before all high ones.

    Neighbouring rounds are alike, so differences are small and their high bytes are nearly all the same.
    """
    head = np.array([len(curves), *curves], "<u4").tobytes()
    ends = np.array([[low, step] for low, step, _ in curves.values()], "<f4").T.tobytes()
    steps = [np.diff(level, prepend=np.uint16(0)) for _, _, level in curves.values()]
    wrapped = np.concatenate([np.empty(0, np.uint16), *steps]).astype("<u2")
    return pack_bytes(head + ends + (wrapped & 0xFF).astype("u1").tobytes() + (wrapped >> 8).astype("u1").tobytes())


def pack(content: Any) -> str:
    """JSON, packed. Raises ValueError for a number that JSON does not have."""
    return pack_bytes(json.dumps(content, separators=(",", ":"), allow_nan=False).encode())


def pack_bytes(content: bytes) -> str:
    """gzip in base64, the same for the same content."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def unpack(text: str) -> bytes:
    """What `pack_bytes` packed. Raises ValueError or OSError for anything else."""
    return gzip.decompress(base64.b64decode(text, validate=True))


def short(value: float | None) -> float | None:
    """Six digits, and None for what is not finite: what a page needs of a number."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None
