"""Leaderboards of a results folder, from its tables only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import durable, tables
from harness.metrics import HEADLINE, wants_rounds
from harness.record import Row, Store
from harness.refusal import Refused
from harness.statistics import Summary, measured, summarise


def table(results: Path | str, metric: str = HEADLINE, baseline: str | None = None) -> Summary:
    """The leaderboard of one metric with its statistics: see `statistics.summarise`.

    Raises Refused for no trials and for an unknown metric or baseline.
    """
    store = Store(results, writable=False)
    trials = _trials(store)
    rounds = store.rows("rounds") if wants_rounds(metric, trials) else ()
    return summarise(trials, rounds, metric, baseline)


def markdown(results: Path | str, metric: str = HEADLINE, baseline: str | None = None) -> str:
    """All leaderboards of a results folder, that of `metric` first and in full, as Markdown."""
    trials, first = _trials(Store(results, writable=False)), table(results, metric, baseline)
    others = [summarise(trials, (), name, compare=False) for name in measured(trials) if name != metric]
    return tables.markdown(Path(results).resolve().name, first, others)


def write(results: Path | str, metric: str = HEADLINE, baseline: str | None = None) -> Path:
    """Write `markdown` to <results>/leaderboard.md, whole or not at all; returns its path."""
    target = Path(results) / "leaderboard.md"
    text = markdown(results, metric, baseline)
    try:
        durable.write(target, text.encode())
    except OSError as problem:
        raise Refused(f"{target} can't be written: {problem.strerror or problem}") from None
    return target


def _trials(store: Store) -> Sequence[Row]:
    if trials := store.rows("trials"):
        return trials
    raise Refused(f"{store.path} has no trials yet: `fedstill sweep CARD --results {store.path}` makes them")
