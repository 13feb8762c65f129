"""Statistics: known rows give known numbers, by hand and by scipy; what is uneven is said."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import scikit_posthocs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness import inference
from harness.config import LATER as LATER_SETTINGS
from harness.config import Trial
from harness.inference import Interval, holm, interval, iqm, letters, nemenyi, paired, signed_rank
from harness.metrics import METRICS, describe
from harness.places import LATER, grouped
from harness.record import flatten
from harness.refusal import Refused
from harness.statistics import Cell, Summary, summarise
from harness.tables import difference, shortened, spelled

HOW = METRICS["accuracy_last10"]
numbers = st.floats(0, 100).map(lambda value: round(value, 4))


def trial(method: str, seed: int, value: float | None, alpha: float = 0.1, **more: Any) -> dict[str, Any]:
    """A row of `trials` whose global model ends at a fraction. more: columns, hyper and config."""
    config = {"method": method, "seed": seed, "hyper": more.pop("hyper", {}), "partition": {"alpha": alpha}}
    config |= {"dataset": "digits", **more.pop("config", {})}
    row = {"status": "done", "method": method, "dataset": "digits", "seed": seed, "config": json.dumps(config)}
    row |= {"partition_hash": f"{alpha} {seed}", "steps": 100, "server_steps": 0, "reason": None}
    if value is not None:
        row |= {f"global_accuracy_{name}": value for name in ("last10", "last", "best", "auc")}
    row |= more
    return {"trial_id": hashlib.sha256(repr(row).encode()).hexdigest()[:16], **row}


def cell(*values: float, **more: Any) -> Cell:
    """The only cell of trials with these values in percent."""
    rows = [trial("a", seed, value / 100) for seed, value in enumerate(values)]
    return summarise([*rows, *more.get("rows", ())]).cells[0][0]


def names(found: Summary) -> list[str]:
    return [line.name for line in found.lines]


def test_mean_deviation_and_interval_by_hand() -> None:
    """70, 80, 90: mean 80, deviation 10; t(.975, 2) = 4.302653, so 80 -/+ 4.302653 * 10 / sqrt 3 = 24.841377."""
    found = cell(70, 80, 90)
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(80), pytest.approx(10))
    assert (found.low, found.high) == pytest.approx((55.158623, 104.841377), abs=1e-6)
    assert spelled(found, HOW) == "80.00 ± 10.00 [55.16, 104.84] (n=3)"


def test_cells_without_enough_to_say() -> None:
    assert spelled(cell(71.5), HOW) == "71.50 (n=1)"
    assert cell(71.5).interval is None
    assert spelled(Cell("a", "", "d"), HOW) == "-"
    lost = [trial("a", 7, None, status="failed"), trial("a", 8, None, status="failed", reason="diverged: nan")]
    assert spelled(cell(70, 72, rows=lost), HOW) == "71.00 ± 1.41 [58.29, 83.71] (n=2, 1 failed, 1 diverged)"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_below_five_values_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(50, 4, n)
    expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = interval([values])
    assert found is not None
    assert found[:2] == pytest.approx(expected)
    assert found.kind == "t"


def test_interval_over_cells_of_three_is_students_with_their_freedom_together() -> None:
    """Two cells (1, 2, 3) and (2, 4, 6): means 2 and 4, so 3. Variances 1 and 4: error sqrt(1/3 + 4/3) / 2 =
    .645497; t(.975, 2 + 2) = 2.776445, so 3 -/+ 1.792188."""
    found = interval([[1, 2, 3], [2, 4, 6]])
    assert found is not None
    assert found.kind == "t"
    assert found[:2] == pytest.approx((1.207812, 4.792188), abs=1e-5)


def test_bootstrap_percentiles_are_taken_as_far_out_as_said() -> None:
    """n = 5: t(.975, 4) = 2.776445, times sqrt(5/4) = 3.104160, below which the normal has .000954. The mean of a
    resample of (0, 0, 0, 0, 1) is Binomial(5, 1/5) / 5, whose quantiles there are 0 and .8: P(1) = .00032 is less
    than .000954, P(.8 or more) = .00672 is not.
    """
    assert interval([[0, 0, 0, 0, 1]]) == Interval(0.0, 0.8, "bootstrap")


@pytest.mark.parametrize(("cells", "n"), [(1, 3), (1, 5), (1, 8), (1, 20), (3, 3), (4, 5)])
def test_intervals_cover_the_mean_about_as_often_as_they_say(cells: int, n: int) -> None:
    """800 draws from a normal: 95 % of the intervals should hold its mean; a standard error is .8 points. Plain
    percentiles would do so in 84 % of the draws of five values and in 75 % of three, which this would notice."""
    rng = np.random.default_rng(cells * 100 + n)
    found = [interval(rng.normal(0, 1, (cells, n))) for _ in range(800)]
    assert np.mean([one is not None and one.low <= 0 <= one.high for one in found]) > 0.91


@given(st.lists(st.lists(numbers, min_size=2, max_size=8), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_intervals_hold_the_mean_and_do_not_know_the_order_of_seeds(strata: list[list[float]], random: Any) -> None:
    found = interval(strata)
    assert found is not None
    middle = float(np.mean([np.mean(stratum) for stratum in strata]))
    assert found.low <= middle + 1e-9
    assert found.high >= middle - 1e-9
    shuffled = [random.sample(stratum, len(stratum)) for stratum in strata]
    assert interval(shuffled) == found
    robust = interval(strata, "iqm")
    assert robust is None or robust.low <= iqm([value for s in strata for value in s]) <= robust.high


def test_interquartile_mean() -> None:
    """Of eight values the two lowest and the two highest go: (3 + 4 + 5 + 6) / 4. Of three none do."""
    assert iqm([1, 2, 3, 4, 5, 6, 70, 80]) == 4.5
    assert iqm([1, 2, 6]) == 3
    values = np.random.default_rng(0).normal(size=21)
    assert iqm(list(values)) == pytest.approx(stats.trim_mean(values, 0.25))


def test_paired_t_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, error 1 / sqrt 3; t = 3.464102 with 2 degrees: p = .074180; t(.975, 2) =
    4.302653, so 2 -/+ 2.484138."""
    found = paired([1, 2, 3])
    assert (found.n, found.mean, found.test) == (3, 2.0, "t")
    assert found.p == pytest.approx(0.0741799, abs=1e-6)
    assert found.interval is not None
    assert found.interval[:2] == pytest.approx((-0.484138, 4.484138), abs=1e-6)


@pytest.mark.parametrize("n", [2, 5, 11, 12, 13, 40, 200])
def test_paired_tests_are_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1, n)
    found = paired(list(values))
    expected = stats.ttest_1samp(values, 0) if n < 12 else stats.wilcoxon(values, correction=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.test == ("t" if n < 12 else "signed-rank")


def test_signed_ranks_with_ties_by_hand() -> None:
    """1, 1, -1, 2: ranks 2, 2, 2, 4, negative 2. Of the 16 signs those with a sum of negative ranks of at most 2 are
    none and each single 2: 4 of 16, doubled .5. A zero counts for nothing."""
    assert signed_rank([1, 1, -1, 2]) == 0.5
    assert signed_rank([1, 1, -1, 2, 0]) == 0.5
    assert signed_rank([0, 0]) == 1.0


def test_differences_that_leave_no_doubt_or_no_difference() -> None:
    assert paired([2.0, 2.0, 2.0]).p == 0.0
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert paired([3.0]) == (1, 3.0, None, None, "none")
    assert math.isnan(paired([]).mean)


def test_holm_by_hand() -> None:
    """.01 x 3, then .04 x 2, then .03 would be .03 x 1 but may not fall below the one before it; sorted: .01, .03,
    .04 -> .03, .06, .06."""
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_average_ranks_friedman_and_critical_difference() -> None:
    """Demsar's (2006) q(.05) for 4 methods is 2.569: over 6 settings 2.569 sqrt(4 * 5 / 36) = 1.9148."""
    scores = np.random.default_rng(3).normal([0, 0.2, 1, 2], 1, (6, 4))
    found = inference.ranking(scores)
    assert found is not None
    assert found.ranks == pytest.approx(stats.rankdata(-scores, axis=1).mean(axis=0))
    assert found.p == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    assert found.critical == pytest.approx(1.9148, abs=2e-3)
    for low, high in ((found.ranks[a], found.ranks[b]) for a, b in combinations(range(4), 2)):
        together = any({low, high} <= {found.ranks[at] for at in clique} for clique in found.cliques)
        assert together == (abs(low - high) < found.critical)
    assert inference.ranking(scores[:1]) is None
    assert inference.ranking(-scores, high=False).ranks == found.ranks  # type: ignore[union-attr]


def test_ties_share_their_rank() -> None:
    """Ranks of (1, 1, 0): 1.5, 1.5, 3. All tied everywhere: nothing differs."""
    found = inference.ranking(np.array([[1, 1, 0], [1, 1, 0]]))
    assert found is not None
    assert found.ranks == (1.5, 1.5, 3.0)
    assert inference.ranking(np.ones((4, 3))).p == 1.0  # type: ignore[union-attr]


def test_nemenyi_is_that_of_scikit_posthocs() -> None:
    scores = np.random.default_rng(5).normal([0, 0.5, 1, 2, 2], 1, (7, 5))
    found = inference.ranking(scores)
    assert found is not None
    expected = scikit_posthocs.posthoc_nemenyi_friedman(scores).to_numpy()
    assert nemenyi(found.ranks, 7) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 10, 50])
def test_studentized_range_is_scipys(k: int) -> None:
    assert inference.range_quantile(k) == pytest.approx(stats.studentized_range.ppf(0.95, k, np.inf), abs=1e-4)


@st.composite
def different(draw: st.DrawFn) -> np.ndarray:
    k = draw(st.integers(1, 8))
    found = np.zeros((k, k), bool)
    for i, j in combinations(range(k), 2):
        found[i, j] = found[j, i] = draw(st.booleans())
    return found


@given(different())
def test_two_share_a_letter_if_and_only_if_they_are_not_told_apart(differs: np.ndarray) -> None:
    found = letters(differs)
    assert all(found)
    for i, j in combinations(range(len(differs)), 2):
        assert bool(set(found[i]) & set(found[j])) != differs[i, j]


def test_letters_in_order() -> None:
    """Best and worst differ, the middle one from neither: ab between a and b."""
    assert letters(np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], bool)) == ["a", "ab", "b"]


def test_runs_of_letters_are_shortened() -> None:
    assert [shortened(text) for text in ("", "abc", "abcd", "acdefg", "abd", "xyz(27)")] == [
        *("", "abc", "a-d", "ac-g", "abd", "xyz(27)")
    ]


def test_chance_to_beat_by_hand() -> None:
    """(1, 3) against (2, 3): 1 loses twice; 3 beats 2 and ties 3: 1.5 of 4. With a second cell of all wins: the mean
    of .375 and 1."""
    assert inference.improvement([[1, 3]], [[2, 3]])[0] == 0.375
    chance, found = inference.improvement([[1, 3], [5, 6]], [[2, 3], [0, 1]])
    assert chance == 0.6875
    assert found is not None
    assert 0.5 <= found.low <= chance <= found.high <= 1.0
    expected = stats.mannwhitneyu([1.0, 4, 2, 8], [3.0, 2, 5]).statistic / 12
    assert inference.improvement([[1, 4, 2, 8]], [[3, 2, 5]])[0] == pytest.approx(expected)


def test_profile_is_the_share_above_a_threshold() -> None:
    """Cells (1, 3) and (2, 4) above 2: 1 of 2 and 1 of 2; above 3.5: 0 and 1 of 2."""
    share, low, high = inference.profile([[1, 3], [2, 4]], np.array([0.0, 2.0, 3.5, 9.0]))
    assert list(share) == [1.0, 0.5, 0.25, 0.0]
    assert (low <= share).all()
    assert (share <= high).all()
    assert (low[[0, 3]] == high[[0, 3]]).all()


def rows(*methods: str, seeds: int = 3, alphas: tuple[float, ...] = (0.1,), **more: Any) -> list[dict[str, Any]]:
    """Trials in which each further method is 2 points better, seeds differ by a point, and alphas by ten."""
    return [
        trial(method, seed, 0.5 + 0.02 * at + 0.01 * seed + 0.1 * (alpha > 0.5) + 0.001 * at * seed, alpha, **more)
        for at, method in enumerate(methods)
        for seed in range(seeds)
        for alpha in alphas
    ]


def test_differences_to_the_baseline_are_paired_by_seed() -> None:
    """b - fedavg: 2.0, 2.1, 2.2 over seeds: mean 2.1, error .1 / sqrt 3, t = 36.373 with 2 degrees: p = .000755;
    c - fedavg twice as much with twice the error, so the same p. Holm: times 2."""
    found = summarise(rows("fedavg", "b", "c"))
    assert found.baseline is not None
    assert (found.baseline.name, names(found)) == ("fedavg", ["c", "b", "fedavg"])
    made = found.cells[1][0].difference
    assert made is not None
    assert (made.paired.n, made.paired.mean, made.unpaired) == (3, pytest.approx(2.1), 0)
    assert made.paired.p == pytest.approx(0.000755, abs=1e-6)
    assert made.p == pytest.approx(0.00151, abs=1e-5)
    assert difference(made, HOW) == "+2.10 [+1.85, +2.35] p=0.0015* (n=3)"
    assert found.cells[2][0].difference is None
    assert [line[0].letters for line in found.cells] == ["a", "b", "c"]


def test_the_baseline_is_chosen_by_method_or_row() -> None:
    every = rows("a", "b")
    assert summarise(every).baseline is None
    assert summarise(every, baseline="b").baseline.method == "b"  # type: ignore[union-attr]
    with pytest.raises(Refused, match=r"unknown baseline 'bb'. Did you mean 'b'\? Allowed: a, b"):
        summarise(every, baseline="bb")
    twice = [trial("a", 0, 0.5, hyper={"x": x}) for x in (1, 2)]
    assert summarise(twice, baseline="a x=2").baseline.name == "a x=2"  # type: ignore[union-attr]
    with pytest.raises(Refused, match="Allowed: a x=1, a x=2"):
        summarise(twice, baseline="a")


def test_only_seeds_with_the_same_partition_are_paired() -> None:
    every = rows("fedavg", "b", seeds=4)
    next(row for row in every if row["method"] == "b" and row["seed"] == 3)["partition_hash"] = "another"
    found = summarise([row for row in every if (row["method"], row["seed"]) != ("fedavg", 0)])
    made = found.cells[0][0].difference
    assert made is not None
    assert (made.paired.n, made.unpaired) == (2, 2)
    assert any("same partition, left out of differences: b at digits (2)" in note for note in found.notes)


def test_over_all_settings() -> None:
    """b is 2.1 points better on average at each of two settings; every run of b at alpha .1 (52, 53.1, 54.2) against
    (50, 51, 52): 8 wins and a tie of 9: .9444."""
    found = summarise(rows("fedavg", "b", alphas=(0.1, 1.0)))
    assert found.pooled[0] is not None
    assert found.pooled[0].n == 6
    assert found.pooled[0].mean == pytest.approx(58.1)
    assert found.pooled[0].better == pytest.approx(8.5 / 9)
    assert found.ranking is not None
    assert (found.ranking.ranks, found.ranking.n) == ((1.0, 2.0), 2)
    gap = summarise(rows("fedavg", "b", alphas=(0.1, 1.0)) + rows("c"))
    assert (names(gap)[-1], gap.pooled[-1]) == ("c", None)
    assert [line.name for line in gap.ranked] == ["b", "fedavg"]
    assert any("No trials: c at alpha=1.0" in note for note in gap.notes)


def test_lower_is_better_for_costs() -> None:
    every = [trial(m, seed, 0.5, seconds=s + seed) for m, s in (("fedavg", 9.0), ("b", 3.0)) for seed in range(3)]
    found = summarise(every, metric="seconds")
    assert names(found) == ["b", "fedavg"]
    assert [line[0].letters for line in found.cells] == ["a", "b"]
    two = summarise(
        [
            *every,
            *(
                {**row, "config": row["config"].replace("0.1", "0.2"), "trial_id": f"x{i}"}
                for i, row in enumerate(every)
            ),
        ],
        metric="seconds",
    )
    assert two.pooled[0] is not None
    assert two.pooled[0].better == 1.0


@settings(max_examples=20)
@given(st.permutations(rows("fedavg", "b", "c", seeds=5, alphas=(0.1, 1.0))))
def test_the_order_of_rows_changes_nothing(shuffled: list[dict[str, Any]]) -> None:
    first = summarise(rows("fedavg", "b", "c", seeds=5, alphas=(0.1, 1.0)))
    again = summarise(shuffled)
    assert (again.lines, again.settings, again.cells) == (first.lines, first.settings, first.cells)
    assert (again.pooled, again.notes) == (first.pooled, first.notes)


def test_what_is_uneven_is_said() -> None:
    six = rows("fedavg", "b", seeds=6, commit="c1", clean=True, device="cpu")
    quiet = summarise(six).notes
    assert len(quiet) == 4  # how to read cells, intervals, letters and differences
    odd = [*six[:-1], trial("b", 9, 0.6, commit="c2", clean=False, device="cuda", drift="torch", steps=300)]
    notes = " ".join(summarise(odd).notes)
    for said in (
        "The seeds differ between the methods at digits: 0, 1, 2, 3, 4, 5 and 0, 1, 2, 3, 4, 9.",
        "2 different versions of the code",
        "1 of 12 trials ran with uncommitted changes",
        "1 trials went on with another version",
        "different devices: cpu, cuda",
    ):
        assert said in notes
    assert "The number of seeds differs between cells: from 5 to 6" in " ".join(summarise(six[:-1]).notes)
    assert "Fewer than 5 seeds (n = 3)" in " ".join(summarise(rows("a")).notes)


def test_budgets_that_differ_are_said() -> None:
    every = rows("fedavg", "b") + rows("codist", steps=200, server_steps=50)
    notes = " ".join(summarise(every).notes)
    assert "Budgets differ, local steps per trial: codist 200; others 100." in notes
    assert "Budgets differ, server steps per trial: codist 50; others 0." in notes


def test_trials_of_a_search_take_no_part() -> None:
    searched = [trial("fedavg", 9, 0.9, stage="search", config={"local": {"lr": lr}}) for lr in (0.1, 0.2)]
    found = summarise([*rows("fedavg"), *searched])
    assert (names(found), found.settings, found.cells[0][0].n) == (["fedavg"], ("digits",), 3)
    assert "2 trials of a search are left out." in found.notes
    only = summarise(searched)
    assert (only.lines, only.cells) == ((), ())
    assert "2 trials of a search are left out." in only.notes


def test_what_a_search_found_belongs_to_the_method_and_makes_no_setting() -> None:
    final = [
        trial(
            "b",
            seed,
            0.6,
            alpha,
            stage="final",
            config={"local": {"lr": alpha / 2}},
            search=json.dumps({"group": "g", "number": 3, "settings": {"local.lr": alpha / 2}}),
        )
        for seed in range(2)
        for alpha in (0.1, 1.0)
    ]
    plain = [trial("fedavg", s, 0.5, a, config={"local": {"lr": 0.01}}) for s in range(2) for a in (0.1, 1.0)]
    found = summarise([*final, *plain])
    assert found.settings == ("alpha=0.1", "alpha=1.0")
    assert names(found) == ["b searched", "fedavg"]


def test_files_of_one_method_are_told_apart_by_their_content() -> None:
    every = [*rows("fedavg", config={"source": ""})]
    for version in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        every += [{**r, "trial_id": r["trial_id"] + version} for r in rows("mine", config={"source": version})]
    found = summarise(every)
    assert found.settings == ("digits",)
    assert sorted(names(found)) == ["fedavg", "mine source=aaaaaaaa", "mine source=bbbbbbbb"]


def test_settings_that_came_later_are_at_their_default_in_older_rows() -> None:
    defaults = Trial(method="fedavg").model_dump(mode="json")
    assert flatten({name: defaults[name] for name in LATER_SETTINGS}) == LATER
    old, new = trial("a", 0, 0.5), trial("a", 1, 0.5, config={"schedule": [], "faults": {"client": "fail"}})
    assert {place.setting for place in grouped([old, new]).values()} == {"digits"}


def test_a_trial_that_was_repeated_counts_once() -> None:
    old = trial("a", 0, 0.2, started="2026-01-01", rules_version=2)
    new = trial("a", 0, 0.4, started="2026-01-02", rules_version=2)
    found = summarise([new, trial("a", 0, 0.9, started="2026-02-01", rules_version=1), old])
    assert found.cells[0][0].values == pytest.approx({0: 40.0})
    assert any("2 trials were repeated with newer rules or later, and are left out" in note for note in found.notes)


def curve(trial_id: str, values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": trial_id,
            "round": at,
            "role": "global",
            "accuracy": value,
            "seconds": 2.0,
            "up_bytes": 10**6,
            "down_bytes": 0,
            **{name: column[at] for name, column in more.items()},
        }
        for at, value in enumerate(values)
    ]


def test_metrics_that_only_the_rounds_tell() -> None:
    """.4, .6, .8 by round: .55 is reached in the second: 2 rounds, 4 s, 2 MB. F1 of the last ten: the mean."""
    row = trial("a", 0, 0.6)
    rounds = curve(row["trial_id"], [0.4, 0.6, 0.8], macro_f1=[0.1, 0.2, 0.6])
    for metric, expected in (("rounds_to_0.55", 2), ("seconds_to_0.55", 4), ("bytes_to_0.55", 2)):
        assert summarise([row], rounds, metric).cells[0][0].mean == expected
    assert summarise([row], rounds, "macro_f1_last10").cells[0][0].mean == pytest.approx(30)
    assert (
        spelled(summarise([row], rounds, "rounds_to_0.9").cells[0][0], describe("rounds_to_0.9")) == "1 not reached"
    )
    with pytest.raises(Refused, match=r"unknown metric 'macro_f1_last'\. Did you mean 'macro_f1_last10'"):
        summarise([row], rounds, "macro_f1_last")


def test_all_pairs_of_many_methods_stay_quick() -> None:
    every = [trial(f"m{m}", s, m / 100 + s / 500, a) for m, s, a in product(range(30), range(3), (0.1, 1.0))]
    found = summarise(every, baseline="m0")
    assert found.cells[0][0].letters.startswith("a")
    assert len(found.notes) == 5
