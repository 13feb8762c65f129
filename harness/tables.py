"""A leaderboard as text for people: Markdown. Names and reasons are data, and must not act as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness.cells import Cell, Difference, Grid
from harness.inference import Interval
from harness.metrics import HEADLINE, METRICS, Metric
from harness.statistics import ALPHA, Pooled, Summary
from harness.verdicts import Verdict

BESIDE = (
    "Inside, outside: whether the published value lies in the 95 % interval of our mean. Compared are the net, the "
    "clients and what becomes of them, the partition, the budget, the optimizer and how accuracy was measured: what "
    "differs makes a value not comparable; what a source does not state is named."
)


def spelled(cell: Cell, how: Metric) -> str:
    """mean ± deviation [interval] (n, and what became of the other trials) letters."""
    counts = (
        *((cell.absent, how.absent), (cell.failed, "failed")),
        *((cell.diverged, "diverged"), (cell.stopped, "stopped")),
    )
    rest = [f"{count} {word}" for count, word in counts if count]
    if cell.mean is None:
        return ", ".join(rest) or "-"
    text = f"{cell.mean:.{how.digits}f}"
    if cell.interval is not None:
        text += f" ± {cell.sd:.{how.digits}f} {between(cell.interval, how.digits)}"
    return f"{text} ({', '.join([f'n={cell.n}', *rest])}) {shortened(cell.letters)}".rstrip()


def shortened(letters: str) -> str:
    """The letters of a cell with runs of four or more as first-last: abcdg is a-dg."""
    return re.sub(r"[a-z]{4,}", lambda run: "".join(_runs(run[0])), letters)


def _runs(letters: str) -> Iterator[str]:
    start = 0
    for at in range(1, len(letters) + 1):
        if at == len(letters) or ord(letters[at]) != ord(letters[at - 1]) + 1:
            run = letters[start:at]
            yield run if len(run) < 4 else f"{run[0]}-{run[-1]}"
            start = at


def between(interval: Interval | None, digits: int, signed: bool = False) -> str:
    """[low, high], or nothing."""
    sign = "+" if signed else ""
    return f"[{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]" if interval else ""


def difference(made: Difference | None, how: Metric) -> str:
    """The mean difference [interval] and its corrected p; with a star where the two are told apart."""
    if made is None:
        return "-"
    if not made.paired.n:
        return "no pairs"
    words = [f"{made.paired.mean:+.{how.digits}f}", between(made.paired.interval, how.digits, signed=True)]
    words += [f"p{chance(made.p)}{'*' * (made.p < ALPHA)}"] if made.p is not None else []
    return " ".join([*filter(None, words), f"(n={made.paired.n})"])


def chance(p: float) -> str:
    """How a p value is said, with two digits that say something."""
    return f"={p:.2f}" if p >= 0.1 else f"={p:.2g}" if p >= 0.0001 else "<0.0001"


def matrix(summary: Summary | Grid) -> list[list[str]]:
    """The cells' texts, with a head of the settings and the lines' names in front."""
    lines = [[spelled(cell, summary.how) for cell in cells] for cells in summary.cells]
    return _named(summary, list(summary.settings), lines)


def differences(summary: Summary) -> list[list[str]]:
    """The differences to the baseline in the same form; empty where there is none to compare."""
    if summary.baseline is None or not any(True for _ in summary.comparisons):
        return []
    lines = [
        ["baseline" if line == summary.baseline else difference(cell.difference, summary.how) for cell in cells]
        for line, cells in zip(summary.lines, summary.cells, strict=True)
    ]
    return _named(summary, list(summary.settings), lines)


def overall(summary: Summary) -> list[list[str]]:
    """Every line over all settings in the same form; empty with one setting."""
    if not any(summary.pooled):
        return []
    ranks = dict(zip(summary.ranked, summary.ranking.ranks, strict=True)) if summary.ranking else {}
    against = summary.baseline.name if summary.baseline else ""
    head = ["mean", "interquartile mean", *([f"chance to beat {against}"] if against else []), "average rank"]
    lines = []
    for line, one in zip(summary.lines, summary.pooled, strict=True):
        rank = f"{ranks[line]:.2f}" if line in ranks else "-"
        lines.append([*_pooled(one, summary.how.digits, bool(against)), rank])
    return _named(summary, head, lines)


def _pooled(one: Pooled | None, digits: int, against: bool) -> list[str]:
    if one is None:
        return ["gaps", "-", *["-"] * against]
    texts = [f"{one.mean:.{digits}f} {between(one.interval, digits)}", f"{one.iqm:.{digits}f} "]
    texts[1] += between(one.iqm_interval, digits)
    if against:
        texts.append("-" if one.better is None else f"{one.better:.2f} {between(one.better_interval, 2)}")
    return [text.rstrip() for text in texts]


def _named(summary: Summary | Grid, head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[list[str]]:
    named = [[line.name, *texts] for line, texts in zip(summary.lines, lines, strict=True)]
    return [["method", *head], *named]


def ranks(summary: Summary) -> str:
    """One sentence on the ranking; empty without one."""
    found = summary.ranking
    if found is None:
        return ""
    return (
        f"Average ranks over {found.n} settings: p{chance(found.p)} by Friedman's test that no method differs; by "
        f"Nemenyi's ranks that differ by less than {found.critical:.2f} are not told apart (5 %)."
    )


def beside(found: Sequence[Verdict]) -> list[list[str]]:
    """Published values beside ours in the same form, with a head; empty without any."""
    lines = [["method", "setting", "source", "published (%)", "ours (%)", "difference", "verdict"]]
    for one in found:
        theirs, cell = one.theirs, one.cell
        sd = "" if theirs.sd is None else f" ± {theirs.sd:g}"
        ours = spelled(replace(cell, letters=""), METRICS[HEADLINE]) if cell else "-"
        apart = "-" if one.difference is None else f"{one.difference:+.2f}"
        name = f"{theirs.method} ({theirs.role})" if theirs.role else theirs.method
        place = f"{theirs.source}, {theirs.table}"
        lines.append([name, theirs.setting, place, f"{theirs.value:g}{sd}", ours, apart, str(one)])
    return lines if found else []


def markdown(name: str, first: Summary, others: Sequence[Grid] = (), found: Sequence[Verdict] = ()) -> str:
    """The leaderboard of a results folder: the first metric in full, published numbers, the cells of the others."""
    parts = [f"# Leaderboard: {escaped(name)}", f"## {escaped(first.title)}", grid(matrix(first))]
    if lines := differences(first):
        parts += [f"Difference to {escaped(first.baseline.name if first.baseline else '')}:", grid(lines)]
    if lines := overall(first):
        parts += ["Over all settings, each of which counts the same:", grid(lines), escaped(ranks(first))]
    parts.append("\n".join(f"- {escaped(note)}" for note in first.notes))
    if lines := beside(found):
        parts += ["## Beside published numbers", grid(lines, texts=7), BESIDE]
    for other in others:
        parts += [f"## {escaped(other.title)}", grid(matrix(other))]
    return "\n\n".join(part for part in parts if part) + "\n"


def grid(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first line is its head, the first columns are texts of others."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    body = [[*map(escaped, line[:texts]), *(cell.replace("*", "\\*") for cell in line[texts:])] for line in lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*map(escaped, lines[0])], rule, *body])


def escaped(text: str) -> str:
    """For Markdown: names and reasons are data, and must neither break the table nor act as HTML or a link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
