"""A leaderboard as text: Markdown for people. Names and reasons are data, and must not act as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from harness.cells import Cell, Difference
from harness.inference import Interval
from harness.metrics import Metric
from harness.statistics import ALPHA, Pooled, Summary


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
    return f"{text} ({', '.join([f'n={cell.n}', *rest])}) {cell.letters}".rstrip()


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
    words += [f"p={chance(made.p)}{'*' * (made.p < ALPHA)}"] if made.p is not None else []
    return " ".join([*filter(None, words), f"(n={made.paired.n})"])


def chance(p: float) -> str:
    """A p value with two digits that say something."""
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}" if p >= 0.0001 else "<0.0001"


def matrix(summary: Summary) -> list[list[str]]:
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


def _named(summary: Summary, head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[list[str]]:
    named = [[line.name, *texts] for line, texts in zip(summary.lines, lines, strict=True)]
    return [["method", *head], *named]


def ranks(summary: Summary) -> str:
    """One sentence on the ranking; empty without one."""
    found = summary.ranking
    if found is None:
        return ""
    return (
        f"Average ranks over {found.n} settings: Friedman's p = {chance(found.p)} that no method differs; "
        f"by Nemenyi's test ranks that differ by less than {found.critical:.2f} are not told apart (5 %)."
    )


def markdown(name: str, first: Summary, others: Sequence[Summary] = ()) -> str:
    """The leaderboard of a results folder: the first metric in full, then the cells of the others."""
    parts = [f"# Leaderboard: {escaped(name)}", f"## {escaped(first.title)}", grid(matrix(first))]
    if found := differences(first):
        parts += [f"Difference to {escaped(first.baseline.name if first.baseline else '')}:", grid(found)]
    if found := overall(first):
        parts += ["Over all settings, each of which counts the same:", grid(found), escaped(ranks(first))]
    parts.append("\n".join(f"- {escaped(note)}" for note in first.notes))
    for summary in others:
        parts += [f"## {escaped(summary.title)}", grid(matrix(summary))]
    return "\n\n".join(part for part in parts if part) + "\n"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    body = [[escaped(line[0]), *(text.replace("*", "\\*") for text in line[1:])] for line in lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*map(escaped, lines[0])], rule, *body])


def escaped(text: str) -> str:
    """For Markdown: names and reasons are data, and must neither break the table nor act as HTML or a link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
