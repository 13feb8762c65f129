"""From a cell's draws and what a tryout of it has shown to what a trial costs: seconds, rows and bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.checkpoint import KEPT
from harness.cohorts import draw_cohort, draw_roster
from harness.config import Trial
from harness.inline import InlinePool
from harness.protocol import Cohort
from harness.server import Server
from harness.tryout import Round, Sample
from harness.work import Setup, Stages

MOST_VISITS = 20_000  # that are drawn to see a trial's course
HOP_S = 0.004  # for a visit to travel to a host and back
FLAT = ("uniform", "weighted")  # patterns under which as many clients come in every round


@dataclass(frozen=True)
class Course:
    """The visits of a trial: what each round trains, as (role, load), for some rounds evenly spread over all.

    share: of the rounds that were drawn. clients: who come at least once, with their role.
    """

    rounds: Sequence[Sequence[tuple[str, float]]]
    share: float
    clients: int

    @property
    def came(self) -> float:
        """Visits in the whole trial that are not lost."""
        return sum(map(len, self.rounds)) / self.share


@dataclass(frozen=True)
class Cost:
    """What one trial takes. held: bytes of its checkpoints while it runs."""

    seconds: float
    round_s: float
    up: float
    down: float
    disk: float
    held: float


def course(setup: Setup) -> Course:
    """Draws the cohorts of a trial as its server will. Load: the rows that pass in a visit, over all its epochs."""
    trial, sizes = setup.trial, [len(rows) for rows in setup.split.clients]
    step = max(1, trial.rounds * _size(setup, [0]) // MOST_VISITS)
    drawn, seen = [], set()
    for cohort in _cohorts(setup, range(0, trial.rounds, step)):
        roster = draw_roster(trial.seed, cohort, trial.availability)
        come = [visit for visit in cohort.visits if visit not in roster.dropped]
        seen |= set(come)
        drawn.append([(v.role, sizes[v.client] * roster.work[v] * trial.local.epochs) for v in come])
    return Course(drawn, len(drawn) / trial.rounds, len(seen))


def visits_of(setup: Setup) -> int:
    """Rows of the table of clients: all visits of a trial, also those that are lost."""
    trial = setup.trial
    if trial.availability.pattern in FLAT:
        return trial.rounds * _size(setup, [0])
    return _size(setup, range(trial.rounds))


def _size(setup: Setup, rounds: Iterable[int]) -> int:
    return sum(len(cohort.visits) for cohort in _cohorts(setup, rounds))


def _cohorts(setup: Setup, rounds: Iterable[int]) -> Iterator[Cohort]:
    """Who is asked in these rounds, as the server draws it."""
    trial, now = setup.trial, Stages(setup).at(0)
    roles, world, how = dict(now.method.roles(now.world)), now.world, trial.availability
    for round in rounds:
        yield draw_cohort(trial.seed, round, roles, world.clients, trial.participation, how, world.sizes, setup.trace)


def names_of(setup: Setup) -> tuple[int, int]:
    """Rows of the table of rounds in a round with evaluation, and in one without."""
    pool = InlinePool()
    pool.load(setup)
    server = Server(setup, pool)
    models, own = len(server.method.models(server.state)), len(server.scoring.own_names)
    return models * (1 + len(setup.domains)) + own, models + own


def due_rounds(trial: Trial) -> int:
    """Rounds whose models are evaluated: every so many, and the last."""
    return -(-trial.rounds // trial.evaluation.every)


def rows_of(trial: Trial, names: tuple[int, int], visits: int) -> Counter[str]:
    """Rows that a trial which goes through leaves in each table."""
    due = due_rounds(trial)
    return Counter(trials=1, rounds=due * names[0] + (trial.rounds - due) * names[1], clients=visits)


def cost(trial: Trial, way: Course, sample: Sample, rows: Mapping[str, float], hosts: int) -> Cost:
    """What a trial takes, by a sample of it or of one like it. rows: of one trial, by table."""
    warm = [r for r in sample.rounds if not r.cold] or list(sample.rounds)
    spent: defaultdict[str, float] = defaultdict(float)
    loads: defaultdict[str, float] = defaultdict(float)
    for one in (one for r in warm for one in r.visits):
        spent[one.role] += one.seconds
        loads[one.role] += one.load
    mean = sum(spent.values()) / max(1.0, sum(loads.values()))
    rate = {role: spent[role] / loads[role] for role in spent if loads[role]}
    training = sum(_round_s([rate.get(role, mean) * load for role, load in r], hosts) for r in way.rounds) / way.share
    due = due_rounds(trial)
    seconds = sample.setup_s + training + due * _rest(warm, True) + (trial.rounds - due) * _rest(warm, False)
    up, down = _traffic(sample.rounds, way, rows["clients"])
    each = sample.table_bytes or {}
    disk = sum(each.get(table, 0.0) * rows[table] for table in ("trials", "rounds", "clients"))
    held = KEPT * (sample.fixed_bytes + sample.memory_bytes * way.clients)
    return Cost(seconds, seconds / trial.rounds, up, down + sample.proxy_bytes * way.clients, disk, held)


def _round_s(visits: Sequence[float], hosts: int) -> float:
    """Seconds of a round's visits: one after the other, or shared by hosts, the longest first."""
    if not hosts or not visits:
        return sum(visits)
    return max(sum(visits) / hosts, max(visits)) + HOP_S * len(visits)


def _rest(rounds: Sequence[Round], due: bool) -> float:
    """Seconds of a round beside its visits."""
    own = [r.rest_s for r in rounds if r.due == due] or [r.rest_s for r in rounds]
    return fmean(own)


def _traffic(rounds: Sequence[Round], way: Course, sent: float) -> tuple[float, float]:
    """Bytes up and down in a whole trial. What travels in the first round may differ from all others."""
    first, later = [[r for r in rounds if (r.number == 0) == so] for so in (True, False)]

    def total(some: Sequence[Round], number: float, name: str, by: str) -> float:
        counted = sum(getattr(r, by) for r in some)
        return number * sum(getattr(r, name) for r in some) / counted if counted else 0.0

    many = len(way.rounds) / way.share
    up = total(first or later, way.came / many, "up", "came")
    down = total(first or later, sent / many, "down", "sent")
    up += total(later or first, way.came * (1 - 1 / many), "up", "came")
    return up, down + total(later or first, sent * (1 - 1 / many), "down", "sent")
