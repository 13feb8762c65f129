"""Hosts as Ray actors in the placement group of their trial, and the way that work and trees take to them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError

from harness.evaluate import Counts
from harness.host import ClientHost
from harness.trees import Parcel, Tree, parcel
from harness.work import Order, Personal, Report, Setup, Shard

START_S = 120.0  # an actor that has not answered by then does not fit its bundle: Ray would wait without a word
SHORT_S = 0.1  # visits shorter than this are queued two deep, to hide the way to the host
RETRIES = 3  # times that a piece of work is given again after the host that had it died


class HostActor:
    """A client host in a process of its own. Trees travel as parcels."""

    def __init__(self, device: str) -> None:
        held: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
        gpus = held.get("GPU", 0.0)
        if device == "cuda" and gpus < 1:  # Ray's fractions are bookkeeping only
            torch.cuda.set_per_process_memory_fraction(gpus)
        self.host = ClientHost(device)
        self._arrays: tuple[Any, Any] = (None, None)

    def load(self, setup: Setup, arrays: list[Any]) -> None:
        """Begins a trial. The data set's reference comes in a list, so that it is only fetched when it is new."""
        if self._arrays[0] != arrays[0]:
            self._arrays = (arrays[0], ray.get(arrays[0]))
        self.host.load(replace(setup, arrays=self._arrays[1]))

    @ray.method(num_returns=3)
    def visit(self, order: Order, memory: Parcel | None, *parts: Parcel) -> tuple[Report, Parcel, Parcel]:
        """One visit; its three answers are stored apart, so that a memory is never moved to the server."""
        report, payload, after = self.host.visit(order, parts, memory)
        return report, parcel(payload), parcel(after)

    def score(self, what: Shard | Personal, params: Parcel) -> Counts:
        """One piece of the evaluation."""
        return self.host.score(what, params)


@dataclass
class Work:
    """A piece of work: how to give it to a host, and what came of it."""

    give: Callable[[Any], Any]
    refs: list[Any] = field(default_factory=list)
    done: bool = False
    tries: int = 0


class RayPool:
    """Hosts as actors. Work goes to the idlest host; evaluation only when no client waits."""

    def __init__(self, hosts: int, device: str, cpus: float, gpus: float) -> None:
        actor: Any = ray.remote(HostActor)
        self._make = lambda: actor.options(num_cpus=cpus, num_gpus=gpus).remote(device)
        self.hosts = [self._make() for _ in range(hosts)]
        self.queue: list[tuple[int, int, Work]] = []
        self.given: dict[Any, tuple[int, Work]] = {}  # first ref of the answer -> host, work
        self.load_of = [0] * hosts
        self.mean_s = 1.0  # running mean of a visit's length
        self._count = 0

    def load(self, setup: Setup, arrays: Any) -> None:
        """Begins a trial on every host; `arrays` is the reference of its data set, which does not travel again."""
        self._begin = (ray.put(replace(setup, arrays=setup.arrays.empty())), [arrays])
        # A trial that failed leaves work behind. Hosts end it before they load, and nobody asks for it any more.
        self.queue.clear()
        self.given.clear()
        self.load_of = [0] * len(self.hosts)
        for at, ref in enumerate([host.load.remote(*self._begin) for host in self.hosts]):
            try:
                _wait_for([ref])
            except RayActorError:  # it died since its last work
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
        return self._queue(0, lambda host: host.visit.remote(order, memory, *parts))

    def score(self, what: Shard | Personal, params: Any) -> Work:
        """Queues a piece of the evaluation behind all visits."""
        return self._queue(1, lambda host: [host.score.remote(what, params)])

    def answer(self, ticket: Work) -> tuple[Report, Tree, Any]:
        """Waits for a visit."""
        self._wait(ticket)
        report = ray.get(ticket.refs[0])
        self.mean_s += (report.seconds - self.mean_s) / 8
        return report, ray.get(ticket.refs[1]).open(), ticket.refs[2]

    def counts(self, ticket: Work) -> Counts:
        """Waits for it."""
        self._wait(ticket)
        found: Counts = ray.get(ticket.refs[0])
        return found

    def _queue(self, priority: int, give: Callable[[Any], Any]) -> Work:
        work = Work(give)
        self._count += 1
        heapq.heappush(self.queue, (priority, self._count, work))
        self._dispatch()
        return work

    def _dispatch(self) -> None:
        depth = 2 if self.mean_s < SHORT_S else 1
        while self.queue and min(self.load_of) < depth:
            work = heapq.heappop(self.queue)[2]
            at = self.load_of.index(min(self.load_of))
            work.refs = work.give(self.hosts[at])
            self.load_of[at] += 1
            self.given[work.refs[0]] = (at, work)

    def _wait(self, ticket: Work) -> None:
        while not ticket.done:
            ready, _ = ray.wait(list(self.given), num_returns=1)
            at, work = self.given.pop(ready[0])
            self.load_of[at] -= 1
            try:
                ray.get(ready[0])
                work.done = True
            except RayActorError:
                self._replace(at, work)
            self._dispatch()

    def _replace(self, at: int, work: Work) -> None:
        """A host died: a new one takes its place and its work. No number depends on who does it."""
        lost = [work, *(w for host, w in self.given.values() if host == at)]
        self.given = {ref: (host, w) for ref, (host, w) in self.given.items() if host != at}
        self.load_of[at] = 0
        for one in lost:
            one.tries += 1
            if one.tries > RETRIES:
                raise RuntimeError(f"a host died {one.tries} times over the same piece of work")
            self._count += 1
            heapq.heappush(self.queue, (0, -self._count, one))
        self._renew(at)

    def _renew(self, at: int) -> None:
        ray.kill(self.hosts[at])
        self.hosts[at] = self._make()
        _wait_for([self.hosts[at].load.remote(*self._begin)])


def _wait_for(refs: list[Any]) -> None:
    ready, missing = ray.wait(refs, num_returns=len(refs), timeout=START_S)
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(refs)} hosts did not come up within {START_S:.0f} s: no room?")
    ray.get(ready)
