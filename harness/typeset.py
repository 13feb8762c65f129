"""A leaderboard as LaTeX, for a paper: booktabs tables with what a reader must know below them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import wrap

from harness.cells import Cell, Difference
from harness.metrics import Metric
from harness.statistics import ALPHA, Summary
from harness.tables import BESIDE, between, overall, ranks, shortened
from harness.verdicts import Verdict

ACROSS = {"cells": 4, "differences": 2}  # settings that fit side by side; more go into further tables
RAISED = 6  # letters beside a number, with which the columns still fit
SPECIAL = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", '"': "\\textquotedbl{}"},
    **{"±": "$\\pm$", "[": "{[}", "]": "{]}", "`": "\\textasciigrave{}", "'": "\\textquotesingle{}"},
}
HEAD = """% Written by fedstill from the tables of {name}. In the preamble: \\usepackage[T1]{{fontenc}}
% \\usepackage{{textcomp}} \\usepackage{{booktabs}}
"""


def latex(name: str, first: Summary, found: Sequence[Verdict] = ()) -> str:
    """Tables to \\input: the cells, the differences to the baseline, all settings together, published values.

    Of the published values only those that were run here; all are in the CSV file.
    """
    label = f"tab:{re.sub('[^a-z0-9]', '-', first.metric)}"
    parts = [HEAD.format(name=_plain(name))]
    counted = any(_count(first, cell) for cells in first.cells for cell in cells)
    for part, columns, more in _parts(first, ACROSS["cells"] - counted):
        lines = [
            [escaped(line.name), *(_cell(first, row, column) for column in columns)]
            for row, line in enumerate(first.lines)
        ]
        said = [note for note in first.notes if _raised(first) or not note.startswith("Letters: ")]
        notes = said if columns[-1] == len(first.settings) - 1 else ()
        title = f"{first.title}{more}; {_usual(first)} seeds where nothing else is said."
        parts.append(_table(title, f"{label}-{part}", _head(first, columns), lines, notes))
    if first.baseline is not None and any(True for _ in first.comparisons):
        title = f"{first.title}: difference to {first.baseline.name}, bold where p < {ALPHA} after Holm"
        for part, columns, more in _parts(first, ACROSS["differences"]):
            lines = [
                [escaped(line.name), *(_difference(first.cells[row][column], first.how) for column in columns)]
                for row, line in enumerate(first.lines)
                if line != first.baseline
            ]
            parts.append(_table(f"{title}{more}.", f"{label}-difference-{part}", _head(first, columns), lines))
    if whole := overall(first):
        body = [list(map(escaped, line)) for line in whole[1:]]
        title = f"{first.title} over all settings, each of which counts the same."
        parts.append(_table(title, f"{label}-overall", whole[0], body, [ranks(first)] if first.ranking else []))
    if run := [one for one in found if one.cell is not None]:
        lines = [_beside(one) for one in run]
        title = "Published accuracies (\\%) beside ours, with the 95 % interval of our mean."
        head = ["method", "setting", "published", "ours", "verdict"]
        sources = "; ".join(dict.fromkeys(one.theirs.source for one in run))
        parts.append(
            _table(title.replace("\\%", "%"), "tab:published", head, lines, [f"Published: {sources}. {BESIDE}"])
        )
    return "\n".join(parts)


def _beside(one: Verdict) -> list[str]:
    theirs, cell = one.theirs, one.cell
    ours = (
        "--"
        if cell is None or cell.mean is None
        else f"{cell.mean:.2f} {escaped(between(cell.interval, 2))}".rstrip()
    )
    name = f"{theirs.method} ({theirs.role})" if theirs.role else theirs.method
    value = f"{theirs.value:.2f}" + ("" if theirs.sd is None else f" $\\pm$ {theirs.sd:.2f}")
    return [escaped(name), _stacked(theirs.setting, 24), value, ours, one.finding]


def _parts(summary: Summary, across: int) -> Iterator[tuple[int, range, str]]:
    """Number of a table, the settings in it, and what its title says if there are several."""
    count = -(-len(summary.settings) // across)
    for at in range(count):
        columns = range(at * across, min((at + 1) * across, len(summary.settings)))
        yield at + 1, columns, f" (part {at + 1} of {count})" if count > 1 else ""


def _head(summary: Summary, columns: range) -> list[str]:
    return ["method", *(summary.settings[column] for column in columns)]


def _table(
    title: str, label: str, head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """lines: LaTeX already; everything else: plain text."""
    below = (
        ["  \\par\\smallskip\\raggedright\\scriptsize", f"  {' '.join(map(escaped, notes))}\\par"] if notes else []
    )
    return "\n".join(
        [
            "\\begin{table}[t]",
            "  \\centering\\footnotesize\\setlength{\\tabcolsep}{4pt}",
            f"  \\caption{{{escaped(title)}}}",
            f"  \\label{{{label}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "    \\toprule",
            f"    {' & '.join(map(_stacked, head))} \\\\",
            "    \\midrule",
            *(f"    {' & '.join(line)} \\\\" for line in lines),
            "    \\bottomrule",
            "  \\end{tabular}",
            *below,
            "\\end{table}",
            "",
        ]
    )


def _stacked(text: str, width: int = 14) -> str:
    """The parts of a setting below each other, or the words of what is none."""
    parts = [escaped(part) for part in (text.split(", ") if "=" in text else wrap(text, width))]
    return parts[0] if len(parts) == 1 else "\\shortstack[r]{" + " \\\\ ".join(parts) + "}"


def _cell(summary: Summary, row: int, column: int) -> str:
    """Mean and deviation, bold for the best of the column, the letters raised."""
    cell, how = summary.cells[row][column], summary.how
    lost = cell.failed + cell.diverged + cell.stopped + cell.absent
    if cell.mean is None:
        return f"{lost} lost" if lost else "--"
    text = f"{cell.mean:.{how.digits}f}"
    if cell.mean == _best(summary, column):
        text = f"\\textbf{{{text}}}"
    if cell.sd is not None:
        text += f" $\\pm$ {cell.sd:.{how.digits}f}"
    if cell.letters and _raised(summary):
        text += f"\\textsuperscript{{{shortened(cell.letters)}}}"
    return text + _count(summary, cell)


def _count(summary: Summary, cell: Cell) -> str:
    """The number of seeds, where it is not the usual one or trials are lost."""
    lost = cell.failed + cell.diverged + cell.stopped + cell.absent
    return f" ({cell.n} of {cell.n + lost})" if cell.n and (lost or cell.n != _usual(summary)) else ""


def _usual(summary: Summary) -> int:
    """The number of seeds that most cells have."""
    sizes = Counter(cell.n for cells in summary.cells for cell in cells if cell.n)
    return max(sizes, key=lambda n: (sizes[n], n), default=0)


def _raised(summary: Summary) -> bool:
    """Whether the letters are few enough to stand beside a number. They are in the CSV file in any case."""
    return all(len(shortened(cell.letters)) <= RAISED for cells in summary.cells for cell in cells)


def _best(summary: Summary, column: int) -> float | None:
    means = [line[column].mean for line in summary.cells if line[column].mean is not None]
    return (max if summary.how.high else min)(means, default=None)  # type: ignore[type-var]


def _difference(cell: Cell, how: Metric) -> str:
    made: Difference | None = cell.difference
    if made is None or not made.paired.n:
        return "--"
    text = f"${made.paired.mean:+.{how.digits}f}$"
    if made.p is not None and made.p < ALPHA:
        text = f"$\\mathbf{{{made.paired.mean:+.{how.digits}f}}}$"
    if made.paired.interval is None:
        return text
    low, high = made.paired.interval[:2]
    return f"{text} {{[}}${low:+.{how.digits}f}$, ${high:+.{how.digits}f}${{]}}"


def escaped(text: str) -> str:
    """Any text as LaTeX that shows it. What lies beyond ASCII is spelled by its number: fonts need not have it."""
    known = "".join(SPECIAL.get(char, char) for char in " ".join(text.split()))
    return "".join(char if ord(char) < 128 else f"\\textbackslash{{}}u{ord(char):04x}" for char in known)


def _plain(text: str) -> str:
    """For a comment: one line of ASCII."""
    return " ".join(text.split()).encode("ascii", "replace").decode()
