"""Searches on paper: what a card may say, what is drawn from it, and how what came of it is scored."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import axes, cards, config
from harness.refusal import Refused
from harness.schedule import parse
from harness.space import Dimension, Group, Search, after, apply, curve, dimension, draw, mutate, score, score_at
from harness.summary import headline

BASE = """
methods = ["fedavg", "kdia"]
seeds = 2
[base]
net = "mlp"
rounds = 40
holdout = { validation = 0.1 }
"""
SPACE = (
    BASE
    + """
[search.space]
"local.lr" = { loguniform = [0.01, 0.3] }
[search.kdia]
lambda_kd = { uniform = [0, 1] }
"""
)
OWN_METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from algorithms.fedavg import FedAvg
from harness.refusal import Refused

@dataclass(frozen=True)
class Own(FedAvg):
    a: float
    b: float = 0.0
    extra: tuple[float, ...] = ()

    def __post_init__(self):
        if self.a + self.b > 1:
            raise Refused(f"a + b must be at most 1, got {self.a + self.b}")

    @property
    def needs(self):
        return frozenset({"one_net", "validation"} if self.b else {"one_net"})
"""


@pytest.fixture
def card(tmp_path: Path) -> Any:
    """Writes a card and loads it as a sweep."""

    def load(text: str, *texts: str) -> axes.Sweep:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return axes.load_sweep(path, texts)

    return load


def group(*, seed: int = 1000, key: str = "kdia", **dimensions: Dimension) -> Group:
    """A group of made-up dimensions; its prototype is never run."""
    return Group(key, config.resolve({"method": "kdia", "net": "mlp", "seed": seed}), dimensions, (0, 1))


@st.composite
def dimensions(pick: st.DrawFn) -> Dimension:
    """Any that a card can have."""
    kind = pick(st.sampled_from(["uniform", "loguniform", "int", "logint", "choice"]))
    if kind == "choice":
        scalar = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-1, 1), st.text(max_size=3))
        one = st.one_of(scalar, st.lists(scalar, max_size=2))
        values = pick(st.lists(one, min_size=2, max_size=5, unique_by=json.dumps))
        return dimension({kind: values}, "here")
    low = {"uniform": -1e9, "int": -(10**6), "loguniform": 1e-9, "logint": 1}[kind]
    number = st.integers(int(low), 10**6) if "int" in kind else st.floats(low, 1e9)
    ends = sorted(pick(st.lists(number, min_size=2, max_size=2, unique=True)))
    return dimension({kind: ends}, "here")


SPACES = st.dictionaries(st.sampled_from("abcd"), dimensions(), min_size=1)


def inside(value: Any, own: Dimension) -> bool:
    if own.kind == "choice":
        return json.dumps(value) in [json.dumps(v) for v in own.values]
    return type(value) is type(own.values[0]) and own.values[0] <= value <= own.values[1]


# ---- what is drawn


@settings(max_examples=60)
@given(SPACES, st.integers(0, 10**6), st.integers(0, 9))
def test_draws_stay_within_bounds_and_are_repeated_alike(own: dict[str, Dimension], seed: int, number: int) -> None:
    drawn = draw(group(**own), Search(seed=seed), number, [])
    assert drawn.keys() == own.keys()
    assert all(inside(drawn[key], own[key]) for key in own)
    assert drawn == draw(group(**own), Search(seed=seed), number, [])
    if "a" in own:  # what else is searched for changes no draw
        assert draw(group(a=own["a"]), Search(seed=seed), number, []) == {"a": drawn["a"]}


@settings(max_examples=40)
@given(SPACES, st.integers(0, 10**6), st.lists(st.floats(-1, 1), min_size=12, max_size=12), st.integers(1, 4))
def test_what_is_suggested_stays_within_bounds_and_ignores_what_is_too_new(
    own: dict[str, Dimension], seed: int, scores: list[float], ahead: int
) -> None:
    """Draw 9 may learn from 0..9-ahead: another score for a later one, or another order, changes nothing."""
    how, mine = Search(sampler="optuna", seed=seed, ahead=ahead), group(**own)
    known = [(k, draw(mine, Search(seed=1), k, []), scores[k]) for k in range(12)]
    drawn = draw(mine, how, 9, known)
    assert all(inside(drawn[key], own[key]) for key in own)
    turned = [(k, s, value if k <= 9 - ahead else -value) for k, s, value in reversed(known)]
    assert draw(mine, how, 9, turned) == drawn
    assert draw(mine, how, 9, known[: 10 - ahead]) == drawn


@settings(max_examples=60)
@given(SPACES, st.integers(0, 20), st.integers(0, 20), st.floats(0, 1))
def test_mutations_stay_within_bounds_and_are_repeated_alike(
    own: dict[str, Dimension], member: int, generation: int, resample: float
) -> None:
    how, mine = Search(scheduler="pbt", resample=resample), group(**own)
    first = draw(mine, how, member, [])
    changed = mutate(mine, how, first, member, generation)
    assert all(inside(changed[key], own[key]) for key in own)
    assert changed == mutate(mine, how, dict(reversed(first.items())), member, generation)


def test_other_numbers_groups_and_seeds_draw_other_values() -> None:
    own = {"a": Dimension("uniform", (0.0, 1.0))}
    drawn = [draw(group(**own), Search(), number, [])["a"] for number in range(200)]
    assert len(set(drawn)) == 200
    assert sum(drawn) / 200 == pytest.approx(0.5, abs=0.06)  # 3 standard errors of a uniform mean
    assert draw(group(key="fedavg", **own), Search(), 0, [])["a"] != drawn[0]
    assert draw(group(**own), Search(seed=7), 0, [])["a"] != drawn[0]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (Dimension("uniform", (2.0, 4.0)), [2.0, 2.5, 3.0, 3.5]),
        (Dimension("loguniform", (0.01, 100.0)), [0.01, 0.1, 1.0, 10.0]),
        (Dimension("int", (1, 4)), [1, 2, 3, 4]),
        (Dimension("choice", ("a", "b")), ["a", "a", "b", "b"]),
        (Dimension("uniform", (0.0, 1 / 3)), [0.0, 0.0833333, 0.166667, 0.25]),  # six digits
    ],
)
def test_even_shares_give_what_the_kind_says(own: Dimension, expected: list[Any]) -> None:
    """Quarters of the way, those of whole numbers taken in the middle of their stretches."""
    shift = 0.125 if own.kind == "int" else 0.0
    assert [own.at(at / 4 + shift) for at in range(4)] == pytest.approx(expected) if own.kind != "choice" else True
    assert own.kind != "choice" or [own.at(at / 4) for at in range(4)] == expected


def test_every_whole_number_of_a_range_is_as_likely_as_its_kind_says() -> None:
    """int: a quarter each of 1..4. logint: log((k + .5) / (k - .5)) / log(4.5 / .5), so 1 in half of the cases."""
    many = [(at + 0.5) / 9000 for at in range(9000)]
    assert Counter(Dimension("int", (1, 4)).at(s) for s in many) == dict.fromkeys(range(1, 5), 2250)
    seen = Counter(Dimension("logint", (1, 4)).at(s) for s in many)
    for k in range(1, 5):
        assert seen[k] / 9000 == pytest.approx(math.log((k + 0.5) / (k - 0.5)) / math.log(9), abs=1e-3)


def test_optuna_learns_where_the_random_sampler_does_not() -> None:
    """Score -(x - .8)^2 on [0, 1]: after 30 draws the last ten lie near .8, those of the random sampler anywhere."""
    mine = group(x=Dimension("uniform", (0.0, 1.0)))

    def last(how: Search) -> float:
        known: list[tuple[int, dict[str, Any], float]] = []
        for number in range(30):
            drawn = draw(mine, how, number, known)
            known.append((number, drawn, -((drawn["x"] - 0.8) ** 2)))
        return sum(value for _, _, value in known[-10:]) / 10

    assert last(Search(sampler="optuna", ahead=1)) > 4 * last(Search())
    assert draw(mine, Search(sampler="optuna"), 3, []) == draw(mine, Search(), 3, [])  # nothing to learn from yet


def test_a_mutation_takes_a_step_or_starts_afresh() -> None:
    own = {
        "x": Dimension("loguniform", (0.001, 1.0)),
        "n": Dimension("int", (1, 8)),
        "c": Dimension("choice", (1.0, 2.0, 4.0)),
    }
    mine, start = group(**own), {"x": 0.1, "n": 2, "c": 2.0}
    steps = [mutate(mine, Search(scheduler="pbt", resample=0.0), start, m, 3) for m in range(40)]
    assert {s["x"] for s in steps} == {0.08, 0.12}
    assert {s["n"] for s in steps} == {1, 3}  # 1.6 and 2.4 are 2 again: then one on
    assert {s["c"] for s in steps} == {1.0, 4.0}
    top = {"x": 1.0, "n": 8, "c": 4.0}
    ends = [mutate(mine, Search(scheduler="pbt", resample=0.0), top, m, 3) for m in range(40)]
    assert ({s["x"] for s in ends}, {s["n"] for s in ends}, {s["c"] for s in ends}) == ({0.8, 1.0}, {6, 8}, {2.0})
    fresh = [mutate(mine, Search(scheduler="pbt", resample=1.0), start, m, 3)["x"] for m in range(40)]
    assert len(set(fresh)) == 40
    mixed = [mutate(mine, Search(scheduler="pbt", resample=0.25), start, m, 3)["x"] for m in range(400)]
    assert sum(x not in (0.08, 0.12) for x in mixed) / 400 == pytest.approx(0.25, abs=0.07)  # 3 standard errors


# ---- from settings to trials


@given(st.floats(0.001, 1), st.floats(0, 1), st.integers(0, 2**62), st.floats(0.01, 1))
@settings(max_examples=30)
def test_settings_make_an_ordinary_trial(lr: float, weight: float, seed: int, share: float) -> None:
    """And nothing but them and the seed differs: the cohort of a participation, for one, stays what it was."""
    prototype = config.resolve({"method": "kdia", "net": "mlp", "clients": 37, "participation": share, "seed": 1000})
    made = apply(prototype, {"local.lr": lr, "hyper.lambda_kd": weight}, seed)
    assert made == config.resolve(
        {
            **{"method": "kdia", "net": "mlp", "clients": 37, "participation": share, "seed": seed},
            **{"local": {"lr": lr}, "hyper": {"lambda_kd": weight}},
        }
    )
    assert apply(made, {}, seed) == made
    assert apply(made, {"local.lr": prototype.local.lr}, 1000).cohort == prototype.cohort


def test_a_later_change_becomes_part_of_the_schedule() -> None:
    trial = config.resolve({"method": "kdia", "net": "mlp", "local": {"lr": 0.1}})
    once = after(trial, 10, {"local.lr": 0.2, "hyper.tau": trial.hyper["tau"]})
    twice = after(once, 20, {"local.lr": 0.3, "hyper.tau": 4.0})
    assert [(c.round, c.settings) for c in map(parse, twice.schedule)] == [
        (10, {"local.lr": 0.2}),  # what does not change is no change
        (20, {"hyper.tau": 4.0, "local.lr": 0.3}),
    ]
    assert (twice.at(15).local.lr, twice.at(20).hyper["tau"]) == (0.2, 4.0)


# ---- scores


def rounds(values: list[float | None], name: str = "validation_accuracy") -> list[dict[str, Any]]:
    return [{"round": at, "role": "student"} | ({} if v is None else {name: v}) for at, v in enumerate(values)]


def test_a_score_is_the_mean_of_the_last_rounds_of_the_primary_model() -> None:
    """Rounds 2..11 of twelve, as the headline's. The second model and the test set do not count."""
    own = rounds([at / 100 for at in range(12)])
    other = [row | {"role": "teacher", "validation_accuracy": 0.9, "accuracy": 0.9} for row in own]
    rows = [row | {"up_bytes": 0, "down_bytes": 0} for pair in zip(own, other, strict=True) for row in pair]
    assert score(rows, Search()) == pytest.approx(0.065)
    assert score(rows, Search()) == headline(rows)["student_validation_accuracy_last10"]
    assert score(rounds([0.5, 0.25], "validation_loss"), Search(metric="loss")) == -0.375  # less is better
    assert score(rounds([0.5, None], "validation_balanced_accuracy"), Search(metric="balanced_accuracy")) == 0.5


def test_where_nothing_was_measured_there_is_no_score() -> None:
    assert score([], Search()) is score_at([], Search(), 5) is None
    assert score(rounds([None, None]), Search()) is None
    assert score(rounds([0.5, math.nan]), Search()) == 0.5
    assert score(rounds([0.5]), Search(metric="loss")) is None


def test_a_score_on_the_way_is_the_last_value_by_then() -> None:
    """Every second round of six is evaluated, after 2, 4 and 6 rounds done."""
    rows = rounds([None, 0.2, None, 0.4, None, 0.6])
    assert curve(rows, Search()) == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert [score_at(rows, Search(), done) for done in range(8)] == [None, None, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6]


# ---- cards


def test_a_card_makes_a_group_for_each_method_and_grid_point(card: Any) -> None:
    text = SPACE + '[grid]\n"partition.alpha" = [0.1, 1]\n"kdia.tau" = [2.0]\n'
    sweep = card(text)
    assert [one.key for one in sweep.search.groups] == [
        "fedavg partition.alpha=0.1",
        "kdia partition.alpha=0.1 tau=2.0",
        "fedavg partition.alpha=1.0",
        "kdia partition.alpha=1.0 tau=2.0",
    ]
    avg, kdia, *_ = sweep.search.groups
    assert avg.dimensions == {"local.lr": Dimension("loguniform", (0.01, 0.3))}
    assert kdia.dimensions == {**avg.dimensions, "hyper.lambda_kd": Dimension("uniform", (0.0, 1.0))}
    assert {one.seeds for one in sweep.search.groups} == {(0, 1)}
    assert (kdia.prototype.seed, kdia.prototype.hyper["tau"], kdia.prototype.partition.alpha) == (1000, 2.0, 0.1)
    assert (sweep.cells, sweep.axes) == ((), ("partition.alpha",))
    part = card(text, "alpha=0.1")  # a part of the search has the draws of the whole
    assert [one.key for one in part.search.groups] == [one.key for one in sweep.search.groups[:2]]
    assert draw(part.search.groups[1], part.search.how, 3, []) == draw(kdia, sweep.search.how, 3, [])


def test_who_has_nothing_to_search_for_goes_straight_to_the_finals(card: Any) -> None:
    sweep = card(BASE + "[search.kdia]\ntau = { choice = [1.0, 2.0] }\n")
    assert [(c.method, c.seed) for c in sweep.cells] == [("fedavg", 0), ("fedavg", 1)]
    avg, kdia = sweep.search.groups
    assert (avg.dimensions, list(kdia.dimensions)) == ({}, ["hyper.tau"])
    assert apply(avg.prototype, {}, 0) == sweep.cells[0]
    assert card(BASE).search is axes.run_sweep("kdia").search is None


def test_settings_of_the_search_can_be_overridden(card: Any) -> None:
    text = SPACE + '[search]\ntrials = 8\nsampler = "optuna"\nahead = 2\n'
    assert card(text).search.how == Search(trials=8, sampler="optuna", ahead=2)
    assert card(text, "trials=4", "search.metric=loss").search.how.trials == 4
    # A card's options may be for another scheduler: they fall back; those of the command line must count.
    assert card(text, "search.scheduler=pbt").search.how == Search(trials=8, scheduler="pbt")
    assert card(text, "sampler=random").search.how == Search(trials=8)
    with pytest.raises(Refused, match=r"override 'ahead=3': search.ahead changes nothing .* read by optuna"):
        card(text, "sampler=random", "ahead=3")


def test_the_last_word_is_the_command_lines(card: Any) -> None:
    """A setting given there is not searched for; what belongs to methods that are not run falls away."""
    fixed = card(SPACE, "lr=0.1")
    assert [list(one.dimensions) for one in fixed.search.groups] == [[], ["hyper.lambda_kd"]]
    assert {c.local.lr for c in fixed.cells} == {0.1}
    assert [one.key for one in card(SPACE, "lr=0.1,0.2").search.groups] == [
        "fedavg local.lr=0.1",
        "kdia local.lr=0.1",
        "fedavg local.lr=0.2",
        "kdia local.lr=0.2",
    ]
    assert card(SPACE, "lr=0.1", "methods=fedavg").search is None
    assert [one.key for one in card(SPACE, "methods=moon").search.groups] == ["moon"]


def test_a_methods_own_range_goes_before_that_of_all(card: Any) -> None:
    sweep = card(SPACE + '"local.lr" = { loguniform = [0.001, 0.1] }\n')
    assert [one.dimensions["local.lr"].values for one in sweep.search.groups] == [(0.01, 0.3), (0.001, 0.1)]
    dotted = card(BASE + "[search.space]\nlocal.lr.uniform = [0.1, 1]\nkdia.tau = { int = [1, 3] }\n")
    assert [list(one.dimensions) for one in dotted.search.groups] == [["local.lr"], ["local.lr", "hyper.tau"]]


def test_a_method_of_ones_own_can_be_searched(card: Any, tmp_path: Path) -> None:
    """Also where it has a hyper-parameter without a default: the ranges alone must make it a trial."""
    (tmp_path / "own.py").write_text(OWN_METHOD)
    text = BASE.replace('"fedavg", "kdia"', f'"{tmp_path / "own.py"}"')
    ranges = "[search.own]\na = { uniform = [0, 0.5] }\nextra = { choice = [[0.1], [0.1, 0.2]] }\n"
    (one,) = card(text + ranges).search.groups
    assert one.key == "own"
    drawn = draw(one, Search(), 0, [])
    assert apply(one.prototype, drawn, 3).hyper["a"] == drawn["hyper.a"]
    with pytest.raises(Refused, match=r"mine.toml, line 9, search.own.a: .* a \+ b must be at most 1, got 1.1"):
        card(text + "[search.own]\na = { uniform = [0, 0.5] }\nb = { choice = [0.6, 0.1] }\n")
    with pytest.raises(Refused, match="pbt can't change what method own needs"):
        card(text + PBT + "[search.own]\na = { uniform = [0, 0.5] }\nb = { uniform = [0, 0.1] }\n")


OF_ALL = [  # ranges of [search.space]
    ('"local.lr" = 0.1', r"line 9, search.space.local.lr: write \{ uniform = \[low, high\] \}"),
    ('"local.lr" = { }', "write { uniform"),
    ('"local.lr" = { uniform = [0.1, 1], int = [1, 2] }', "write { uniform"),
    ('"local.lr" = { loguniforn = [0.1, 1] }', "unknown kind of range 'loguniforn'. Did you mean 'loguniform'"),
    ('"local.lr" = { uniform = 1 }', "uniform takes a list, got 1"),
    ('"local.lr" = { uniform = [0.1] }', "uniform takes two finite numbers"),
    ('"local.lr" = { uniform = [0.1, inf] }', "uniform takes two finite numbers"),
    ('"local.lr" = { uniform = [0.1, true] }', "uniform takes two finite numbers"),
    ('"local.lr" = { uniform = [1, 0.1] }', "must be a lower and a higher one"),
    ('"local.lr" = { uniform = [1, 1] }', "must be a lower and a higher one"),
    ('"local.lr" = { loguniform = [0, 1] }', "must be greater than 0"),
    ('"local.epochs" = { int = [1.0, 2.0] }', "int takes two whole numbers"),
    ('"local.epochs" = { int = [1, 90071992547409920] }', "int takes two whole numbers"),
    ('"local.epochs" = { logint = [0, 2] }', "must be greater than 0"),
    # their ends, as settings of the method
    ('"local.lr" = { uniform = [0, 1] }', r"line 9, search.space.local.lr: local.lr must be .*, got 0.0"),
    ('"local.momentum" = { uniform = [0, 1] }', r"search.space.local.momentum: .*\[0, 1\), got 1.0"),
    ('"local.epochs" = { uniform = [1, 5] }', "local.epochs must be a whole number"),
    ('net = { choice = ["mlp", "lenet55"] }', "search.space.net: unknown net 'lenet55'. Did you mean 'lenet5'"),
    # what they are of
    ('"local.lrr" = { uniform = [1, 4] }', "unknown key 'local.lrr'. Did you mean 'local.lr'"),
    ('"kdia.tua" = { uniform = [1, 4] }', "unknown hyper-parameter 'kdia.tua'. Did you mean 'kdia.tau'"),
    ('"moon.mu" = { uniform = [1, 4] }', "method moon is not in this sweep"),
    ('"partition.alpha" = { uniform = [1, 4] }', r"is part of the problem, .* list its values in \[grid\]"),
    ('"holdout.validation" = { uniform = [0.1, 0.2] }', "is part of the problem"),
    ("rounds = { int = [10, 20] }", "is part of the problem"),
    ("seed = { int = [10, 20] }", "unknown key 'seed'"),
    ('"execution.hosts" = { int = [1, 2] }', "unknown key 'execution.hosts'"),
]
OF_KDIA = [  # ranges of [search.kdia]
    ("tau = { choice = [1.0] }", "choice takes two different values or more"),
    ("tau = { choice = [1.0, 2.0, 1.0] }", "choice takes two different values or more"),
    ("tau = { uniform = [0, 4] }", r"search.kdia.tau: tau \(hyper-parameter of method kdia\) must be .*, got 0.0"),
    ('teacher = { choice = ["triple", "emma"] }', "search.kdia.teacher: .*'emma'. Did you mean 'ema'"),
    ("tau = { choice = [1.0, 2020-01-01] }", "search.kdia.tau: tau"),
    ("tua = { uniform = [1, 4] }", "search.kdia.tua: unknown key 'tua'. Did you mean 'kdia.tau'"),
    ("lr = { uniform = [1, 4] }", "Did you mean 'local.lr'"),
    ('"local.lrr" = { uniform = [1, 4] }', "Did you mean 'local.lr'"),
    ('"fedavg.tau" = { uniform = [1, 4] }', "fedavg.tau is not a setting of method kdia"),
    ('tau = { int = [1, 4] }\n"kdia.tau" = { int = [1, 2] }', "kdia.tau has a range already at mine.toml, line 9"),
    (
        'tau = { int = [1, 4] }\n[grid]\n"kdia.tau" = [1.0]',
        "line 9.*tau is an axis already at mine.toml, line 11",
    ),
]
TABLES = [
    ('[search.fedavg]\n"kdia.tau" = { uniform = [1, 4] }', "kdia.tau is not a setting of method fedavg"),
    ("[search.moon]\nmu = { uniform = [1, 4] }", "line 8, search.moon: method moon is not in this sweep"),
    (
        "[search.kdai]\ntau = { uniform = [1, 4] }",
        "unknown table .* 'search.kdai'. Did you mean 'search.kdia'",
    ),
    ("[search]\ntrials = 3", "a search needs ranges"),
    ("[[search]]", r"\[search\] must be a table"),
]
REFUSED = [(f"[search.space]\n{text}", said) for text, said in OF_ALL]
REFUSED += [(f"[search.kdia]\n{text}", said) for text, said in OF_KDIA]
REFUSED += TABLES
WITH_RANGES = [
    ("trails = 3", "line 9, search.trails: unknown key 'search.trails'. Did you mean 'search.trials'"),
    ("trials = 0", "line 9, search.trials: search.trials must be a whole number"),
    ("trials = [1, 2]", "search.trials must be a whole number"),
    ('sampler = "optunna"', "unknown value of search.sampler 'optunna'. Did you mean 'optuna'"),
    ("reduction = 1", "search.reduction must be"),
    ("quantile = 0.6", "search.quantile must be"),
    ("seed = 1", "line 9, search.seed: search.seed = 1 is one of the seeds"),
    ("trials = 100000", "more than 100000 trials"),
    (
        "ahead = 3",
        "line 9, search.ahead: search.ahead changes nothing with search.scheduler = fifo, sampler = random",
    ),
    ("grace = 3", "search.grace changes nothing .* read by asha, median"),
    ("reduction = 4", "search.reduction changes nothing"),
    ("interval = 3", "search.interval changes nothing .* read by pbt"),
    ("quantile = 0.5", "search.quantile changes nothing"),
    ("resample = 0.5", "search.resample changes nothing"),
    ('scheduler = "asha"\ninterval = 5', "search.interval changes nothing"),
    (
        'scheduler = "pbt"\nsampler = "optuna"',
        "search.sampler changes nothing with .*scheduler = pbt; read by fifo",
    ),
    ('scheduler = "asha"\ngrace = 40', "search.grace = 40 rounds must be less than the trial's 40"),
    ('scheduler = "pbt"\ninterval = 40', "search.interval = 40 rounds must be less"),
    ('scheduler = "pbt"\ntrials = 1', "set search.trials to 2 or more"),
]
PBT = '[search]\nscheduler = "pbt"\n'
OTHERWISE = [
    (SPACE, ["validation=0"], r"line 10, search.space.local.lr: .* set holdout.validation = 0.1 in \[base\]"),
    (SPACE, ["validation=0.1,0"], "set holdout.validation"),
    (SPACE, ["seeds=2000"], "override 'seeds=2000': search.seed = 1000 is one of the seeds"),
    (SPACE, ["seeds=x"], "override 'seeds=x': seed must be a whole number"),
    (SPACE, ["scheduler=asha", "evaluation.every=10"], "no less than evaluation.every = 10"),
    (SPACE, ["search.trials=1,2"], "search.trials takes one value, not 2"),
    (SPACE, ["search.space=1"], "unknown key 'search.space'"),
    (SPACE, ["lr=0.1", "methods=fedavg", "search.trials=3"], "nothing is left to search for"),
    (BASE, ["search.trials=3"], "there is no search here"),
    (SPACE + PBT, ['schedule=["3 local.lr=0.5"]'], "leave schedule empty"),
    (BASE + PBT + "[search.kdia]\nteacher = { choice = ['ema', 'triple'] }", [], "kdia.teacher: .* only numbers"),
    (BASE + PBT + '[search.space]\n"local.epochs" = { int = [1, 2] }', [], "local.weight_decay, local.clip can"),
]


@pytest.mark.parametrize(("text", "overrides", "said"), OTHERWISE)
def test_what_cannot_be_searched_is_refused(card: Any, text: str, overrides: list[str], said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        card(text, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_a_range_is_refused_where_it_stands(card: Any, text: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        card(BASE + text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), WITH_RANGES)
def test_settings_of_the_search_are_refused_where_they_stand(card: Any, text: str, said: str) -> None:
    ranges = '\n[search.space]\n"local.lr" = { loguniform = [0.01, 0.3] }\n'
    with pytest.raises(Refused, match=said) as caught:
        card(BASE + "[search]\n" + text + ranges)
    assert "\n" not in str(caught.value)


def test_a_single_command_has_no_search() -> None:
    with pytest.raises(Refused, match=r"override 'search.trials=3': there is no search here: only a card has one"):
        axes.run_sweep("kdia", ["search.trials=3"])


def test_schedulers_that_fit_are_taken(card: Any) -> None:
    for text, ready in itertools.product(("grace = 39", "grace = 1\nreduction = 2"), ("asha", "median")):
        assert card(SPACE + f'[search]\nscheduler = "{ready}"\n{text}\n').search.how.scheduler == ready
    ranges = '"local.lr" = { uniform = [0.1, 1] }\n"kdia.tau" = { choice = [1.0, 2.0] }\n'
    assert card(BASE + PBT + "interval = 39\nresample = 0.0\n[search.space]\n" + ranges).search.how.interval == 39


@pytest.mark.parametrize("name", cards.names("sweeps"))
def test_every_shipped_card_resolves(name: str) -> None:
    """With another search seed and with another number of seeds too, as its readers will want to have it."""
    sweep = axes.load_sweep(name)
    assert sweep.cells or sweep.search
