"""The space that a search draws from, and its draws: pure functions, so that a search draws the same when repeated.

A number's randomness comes from (the search's seed, the group, the number) alone, never from a stream that goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field

from harness import config
from harness.config import Trial
from harness.refusal import Refused, unknown
from harness.schedule import Change
from harness.sections import Count
from harness.settings import Settings
from harness.summary import Row, curve_of, last_mean

Kind = Literal["uniform", "loguniform", "int", "logint", "choice"]
Known: TypeAlias = Sequence[tuple[int, Mapping[str, Any], float]]  # number of a draw, its settings, its score
DIGITS = 6  # significant ones of a drawn number, so that it prints well
EXACT = 2**53  # largest whole number up to which a float has every one
STARTUP = 4  # results that the sampler learns from at least; before that its draws are the random ones
FACTORS = (0.8, 1.2)  # of a mutation, Jaderberg et al. 2017


class Search(Settings):
    """How settings are searched for, the same for every method. A sampler or scheduler reads only what it needs."""

    sampler: Literal["random", "optuna"] = "random"
    scheduler: Literal["fifo", "asha", "median", "pbt"] = "fifo"
    trials: Count = 16  # per method and grid point; pbt: the size of its population
    steps: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0  # most local and server steps of a group's search; 0: any
    metric: Literal["accuracy", "balanced_accuracy", "loss"] = "accuracy"  # of validation
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1000  # of all trials of the search
    ahead: Count = 4  # draw k learns from 0..k-ahead: whichever machine is faster changes nothing
    grace: Count = 5  # rounds before a trial may be stopped
    reduction: Annotated[int, Field(ge=2, le=10**6)] = 3  # asha: 1 in so many goes on; median: fewest to judge by
    interval: Count = 10  # rounds of a generation
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25  # share of a population that is replaced
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25  # chance of a new value instead of a changed one

    # The samplers or schedulers that read a setting; those that are not listed are read by all.
    READ_BY: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "sampler": ("fifo", "asha", "median"),
            "ahead": ("optuna",),
            "grace": ("asha", "median"),
            "reduction": ("asha", "median"),
            **dict.fromkeys(("interval", "quantile", "resample"), ("pbt",)),
        }
    )

    def unread(self) -> list[str]:
        """What is set but changes nothing with this sampler and scheduler. A first population is drawn at random."""
        usual = {name: field.default for name, field in type(self).model_fields.items()}
        there = {self.scheduler} | ({self.sampler} if self.scheduler != "pbt" else set())
        return [n for n, by in self.READ_BY.items() if getattr(self, n) != usual[n] and there.isdisjoint(by)]

    def canonical(self) -> Search:
        """The same search with unread settings at their defaults."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.unread()})


@dataclass(frozen=True)
class Dimension:
    """The values that one setting may have: a range's two ends, or the choices. source: where it was written."""

    kind: Kind
    values: tuple[Any, ...]
    source: str = field(default="", compare=False)

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the way through: evenly spread shares make draws as the kind has them."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if self.kind in ("int", "logint"):  # every whole number has its own stretch, half a step to either side
            low, high = low - 0.5, high + 0.5
        if self.kind in ("loguniform", "logint"):
            return self.fit(math.exp(math.log(low) * (1 - share) + math.log(high) * share))
        return self.fit(low * (1 - share) + high * share)

    def fit(self, value: float) -> int | float:
        """A number as it is used: short, of the right type, within the bounds."""
        low, high = self.values
        short = round(value) if self.kind in ("int", "logint") else float(f"{value:.{DIGITS}g}")
        fitted: int | float = min(max(short, low), high)
        return fitted

    def moved(self, value: Any, up: bool) -> Any:
        """A value not far from this one: a number times one of `FACTORS`, at least one on; of choices a neighbour."""
        if self.kind == "choice":
            at = self.place(value) + (1 if up else -1)
            return self.values[at if 0 <= at < len(self.values) else self.place(value) - (1 if up else -1)]
        changed = self.fit(value * FACTORS[up])
        if changed == value and self.kind in ("int", "logint"):
            return self.fit(value + (1 if up else -1))
        return changed

    def place(self, value: Any) -> int:
        """The number of a choice. True and 1 are two choices, [1] and (1,) are one."""
        return [json.dumps(v) for v in self.values].index(json.dumps(value))


@dataclass(frozen=True)
class Group:
    """What is searched for at once: a method at one grid point.

    key: its name, stable and short. prototype: the cell, with the search's seed and every dimension at its first
    value. dimensions: key in a trial ("local.lr", "hyper.tau") -> its values; empty: there is nothing to search.
    seeds: of the final runs with what was found.
    """

    key: str
    prototype: Trial
    dimensions: Mapping[str, Dimension]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class SearchPlan:
    """The searches of a sweep: one for each group."""

    how: Search
    groups: tuple[Group, ...]


def dimension(written: object, source: str) -> Dimension:
    """A dimension as a card has it: { uniform = [0, 1] }. Raises Refused."""
    if not isinstance(written, dict) or len(written) != 1:
        shape = "{ uniform = [low, high] } or { choice = [a, b, c] }"
        raise Refused(f"{source}: write {shape}, with one of {', '.join(get_args(Kind))}, got {written!r:.80}")
    [(kind, values)] = written.items()
    if kind not in get_args(Kind):
        raise Refused(f"{source}: {unknown('kind of range', kind, get_args(Kind))}")
    if not isinstance(values, list):
        raise Refused(f"{source}: {kind} takes a list, got {values!r:.80}")
    if kind == "choice":
        if len({json.dumps(v, default=str) for v in values}) < max(2, len(values)):
            raise Refused(f"{source}: choice takes two different values or more, got {values!r:.80}")
        return Dimension(kind, tuple(values), source)
    whole = kind in ("int", "logint")
    if len(values) != 2 or not all(_number(v, whole) for v in values):
        raise Refused(f"{source}: {kind} takes two {'whole' if whole else 'finite'} numbers, got {values!r:.80}")
    low, high = values if whole else map(float, values)
    if low >= high:
        raise Refused(f"{source}: the bounds of {kind} must be a lower and a higher one, got {values!r:.80}")
    if kind in ("loguniform", "logint") and low <= 0:
        raise Refused(f"{source}: the bounds of {kind} must be greater than 0, got {values!r:.80}")
    return Dimension(kind, (low, high), source)


def _number(value: object, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return abs(value) <= EXACT if isinstance(value, int) else math.isfinite(value)


def apply(prototype: Trial, settings: Mapping[str, Any], seed: int) -> Trial:
    """The prototype with other settings (by their keys in a trial) and another seed. Raises Unfit."""
    raw = prototype.model_dump() | {"seed": seed}
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        (raw[table] if table else raw)[name] = value
    return config.resolve(raw)


def after(cell: Trial, round: int, settings: Mapping[str, Any]) -> Trial:
    """The cell with a change of settings (by their keys in a trial) from a round on, after those it has already."""
    return config.resolve({**cell.model_dump(), "schedule": (*cell.schedule, str(Change(round, settings)))})


def draw(group: Group, how: Search, number: int, known: Known) -> dict[str, Any]:
    """The settings of a draw; the first has number 0. Of what is known, only 0..number-ahead is learnt from."""
    told = sorted((k for k in known if k[0] <= number - how.ahead), key=lambda k: k[0])
    if how.sampler == "optuna" and len(told) >= STARTUP:
        return _suggested(group, _stream(how.seed, group.key, number).getrandbits(32), told)
    return {key: d.at(_stream(how.seed, group.key, number, key).random()) for key, d in group.dimensions.items()}


def mutate(group: Group, how: Search, settings: Mapping[str, Any], member: int, generation: int) -> dict[str, Any]:
    """Settings not far from these, for a member of a population that takes over another one's state."""

    def changed(key: str, own: Dimension) -> Any:
        rng = _stream(how.seed, group.key, "mutate", member, generation, key)
        if rng.random() < how.resample:
            return own.at(rng.random())
        return own.moved(settings[key], rng.random() < 0.5)

    return {key: changed(key, own) for key, own in group.dimensions.items()}


def curve(rounds: Sequence[Row], how: Search) -> list[tuple[int, float]]:
    """Rounds done and what was measured then, larger for better, of the primary model: the one of the first row."""
    sign = -1 if how.metric == "loss" else 1
    own = sorted((row for row in rounds if row["role"] == rounds[0]["role"]), key=lambda row: int(row["round"]))
    return [(at + 1, sign * value) for at, value in curve_of(own, f"validation_{how.metric}")]


def score(rounds: Sequence[Row], how: Search) -> float | None:
    """How good a trial's rounds were, larger for better: the headline of validation. None: nothing was measured."""
    return last_mean(curve(rounds, how))


def score_at(rounds: Sequence[Row], how: Search, round: int) -> float | None:
    """How good it was when so many rounds were done: the last that was measured by then."""
    seen = [value for at, value in curve(rounds, how) if at <= round]
    return seen[-1] if seen else None


def _stream(*key: object) -> Random:
    return Random(int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()))


def _suggested(group: Group, seed: int, told: Known) -> dict[str, Any]:
    """What Optuna's TPE makes of the results that it is told."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def distribution(own: Dimension) -> optuna.distributions.BaseDistribution:
        log = own.kind in ("loguniform", "logint")
        if own.kind == "choice":
            return optuna.distributions.CategoricalDistribution(range(len(own.values)))
        low, high = own.values
        if own.kind in ("int", "logint"):
            return optuna.distributions.IntDistribution(low, high, log=log)
        return optuna.distributions.FloatDistribution(low, high, log=log)

    space = {key: distribution(own) for key, own in sorted(group.dimensions.items())}
    choices = {key: own for key, own in group.dimensions.items() if own.kind == "choice"}
    sampler = optuna.samplers.TPESampler(n_startup_trials=0, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _, settings, value in told:
        params = {k: choices[k].place(settings[k]) if k in choices else settings[k] for k in space}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    found = study.ask(space).params
    return {k: own.values[found[k]] if k in choices else own.fit(found[k]) for k, own in group.dimensions.items()}
