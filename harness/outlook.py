"""What a sweep will do, and about what it will take, before it starts anything. Nothing is written."""

from __future__ import annotations

import heapq
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from harness import cluster, lock, repair
from harness.axes import Sweep
from harness.checkpoint import Shelf
from harness.cohorts import Trace, read_trace
from harness.config import Trial, trial_id
from harness.costs import Cost, Course, cost, course, names_of, rows_of, visits_of
from harness.data import Arrays, card
from harness.desk import Job, Result
from harness.lanes import try_out
from harness.ledger import Ledger
from harness.record import TABLES, Store
from harness.registry import label
from harness.room import Node, at_once
from harness.sources import to_download
from harness.stacks import pairs, told
from harness.summary import final
from harness.sweep import check_data, check_drift, known_cells, sources_of, traces_of, visited
from harness.trial import device_of
from harness.tryout import Sample, Task
from harness.work import Setup, make_setup

TRYING_S = 30.0  # for all tryouts together, beside starting their processes
MOST_S = 50.0  # after which the rest is told from others
MOST_LANES = 4
COUNTING_S = 10.0  # for dealing out cells to count their clients
START_S = 8.0  # until Ray and the first trials are up
TRIAL_S = 0.3  # between two trials in one process


@dataclass
class Kind:
    """Cells that cost about the same: all that differs is the seed and settings that weigh nothing.

    cells: those known ahead; of a search there is one for all its draws. rounds: left in each trial.
    """

    cell: Trial
    cells: list[Trial] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    setup: Setup | None = None
    course: Course | None = None
    sample: Sample | None = None
    told_from: Trial | None = None  # whose sample it is, if not its own
    cost: Cost | None = None
    rows: Counter[str] = field(default_factory=Counter)


@dataclass
class Outlook:
    """See the module. bound: the numbers are the most there can be, as some may be stopped early.

    exact: the rows were counted, not told from one cell for others. lanes: trials at once.
    """

    sweep: Sweep
    every: int
    done: int
    resting: int
    kinds: list[Kind]
    nodes: list[Node]
    lanes: int
    joined: bool
    notes: list[str]
    bound: bool = False
    exact: bool = True
    seconds: float | None = None
    graphics: list[Sample] = field(default_factory=list)

    @property
    def to_do(self) -> int:
        """Trials that will run."""
        return sum(len(kind.rounds) for kind in self.kinds)


class Reading:
    """A `desk.Book` that writes nothing: what it is told to write, it only remembers."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.heirs: dict[str, str] = {}
        self.closed: dict[str, Result] = {}

    def result(self, name: str) -> Result | None:  # noqa: D102
        return self.closed.get(name) or self.ledger.result(name)

    def curve(self, name: str) -> Sequence[Mapping[str, Any]]:  # noqa: D102
        return self.ledger.curve(self.heirs.get(name, name))

    def reached(self, name: str) -> int:  # noqa: D102
        return self.ledger.reached(self.heirs.get(name, name))

    def adopt(self, donor: str, heir: str) -> None:  # noqa: D102
        self.heirs[heir] = self.heirs.get(donor, donor)

    def close(self, job: Job, reason: str) -> None:  # noqa: D102
        self.closed[job.name] = Result("stopped", reason, 0, self.curve(job.name))


def look(sweep: Sweep, results: Path, trying: bool = True) -> Outlook:
    """Looks at the card, the results there are and the machine or the cluster; tries cells out here, if wanted.

    Raises Refused for what the sweep would refuse.
    """
    how = sweep.execution
    notes: list[str] = []
    with visited(how, known_cells(sweep)) as told:
        nodes = cluster.supply()
        cluster.check_room(how, nodes)
    with _tables(results, notes) as store:
        ledger = Ledger(store, Shelf(results), notes)
        check_drift(sweep, ledger)
        sources = sources_of(sweep, Reading(ledger))
        ahead = [kind for source in sources for kind in source.expected()]
        resting = _resting(sweep, ledger)
        kinds = _kinds(ahead, ledger)
    to_do, search = sum(n for _, n in ahead), sweep.search
    lanes = at_once(how, nodes, max(1, to_do))
    done = sum(source.found for source in sources)
    notes += [told] if told else []
    notes += [source.problem for source in sources if source.problem]
    found = Outlook(sweep, _every(sweep), done, resting, kinds, nodes, lanes, bool(told), notes)
    found.bound = search is not None and (search.how.scheduler != "fifo" or search.how.steps > 0)
    if kinds and (sets := _data(found)) is not None:
        traces = {path: read_trace(path, n)[0] for path, n in traces_of([kind.cell for kind in kinds])}
        _count(found, sets, traces)
        if trying:
            _try(found, sets, traces)
        for kind in kinds:
            _weigh(kind, how.hosts)
        found.seconds = _wall(found)
    return found


@contextmanager
def _tables(results: Path, notes: list[str]) -> Iterator[Store]:
    """The tables as the sweep would take them up: without what is damaged. They themselves stay as they are."""
    with tempfile.TemporaryDirectory(prefix="fedstill-") as name:
        if not results.exists():
            yield Store(name, writable=False)
            return
        store, running = Store(results, writable=False), lock.holder(results)
        faults = [] if running else repair.found_damaged(results)  # who runs there has put them aside
        notes += (
            [f"A sweep runs there now ({running}); what it has under way is counted as to do."] if running else []
        )
        notes += [f"{fault.file} is damaged ({fault.what}): its trials run again." for fault in faults]
        for table in TABLES if faults else ():
            if (results / table).is_dir():
                shutil.copytree(results / table, Path(name) / table)
        if faults:
            repair.quarantine(Path(name))
        yield Store(name, writable=False) if faults else store


def _every(sweep: Sweep) -> int:
    """All trials of the card: its cells, and the draws and finals of its searches."""
    groups = [group for group in sweep.search.groups if group.dimensions] if sweep.search else []
    draws = sweep.search.how.trials if sweep.search else 0
    return len(sweep.cells) + sum(draws + len(group.seeds) for group in groups)


def _resting(sweep: Sweep, ledger: Ledger) -> int:
    """Trials that go on from a checkpoint."""
    names = set(ledger.shelf.names())
    if sweep.search is None:
        names &= {trial_id(cell) for cell in sweep.cells}
    return sum(1 for name in names if not _over(ledger.result(name)) and ledger.reached(name))


def _over(result: Result | None) -> bool:
    return result is not None and final(result.status, result.reason, "")


def _kinds(ahead: Sequence[tuple[Trial, int]], ledger: Ledger) -> list[Kind]:
    """The cells to do, those that cost the same together."""
    kinds: dict[str, Kind] = {}
    for cell, count in ahead:
        if count:
            kind = kinds.setdefault(_weight(cell), Kind(cell))
            left = cell.rounds - (ledger.reached(trial_id(cell)) if count == 1 else 0)
            kind.rounds += [left] * count
            kind.cells += [cell] * count if count == 1 else []
    return list(kinds.values())


def _weight(cell: Trial) -> str:
    """All settings that may change what a trial costs; strengths and rates, which are no whole numbers, don't."""
    settings = cell.model_dump(mode="json")
    whole = {k: v for k, v in settings["hyper"].items() if not isinstance(v, float)}
    rates = {k: v for k, v in settings["local"].items() if not isinstance(v, float)}
    dealt = {k: v for k, v in settings["partition"].items() if not isinstance(v, float) or k == "fraction"}
    return json.dumps({**settings, "hyper": whole, "local": rates, "partition": dealt, "seed": 0})


def _data(found: Outlook) -> dict[str, Arrays] | None:
    """The data sets; None if one is not here, but the sweep would download it."""
    how = found.sweep.execution
    cells = [cell for kind in found.kinds for cell in (kind.cells or [kind.cell])]
    names = dict.fromkeys(name for cell in cells for name in (cell.dataset, cell.proxy.source))
    folder = Path(how.data) if how.data else None
    if far := [n for n in names if n not in ("none", "train") and to_download(card(n), folder)]:
        found.notes.append(f"The sweep will download {', '.join(far)} first; until it is here, nothing is estimated.")
        return None
    return check_data(cells, how, download=False)


def _count(found: Outlook, sets: Mapping[str, Arrays], traces: Mapping[str, Trace]) -> None:
    """The rows of all that is to do. Draws of a search, and cells that there is no time for, are as one like them."""
    ends = time.monotonic() + COUNTING_S
    for kind in found.kinds:
        cell = kind.cell

        def dealt(one: Trial) -> Setup:
            trace = traces.get(one.availability.trace)
            return make_setup(one, sets[one.dataset], sets.get(one.proxy.source), trace)[0]

        kind.setup, names = dealt(cell), None
        kind.course, names, visits = course(kind.setup), names_of(kind.setup), visits_of(kind.setup)
        counted = 0
        for one in kind.cells:
            if time.monotonic() > ends:
                break
            kind.rows += rows_of(one, names, visits if one == cell else visits_of(dealt(one)))
            counted += 1
        left = len(kind.rounds) - counted
        for table, number in rows_of(cell, names, visits).items():
            kind.rows[table] += left * number
        found.exact = found.exact and counted == len(kind.cells)


def _try(found: Outlook, sets: Mapping[str, Arrays], traces: Mapping[str, Trace]) -> None:
    """Samples of all kinds; of those that there was no time for, that of the nearest."""
    how, here = found.sweep.execution, cluster.machine()
    device = "cuda" if device_of(how) == "cuda" and here["GPU"] else "cpu"
    if device_of(how) == "cuda" and device == "cpu":
        found.notes.append("This machine has no GPU, so the seconds are those of its CPU: a GPU takes less.")
    firsts = list({label(kind.cell.method): kind for kind in reversed(found.kinds)}.values())[::-1]
    order = [*firsts, *(kind for kind in found.kinds if not any(kind is first for first in firsts))]
    busy = found.lanes * max(1, how.hosts) if not found.joined else int(here["CPU"])
    lanes = max(1, min(busy, int(here["CPU"]), MOST_LANES)) if device == "cpu" else 1
    crowd = list(islice(cycle(order), max(len(order), lanes)))  # as many at a time as in the sweep: it slows them
    seconds = min(5.0, max(1.0, TRYING_S * lanes / len(crowd)))
    ways = pairs(kind.cell for kind in firsts)
    tasks = [Task(kind.cell, seconds, device) for kind in crowd]
    both = [Task(cell, min(seconds, 1.5), device) for pair in ways for cell in pair]
    tried = try_out(tasks + both, sets, traces, lanes, MOST_S)
    found.notes += told(ways, tried[len(crowd) :])
    for kind, sample in zip(crowd, seen := tried[: len(crowd)], strict=True):
        if sample is not None and sample.rounds:
            kind.sample = kind.sample or sample
        elif sample is not None:
            found.notes.append(f"A tryout of {label(kind.cell.method)} failed: {sample.error}")
    for kind in order:
        near = [k for k in order if k.sample is not None and k.told_from is None]
        if kind.sample is None and near:
            own = kind.cell
            nearest = min(near, key=lambda k: (k.cell.dataset != own.dataset, k.cell.method != own.method))
            kind.sample, kind.told_from = nearest.sample, nearest.cell
    if here["GPU"] and how.device != "cpu":
        wanted = [Task(kind.cell, 1.0, "cuda") for kind in firsts] if device == "cpu" else []
        more = try_out(wanted, sets, traces, 1, MOST_S / 2) if wanted else seen
        found.graphics = [sample for sample in more if sample is not None and sample.device_memory]


def _weigh(kind: Kind, hosts: int) -> None:
    if kind.sample is not None and kind.course is not None:
        one = {table: number / len(kind.rounds) for table, number in kind.rows.items()}
        kind.cost = cost(kind.cell, kind.course, kind.sample, one, hosts)


def _wall(found: Outlook) -> float | None:
    """Seconds until all is done, each trial taking the first place that is free."""
    if any(kind.cost is None for kind in found.kinds):
        return None
    search, lanes = found.sweep.search, found.lanes
    if search is not None and search.how.sampler == "optuna":  # a draw waits for those that it learns from
        lanes = max(1, min(lanes, search.how.ahead * sum(bool(group.dimensions) for group in search.groups)))
    places = [START_S] * lanes
    for kind in found.kinds:
        for rounds in kind.rounds:
            seconds = kind.cost.seconds * rounds / kind.cell.rounds if kind.cost else 0.0
            heapq.heappush(places, heapq.heappop(places) + seconds + TRIAL_S)
    return max(places)
