"""Who takes part: drawn from the seed alone, within the rules of availability."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cohorts import draw_cohort, draw_roster, read_trace
from harness.protocol import Cohort, Role, Visit
from harness.refusal import Refused
from harness.sections import Availability

ROLES = {"global": Role("mlp")}


def clients_of(cohort: Cohort) -> list[int]:
    return [visit.client for visit in cohort.visits]


@given(st.integers(0, 99), st.integers(0, 200), st.integers(4, 60), st.integers(2, 30))
def test_cyclic_clients_come_only_in_their_window(seed: int, round: int, clients: int, period: int) -> None:
    """A client that is there in round t is there in round t + period, too, and over a period all of them are."""
    how = Availability(pattern="cyclic", period=period, window=0.5)
    everybody = [
        set(clients_of(draw_cohort(seed, t, ROLES, clients, 1.0, how))) for t in range(round, round + period)
    ]
    assert set().union(*everybody) == set(range(clients))
    assert everybody[0] == set(clients_of(draw_cohort(seed, round + period, ROLES, clients, 1.0, how)))
    there = sum(len(some) for some in everybody)
    assert abs(there / period / clients - 0.5) <= 0.5 / period + 1e-9  # windows are whole numbers of rounds


def test_cyclic_cohorts_are_cut_to_those_who_are_there() -> None:
    how = Availability(pattern="cyclic", period=10, window=0.1)
    sizes = [len(draw_cohort(0, t, ROLES, 20, 0.5, how).visits) for t in range(10)]
    assert sizes == [2] * 10  # 20 clients in 10 time zones: 2 are there, 10 were wanted


def test_weighted_cohorts_favour_rows_and_never_pick_empty_clients() -> None:
    """One of 3 clients with rows 0, 1, 3: over 4,000 draws client 2 comes 3/4 of the time (standard error .007)."""
    how = Availability(pattern="weighted")
    picked = [clients_of(draw_cohort(1, t, ROLES, 3, 0.4, how, sizes=(0, 1, 3)))[0] for t in range(4000)]
    assert 0 not in picked
    assert abs(picked.count(2) / 4000 - 0.75) < 0.035


def test_a_trace_is_followed_exactly(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    pd.DataFrame({"round": [0, 0, 2, 0], "client": [3, 1, 2, 3]}).to_parquet(path)
    trace, digest = read_trace(path, clients=4)
    assert trace == {0: [1, 3], 2: [2]}
    how = Availability(pattern="trace", trace=str(path))
    drawn = [clients_of(draw_cohort(5, t, ROLES, 4, 0.25, how, trace=trace)) for t in range(3)]
    assert drawn == [[1, 3], [], [2]]
    pd.DataFrame({"client": [2, 1, 3], "round": [2, 0, 0]}).to_parquet(path)
    assert read_trace(path, clients=4) == (trace, digest)  # the same rows, in another order


@pytest.mark.parametrize("content", [{"round": [0]}, {"round": [0.5], "client": [1]}, {"round": [0], "client": [4]}])
def test_bad_traces_are_refused(tmp_path: Path, content: dict[str, list[float]]) -> None:
    path = tmp_path / "trace.parquet"
    pd.DataFrame(content).to_parquet(path)
    with pytest.raises(Refused, match=r"availability\.trace"):
        read_trace(path, clients=4)


def test_a_trace_that_is_missing_or_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="trace"):
        read_trace(tmp_path / "none.parquet", clients=4)
    (tmp_path / "text.parquet").write_text("round,client\n0,1\n")
    with pytest.raises(Refused, match="trace"):
        read_trace(tmp_path / "text.parquet", clients=4)


def test_dropout_and_stragglers_have_their_rates_and_do_not_depend_on_each_other() -> None:
    """Binomial: 5,000 visits at .3 and .2 have standard errors .0065 and .0057; five of them are allowed."""
    cohort = Cohort(3, tuple(Visit(k, "global") for k in range(5000)))
    roster = draw_roster(0, cohort, Availability(dropout=0.3, stragglers=0.2, straggler_work=0.25))
    slow = {visit for visit, share in roster.work.items() if share == 0.25}
    assert set(roster.work.values()) == {0.25, 1.0}
    assert abs(len(roster.dropped) / 5000 - 0.3) < 0.0325
    assert abs(len(slow) / 5000 - 0.2) < 0.0285
    assert roster.dropped == draw_roster(0, cohort, Availability(dropout=0.3)).dropped


def test_fewer_visits_do_not_change_the_luck_of_the_others() -> None:
    whole = Cohort(1, tuple(Visit(k, "global") for k in range(50)))
    half = Cohort(1, whole.visits[::2])
    how = Availability(dropout=0.5)
    assert draw_roster(0, half, how).dropped == draw_roster(0, whole, how).dropped & set(half.visits)
