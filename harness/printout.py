"""The leaderboard on the terminal, its files beside the tables, and both in MLflow."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from rich.table import Table
from rich.text import Text

from harness import board as boards
from harness import page, tables
from harness.refusal import Refused
from harness.terminal import console
from harness.tracking import attach


def print_board(results: Path, metric: str, baseline: str | None = None, to: Path | None = None) -> boards.Board:
    """Prints the leaderboard and writes its files: see `board.write`, `board.draw` and `page.write`. Returns it."""
    board, out = boards.read(results, metric, baseline), console()
    found, written = board.first, boards.write(board, to)
    out.print(found.title, style="bold", highlight=False, markup=False)
    for title, lines in (
        ("method", tables.matrix(found)),
        (f"difference to {found.baseline.name}" if found.baseline else "", tables.differences(found)),
        ("over all settings", tables.overall(found)),
        ("beside published numbers", tables.beside([one for one in board.beside if one.cell])),
    ):
        if lines:
            grid = Table(show_edge=False, pad_edge=False)
            grid.add_column(Text(title), no_wrap=True)
            for column in lines[0][1:]:
                grid.add_column(Text(column), justify="right")
            for line in lines[1:]:
                grid.add_row(*map(Text, line))
            out.print(grid, "")
    absent = sum(one.cell is None for one in board.beside)
    beside = f"{absent} published values of the same sources were not run here: see published.csv." if absent else ""
    for note in filter(None, (tables.ranks(found), *found.notes, beside)):
        out.print(f"- {note}", highlight=False, markup=False)
    names = ", ".join(
        path.name for path in (*written, page.write(results, baseline, to), *(boards.draw(board, to) if to else ()))
    )
    out.print(f"Written to {to or results}: {names}", highlight=False, markup=False, soft_wrap=True)
    return board


def exhibit(results: Path, board: boards.Board | None = None) -> list[str]:
    """Puts the leaderboard, its page and its pictures to the folder's runs in MLflow. Returns what went wrong.

    The pictures are drawn for that; files of the leaderboard that are not there are passed over. board: the folder's,
    if it was read already.
    """
    with tempfile.TemporaryDirectory(prefix="fedstill-") as folder:
        with suppress(Refused):  # a folder without any trial has no leaderboard
            boards.draw(board or boards.read(results, "accuracy_last10", None), folder)
        return attach(results, [*sorted(results.glob("leaderboard.*")), *sorted(Path(folder).glob("*.png"))])
