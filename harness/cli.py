"""The command `fedstill`. Heavy modules are imported by the commands that need them, so that it answers at once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from harness.refusal import Refused, unknown

if TYPE_CHECKING:
    from harness.axes import Sweep


Misused: Any = typer.BadParameter.__mro__[2]  # what click raises; newer typers bring a click of their own
app = typer.Typer(
    help="Measures knowledge-distillation methods for federated learning, side by side, under one protocol.",
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
Fresh = Annotated[bool, typer.Option("--fresh", help="throw away what this sweep has left there, and start over")]
Drift = Annotated[bool, typer.Option("--allow-drift", help="go on from checkpoints of other versions, and say so")]


@app.command()
def sweep(
    card: Annotated[str, typer.Argument(help="a shipped card (fedstill show sweeps) or a .toml file")],
    overrides: Overrides = None,
    results: Results = None,
    fresh: Fresh = False,
    allow_drift: Drift = False,
) -> None:
    """Run every trial of a card that has no row yet, and print the leaderboard."""
    from harness.axes import load_sweep

    _run(load_sweep(card, [*(overrides or []), *_drift(allow_drift)]), results, fresh)


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="a method (fedstill show methods) or a path to its .py file")],
    overrides: Overrides = None,
    results: Results = None,
    fresh: Fresh = False,
    allow_drift: Drift = False,
) -> None:
    """Run one method with the settings given: a sweep of one cell, or more where a setting has commas."""
    from harness.axes import run_sweep

    _run(run_sweep(method, [*(overrides or []), *_drift(allow_drift)]), results, fresh)


@app.command()
def plan(
    card: Annotated[str, typer.Argument(help="a shipped card (fedstill show sweeps) or a .toml file")],
    overrides: Overrides = None,
    results: Results = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="try a few rounds out, for at most a minute")
    ] = True,
) -> None:
    """Say what a sweep would do here and about what it would take: trials, time, rows, bytes. Nothing is written."""
    from harness.axes import load_sweep
    from harness.preview import preview

    planned = load_sweep(card, overrides or [])
    preview(planned, (results or Path("results") / planned.name).absolute(), probe)


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="a method (fedstill show methods) or a path to its .py file")],
    overrides: Overrides = None,
) -> None:
    """Run the conformance suite on a method, with these hyper-parameters; exit code 1 if it fails a check."""
    from harness.show import check_page

    if not check_page(method, overrides or []):
        raise typer.Exit(1)


@app.command()
def board(
    results: Annotated[Path, typer.Argument(help="a results folder")],
    metric: Annotated[str, typer.Option(help="which column to rank by")] = "accuracy_last10",
    baseline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the method that the others are compared to; default fedavg, if it is there"),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="a folder for leaderboard.md, .csv, .tex and the pictures; default: no pictures, the rest there"
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="show the page while a sweep runs; nothing is written")
    ] = False,
    port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="of --serve, on 127.0.0.1; 0: any that is free; default 8765"),
    ] = None,
) -> None:
    """Print the leaderboard of a results folder, and write it as HTML, Markdown, CSV and LaTeX."""
    if not serve and port is not None:
        raise Refused("--port is where --serve shows the page: give both, or neither")
    if not serve:
        from harness.printout import print_board

        print_board(results, metric, baseline, out)
        return
    if metric != "accuracy_last10" or out is not None:
        raise Refused("--serve writes nothing and shows every metric: leave --metric and --out out")
    from harness.live import PORT
    from harness.live import serve as show_page

    show_page(results, PORT if port is None else port, lambda text: print(text, flush=True), baseline)


@app.command()
def compact(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Put the trials that will never run again into one file per table; the tables stay the same."""
    from harness.compaction import compact as gather

    print(gather(results))


@app.command()
def sync(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Rebuild what MLflow shows of a results folder from its tables, as far as it differs from them."""
    from harness.printout import exhibit
    from harness.tracking import sync as bring

    print(*bring(results), *exhibit(results), sep="\n")


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="a results folder")],
    rerun: Annotated[int, typer.Option(help="run so many finished trials again, and compare bit for bit")] = 0,
    seed: Annotated[Optional[int], typer.Option(help="chooses those of --rerun; default: drawn")] = None,  # noqa: UP045
) -> None:
    """Check a results folder against itself, its data and MLflow; exit code 1 if anything disagrees."""
    from harness.verify import verify as agrees

    raise typer.Exit(not agrees(results, rerun, seed))


@app.command()
def bench(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[NAME]...", help="loop, start, rounds, scale, server, clients, sweep; default: all"),
    ] = None,
    hosts: Annotated[int, typer.Option(min=1, help="processes that train, for loop, rounds and scale")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda; start and sweep are measured on the CPU")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="measurements behind each median")] = 7,
    json: Annotated[Optional[Path], typer.Option(help="a file for the figures")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="a folder for a table of each")] = Path("results/benchmarks"),
) -> None:
    """Measure how fast this machine runs fedstill, each time against the same arithmetic written by hand."""
    from harness.bench import run_all

    run_all(names or [], hosts, repeats, json, out, device)


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


def _drift(allowed: bool) -> list[str]:
    return ["execution.allow_drift=true"] if allowed else []


def _run(planned: Sweep, results: Path | None, fresh: bool) -> None:
    from harness.printout import exhibit, print_board
    from harness.progress import Display, console
    from harness.sweep import run as run_cells

    folder = (results or Path("results") / planned.name).absolute()  # links in it are the store's to judge
    out = console()
    drawn = {key for group in planned.search.groups for key in group.dimensions} if planned.search else ()
    with Display(out, (*planned.axes, *sorted(drawn))) as display:
        try:
            outcome = run_cells(planned, folder, display, fresh)
        except KeyboardInterrupt:
            out.print("Interrupted. What has ended is kept: the same command goes on.", style="yellow")
            raise
    for problem in outcome.problems:
        out.print(problem, style="yellow", highlight=False, markup=False)
    shown = print_board(folder, "accuracy_last10")
    for problem in exhibit(folder, shown) if outcome.tracked else ():
        out.print(problem, style="yellow", highlight=False, markup=False)
    if outcome.failed:
        out.print(f"Trials that failed: {outcome.failed}. The reasons are above and in the table of trials.")
        raise typer.Exit(1)


_ended_by: list[int] = []  # signals other than Ctrl-C


def _terminate(number: int, _: object) -> None:
    """SIGTERM ends a sweep just as Ctrl-C does."""
    _ended_by.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Entry point. Refused input: one line on stderr, exit code 2. Failed trials: 1. Ctrl-C: 130; SIGTERM: 143."""
    signal.signal(signal.SIGTERM, _terminate)
    words = sys.argv[1:] or ["--help"]
    commands = [c.callback.__name__ for c in app.registered_commands if c.callback]
    try:
        if "" in words:  # as a folder it would mean this one
            raise Refused("an argument is empty: was it a variable that is not set? Give it a value, or leave it out")
        if not words[0].startswith("-") and words[0] not in commands:
            raise unknown("command", words[0], commands)
        code = app(words, standalone_mode=False)
        sys.exit(128 + _ended_by[0] if _ended_by else code)
    except Refused as refusal:
        said = str(refusal)
    except Misused as error:
        here = ["fedstill", *(word for word in words[:1] if word in commands), "--help"]
        said = f"{error.format_message().rstrip('.')}: see {' '.join(here)}"
    except OSError as problem:  # such as a name too long for the file system, or a full disk
        said = str(problem)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(128 + _ended_by[0] if _ended_by else 130)
    print(f"fedstill: {Refused(said)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
