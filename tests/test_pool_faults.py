"""Hosts that die, hang, raise or run out of memory: what is done about it, what is told, and that no number changes.

A method file of the test's own makes the trouble, on purpose and for one client; markers on the disk say how often.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError

from harness import pool
from harness.config import Execution
from harness.inline import InlinePool
from harness.pool import RayPool
from harness.server import Server
from harness.work import Setup, WorkFailed

SIZES = (3, 4, 8, 5, 2)
VICTIM = 2  # the client with 8 rows
CLOCKS = {"seconds", "server_seconds"}
TROUBLE = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

import torch
from algorithms.fedavg import FedAvg

@dataclass(frozen=True)
class Troubled(FedAvg):
    where: str = ""
    often: int = 1  # times that there is trouble

    def loss(self, net, p, batch, inbox, memory):
        marks = Path(self.where)
        if self.where and len(batch.y) == 8 and inbox["round"] == 1 and len(list(marks.iterdir())) < self.often:
            (marks / str(time.time_ns())).touch()
            LINE
        return super().loss(net, p, batch, inbox, memory)
"""


@pytest.fixture
def troubled(tmp_path: Path, lab: Any) -> Callable[..., Setup]:
    """A trial in which something goes wrong with client 2 in round 1. line: what; often: how many times in all."""

    def make(line: str, often: int, many: tuple[int, ...] = SIZES, **trial: Any) -> Setup:
        path, marks = tmp_path / "troubled.py", tmp_path / "marks"
        path.write_text(TROUBLE.replace("LINE", line))
        marks.mkdir()
        setup: Setup = lab.setup(str(path), {"where": str(marks), "often": often}, sizes=many, rounds=3, **trial)
        return setup

    return make


def tables(server: Server) -> list[list[dict[str, Any]]]:
    return [[{k: v for k, v in row.items() if k not in CLOCKS} for row in t] for t in (server.rounds, server.clients)]


def finished(server: Server) -> list[list[dict[str, Any]]]:
    while not server.done:
        server.step()
    return tables(server)


def told(server: Server) -> list[tuple[str, int | None, int | None]]:
    return [(e["kind"], e["round"], e["client"]) for e in server.events]


def details(server: Server) -> str:
    return " | ".join(e["detail"] for e in server.events)


# ---- inline


class Small(InlinePool):
    """A GPU that is too small for visits of client 2, as often as is said, and counts how often it was emptied."""

    often = 1
    emptied = 0

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        whole = self.host.visit

        def visit(order: Any, parts: Any, memory: Any) -> Any:
            if order.visit.client == VICTIM and order.round == 1 and self.often:
                self.often -= 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return whole(order, parts, memory)

        def empty() -> None:
            self.emptied += 1

        patch.setattr(self.host, "visit", visit)
        patch.setattr(torch.cuda, "empty_cache", empty)


def small(lab: Any, patch: pytest.MonkeyPatch, often: int, **trial: Any) -> Server:
    made, setup = Small(patch), lab.setup(sizes=SIZES, **trial)
    made.often = often
    made.load(setup)
    return Server(setup, made)


def test_a_gpu_without_room_is_emptied_and_the_work_done_again(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = small(lab, monkeypatch, 1)
    assert finished(server) == tables(lab.run(sizes=SIZES))
    assert told(server) == [("out_of_memory", 1, VICTIM)]
    assert "CUDA out of memory" in details(server)
    assert server.pool.emptied == 1  # type: ignore[attr-defined]


def test_a_gpu_that_has_no_room_twice_fails_the_visit(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = small(lab, monkeypatch, 2)
    with pytest.raises(WorkFailed, match="client 2 in round 1: OutOfMemoryError: CUDA out of memory"):
        finished(server)
    assert told(server) == [("out_of_memory", 1, VICTIM), ("client_failed", 1, VICTIM)]
    skipping = small(lab, monkeypatch, 2, faults={"client": "skip"})
    finished(skipping)
    assert told(skipping) == [("out_of_memory", 1, VICTIM), ("client_skipped", 1, VICTIM)]


# ---- on hosts


class Watched(RayPool):
    """Two hosts that live as long as the module; `before` is called with every order."""

    before: Callable[[Any], None] = staticmethod(lambda order: None)  # type: ignore[assignment]

    def visit(self, order: Any, *rest: Any) -> Any:
        self.before(order)
        return super().visit(order, *rest)

    def start(self, setup: Setup, **how: Any) -> Server:
        """A server in this process with its hosts here. how: execution settings."""
        self.how = Execution(hosts=2, **how)
        self.load(setup, ray.put(setup.arrays))
        return Server(setup, self)

    def pids(self) -> list[int]:
        return ray.get([host.__ray_call__.remote(lambda _: os.getpid()) for host in self.hosts])


@pytest.fixture(scope="module")
def both(cluster: None) -> Iterator[Watched]:
    made = Watched(Execution(hosts=2), "cpu")
    yield made
    for host in made.hosts:
        ray.kill(host)


def plain(lab: Any) -> list[list[dict[str, Any]]]:
    """The numbers when nothing goes wrong."""
    return tables(lab.run(sizes=SIZES))


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
HANG = "time.sleep(600)"
RAISE = "raise ValueError('bad\\nluck')"
SHORT = "raise torch.cuda.OutOfMemoryError('CUDA out of memory')"


@pytest.mark.cluster
def test_a_host_that_dies_is_an_event_and_no_other_number(troubled: Any, lab: Any, both: Watched) -> None:
    server = both.start(troubled(DIE, 1))
    assert finished(server) == plain(lab)
    assert told(server) == [("host_lost", 1, VICTIM)]
    assert "its worker process has died; given again" in details(server)


@pytest.mark.long
@pytest.mark.cluster
def test_a_visit_that_kills_every_host_fails(troubled: Any, both: Watched) -> None:
    server = both.start(troubled(DIE, 9), host_retries=1)
    with pytest.raises(WorkFailed, match=r"client 2 in round 1: .*host lost 2 times"):
        finished(server)
    assert told(server) == [("host_lost", 1, VICTIM)] * 2 + [("client_failed", 1, VICTIM)]
    assert [row["round"] for row in server.rounds] == [0], "the round before is whole"


@pytest.mark.cluster
def test_a_visit_that_hangs_is_given_again_once(troubled: Any, lab: Any, both: Watched) -> None:
    server = both.start(troubled(HANG, 1), visit_timeout_s=1.5)
    started = time.monotonic()
    assert finished(server) == plain(lab)
    assert told(server) == [("visit_hung", 1, VICTIM)]
    assert "no answer from host" in details(server)
    assert time.monotonic() - started > 1.5


@pytest.mark.long
@pytest.mark.cluster
def test_a_visit_that_hangs_again_fails_or_is_skipped(troubled: Any, lab: Any, both: Watched) -> None:
    """Skipped: the other four clients' updates make round 1, and the victim is back in round 2."""
    server = both.start(troubled(HANG, 2, faults={"client": "skip"}), visit_timeout_s=1.5)
    finished(server)
    assert told(server) == [("visit_hung", 1, VICTIM)] * 2 + [("client_skipped", 1, VICTIM)]
    victim = [row for row in server.clients if row["client"] == VICTIM]
    assert [row["steps"] for row in victim] == [1, 0, 1]
    assert [row["up_bytes"] > 0 for row in victim] == [True, False, True]
    assert len({row["down_bytes"] for row in victim}) == 1


@pytest.mark.cluster
def test_the_clock_of_a_visit_starts_when_it_starts(
    tmp_path: Path, lab: Any, both: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 5 visits takes .8 s, and 2 hosts have them two deep: the second of a host is answered after 1.6 s."""
    path = tmp_path / "slow.py"
    line = "time.sleep(0.8)"
    path.write_text(TROUBLE.replace('len(batch.y) == 8 and inbox["round"] == 1 and ', "").replace("LINE", line))
    (tmp_path / "marks").mkdir()
    where = {"where": str(tmp_path / "marks"), "often": 99}
    setup = lab.setup(str(path), where, sizes=SIZES, rounds=1)
    server = both.start(setup, visit_timeout_s=1.4)
    both.mean_s = 0.09  # short enough for two calls at a host, too long for two visits in a call
    deepest, give = 0, pool.give

    def watched(host: Any, at: int, works: list[Any]) -> Any:
        nonlocal deepest
        deepest = max(deepest, 1 + both.load_of[at])
        assert len(works) == 1
        return give(host, at, works)

    monkeypatch.setattr(pool, "give", watched)
    finished(server)
    assert deepest == 2
    assert server.events == []


@pytest.mark.cluster
def test_a_long_absence_of_the_server_makes_nobody_late(troubled: Any, lab: Any, both: Watched) -> None:
    """Work was given, the server did something else for longer than the time-out, and all is answered by then."""
    setup = troubled(HANG, 0)
    server = both.start(setup, visit_timeout_s=1)
    late = []

    def absent(order: Any) -> None:
        if (order.round, order.visit.client) == (1, 4):
            late.append(order)
            time.sleep(2)

    both.before = absent  # type: ignore[method-assign]
    try:
        assert finished(server) == plain(lab)
    finally:
        del both.before
    assert len(late) == 1
    assert server.events == []


@pytest.mark.cluster
def test_a_visit_that_raises_fails_the_trial_or_is_skipped(troubled: Any, both: Watched) -> None:
    server = both.start(troubled(RAISE, 1))
    with pytest.raises(WorkFailed, match=r"^client 2 in round 1: ValueError: bad luck$"):
        finished(server)
    assert told(server) == [("client_failed", 1, VICTIM)]


@pytest.mark.cluster
def test_skipping_on_hosts_is_skipping_inline(troubled: Any, lab: Any, both: Watched) -> None:
    setup = troubled(RAISE, 99, faults={"client": "skip"})
    server = both.start(setup)
    assert finished(server) == finished(lab.server(setup))
    assert told(server) == [("client_skipped", 1, VICTIM)]


@pytest.mark.cluster
def test_a_shortage_of_memory_halves_the_hosts_at_work(troubled: Any, lab: Any, both: Watched) -> None:
    server = both.start(troubled(SHORT, 1))
    assert finished(server) == plain(lab)
    assert told(server) == [("out_of_memory", 1, VICTIM)]
    assert "CUDA out of memory; 1 of 2 hosts work from now on; given again" in details(server)
    assert both.thinned == 2
    both.start(lab.setup())
    assert both.thinned == 1, "the next trial has all hosts again"


@pytest.mark.cluster
def test_a_second_shortage_fails(troubled: Any, both: Watched) -> None:
    server = both.start(troubled(SHORT, 2))
    with pytest.raises(WorkFailed, match=r"client 2 in round 1: .*CUDA out of memory.*out of memory 2 times"):
        finished(server)
    assert told(server) == [("out_of_memory", 1, VICTIM)] * 2 + [("client_failed", 1, VICTIM)]


@pytest.mark.cluster
def test_a_host_ended_by_the_memory_monitor_is_a_shortage(
    troubled: Any, lab: Any, both: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray tells it: the calls of an actor that its monitor ended raise OutOfMemoryError, no RayActorError."""
    seen = pool.outcome

    def outcome(ref: Any) -> tuple[Any, Exception | None]:
        found, error = seen(ref)
        return found, OutOfMemoryError("1 worker(s) were killed") if isinstance(error, RayActorError) else error

    monkeypatch.setattr(pool, "outcome", outcome)
    born = set(both.hosts)
    server = both.start(troubled(DIE, 1))
    assert finished(server) == plain(lab)
    assert told(server) == [("out_of_memory", 1, VICTIM)]
    assert "ended by Ray's memory monitor; 1 of 2 hosts work from now on" in details(server)
    assert len(set(both.hosts) - born) == 1


@pytest.mark.cluster
def test_a_host_that_hangs_does_not_hold_up_the_next_trial(
    troubled: Any, lab: Any, both: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial ends while one of its hosts sleeps for ten minutes: that host is ended, too."""
    server = both.start(troubled(HANG, 1))
    server.step()
    with monkeypatch.context() as patch:
        patch.setattr(both, "answer", lambda ticket: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.step()
    monkeypatch.setattr(pool, "STALE_S", 0.5)
    started = time.monotonic()
    again = both.start(lab.setup(sizes=SIZES))
    assert time.monotonic() - started < 60
    assert finished(again) == plain(lab)


@pytest.mark.cluster
def test_a_host_that_died_between_two_trials_is_an_event(lab: Any, both: Watched) -> None:
    finished(both.start(lab.setup(sizes=SIZES)))
    os.kill(both.pids()[1], signal.SIGKILL)
    server = both.start(lab.setup(sizes=SIZES))
    assert finished(server) == plain(lab)
    assert told(server) == [("host_lost", None, None)]
    assert "host 1 died between two trials" in details(server)


# ---- several visits at once

CROWD = (3, 4, 8, 5, 2) + (9, 10) * 20  # 45 clients; the victim comes when hosts have had their first single visits

WIDE: Any = {"local": {"batch": 16}}  # no other client has a batch of 8 rows


class Bundles:
    """Watches what hosts are given at once, while visits are believed to take a millisecond."""

    def __init__(self, patch: pytest.MonkeyPatch, both: Watched) -> None:
        self.sizes: list[int] = []
        give = pool.give

        def watched(host: Any, at: int, works: list[Any]) -> Any:
            if works[0].score is None:
                self.sizes.append(len(works))
            both.mean_s = 0.001
            return give(host, at, works)

        patch.setattr(pool, "give", watched)
        both.mean_s = 0.001


@pytest.fixture
def bundles(monkeypatch: pytest.MonkeyPatch, both: Watched) -> Bundles:
    return Bundles(monkeypatch, both)


@pytest.mark.cluster
def test_short_visits_go_several_at_once(lab: Any, both: Watched, bundles: Bundles) -> None:
    """A method with memories (SCAFFOLD), so that each finds its own; nobody is visited twice or left out."""
    setup = lab.setup("scaffold", sizes=CROWD, rounds=3)
    assert finished(both.start(setup)) == finished(lab.server(setup))
    assert sum(bundles.sizes) == 3 * len(CROWD)
    assert max(bundles.sizes) > 4, "bundles were made"
    assert bundles.sizes[-1] < max(bundles.sizes), "fewer at once towards the end, so that hosts end together"


@pytest.mark.cluster
@pytest.mark.parametrize("line, kind", [(DIE, "host_lost"), (HANG, "visit_hung"), (SHORT, None)])
def test_trouble_of_a_bundle_is_that_of_one_visit(
    troubled: Any, lab: Any, both: Watched, bundles: Bundles, line: str, kind: str | None
) -> None:
    """Once, for one client of 45: its bundle is given again, one by one, and no number changes."""
    setup = troubled(line, 1, many=CROWD, **WIDE)
    server = both.start(setup, visit_timeout_s=0.4 if kind == "visit_hung" else 100)
    assert finished(server) == tables(lab.run(sizes=CROWD, rounds=3, **WIDE))
    assert [e["kind"] for e in server.events] == ([kind] if kind else [])
    assert all("visits: " in e["detail"] and e["client"] is None for e in server.events)


@pytest.mark.long
@pytest.mark.cluster
def test_a_visit_that_kills_every_host_takes_no_other_along(
    troubled: Any, lab: Any, both: Watched, bundles: Bundles
) -> None:
    setup = troubled(DIE, 99, many=CROWD, **WIDE, faults={"client": "skip"})
    server = both.start(setup, host_retries=1)
    finished(server)
    assert [e["client"] for e in server.events if e["kind"] == "client_skipped"] == [VICTIM]
    assert [row["client"] for row in server.clients if not row["steps"]] == [VICTIM]


@pytest.mark.cluster
def test_a_visit_of_a_bundle_that_raises_is_skipped_alone(
    troubled: Any, lab: Any, both: Watched, bundles: Bundles
) -> None:
    setup = troubled(RAISE, 99, many=CROWD, **WIDE, faults={"client": "skip"})
    server = both.start(setup)
    assert finished(server) == finished(lab.server(setup))
    assert told(server) == [("client_skipped", 1, VICTIM)]
    assert details(server) == "ValueError: bad luck"


@pytest.mark.cluster
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "feddyn", "fedadam"])
def test_hosts_send_one_mean_of_a_whole_chunk(
    lab: Any, both: Watched, bundles: Bundles, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """45 visits a round: most of the models stay where they are, and no bit changes."""
    setup = lab.setup(method, sizes=CROWD, rounds=3, **WIDE)
    server, came, answer = both.start(setup), [], both.answer

    def counted(ticket: Any) -> Any:
        found = answer(ticket)
        came.append("params" in found[1])
        return found

    monkeypatch.setattr(both, "answer", counted)
    assert finished(server) == finished(lab.server(setup))
    assert len(came) == 3 * len(CROWD)
    assert sum(came[len(CROWD) :]) < len(CROWD), "in the rounds whose visits are known to be short"


@pytest.mark.cluster
def test_long_visits_go_chunk_by_chunk_while_that_leaves_the_other_hosts_as_much(
    lab: Any, both: Watched, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Visits of 60 ms: too long for a bundle, but 8 of them are worth one model instead of eight.

    Of 45 for two hosts four chunks go whole; 13 are left, fewer than two chunks, and they go one by one.
    """
    monkeypatch.setattr(type(both), "mean_s", property(lambda _: 0.06, lambda _, seconds: None), raising=False)
    setup = lab.setup("fedavg", sizes=CROWD, rounds=2, **WIDE)
    assert finished(both.start(setup)) == finished(lab.server(setup))
    assert bundles.sizes == 2 * [*4 * [8], *13 * [1]]
