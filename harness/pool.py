"""Hosts as Ray actors in the placement group of their trial, and the way that work and trees take to them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from harness.actors import GONE, SHORT, HostActor, answers, death_of, outcome
from harness.calls import Call, Work, give, joins
from harness.config import Execution
from harness.evaluate import Counts
from harness.trees import CHUNK, Parcel, Tree, parcel
from harness.work import Asked, Event, Order, Personal, Report, Setup, Shard, WorkFailed, event, said

START_S = 120.0  # an actor that has not answered by then does not fit its bundle: Ray would wait without a word
STALE_S = 10.0  # for a host to end what a failed trial left it with
NOT_UP = f"host {{}} did not come up within {START_S:.0f} s: no room?"
SHORT_S = 0.1  # visits shorter than this are queued two deep, to hide the way to the host, and go several at once
WORTHWHILE_S = 0.01  # of work that a call is made for, if there is so much: the way there and back takes 2 ms
WHOLE_S = 1.0  # of work up to which a host gets a chunk as a whole, to take its mean: large nets take long to send
Ticket: TypeAlias = tuple[Work, int]  # a piece of work, and which of its visits


class RayPool:
    """Hosts as actors. Work goes to the idlest host; evaluation only when no client waits."""

    def __init__(self, how: Execution, device: str) -> None:
        actor: Any = ray.remote(HostActor)
        resources = {"num_cpus": how.cpus_per_host, "num_gpus": how.gpus_per_host}
        self.how, self._make = how, lambda: actor.options(**resources).remote(device)
        self.hosts = [self._make() for _ in range(how.hosts)]
        self.queue: list[tuple[int, int, Work]] = []
        self.given: dict[Any, Call] = {}  # by the first ref of the answer, in the order of giving
        self.load_of = [0] * how.hosts
        self.since = [0.0] * how.hosts  # monotonic: when the host began what it is doing, as far as is known
        self.thinned = 1  # every so manieth host takes work: more than one after memory was short
        self.mean_s = 1.0  # running mean of a visit's length
        self.events: list[Event] = []
        self._count = self._visits = 0  # ever queued; visits in the queue

    @property
    def brisk(self) -> bool:
        """Whether visits are so short that a call is worth a whole chunk of them."""
        return self.mean_s * CHUNK <= WORTHWHILE_S

    def load(self, setup: Setup, arrays: Any) -> None:
        """Begins a trial on every host; `arrays` is the reference of its data set, which does not travel again."""
        self._begin = (ray.put(replace(setup, arrays=setup.arrays.empty())), [arrays])
        # A trial that failed leaves work behind that nobody asks for any more. A host that does not end it is ended.
        stale = [load > 0 for load in self.load_of]
        self.queue.clear()
        self.given.clear()
        self._visits, self.mean_s = 0, 1.0  # other nets and rows: visits are believed to be long again
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

    def visit(self, order: Order, parts: Sequence[Any], memory: Any | None) -> Ticket:
        """Queues a visit."""
        return self.visits([(order, parts, memory)])[0]

    def visits(self, asked: Sequence[Asked]) -> list[Ticket]:
        """Queues visits that stay together."""
        order, many = asked[0][0], len(asked)
        name, client = ("a visit", order.visit.client) if many == 1 else (f"a group of {many} visits", None)
        work = self._queue(0, Work(name, order.round, client, asked=asked))
        return [(work, at) for at in range(many)]

    def score(self, what: Shard | Personal, params: Any) -> Work:
        """Queues a piece of the evaluation behind all visits."""
        round, client = (what.round, what.visit.client) if isinstance(what, Personal) else (None, None)
        return self._queue(1, Work("scoring", round, client, lambda host: host.score.remote(what, params)))

    def answer(self, ticket: Ticket) -> tuple[Report, Tree, Any]:
        """Waits for a visit."""
        work, at = ticket
        found = self._wait(work)[at]
        work.found[at] = None
        if isinstance(found, WorkFailed):
            raise found
        report, payload, memory = found
        return report, payload.open(), memory

    def counts(self, ticket: Work) -> Counts:
        """Waits for it."""
        found: Counts = self._wait(ticket)
        return found

    def drain(self) -> list[Event]:
        """What happened since the last call."""
        found, self.events = self.events, []
        return found

    def _queue(self, priority: int, work: Work) -> Work:
        self._count += 1
        self._visits += len(work.asked)
        heapq.heappush(self.queue, (priority, self._count, work))
        if priority or self.mean_s >= SHORT_S:  # short visits wait until it is known how many there are
            self._dispatch()
        return work

    def _dispatch(self) -> None:
        depth = 2 if self.mean_s < SHORT_S else 1
        while self.queue:
            at = min(range(0, len(self.hosts), self.thinned), key=self.load_of.__getitem__)
            if self.load_of[at] >= depth:
                return
            call = give(self.hosts[at], at, self._next())
            for work in call.works:
                work.thinned = self.thinned
            if not self.load_of[at]:
                self.since[at] = time.monotonic()
            self.load_of[at] += 1
            self.given[call.refs[0]] = call

    def _next(self) -> list[Work]:
        """What a host gets next: a piece of work, or several visits that are short compared with the way to it.

        The fewer are left the fewer go together, so that all hosts come to their ends at the same time.
        """
        works = [heapq.heappop(self.queue)[2]]
        each = max(self.mean_s, 1e-6)
        fair = -(-self._visits // (2 * len(self.hosts)))
        worthwhile = min(-(-self._visits // max(1, self.load_of.count(0))), int(WORTHWHILE_S / each))
        most = min(max(fair, worthwhile, CHUNK * self.brisk), int(SHORT_S / each))
        if works[0].score is None:
            size, chunk = len(works[0].asked), works[0].asked[0][0].chunk
            if chunk and chunk.size * each <= WHOLE_S and chunk.size * len(self.hosts) <= self._visits:
                most = max(most, chunk.size)  # and no host will have more to do than the others
            while self.queue and joins(self.queue[0][2], works[-1], most - size):
                works.append(heapq.heappop(self.queue)[2])
                size += len(works[-1].asked)
            self._visits -= size
        return works

    def _wait(self, ticket: Work) -> Any:
        while not ticket.done:
            self._dispatch()
            now, due = time.monotonic(), self._due()
            # What came while nobody looked is looked at before anybody is called late.
            patience = max(0.05, min(due.values()) - now) if due else None
            for ref in ray.wait(list(self.given), num_returns=1, timeout=patience)[0]:
                self._take(ref)
            for at, then in self._due().items():
                if time.monotonic() > then and not self._has_answered(at):
                    self._replace(at)
        if ticket.error is not None:
            raise ticket.error
        return ticket.found

    def _due(self) -> dict[int, float]:
        """When each busy host should have answered, on the monotonic clock; empty without a limit."""
        first: dict[int, Call] = {}
        for call in self.given.values() if self.how.visit_timeout_s else ():
            first.setdefault(call.at, call)
        return {at: self.since[at] + call.size * self.how.visit_timeout_s for at, call in first.items()}

    def _has_answered(self, at: int) -> bool:
        own = [ref for ref, call in self.given.items() if call.at == at]
        return bool(ray.wait(own, num_returns=1, timeout=0)[0])

    def _take(self, ref: Any) -> None:
        """Books an answer that is there."""
        call = self.given[ref]
        found, error = outcome(ref)
        if isinstance(error, GONE):
            self._replace(call.at)
            return
        del self.given[ref]
        self.load_of[call.at] -= 1
        self.since[call.at] = time.monotonic()  # what is queued behind it begins
        self._settle(call, found, error)

    def _settle(self, call: Call, found: Any, error: Exception | None) -> None:
        """The host has done it, or says why not."""
        if error is None:
            self._book(call, found)
        elif len(call.works) > 1:  # whose fault it is will be seen
            self._apart(call.works)
        else:
            work, cause = call.works[0], getattr(error, "cause", None) or error
            if isinstance(cause, SHORT):
                self._starve(work, said(cause))
            elif not isinstance(cause, ObjectLostError):
                work.end(error=WorkFailed(said(cause)))
            elif isinstance(error, RayTaskError) or work.trouble["host_lost"]:
                work.end(error=error)  # its memory is lost, which is no fault of a visit
            else:  # with the machine that it lay on
                self._again("host_lost", work, f"its answer was lost: {said(error)}")

    def _book(self, call: Call, found: Any) -> None:
        if call.works[0].score is not None:
            call.works[0].end(found)
            return
        memories = iter(call.refs[1:])
        for work, replies in zip(call.works, found, strict=True):
            for answer in replies:
                if not isinstance(answer, WorkFailed):
                    self.mean_s += (answer[0].seconds - self.mean_s) / 8
            pairs = zip(replies, [next(memories) for _ in replies], strict=True)
            work.end([one if isinstance(one, WorkFailed) else (*one, memory) for one, memory in pairs])

    def _replace(self, at: int) -> None:
        """A host died, or hangs: a new one takes its place and its work. No number depends on who does it."""
        own = [(ref, call) for ref, call in self.given.items() if call.at == at]
        self.given = {ref: call for ref, call in self.given.items() if call.at != at}
        self.load_of[at] = 0
        lost: list[tuple[Call, Exception | None]] = []
        for ref, call in own:
            there = bool(ray.wait([ref], timeout=0)[0])
            found, error = outcome(ref) if there else (None, None)
            if there and not isinstance(error, GONE):
                self._settle(call, found, error)
            else:
                lost.append((call, error))
        self._renew(at)
        for call, _ in reversed(lost[1:]):  # they were only waiting
            for work in reversed(call.works):
                self._requeue(work)
        for call, error in lost[:1]:
            works = call.works
            if error is None:
                kind, why = "visit_hung", f"no answer from host {at} in {self.how.visit_timeout_s * call.size:g} s"
            else:
                kind, why = "host_lost", f"host {at} died: {death_of(error)}"
            if len(works) > 1:
                self.events.append(event(kind, f"{call.size} visits: {why}; given again", works[0].round))
                self._apart(works)
            elif isinstance(error, SHORT):
                self._starve(works[0], f"host {at} was ended by Ray's memory monitor")
            else:
                self._again(kind, works[0], why)

    def _apart(self, works: Sequence[Work]) -> None:
        """Gives visits that went together again, each alone from now on."""
        for work in reversed(works):
            work.alone = True
            self._requeue(work)

    def _again(self, kind: str, work: Work, why: str) -> None:
        """Gives work again, or gives it up."""
        work.trouble[kind] += 1
        tries, most = work.trouble[kind], self.how.host_retries if kind == "host_lost" else 1
        what = f"{work.name}: {why}"
        if tries > most:
            self.events.append(event(kind, f"{what}; given up", work.round, work.client))
            work.end(error=WorkFailed(f"{what} ({kind.replace('_', ' ')} {tries} times)"))
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
        self._visits += len(work.asked)
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
