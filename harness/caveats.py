"""What a reader of a leaderboard must know of its rows: nothing that is missing, uneven or mixed goes unsaid."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from harness.cells import Grid, Line
from harness.inference import SIGNED_FROM
from harness.places import Place
from harness.record import Row

FEW = 5  # seeds below which an interval deserves a warning
MOST_NAMED = 3  # of a kind, before they are only counted


def caveats(
    searched: int, kept: Sequence[Row], places: Mapping[str, Place], grid: Grid, against: Line | None
) -> tuple[str, ...]:
    """The notes below a table. searched: trials of a search; kept: rows of the others; grid: what became of them."""
    return (
        *_legend(grid, against),
        *_seeds(grid),
        *_pairs(grid, against),
        *_gaps(grid),
        *_budgets(grid),
        *_left_out(searched, grid),
        *_lost(kept, places),
        *_origins(kept),
    )


def _legend(grid: Grid, against: Line | None) -> Iterable[str]:
    kinds = {cell.interval.kind for line in grid.cells for cell in line if cell.interval}
    way = {
        "t": "Student's t (fewer than 5 values)",
        "bootstrap": "a bootstrap over seeds (10,000 resamples, percentiles widened for small n)",
    }
    yield f"Cells ({grid.how.unit}): mean{' ± standard deviation' if kinds else ''} over n seeds."
    if kinds:
        yield f"In brackets: 95 % intervals of the mean, by {'; by '.join(way[kind] for kind in sorted(kinds))}."
    if any(cell.letters for line in grid.cells for cell in line):
        yield (
            "Letters: methods of a column that share one are not told apart (paired by seed, Holm-corrected over the "
            "pairs of the column, 5 %)."
        )
    if against is not None and (tests := {d.paired.test for d in _differences(grid)} - {"none"}):
        yield (
            f"Differences to {against.name}: same seed and same partition, p by {_tests(tests)}, Holm-corrected over "
            f"all comparisons of the table ({sum(d.paired.p is not None for d in _differences(grid))})."
        )


def _tests(tests: set[str]) -> str:
    texts = {
        "t": f"the paired t test (fewer than {SIGNED_FROM} pairs)",
        "signed-rank": f"Wilcoxon's signed-rank test (from {SIGNED_FROM} pairs on)",
    }
    return " or ".join(texts[test] for test in sorted(tests, reverse=True))


def _differences(grid: Grid) -> list:  # type: ignore[type-arg]
    return [cell.difference for line in grid.cells for cell in line if cell.difference is not None]


def _seeds(grid: Grid) -> Iterable[str]:
    sizes = {cell.n for line in grid.cells for cell in line if cell.n}
    if sizes and min(sizes) < FEW:
        yield f"Fewer than {FEW} seeds (n = {min(sizes)}): the intervals are wide; differences may be chance."
    if len(sizes) > 1:
        yield f"The number of seeds differs between cells: from {min(sizes)} to {max(sizes)}."
    for at, setting in enumerate(grid.settings):
        sets = {tuple(sorted(line[at].partitions)) for line in grid.cells if line[at].partitions}
        if len(sets) > 1 and len({len(seeds) for seeds in sets}) == 1:
            yield f"The seeds differ between the methods at {setting}: {_some(map(_spelled, sorted(sets)), ' and ')}."


def _spelled(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _pairs(grid: Grid, against: Line | None) -> Iterable[str]:
    odd = [
        f"{line.name} at {cell.setting} ({cell.difference.unpaired})"
        for line, cells in zip(grid.lines, grid.cells, strict=True)
        for cell in cells
        if cell.difference is not None and cell.difference.unpaired
    ]
    if odd and against is not None:
        yield f"Seeds without one of {against.name} with the same partition, left out of differences: {_some(odd)}."


def _gaps(grid: Grid) -> Iterable[str]:
    empty = [
        f"{line.name} at {cell.setting}"
        for line, cells in zip(grid.lines, grid.cells, strict=True)
        for cell in cells
        if not cell.trial_ids
    ]
    if empty:
        yield f"No trials: {_some(empty)}. Rows with gaps stand below the complete ones."
    short = sum(cell.absent > 0 for line in grid.cells for cell in line)
    if short and grid.how.absent == "not reached":
        yield f"In {short} cells some seeds did not reach the target; the means are over those that did: too good."


def _budgets(grid: Grid) -> Iterable[str]:
    """Local steps are the same for all methods at a setting, unless a method takes phases or pools of its own."""
    for column, what in (("steps", "local"), ("server_steps", "server")):
        odd, others = defaultdict[str, list[float]](list), list[float]()
        for at in range(len(grid.settings)):
            # One line per entry: the roles of one trial share its budget.
            spent = {ln.entry: getattr(line[at], column) for ln, line in zip(grid.lines, grid.cells, strict=True)}
            known = {entry: steps for entry, steps in spent.items() if steps is not None}
            usual = Counter(known.values()).most_common(1)[0][0] if known else 0
            for entry, steps in known.items():
                (others if steps == usual else odd[entry]).append(steps)
        if odd:
            texts = [f"{entry} {_range(steps)}" for entry, steps in odd.items()]
            yield f"Budgets differ, {what} steps per trial: {_some(texts, most=12)}; others {_range(others)}."


def _range(steps: Sequence[float]) -> str:
    return " to ".join(f"{end:,.0f}" for end in sorted({min(steps), max(steps)}))


def _left_out(searched: int, grid: Grid) -> Iterable[str]:
    if searched:
        yield f"{searched} trials of a search are left out."
    if grid.left_out:
        yield (
            f"{len(grid.left_out)} trials were repeated with newer rules or later, and are left out: "
            f"{_some(grid.left_out)}."
        )


def _lost(trials: Sequence[Row], places: Mapping[str, Place]) -> Iterable[str]:
    lost = defaultdict[str, list[Row]](list)
    for row in trials:
        if row["status"] != "done":
            entry = places[str(row["trial_id"])].entry
            lost[f"{entry} {row['status']}: {row.get('reason') or 'no reason recorded'}"].append(row)
    for what, rows in lost.items():
        at = dict.fromkeys(places[str(row["trial_id"])].setting for row in rows)
        yield f"{len(rows)} x {what} (at {_some(at, '; ')}: trial {_some(str(row['trial_id']) for row in rows)})"


def _origins(trials: Sequence[Row]) -> Iterable[str]:
    code = {(row.get("commit"), row.get("rules_version")) for row in trials}
    if len(code) > 1:
        yield f"The trials come from {len(code)} different versions of the code: see the column commit."
    if dirty := sum(row.get("clean") is False for row in trials):
        yield f"{dirty} of {len(trials)} trials ran with uncommitted changes to the code: see the column clean."
    if drifted := sum(bool(row.get("drift")) for row in trials):
        yield f"{drifted} trials went on with another version of the software: see the column drift."
    devices = sorted({str(row["device"]) for row in trials if row.get("device")})
    if len(devices) > 1:
        yield f"The trials ran on different devices: {', '.join(devices)}."


def _some(things: Iterable[str], between: str = ", ", most: int = MOST_NAMED) -> str:
    every = list(things)
    return between.join([*every[:most], *(["..."] if len(every) > most else [])])
