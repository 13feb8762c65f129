"""The command `fedstill`. Heavy modules are imported by the commands that need them, so that it answers at once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from harness.refusal import Refused, unknown

if TYPE_CHECKING:
    from harness.axes import Sweep

app = typer.Typer(
    help="Measures knowledge-distillation methods for federated learning, side by side, under one protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads this annotation
    typer.Argument(metavar="[key=value]...", help="settings, such as alpha=0.1 or seeds=5; a,b,c makes an axis"),
]
Results = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="folder for trials/, rounds/ and clients/; default results/<sweep's name>"),
]


@app.command()
def sweep(
    card: Annotated[str, typer.Argument(help="a shipped card (fedstill show sweeps) or a .toml file")],
    overrides: Overrides = None,
    results: Results = None,
) -> None:
    """Run every trial of a card that has no row yet, and print the leaderboard."""
    from harness.axes import load_sweep

    _run(load_sweep(card, overrides or []), results)


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="a method (fedstill show methods) or a path to its .py file")],
    overrides: Overrides = None,
    results: Results = None,
) -> None:
    """Run one method with the settings given: a sweep of one cell, or more where a setting has commas."""
    from harness.axes import run_sweep

    _run(run_sweep(method, overrides or []), results)


@app.command()
def board(
    results: Annotated[Path, typer.Argument(help="a results folder")],
    metric: Annotated[str, typer.Option(help="which column to rank by")] = "accuracy_last10",
) -> None:
    """Print the leaderboard of a results folder and write it to leaderboard.md there."""
    _print_board(results, metric)


@app.command()
def partition(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="where the heat map goes")] = Path("partition.png"),
) -> None:
    """Deal a data set to clients: print the realised statistics and draw the client x class heat map."""
    from harness.axes import resolve_setting
    from harness.show import partition_page

    partition_page(resolve_setting(overrides or []), out)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="methods, datasets, nets, partitions or sweeps")],
    name: Annotated[Optional[str], typer.Argument(help="one of them, in detail")] = None,  # noqa: UP045
) -> None:
    """List what there is, or describe one."""
    from harness.show import PAGES

    if what not in PAGES:
        raise unknown("thing to show", what, PAGES)
    PAGES[what](name)


def _run(planned: Sweep, results: Path | None) -> None:
    from rich.console import Console

    from harness.progress import Display
    from harness.sweep import run as run_cells

    folder = (results or Path("results") / planned.name).resolve()
    console = Console()
    with Display(console, planned.axes) as display:
        try:
            outcome = run_cells(planned, folder, display)
        except KeyboardInterrupt:
            console.print("\nInterrupted. What has ended is kept: the same command goes on.", style="yellow")
            raise
    for problem in outcome.problems:
        console.print(problem, style="yellow", highlight=False)
    _print_board(folder, "accuracy_last10")
    if outcome.failed:
        console.print(f"{outcome.failed} trials failed: the reasons are above and in the table of trials.")
        raise typer.Exit(1)


def _print_board(results: Path, metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from harness import board as boards

    found = boards.table(results, metric)
    console = Console()
    grid = Table(title=found.title, title_justify="left", show_edge=False, pad_edge=False)
    grid.add_column("method", no_wrap=True)
    for column in found.columns:
        grid.add_column(column, justify="right")
    for name, cells in zip(found.rows, found.cells, strict=True):
        grid.add_row(name, *map(str, cells))
    console.print(grid, markup=False)
    for note in found.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    console.print(f"Written to {boards.write(results)}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point. Refused input: one line on stderr, exit code 2. Ctrl-C: 130; SIGTERM: 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except Refused as refusal:
        print(f"fedstill: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
