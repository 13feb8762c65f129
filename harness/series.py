"""What a page keeps of a trial's rounds: summaries, thinned curves, recalls; and how they travel in little room."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
WINDOW = 10  # rounds of the headline's mean
POINTS = 200  # of a curve, at most
FEWEST = 20  # to which curves are thinned before metrics are left out
VALUES = 2_500_000  # of all curves together, at most: about 3 MB of the page
LEVELS = 10_000  # steps of a value's range: four digits
MISSING = 0xFFFF
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


def seen(rounds: pd.DataFrame, metrics: Sequence[str]) -> dict[str, list[Seen]]:
    """By trial: its models in the order of their rows. rounds: the table, of any number of trials."""
    evaluated = rounds[rounds["accuracy"].notna()]
    found: dict[str, list[Seen]] = {}
    for (trial_id, role), own in evaluated.groupby(["trial_id", "role"], sort=False):
        at = own["round"].to_numpy(np.int64)
        values = {name: own[name].to_numpy(np.float64) for name in metrics if name in own}
        late = own["recall"].to_numpy()[at > at[-1] - WINDOW] if "recall" in own else ()
        lists = [np.asarray(one, np.float64) for one in late if one is not None]
        recall = np.mean(lists, axis=0) if lists and len({len(one) for one in lists}) == 1 else None
        kept = {name: value for name, value in values.items() if not np.isnan(value).all()}
        found.setdefault(str(trial_id), []).append(Seen(str(role), at, kept, recall))
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


def short(value: float | None) -> float | None:
    """Six digits, and None for what is not finite: what a page needs of a number."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None
