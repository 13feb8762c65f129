"""Who holds which classes: the counts behind a page's heat maps, dealt again from data that is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness import config, data, partitions
from harness.record import Row

MOST = 12  # heat maps on a page
WIDEST = 200  # clients of one
TALLEST = 100  # classes
SLOW = ("images", "glosses", "posts")  # formats that take long to read, or whose classes are words


def deals(trials: Iterable[Row], known: Mapping[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The deals of at most a dozen different partitions, of the lowest seed first.

    trials: rows of the table. known: deals that were made before, by hash. A deal
    whose hash is not the recorded one is left out, and so is data that is not at hand: nothing is downloaded.
    """
    firsts: dict[str, Row] = {}
    for row in sorted(trials, key=lambda row: (int(row["seed"]), str(row["dataset"]), row["alpha"] or 0.0)):
        if row.get("partition_hash"):
            firsts.setdefault(str(row["partition_hash"]), row)
    found = []
    loaded: dict[str, data.Arrays | None] = {}
    for digest, row in firsts.items():
        deal = (known or {}).get(digest) or _deal(digest, row, loaded)
        if deal is not None:
            found.append(deal)
        if len(found) == MOST:
            break
    return found


def _deal(digest: str, row: Row, loaded: dict[str, data.Arrays | None]) -> dict[str, Any] | None:
    name = str(row["dataset"])
    try:
        about = data.card(name)
        if name not in loaded:
            loaded[name] = None if about.format in SLOW else data.load(about, download=False)
        arrays = loaded[name]
        if arrays is None:
            return None
        trial = config.Trial.model_validate_json(row["config"])
        split = partitions.divide(arrays.y_train, about.classes, trial, arrays.domains_train)
    except (ValueError, KeyError, OSError):  # Refused: not at hand; a config of other rules
        loaded.setdefault(name, None)
        return None
    if split.digest != digest:
        return None
    return {
        "hash": digest,
        "trial": str(row["trial_id"]),
        "dataset": name,
        "clients": len(split.counts),
        "classes": about.classes,
        "counts": split.counts[:WIDEST, :TALLEST].tolist(),
    }
