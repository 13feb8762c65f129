"""Leaderboards of a results folder, from its tables only: as text, as files for a paper, as pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness import durable, sheets, tables, typeset
from harness.cells import Grid, fill
from harness.metrics import HEADLINE, present, wants_rounds
from harness.places import competing, grouped
from harness.record import Row, Store
from harness.refusal import Refused
from harness.statistics import Summary, summarise
from harness.verdicts import Verdict, verdicts


@dataclass(frozen=True)
class Board:
    """A results folder's leaderboards. first: with all its statistics; others: the cells of the other metrics.

    beside: published values, where there are any for these settings.
    """

    results: Path
    trials: tuple[Row, ...]
    first: Summary
    others: tuple[Grid, ...]
    beside: tuple[Verdict, ...] = ()

    @property
    def name(self) -> str:
        """The folder's."""
        return self.results.resolve().name


def read(results: Path | str, metric: str = HEADLINE, baseline: str | None = None) -> Board:
    """The leaderboards, that of `metric` in full: see `statistics.summarise`.

    Raises Refused for no trials and for an unknown metric or baseline.
    """
    store = Store(results, writable=False)
    trials = store.rows("trials")
    if not trials:
        raise Refused(f"{results} has no trials yet: `fedstill sweep CARD --results {results}` makes them")
    rounds = store.rows("rounds") if wants_rounds(metric, trials) else ()
    first = summarise(trials, rounds, metric, baseline)
    kept = competing(trials)
    places = grouped(kept)
    others = dict.fromkeys([HEADLINE, *present(kept)])
    grids = tuple(fill(kept, (), other, places) for other in others if other != metric)
    return Board(Path(results), tuple(trials), first, grids, verdicts(kept, places))


def write(board: Board, folder: Path | str | None = None) -> list[Path]:
    """Write leaderboard.md, .csv and .tex into a folder, by default that of the results; each whole or not at all.

    Beside them published.csv, where there are published values for these settings.
    """
    place, first, others = Path(folder or board.results), board.first, board.others
    texts = {
        "leaderboard.md": tables.markdown(board.name, first, others, board.beside),
        "leaderboard.csv": sheets.cells_text(first, others),
        "leaderboard.tex": typeset.latex(board.name, first, board.beside),
        **({"published.csv": sheets.beside_text(board.beside)} if board.beside else {}),
    }
    written = []
    for name, text in texts.items():
        target = place / name
        try:
            place.mkdir(parents=True, exist_ok=True)
            durable.write(target, text.encode())
        except OSError as problem:
            raise Refused(f"{target} can't be written: {problem.strerror or problem}") from None
        written.append(target)
    return written


def draw(board: Board, folder: Path | str) -> list[Path]:
    """Draw what these trials have for it, each as PNG and as SVG. Returns the PNG files' paths."""
    from harness import diagrams, plots

    place, first = Path(folder), board.first
    pictures: dict[str, Callable[[Path], Path]] = {
        "critical-difference": lambda path: diagrams.critical_difference(first, path),
        "performance-profile": lambda path: diagrams.performance_profile(first, path),
        "learning-curves": lambda path: plots.learning_curves(board.results, path),
    }
    for key in diagrams.drawn(first, board.trials):
        name = f"by-{key.rpartition('.')[2].replace('_', '-')}"
        pictures[name] = lambda path, key=key: diagrams.along(first, board.trials, key, path)  # type: ignore[misc]
    drawn = []
    for name, picture in pictures.items():
        with suppress(plots.Undrawn):
            drawn.append(picture(place / name))
    return drawn
