"""A trial on Ray: the server is a Tune trainable and thereby an actor; its hosts are actors in its placement group."""

from __future__ import annotations

import heapq
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayActorError

from harness import config
from harness.data import card
from harness.evaluate import Counts
from harness.host import ClientHost, InlinePool, Order, Report, Setup, Shard
from harness.partitions import Split, split
from harness.refusal import Refused
from harness.server import Diverged, Server
from harness.trees import Parcel, Tree, parcel

START_S = 120.0  # an actor that has not answered by then does not fit its bundle: Ray would wait without a word
REPORT_S = 0.5  # rounds are run until so much time has passed, then reported together
SHORT_S = 0.1  # visits shorter than this are queued two deep, to hide the way to the host
RETRIES = 3  # times that a piece of work is given again after the host that had it died


@ray.remote
class HostActor:
    """A client host in a process of its own. Trees travel as parcels."""

    def __init__(self, device: str) -> None:
        gpus = sum(n for name, n in ray.get_runtime_context().get_assigned_resources().items() if name == "GPU")
        if device == "cuda" and gpus < 1:  # Ray's fractions are bookkeeping only
            torch.cuda.set_per_process_memory_fraction(gpus)
        self.host = ClientHost(device)
        self._arrays: tuple[Any, Any] = (None, None)

    def load(self, trial: config.Trial, cut: Any, arrays: list[Any]) -> None:
        """Begins a trial. The data set's reference comes in a list, so that it is only fetched when it is new."""
        if self._arrays[0] != arrays[0]:
            self._arrays = (arrays[0], ray.get(arrays[0]))
        self.host.load(Setup(trial, self._arrays[1], cut))

    @ray.method(num_returns=3)
    def visit(self, order: Order, memory: Parcel | None, *parts: Parcel) -> tuple[Report, Parcel, Parcel]:
        """One visit; its three answers are stored apart, so that a memory is never moved to the server."""
        report, payload, after = self.host.visit(order, parts, memory)
        return report, parcel(payload), parcel(after)

    def score(self, shard: Shard, params: Parcel) -> Counts:
        """One shard of the evaluation."""
        return self.host.score(shard, params)


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
        self._make = lambda: HostActor.options(num_cpus=cpus, num_gpus=gpus).remote(device)  # type: ignore[attr-defined]
        self.hosts = [self._make() for _ in range(hosts)]
        self.queue: list[tuple[int, int, Work]] = []
        self.given: dict[Any, tuple[int, Work]] = {}  # first ref of the answer -> host, work
        self.load_of = [0] * hosts
        self.mean_s = 1.0  # running mean of a visit's length
        self._count = 0

    def load(self, trial: config.Trial, cut: Split, arrays: Any) -> None:
        """Begins a trial on every host; `arrays` is the reference of the data set."""
        self._begin = (trial, ray.put(cut), [arrays])
        self.queue.clear()
        _wait_for([host.load.remote(*self._begin) for host in self.hosts])

    def put(self, tree: Tree) -> Any:
        """One flat buffer in the object store."""
        return ray.put(parcel(tree))

    def fetch(self, handle: Any) -> Tree:
        """A copy of a stored tree."""
        return ray.get(handle).open()

    def visit(self, order: Order, parts: Sequence[Any], memory: Any | None) -> Work:
        """Queues a visit."""
        return self._queue(0, lambda host: host.visit.remote(order, memory, *parts))

    def score(self, shard: Shard, params: Any) -> Work:
        """Queues a shard behind all visits."""
        return self._queue(1, lambda host: [host.score.remote(shard, params)])

    def answer(self, ticket: Work) -> tuple[Report, Tree, Any]:
        """Waits for a visit."""
        self._wait(ticket)
        report = ray.get(ticket.refs[0])
        self.mean_s += (report.seconds - self.mean_s) / 8
        return report, ray.get(ticket.refs[1]).open(), ticket.refs[2]

    def counts(self, ticket: Work) -> Counts:
        """Waits for a shard."""
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
        ray.kill(self.hosts[at])
        self.hosts[at] = self._make()
        _wait_for([self.hosts[at].load.remote(*self._begin)])


def _wait_for(refs: list[Any]) -> None:
    ready, missing = ray.wait(refs, num_returns=len(refs), timeout=START_S)
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(refs)} hosts did not come up within {START_S:.0f} s: no room?")
    ray.get(ready)


class FederatedTrial(tune.Trainable):  # type: ignore[misc]
    """Runs one cell after the other; process, hosts and data stay. config: the number of a cell in data["cells"]."""

    def setup(self, config: dict[str, Any], data: dict[str, Any] | None = None) -> None:
        """Begins the first cell. data: "cells", "execution" and, by data set, the references of the "arrays"."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        self.data = data or {}
        self.hosts: RayPool | None = None
        self.inline: InlinePool | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins the next cell in this process."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Some rounds. The last result of a cell carries its tables."""
        until = time.monotonic() + REPORT_S
        try:
            if self.failure is None:
                server = self._server()
                while not server.done and time.monotonic() < until:
                    server.step()
        except Exception as error:  # a failure is a row, not a hole
            self.failure = reason(error)
        server = self.server
        ended = self.failure is not None or (server is not None and server.done)
        last = server.rounds[-1] if server is not None and server.rounds else {}
        result = {"rounds_done": server.round if server else 0, "accuracy": last.get("accuracy"), "done": ended}
        return {**result, "tables": self._tables()} if ended else result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's own checkpoints are not used: what is done is known from the tables."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def _begin(self, chosen: dict[str, Any]) -> None:
        self.started, self.clock = time.time(), time.monotonic()
        self.failure: str | None = None
        self.server: Server | None = None
        self.skew: dict[str, Any] = {}
        self.settings = config.resolve(self.data["cells"][chosen["cell"]])
        self.execution = config.Execution.model_validate(self.data["execution"])
        _forget_peak()

    def _server(self) -> Server:
        """The server of the cell, made at its first step so that a failure to make it is the cell's own."""
        if self.server is None:
            trial, how = self.settings, self.execution
            arrays = ray.get(self.data["arrays"][trial.dataset])
            cut = split(arrays.y_train, card(trial.dataset).classes, trial.clients, trial.partition, trial.seed)
            self.skew = {"partition_hash": cut.digest, **{f"partition_{k}": v for k, v in cut.statistics.items()}}
            setup, device = Setup(trial, arrays, cut), device_of(how)
            if how.hosts:
                if self.hosts is None:
                    self.hosts = RayPool(how.hosts, device, how.cpus_per_host, how.gpus_per_host)
                self.hosts.load(trial, cut, self.data["arrays"][trial.dataset])
            else:
                if self.inline is None:
                    self.inline = InlinePool(device)
                self.inline.load(setup)
            here = "cuda" if device == "cuda" and (how.gpus_per_server or not how.hosts) else "cpu"
            self.server = Server(setup, self.hosts or self.inline, here)  # type: ignore[arg-type]
        return self.server

    def _tables(self) -> bytes:
        server = self.server
        summary = {
            "status": "failed" if self.failure else "done",
            "reason": self.failure,
            "started": self.started,
            "seconds": time.monotonic() - self.clock,
            "rounds_done": server.round if server else 0,
            "peak_memory_bytes": _peak(),
            "device": _device_name(device_of(self.execution)),
            "threads": torch.get_num_threads(),
            "skew": self.skew,
        }
        rounds, clients = (server.rounds, server.clients) if server else ([], [])
        return json.dumps({"summary": summary, "rounds": rounds, "clients": clients}).encode()


def device_of(how: config.Execution) -> str:
    """cpu or cuda. Asking for a GPU where none is visible is an error: the CPU never steps in silently."""
    if how.device != "auto":
        return how.device
    return "cuda" if how.gpus_per_host or how.gpus_per_server else "cpu"


def reason(error: Exception) -> str:
    """One line for the table."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, Diverged | Refused) else f"{type(error).__name__}: {text}"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else platform.machine()


def _forget_peak() -> None:
    """Starts the peak of this process's memory anew, where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Peak resident memory of this process, bytes."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
