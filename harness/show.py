"""What `fedstill show` and `fedstill partition` print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import axes, cards, catalogue, config, nets, overrides, plots, registry
from harness.data import card, load
from harness.partitions import divide
from harness.progress import console
from harness.refusal import Refused, unknown
from harness.trees import size, stream

SHADES = " ░▒▓█"


def partition_page(trial: config.Trial, out: Path) -> None:
    """The statistics of a partition, its heat map on the terminal and as a picture."""
    about = card(trial.dataset)
    arrays = load(about)
    cut = divide(arrays.y_train, about.classes, trial, arrays.domains_train)
    how = trial.partition
    title = f"{trial.dataset}, {trial.clients} clients, {how.kind}"
    title += f" alpha={how.alpha:g}" if "alpha" not in how.unread() else ""
    page = console()
    page.print(f"{title}, seed {trial.seed}: {sum(map(len, cut.clients))} rows dealt, {len(cut.left)} left over")
    for name, value in cut.statistics.items():
        page.print(f"  {name:24} {value:.4g}", highlight=False)
    page.print(f"  {'hash':24} {cut.digest}", highlight=False)
    _shade(page, cut.counts, about.class_names or tuple(map(str, range(about.classes))))
    try:
        drawn = plots.partition_heatmap(cut.counts, title, out)
        page.print(f"Heat map: {drawn}", soft_wrap=True, highlight=False, markup=False)
    except OSError as problem:
        raise Refused(f"{out} can't be written: {problem.strerror or problem}; choose a place with --out") from None


def _shade(page: Console, counts: np.ndarray[Any, np.dtype[np.int64]], class_names: tuple[str, ...]) -> None:
    """Classes down, clients across, darker for more rows; as many clients as the line takes."""
    width = max(map(len, class_names))
    fits = max(1, page.width - width - 4)
    top = max(1, int(counts.max()))
    level = np.ceil(np.sqrt(counts / top) * (len(SHADES) - 1)).astype(int)
    for c, name in enumerate(class_names[:40]):
        shades = "".join(SHADES[i] for i in level[:fits, c])
        page.print(f"  {name:>{width}} {shades}", highlight=False, markup=False)
    if len(counts) > fits or len(class_names) > 40:
        page.print(f"  (the first {min(fits, len(counts))} clients and {min(40, len(class_names))} classes)")


def check_page(method: str, texts: Sequence[str] = ()) -> bool:
    """The table of the conformance suite for a method, by name or path. texts: overrides of its hyper-parameters."""
    from harness.check import check

    known = {k: target for k, target in overrides.targets([method]).items() if target.scope == "hyper"}
    given = [overrides.match(setting, known) for setting in overrides.parse(texts)]
    findings = check(method, {known[setting.key].path[0]: setting.one for setting in given})
    _grid(("check", "", registry.label(method)), [(f.check, "ok" if f.passed else "FAILED", f.why) for f in findings])
    return all(f.passed for f in findings)


def _methods(name: str | None) -> None:
    if name is None:
        return _list("methods", [(n, _first_line(registry.load(n))) for n in registry.names()])
    method = registry.load(name)
    page = console()
    page.print(catalogue.doc(method), highlight=False, markup=False)
    page.print()
    rows = [(f.name, str(f.default), str(f.type)) for f in fields(method)]  # type: ignore[arg-type]
    if rows:
        _grid(("hyper-parameter", "default", "type"), rows)
    page.print(f"needs: {', '.join(catalogue.needs(name)) or 'nothing'}", highlight=False)
    return None


def _datasets(name: str | None) -> None:
    if name is None:
        return _list("datasets", [(n, card(n).title) for n in cards.names("datasets")])
    about = card(name).model_dump()
    return _grid(("key", name), [(k, str(v)) for k, v in about.items()])


def _nets(name: str | None) -> None:
    shapes = [(card(d).shape, card(d).classes) for d in ("digits", "fashion-mnist", "cifar10", "wordnet")]
    if name is not None and name not in nets.names(of=name):
        raise unknown("net", name, nets.names(of=name))
    rows = []
    for one in [name] if name else nets.names():
        counts = [_parameters(one, shape, classes) for shape, classes in shapes]
        rows.append((one, *counts))
    inputs = ["x".join(map(str, s)) if len(s) > 1 else f"{s[0]} words" for s, _ in shapes]
    return _grid(("net", *(f"parameters at {what}" for what in inputs)), rows)


def _parameters(net: str, shape: tuple[int, ...], classes: int) -> str:
    try:
        return f"{size(nets.build(net, shape, classes).init(stream('show'))):,}"
    except Refused:
        return "-"


def _partitions(name: str | None) -> None:
    kinds = get_args(config.Kind)
    if name is not None and name not in kinds:
        raise unknown("partition", name, kinds)
    reads = config.Partition.READ_BY
    rows = [(kind, ", ".join(k for k, by in reads.items() if kind in by) or "-") for kind in kinds]
    return _grid(("partition.kind", "reads"), [row for row in rows if name in (None, row[0])])


def _sweeps(name: str | None) -> None:
    if name is None:
        return _list("sweeps", [(n, cards.read("sweeps", n).get("title", "")) for n in cards.names("sweeps")])
    planned = axes.load_sweep(name)
    page = console()
    axes_named = ", ".join(planned.axes) or "none"
    page.print(f"{name}: {planned.title}\n{_size(planned)}; axes: {axes_named}\n", highlight=False, markup=False)
    page.print(cards.find("sweeps", name).read_text(encoding="utf-8"), highlight=False, markup=False)
    return None


def _size(planned: axes.Sweep) -> str:
    """The trials of a sweep, and those of its searches, each group of which has as many."""
    if planned.search is None:
        return f"{len(planned.cells)} trials"
    how, groups = planned.search.how, [group for group in planned.search.groups if group.dimensions]
    finals = sum(len(group.seeds) for group in groups) + len(planned.cells)
    each = f"{how.trials} trials each, {how.sampler} and {how.scheduler}"
    return f"{len(groups)} searches of {each}; then {finals} final trials"


PAGES: dict[str, Callable[[str | None], None]] = {
    "methods": _methods,
    "datasets": _datasets,
    "nets": _nets,
    "partitions": _partitions,
    "sweeps": _sweeps,
}


def _first_line(method: type) -> str:
    return catalogue.doc(method).splitlines()[0]


def _list(title: str, rows: Sequence[tuple[str, str]]) -> None:
    _grid((title, ""), rows)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    for column in header:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # names and defaults are somebody's, and no markup
    console().print(table)
