"""Hosts as Ray actors in the placement group of their trial, and the way that work and trees take to them."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from harness.actors import GONE, SHORT, HostActor, answers, death_of, error_of
from harness.config import Execution
from harness.evaluate import Counts
from harness.trees import Parcel, Tree, parcel
from harness.work import Event, Order, Personal, Report, Setup, Shard, WorkFailed, event, said

START_S = 120.0  # an actor that has not answered by then does not fit its bundle: Ray would wait without a word
STALE_S = 10.0  # for a host to end what a failed trial left it with
NOT_UP = f"host {{}} did not come up within {START_S:.0f} s: no room?"
SHORT_S = 0.1  # visits shorter than this are queued two deep, to hide the way to the host


@dataclass(eq=False)
class Work:
    """A piece of work: how to give it to a host, and what came of it."""

    give: Callable[[Any], Any]
    name: str
    round: int | None = None
    client: int | None = None
    refs: list[Any] = field(default_factory=list)
    done: bool = False
    error: Exception | None = None
    thinned: int = 1  # how thinly work was spread over the hosts when it was given
    trouble: Counter[str] = field(default_factory=Counter)  # kind of event -> times

    def end(self, error: Exception | None = None) -> None:
        """It is over, well or with an error."""
        self.done, self.error = True, error


class RayPool:
    """Hosts as actors. Work goes to the idlest host; evaluation only when no client waits."""

    def __init__(self, how: Execution, device: str) -> None:
        actor: Any = ray.remote(HostActor)
        resources = {"num_cpus": how.cpus_per_host, "num_gpus": how.gpus_per_host}
        self.how, self._make = how, lambda: actor.options(**resources).remote(device)
        self.hosts = [self._make() for _ in range(how.hosts)]
        self.queue: list[tuple[int, int, Work]] = []
        self.given: dict[Any, tuple[int, Work]] = {}  # first ref of the answer -> host, work; in the order of giving
        self.load_of = [0] * how.hosts
        self.since = [0.0] * how.hosts  # monotonic: when the host began what it is doing, as far as is known
        self.thinned = 1  # every so manieth host takes work: more than one after memory was short
        self.mean_s = 1.0  # running mean of a visit's length
        self.events: list[Event] = []
        self._count = 0

    def load(self, setup: Setup, arrays: Any) -> None:
        """Begins a trial on every host; `arrays` is the reference of its data set, which does not travel again."""
        self._begin = (ray.put(replace(setup, arrays=setup.arrays.empty())), [arrays])
        # A trial that failed leaves work behind that nobody asks for any more. A host that does not end it is ended.
        stale = [load > 0 for load in self.load_of]
        self.queue.clear()
        self.given.clear()
        self.load_of, self.thinned, self.events = [0] * len(self.hosts), 1, []
        for at, ref in enumerate([host.load.remote(*self._begin, 1) for host in self.hosts]):
            try:
                if answers(ref, STALE_S if stale[at] else START_S):
                    continue
                if not stale[at]:
                    raise RuntimeError(NOT_UP.format(at))
            except GONE as error:
                self.events.append(event("host_lost", f"host {at} died between two trials: {death_of(error)}"))
            self._renew(at)

    def put(self, tree: Tree) -> Any:
        """One flat buffer in the object store."""
        return ray.put(parcel(tree))

    def fetch(self, handle: Any) -> Tree:
        """A copy of a stored tree."""
        box: Parcel = ray.get(handle)
        return box.open()

    def visit(self, order: Order, parts: Sequence[Any], memory: Any | None) -> Work:
        """Queues a visit."""
        give = lambda host: host.visit.remote(order, memory, *parts)  # noqa: E731
        return self._queue(0, Work(give, "a visit", order.round, order.visit.client))

    def score(self, what: Shard | Personal, params: Any) -> Work:
        """Queues a piece of the evaluation behind all visits."""
        round, client = (what.round, what.visit.client) if isinstance(what, Personal) else (None, None)
        return self._queue(1, Work(lambda host: [host.score.remote(what, params)], "scoring", round, client))

    def answer(self, ticket: Work) -> tuple[Report, Tree, Any]:
        """Waits for a visit."""
        while True:
            self._wait(ticket)
            try:
                report, payload = ray.get(ticket.refs[:2])
            except ObjectLostError as error:  # with the machine that it lay on
                ticket.done = False
                self._again("host_lost", ticket, f"its answer was lost: {said(error)}")
                continue
            self.mean_s += (report.seconds - self.mean_s) / 8
            return report, payload.open(), ticket.refs[2]

    def counts(self, ticket: Work) -> Counts:
        """Waits for it."""
        self._wait(ticket)
        found: Counts = ray.get(ticket.refs[0])
        return found

    def drain(self) -> list[Event]:
        """What happened since the last call."""
        found, self.events = self.events, []
        return found

    def _queue(self, priority: int, work: Work) -> Work:
        self._count += 1
        heapq.heappush(self.queue, (priority, self._count, work))
        self._dispatch()
        return work

    def _dispatch(self) -> None:
        depth = 2 if self.mean_s < SHORT_S else 1
        while self.queue:
            at = min(range(0, len(self.hosts), self.thinned), key=self.load_of.__getitem__)
            if self.load_of[at] >= depth:
                return
            work = heapq.heappop(self.queue)[2]
            work.refs, work.thinned = work.give(self.hosts[at]), self.thinned
            if not self.load_of[at]:
                self.since[at] = time.monotonic()
            self.load_of[at] += 1
            self.given[work.refs[0]] = (at, work)

    def _wait(self, ticket: Work) -> None:
        limit = self.how.visit_timeout_s
        while not ticket.done:
            self._dispatch()
            now, busy = time.monotonic(), [at for at, load in enumerate(self.load_of) if load]
            # What came while nobody looked is looked at before anybody is called late.
            patience = max(0.05, min(self.since[at] for at in busy) + limit - now) if limit else None
            for ref in ray.wait(list(self.given), num_returns=1, timeout=patience)[0]:
                self._take(ref)
            for at in busy if limit else ():
                if self.load_of[at] and time.monotonic() - self.since[at] > limit and not self._has_answered(at):
                    self._replace(at)
        if ticket.error is not None:
            raise ticket.error

    def _has_answered(self, at: int) -> bool:
        own = [ref for ref, (host, _) in self.given.items() if host == at]
        return bool(ray.wait(own, num_returns=1, timeout=0)[0])

    def _take(self, ref: Any) -> None:
        """Books an answer that is there."""
        at, work = self.given[ref]
        error = error_of(ref)
        if isinstance(error, GONE):
            self._replace(at)
            return
        del self.given[ref]
        self.load_of[at] -= 1
        self.since[at] = time.monotonic()  # what is queued behind it begins
        self._settle(work, error)

    def _settle(self, work: Work, error: Exception | None) -> None:
        """The host has done it, or says why not."""
        cause = getattr(error, "cause", None) or error
        if cause is None or isinstance(cause, ObjectLostError):  # a memory that is lost is no fault of a visit
            work.end(error)
        elif isinstance(cause, SHORT):
            self._starve(work, said(cause))
        else:
            work.end(WorkFailed(said(cause)))

    def _replace(self, at: int) -> None:
        """A host died, or hangs: a new one takes its place and its work. No number depends on who does it."""
        own = [(ref, work) for ref, (host, work) in self.given.items() if host == at]
        self.given = {ref: (host, work) for ref, (host, work) in self.given.items() if host != at}
        self.load_of[at] = 0
        lost: list[tuple[Work, Exception | None]] = []
        for ref, work in own:
            there = bool(ray.wait([ref], timeout=0)[0])
            error = error_of(ref) if there else None
            if there and not isinstance(error, GONE):
                self._settle(work, error)
            else:
                lost.append((work, error))
        self._renew(at)
        for work, _ in reversed(lost[1:]):  # they were only waiting
            self._requeue(work)
        for work, error in lost[:1]:
            if isinstance(error, SHORT):
                self._starve(work, f"host {at} was ended by Ray's memory monitor")
            elif error is None:
                self._again("visit_hung", work, f"no answer from host {at} in {self.how.visit_timeout_s:g} s")
            else:
                self._again("host_lost", work, f"host {at} died: {death_of(error)}")

    def _again(self, kind: str, work: Work, why: str) -> None:
        """Gives work again, or gives it up."""
        work.trouble[kind] += 1
        tries, most = work.trouble[kind], self.how.host_retries if kind == "host_lost" else 1
        what = f"{work.name}: {why}"
        if tries > most:
            self.events.append(event(kind, f"{what}; given up", work.round, work.client))
            work.end(WorkFailed(f"{what} ({kind.replace('_', ' ')} {tries} times)"))
        else:
            self.events.append(event(kind, f"{what}; given again", work.round, work.client))
            self._requeue(work)

    def _starve(self, work: Work, why: str) -> None:
        """There was not enough memory: half as many hosts get work, unless that was done since this was given."""
        if work.thinned == self.thinned < len(self.hosts):
            self.thinned *= 2
        left = len(range(0, len(self.hosts), self.thinned))
        for host in self.hosts:
            host.relax.remote(self.thinned)
        self._again("out_of_memory", work, f"{why}; {left} of {len(self.hosts)} hosts work from now on")

    def _requeue(self, work: Work) -> None:
        self._count += 1
        heapq.heappush(self.queue, (0, -self._count, work))

    def _renew(self, at: int) -> None:
        """A new host, loaded. It may die on the way, too."""
        for left in reversed(range(1 + self.how.host_retries)):
            ray.kill(self.hosts[at])
            self.hosts[at] = self._make()
            try:
                if answers(self.hosts[at].load.remote(*self._begin, self.thinned), START_S):
                    return
                raise RuntimeError(NOT_UP.format(at))
            except GONE:
                if not left:
                    raise
