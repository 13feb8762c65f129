"""A leaderboard as text: Markdown for people, CSV for machines. Names and reasons are data, never markup."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterator, Sequence
from io import StringIO

from harness.cells import Cell, Difference, Grid
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
        f"Average ranks over {found.n} settings: Friedman's p{chance(found.p)} that no method differs; "
        f"by Nemenyi's test ranks that differ by less than {found.critical:.2f} are not told apart (5 %)."
    )


def markdown(name: str, first: Summary, others: Sequence[Grid] = ()) -> str:
    """The leaderboard of a results folder: the first metric in full, then the cells of the others."""
    parts = [f"# Leaderboard: {escaped(name)}", f"## {escaped(first.title)}", grid(matrix(first))]
    if found := differences(first):
        parts += [f"Difference to {escaped(first.baseline.name if first.baseline else '')}:", grid(found)]
    if found := overall(first):
        parts += ["Over all settings, each of which counts the same:", grid(found), escaped(ranks(first))]
    parts.append("\n".join(f"- {escaped(note)}" for note in first.notes))
    for other in others:
        parts += [f"## {escaped(other.title)}", grid(matrix(other))]
    return "\n\n".join(part for part in parts if part) + "\n"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    body = [[escaped(line[0]), *(text.replace("*", "\\*") for text in line[1:])] for line in lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*map(escaped, lines[0])], rule, *body])


def escaped(text: str) -> str:
    """For Markdown: names and reasons are data, and must neither break the table nor act as HTML or a link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


COLUMNS = (
    *("metric", "unit", "method", "role", "row", "setting", "n", "mean", "sd", "iqm", "low", "high", "interval"),
    *("letters", "baseline", "pairs", "unpaired", "difference", "difference_low", "difference_high", "p", "p_holm"),
    *("test", "failed", "diverged", "stopped", "absent", "steps", "server_steps", "values", "trials"),
)


def csv_text(name: str, first: Summary, others: Sequence[Grid] = ()) -> str:
    """Every cell of every metric as a line of CSV, with all that is known of it; empty where there is nothing.

    values: "seed=value" for each; p: uncorrected. Texts that a spreadsheet would take for formulas are quoted.
    """
    out = StringIO()
    sheet = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    sheet.writeheader()
    grids: list[Summary | Grid] = [first, *others]
    for one in grids:
        for line, cells in zip(one.lines, one.cells, strict=True):
            for cell in cells:
                known = {"metric": one.metric, "unit": one.how.unit, "row": line.name, **_sheet(cell)}
                sheet.writerow({key: guarded(v) if isinstance(v, str) else v for key, v in known.items()})
    return out.getvalue()


def _sheet(cell: Cell) -> dict[str, object]:
    known: dict[str, object] = {
        **{key: getattr(cell, key) for key in ("method", "role", "setting", "n", "mean", "sd", "iqm", "low", "high")},
        **{key: getattr(cell, key) for key in ("letters", "failed", "diverged", "stopped", "absent")},
        **{key: getattr(cell, key) for key in ("steps", "server_steps")},
        "interval": cell.interval.kind if cell.interval else "",
        "values": " ".join(f"{seed}={value!r}" for seed, value in cell.values.items()),
        "trials": " ".join(cell.trial_ids),
    }
    if (made := cell.difference) is not None:
        known |= {"baseline": made.baseline, "pairs": made.paired.n, "unpaired": made.unpaired, "p_holm": made.p}
        known |= {
            "difference": made.paired.mean if made.paired.n else "",
            "p": made.paired.p,
            "test": made.paired.test,
        }
        if made.paired.interval:
            known |= {"difference_low": made.paired.interval.low, "difference_high": made.paired.interval.high}
    return {key: "" if value is None else value for key, value in known.items()}


def guarded(text: str) -> str:
    """A text that no spreadsheet takes for a formula: one that begins like one gets an apostrophe in front."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
