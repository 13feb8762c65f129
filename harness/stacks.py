"""Whether clients had better train one by one or several at once: both are tried, for `fedstill plan` to say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.config import Trial
from harness.registry import label
from harness.tryout import Sample

MOST_TOGETHER = 16
WORTH = 1.1  # times as fast: less than that may be noise


def pairs(cells: Iterable[Trial]) -> list[tuple[Trial, Trial]]:
    """What to try, of cells that train one by one: one for each net and batch size, as it is and together."""
    alone: dict[tuple[object, ...], Trial] = {}
    for cell in cells:
        if cell.together == 1 and cell.cohort > 1:
            alone.setdefault((cell.dataset, cell.net, tuple(cell.fleet.nets), cell.local.batch), cell)
    stacks = [cell.model_copy(update={"together": min(MOST_TOGETHER, cell.cohort)}) for cell in alone.values()]
    return list(zip(alone.values(), stacks, strict=True))


def told(tried: Sequence[tuple[Trial, Trial]], seen: Sequence[Sample | None]) -> list[str]:
    """A line for each pair, by the samples of their members in turn."""
    found = zip(tried, seen[::2], seen[1::2], strict=True)
    lines = [_said(stacked, [alone, together]) for (_, stacked), alone, together in found]
    return [line for line in lines if line]


def _said(cell: Trial, seen: Sequence[Sample | None]) -> str:
    """What to do about it; empty if it could not be tried."""
    pace = [_pace(sample) for sample in seen]
    if not all(pace):
        return ""
    gain, what = pace[0] / pace[1], f"{label(cell.method)} on {cell.net}, batch {cell.local.batch}"
    if gain < WORTH:
        return f"One by one is right for {what}: together={cell.together} trains {gain:.2g} times as fast."
    return (
        f"{what}: together={cell.together} trains {gain:.2g} times as fast. Numbers differ in their last digits: "
        "give it to all trials that are compared, or to none."
    )


def _pace(sample: Sample | None) -> float:
    """Seconds of training for a row, warm; 0: not known."""
    visits = [visit for one in (sample.rounds if sample else ()) if not one.cold for visit in one.visits]
    load = sum(visit.load for visit in visits)
    return sum(visit.seconds for visit in visits) / load if load else 0.0
