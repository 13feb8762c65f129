"""Pictures from the tables, PNG or SVG by the name of the file, drawn without a display. The place of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.places import competing, grouped
from harness.record import SCHEMAS, Store
from harness.refusal import Refused, unknown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart; yellow left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[str, ...] = ("-", "--", ":", "-.")
BANDS = 8  # lines in a picture, up to which bands around them can be told apart
ANNOTATED = 400  # cells: with more of them the numbers would not be readable


class Undrawn(Refused):
    """There is nothing to draw."""


def partition_heatmap(counts: np.ndarray, title: str, path: Path | str) -> Path:
    """Draw who holds what. counts: [N, C] rows of each class at each client. Returns the PNG's path."""
    from matplotlib.colors import PowerNorm

    counts = np.asarray(counts)
    clients, classes = counts.shape
    width, height = np.clip(0.16 * clients, 6, 22) + 1.5, np.clip(0.16 * classes, 2.5, 16) + 1.4
    figure = blank(width, height)
    axes = figure.add_subplot()
    # The square root keeps small holdings visible beside large ones; white is reserved for none at all.
    shown = np.ma.masked_equal(counts.T, 0)
    top = max(int(counts.max(initial=0)), 1)
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=PowerNorm(0.5, vmin=0, vmax=top)
    )
    for axis, count, room in ((axes.xaxis, clients, width / 0.35), (axes.yaxis, classes, height / 0.2)):
        axis.set_ticks(np.arange(0, count, stride(count, room)))
    if counts.size <= ANNOTATED:
        for client, label in zip(*np.nonzero(counts), strict=True):
            value = int(counts[client, label])
            ink = "white" if value > top / 4 else "black"
            axes.text(client, label, str(value), ha="center", va="center", fontsize=6, color=ink)
    axes.set(title=title, xlabel=f"client ({clients})", ylabel=f"class ({classes})")
    figure.colorbar(image, ax=axes, label="training rows (white: none)", pad=0.01, fraction=0.04, aspect=30)
    return save(figure, path)


def learning_curves(results: Path | str, path: Path | str, metric: str = "accuracy") -> Path:
    """Draw a column of the table `rounds` by round: a panel per setting, a line per method and role.

    A line is the mean over seeds; of few lines each has a band, one standard deviation to either side. Only trials
    that are done, and of no search, take part. Returns the PNG's path. Raises Undrawn if there is nothing to draw.
    """
    curves = _curves(Store(results, writable=False), metric)
    if curves.empty:
        raise Undrawn(f"no finished trial in {results} has the metric {metric!r} in its rounds")
    settings, names = list(dict.fromkeys(curves["setting"])), sorted(set(curves["name"]))
    style = styles(names)
    figure, grid = panels(len(settings))
    for axes, setting in zip(grid, settings, strict=True):
        for name, line in curves[curves["setting"] == setting].groupby("name"):
            axes.plot(line["round"] + 1, line["mean"], lw=1.5, label=name, **style[name])
            low, high = line["mean"] - line["std"], line["mean"] + line["std"]
            if len(names) <= BANDS:
                axes.fill_between(line["round"] + 1, low, high, color=style[name]["color"], alpha=0.15, lw=0)
        axes.set(title=setting, xlabel="rounds trained", ylabel=metric.replace("_", " "))
    legend(figure, grid, names)
    return save(figure, path)


def _curves(store: Store, metric: str) -> pd.DataFrame:
    """Columns setting, name, round, mean, std (0 for one seed); the settings in their order."""
    rounds = store.read("rounds")
    if metric not in rounds:
        raise unknown("metric", metric, SCHEMAS["rounds"].names)
    places = grouped([row for row in competing(store.rows("trials")) if row["status"] == "done"])
    rounds = rounds[rounds["trial_id"].isin(places) & rounds[metric].notna()]
    entries = rounds["trial_id"].map({trial_id: place.entry for trial_id, place in places.items()})
    roles = rounds.groupby(entries)["role"].nunique()
    order = {setting: at for at, setting in enumerate(dict.fromkeys(p.setting for p in places.values()))}
    frame = rounds.assign(
        setting=[places[trial_id].setting for trial_id in rounds["trial_id"]],
        name=[
            entry if roles[entry] == 1 else f"{entry} ({role})"
            for entry, role in zip(entries, rounds["role"], strict=True)
        ],
    )
    lines = frame.groupby(["setting", "name", "round"])[metric].agg(["mean", "std"]).fillna(0.0).reset_index()
    return lines.sort_values("setting", key=lambda column: column.map(order), kind="stable")


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each, the same in every picture of the same names; neighbours differ in both, so that
    equal lines show each other and a print without colours can be read.
    """
    both = ({"color": colour, "linestyle": dash} for colour, dash in zip(cycle(COLOURS), cycle(DASHES), strict=False))
    return dict(zip(names, both, strict=False))


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, three across, which share their axes."""
    across = min(count, 3)
    down = -(-count // across)
    figure = blank(4.4 * across + 0.6, 3.2 * down + 0.8)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[:count]:
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3, lw=0.5)
    return figure, list(grid[:count])


def legend(figure: Figure, grid: Sequence[Axes], names: Sequence[str]) -> None:
    """One legend below all panels, with those of the names that are drawn, in their order."""
    found = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [name for name in names if name in found]
    widest = max(map(len, shown), default=1)
    columns = max(1, min(len(shown), int(figure.get_figwidth() / (0.7 + 0.085 * widest))))
    figure.set_figheight(figure.get_figheight() + 0.22 * (len(shown) // columns))  # the panels keep their size
    figure.legend([found[n] for n in shown], shown, loc="outside lower center", ncols=columns, frameon=False)


def stride(count: int, room: float) -> int:
    """The smallest round step with which at most `room` of `count` ticks are labelled."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, count) if count <= step * room or step >= count)


def blank(width: float, height: float) -> Figure:
    """Inches. Without pyplot, whose global state and choice of a display no picture here needs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path | str) -> Path:
    """Write a picture; a path without an ending is written as PNG and as SVG. Returns the (PNG) file's path."""
    from matplotlib import rc_context

    targets = [Path(path)] if Path(path).suffix else [Path(f"{path}.png"), Path(f"{path}.svg")]
    for target in targets:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # The same picture is the same file: no date, and no random names in it.
            with rc_context({"svg.hashsalt": target.stem}):
                figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
        except OSError as problem:
            raise Refused(f"{target} can't be written: {problem.strerror or problem}") from None
    return targets[0]
