"""Pictures of a leaderboard: ranks that are not told apart, profiles of runs, means along a setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from harness.inference import Ranking, profile
from harness.places import config_of
from harness.plots import BANDS, COLOURS, Undrawn, blank, legend, panels, save, stride, styles
from harness.record import Row
from harness.statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Settings that are drawn as an axis where they vary.
AXES = (
    *("partition.alpha", "partition.shards_per_client", "partition.classes_per_client", "partition.size_alpha"),
    *("partition.long_tail", "partition.shift_level", "participation", "clients"),
)
BAR, LINE = 0.16, 0.24  # heights in a diagram of ranks: of a bar over equals, of a method's name


def critical_difference(summary: Summary, path: Path | str) -> Path:
    """Draw the average ranks, best to the left, and bars over those that Nemenyi's test does not tell apart.

    After Demsar (2006). Returns the file's path. Raises Undrawn where there is nothing to rank.
    """
    found = summary.ranking
    if found is None:
        raise Undrawn("ranks need two methods or more that all have a value at two settings or more")
    last = len(found.ranks)
    deep = BAR * len(found.cliques) + LINE * ((last + 1) // 2)
    figure = blank(8.5, 1.5 + deep)
    axes = figure.add_subplot()
    axes.set(xlim=(1 - 0.5 * last, last + 0.5 * last), ylim=(-deep - 0.3, 1))
    axes.set_axis_off()
    axes.plot([1, last], [0, 0], color="black", lw=1)
    for rank in range(1, last + 1, stride(last, 24)):
        axes.plot([rank, rank], [0, 0.07], color="black", lw=1)
        axes.text(rank, 0.1, str(rank), ha="center", va="bottom", fontsize=8)
    _ruler(axes, found.critical)
    for at, clique in enumerate(found.cliques):
        ends, height = (found.ranks[clique[0]], found.ranks[clique[-1]]), -0.1 - BAR * at
        axes.plot([ends[0] - 0.03, ends[1] + 0.03], [height, height], color=COLOURS[1], lw=3.5, solid_capstyle="butt")
    _names(axes, found, [line.name for line in summary.ranked])
    axes.set_title(
        f"Average rank over {found.n} settings, 1 is best (Friedman p = {found.p:.2g}); "
        "bars: not told apart (Nemenyi, 5 %)",
        fontsize=9,
    )
    return save(figure, path)


def _ruler(axes: Axes, length: float) -> None:
    axes.plot([1, 1 + length], [0.5, 0.5], color="black", lw=1)
    for end in (1, 1 + length):
        axes.plot([end, end], [0.45, 0.55], color="black", lw=1)
    axes.text(1 + length / 2, 0.57, f"critical difference {length:.2f}", ha="center", va="bottom", fontsize=8)


def _names(axes: Axes, found: Ranking, names: Sequence[str]) -> None:
    """The better half to the left, from the top; the others to the right, from the bottom."""
    order = sorted(range(len(names)), key=lambda at: found.ranks[at])
    half = (len(order) + 1) // 2
    for at, method in enumerate(order):
        left = at < half
        height = -BAR * len(found.cliques) - LINE * ((at if left else len(order) - 1 - at) + 1)
        end, rank = (0.9 if left else len(order) + 0.1), found.ranks[method]
        axes.plot([rank, rank, end], [0, height, height], color="black", lw=0.7)
        text = f"{names[method]}  {rank:.2f} " if left else f" {rank:.2f}  {names[method]}"
        axes.text(end, height, text, ha="right" if left else "left", va="center", fontsize=8)


def performance_profile(summary: Summary, path: Path | str) -> Path:
    """Draw the share of runs beyond each value, a line per method (Agarwal et al. 2021), of few with its 95 % band.

    Only lines with two values or more at every setting; every setting counts the same. Returns the file's path.
    Raises Undrawn where there is none.
    """
    strata = {
        line.name: [list(cell.values.values()) for cell in cells]
        for line, cells in zip(summary.lines, summary.cells, strict=True)
        if all(cell.n > 1 for cell in cells)
    }
    if not strata:
        raise Undrawn("a profile needs a method with two seeds or more at every setting")
    every = np.concatenate([values for cells in strata.values() for values in cells])
    room = 0.03 * max(float(np.ptp(every)), 1e-9)
    at = np.linspace(every.min() - room, every.max() + room, 400)
    figure = blank(8, 4.4)
    axes = figure.add_subplot()
    style = styles(sorted(line.name for line in summary.lines))
    for name, cells in strata.items():
        share, low, high = profile(cells, at)
        if not summary.how.high:
            share, low, high = 1 - share, 1 - high, 1 - low
        axes.plot(at, share, lw=1.5, label=name, **style[name])
        if len(strata) <= BANDS:
            axes.fill_between(at, low, high, color=style[name]["color"], alpha=0.12, lw=0)
    beyond = "above" if summary.how.high else "at most"
    axes.set(xlabel=summary.title, ylabel=f"share of runs {beyond} it", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3, lw=0.5)
    legend(figure, [axes], list(strata))
    return save(figure, path)


def along(summary: Summary, trials: Sequence[Row], key: str, path: Path | str) -> Path:
    """Draw the means by a setting that varies, such as partition.alpha, with their 95 % intervals.

    A panel for every combination of the other settings. Returns the file's path. Raises Undrawn if the key has fewer
    than two numbers in these trials.
    """
    found = numbers(summary, trials, key)
    ticks = sorted(set(found.values()))
    if len(ticks) < 2:
        raise Undrawn(f"{key} has fewer than two numbers in these trials: there is no axis to draw")
    rests: dict[str, list[int]] = {}
    for column in sorted(found, key=lambda column: found[column]):
        starts = (f"{key}=", f"{key.rpartition('.')[2]}=")
        parts = [part for part in summary.settings[column].split(", ") if not part.startswith(starts)]
        rests.setdefault(", ".join(parts), []).append(column)
    figure, grid = panels(len(rests))
    wide = ticks[0] > 0 and ticks[-1] / ticks[0] >= 5
    for axes, (rest, columns) in zip(grid, rests.items(), strict=True):
        axes.set_xscale("log" if wide else "linear")
        _means(axes, summary, {column: found[column] for column in columns})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(title=rest, xlabel=key)
    grid[0].set_ylabel(fill(summary.title, 36))
    legend(figure, grid, [line.name for line in summary.lines])
    return save(figure, path)


def _means(axes: Axes, summary: Summary, places: Mapping[int, float]) -> None:
    """A line with its intervals for each method; side by side, so that the intervals can be told apart."""
    style = styles(sorted(line.name for line in summary.lines))
    log = axes.get_xscale() == "log"
    ends = [math.log(at) if log else at for at in places.values()]
    step = 0.012 * (max(ends) - min(ends) or 1)
    for number, (line, cells) in enumerate(zip(summary.lines, summary.cells, strict=True)):
        shift = step * (number - (len(summary.lines) - 1) / 2) * min(1, 8 / len(summary.lines))
        known = [(at, cells[column]) for column, at in places.items() if cells[column].n]
        x = [at * math.exp(shift) if log else at + shift for at, _ in known]
        means = [cell.mean or 0.0 for _, cell in known]
        low = [mean if cell.low is None else cell.low for mean, (_, cell) in zip(means, known, strict=True)]
        high = [mean if cell.high is None else cell.high for mean, (_, cell) in zip(means, known, strict=True)]
        axes.vlines(x, low, high, color=style[line.name]["color"], lw=1.2)
        axes.plot(x, means, marker="o", ms=3.5, lw=1, label=line.name, **style[line.name])


def numbers(summary: Summary, trials: Sequence[Row], key: str) -> dict[int, float]:
    """Column of the board -> the number that a config key has there; columns without one are left out."""
    rows, found = {str(row["trial_id"]): row for row in trials}, dict[int, float]()
    for column in range(len(summary.settings)):
        first = next((cells[column].trial_ids[0] for cells in summary.cells if cells[column].trial_ids), None)
        value = config_of(rows[first]).get(key) if first else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[column] = float(value)
    return found


def drawn(summary: Summary, trials: Sequence[Row]) -> list[str]:
    """The settings of `AXES` that vary here."""
    return [key for key in AXES if len(set(numbers(summary, trials, key).values())) > 1]
