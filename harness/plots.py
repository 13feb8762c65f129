"""Pictures from the tables: who holds which classes, and accuracy by round. PNG files, drawn without a display."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.places import grouped
from harness.record import SCHEMAS, Store
from harness.refusal import Refused, unknown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart; yellow left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[str, ...] = ("-", "--", ":", "-.")
ANNOTATED = 400  # cells: with more of them the numbers would not be readable


def partition_heatmap(counts: np.ndarray, title: str, path: Path | str) -> Path:
    """Draw who holds what. counts: [N, C] rows of each class at each client. Returns the PNG's path."""
    from matplotlib.colors import PowerNorm

    counts = np.asarray(counts)
    clients, classes = counts.shape
    width, height = np.clip(0.16 * clients, 6, 22) + 1.5, np.clip(0.16 * classes, 2.5, 16) + 1.4
    figure = _figure(width, height)
    axes = figure.add_subplot()
    # The square root keeps small holdings visible beside large ones; white is reserved for none at all.
    shown = np.ma.masked_equal(counts.T, 0)
    top = max(int(counts.max(initial=0)), 1)
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=PowerNorm(0.5, vmin=0, vmax=top)
    )
    for axis, count, room in ((axes.xaxis, clients, width / 0.35), (axes.yaxis, classes, height / 0.2)):
        axis.set_ticks(np.arange(0, count, _stride(count, room)))
    if counts.size <= ANNOTATED:
        for client, label in zip(*np.nonzero(counts), strict=True):
            value = int(counts[client, label])
            ink = "white" if value > top / 4 else "black"
            axes.text(client, label, str(value), ha="center", va="center", fontsize=6, color=ink)
    axes.set(title=title, xlabel=f"client ({clients})", ylabel=f"class ({classes})")
    figure.colorbar(image, ax=axes, label="training rows (white: none)", pad=0.01, fraction=0.04, aspect=30)
    return _save(figure, path)


def learning_curves(results: Path | str, path: Path | str, metric: str = "accuracy") -> Path:
    """Draw a column of the table `rounds` by round: a panel per setting, a line per method and role.

    A line is the mean over seeds, its band one standard deviation to either side (none for a single seed). Only
    trials that are done take part. Returns the PNG's path. Raises Refused if there is nothing to draw.
    """
    curves = _curves(Store(results, writable=False), metric)
    if curves.empty:
        raise Refused(f"no finished trial in {results} has the metric {metric!r} in its rounds")
    settings, names = list(dict.fromkeys(curves["setting"])), sorted(set(curves["name"]))
    styles = [{"color": colour, "linestyle": dash} for dash in DASHES for colour in COLOURS]
    style = dict(zip(names, cycle(styles), strict=False))
    across = min(len(settings), 3)
    down = -(-len(settings) // across)
    figure = _figure(4.4 * across + 0.6, 3.2 * down + 0.8)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[len(settings) :]:
        axes.set_axis_off()
    for axes, setting in zip(grid, settings, strict=False):
        for name, line in curves[curves["setting"] == setting].groupby("name"):
            axes.plot(line["round"] + 1, line["mean"], lw=1.5, label=name, **style[name])
            low, high = line["mean"] - line["std"], line["mean"] + line["std"]
            axes.fill_between(line["round"] + 1, low, high, color=style[name]["color"], alpha=0.15, lw=0)
        axes.set(title=setting, xlabel="rounds trained", ylabel=metric.replace("_", " "))
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3, lw=0.5)
    legend = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [legend[name] for name in names]
    figure.legend(shown, names, loc="outside lower center", ncols=min(len(names), 3 * across), frameon=False)
    return _save(figure, path)


def _curves(store: Store, metric: str) -> pd.DataFrame:
    """Columns setting, name, round, mean, std (0 for one seed); the settings in their order."""
    rounds = store.read("rounds")
    if metric not in rounds:
        raise unknown("metric", metric, SCHEMAS["rounds"].names)
    places = grouped([row for row in store.rows("trials") if row["status"] == "done"])
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


def _stride(count: int, room: float) -> int:
    """The smallest round step with which at most `room` of `count` ticks are labelled."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, count) if count <= step * room or step >= count)


def _figure(width: float, height: float) -> Figure:
    """Inches. Without pyplot, whose global state and choice of a display no picture here needs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path | str) -> Path:
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    except OSError as problem:
        raise Refused(f"{target} can't be written: {problem.strerror or problem}") from None
    return target
