"""Who is stopped early: Tune's rules, applied within each group of a search, never across methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from harness.desk import Job
from harness.space import Search

Curve = Sequence[tuple[int, float]]  # rounds done, score so far


@dataclass(frozen=True)
class Known:
    """A trial of an earlier run, as Tune's rules see trials."""

    trial_id: str


class Referee(FIFOScheduler):
    """A rule for every group of a search; other trials run to their end.

    jobs: by Tune's trial id. known: the curves of trials that have ended before, by group: rules start from them.
    """

    def __init__(
        self, how: Search | None, jobs: Mapping[str, Job], known: Mapping[str, Mapping[str, Curve]] | None = None
    ) -> None:
        super().__init__()
        self.how, self.jobs, self.known = how, jobs, known or {}
        self._rules: dict[str, Any] = {}  # of Tune, by group
        self._met: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on. A trial from a checkpoint brings the curve of its earlier rounds along."""
        job = self.jobs[trial.trial_id]
        if job.stage != "search" or job.group is None or "curve" not in result or result["done"]:
            return str(TrialScheduler.CONTINUE)
        rule = self._rule(job)
        if rule is None:
            return str(TrialScheduler.CONTINUE)
        *earlier, now = result["curve"]
        if trial.trial_id not in self._met:
            self._met.add(trial.trial_id)
            _remember(rule, trial, earlier)
        return str(rule.on_trial_result(tune_controller, trial, _told(*now)))

    def _rule(self, job: Job) -> Any:
        assert job.group is not None
        if self.how is None or self.how.scheduler not in ("asha", "median"):
            return None
        key = job.group.key
        if key not in self._rules:
            rule = self._rules[key] = _make(self.how, job.cell.rounds)
            for name, curve in self.known.get(key, {}).items():
                _remember(rule, Known(name), curve)
        return self._rules[key]


class _MedianRule(MedianStoppingRule):
    """Tune's, which can be told of the past without judging it again: it would take a trial's next result for an
    error once it has told it to stop, and whether it would stop it depends on what others have reported since.
    """

    def remember(self, trial: Any, curve: Curve) -> None:
        """What a trial has reported before."""
        self._results[trial] += [_told(at, value) for at, value in curve]


def _remember(rule: Any, trial: Any, curve: Curve) -> None:
    """Tells a rule what a trial has reported before, in an earlier run. Nobody is stopped by that."""
    nobody: Any = None  # these rules do not look at Tune itself
    rule.on_trial_add(nobody, trial)
    if isinstance(rule, _MedianRule):
        rule.remember(trial, curve)
        return
    for at, value in curve:  # successive halving keeps its rungs from these
        rule.on_trial_result(nobody, trial, _told(at, value))


def _make(how: Search, rounds: int) -> TrialScheduler:
    """A rule of Tune. Its clock is the rounds done, its metric is larger for better trials."""
    common: dict[str, Any] = {"time_attr": "rounds_done", "metric": "score", "mode": "max", "grace_period": how.grace}
    if how.scheduler == "asha":
        return ASHAScheduler(
            **common, max_t=max(rounds, how.grace), reduction_factor=how.reduction, stop_last_trials=False
        )
    # An endless time slice: it would otherwise pause trials to let others catch up, through Tune's own checkpoints.
    common["min_time_slice"] = math.inf
    return _MedianRule(**common, min_samples_required=how.reduction)


def _told(rounds_done: int, value: float) -> dict[str, Any]:
    return {"rounds_done": rounds_done, "score": value}
