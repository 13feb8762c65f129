"""The processes that `fedstill bench` measures: a server with its hosts, as in a sweep, and floors beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from harness.config import Execution, Trial
from harness.data import card, load
from harness.fit import settle
from harness.floor import FLOORS, MODELS, Layout
from harness.inline import InlinePool
from harness.partitions import Split
from harness.pool import RayPool
from harness.server import Server
from harness.trial import device_of
from harness.work import Pool, Setup, make_setup


def _status(field: str, file: str = "status") -> int:
    """Bytes that Linux tells of this process."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(_: object = None) -> dict[str, int]:
    """Bytes: the most resident memory that this process ever had, and what it has written and shares with nobody."""
    return {"peak_bytes": _status("VmHWM"), "private_bytes": _status("Private_Dirty", "smaps_rollup")}


def sparse(trial: Trial) -> Setup:
    """A trial whose clients have 60 rows each, however many clients there are: their rows overlap.

    So populations can be compared that no data set has rows for.
    """
    arrays = load(card(trial.dataset))
    n, classes = len(arrays.y_train), card(trial.dataset).classes
    own = (np.arange(60)[None, :] + 60 * np.arange(trial.clients)[:, None]) % n
    counts = np.zeros((trial.clients, classes), np.int64)
    np.add.at(counts, (np.arange(trial.clients)[:, None], arrays.y_train[own]), 1)
    split = Split(tuple(own), np.empty(0, np.int64), counts, "", {}, levels=(0,) * trial.clients)
    return Setup(trial, arrays, split)


class ServerStand:
    """A trial's server in a process of its own, with its hosts in others; rounds are run when asked for."""

    def __init__(self, trial: Trial, how: Execution, overlapping: bool = False) -> None:
        settle()
        setup, mixes = (sparse(trial), None) if overlapping else make_setup(trial, load(card(trial.dataset)))
        self.hosts: list[Any] = []
        pool: Pool
        if how.hosts:
            pool = RayPool(how, device_of(how))
            pool.load(setup, ray.put(setup.arrays))
            self.hosts = pool.hosts
        else:
            pool = InlinePool(device_of(how))
            pool.load(setup)
        self.server = Server(setup, pool, device_of(how), mixes)

    def rounds(self, count: int) -> float:
        """Seconds for so many rounds, from the first to the booking of the last."""
        started = time.perf_counter()
        for _ in range(count):
            self.server.step()
        self.server.flush()
        if self.server.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def samples(self) -> int:
        """Rows that clients have trained on so far."""
        return sum(int(row["samples"]) for row in self.server.rounds)

    def served(self, count: int) -> float:
        """Median seconds that the server's own part of the last rounds took."""
        rows = [float(row["server_seconds"]) for row in self.server.rounds]
        return statistics.median([s for s in rows if s][-count:])

    def memory(self) -> dict[str, dict[str, int]]:
        """Of the server and of its first host."""
        asked = {f"host{i}": host.__ray_call__.remote(memory) for i, host in enumerate(self.hosts[:1])}
        return {"server": memory(), **{name: ray.get(ref) for name, ref in asked.items()}}


class FloorStand:
    """One process of the floor."""

    def __init__(self, trial: Trial, layout: Layout, device: str) -> None:
        settle()
        setup, _ = make_setup(trial, load(card(trial.dataset)))
        self.floor, self.models = FLOORS[trial.method](setup, layout, device), MODELS.get(trial.method, 1)

    def round(self, clients: Sequence[int], part: int, of: int) -> float:
        """Seconds for these visits and this share of the evaluation."""
        return self.floor.round(clients, part, of, self.models)

    def serve(self, cohort: int) -> float:
        """Seconds for what the server does."""
        return self.floor.served(cohort)


class Floor:
    """As many processes as there are hosts. A round is as long as the slowest of them takes, and then the server."""

    def __init__(self, trial: Trial, layout: Layout, processes: int, device: str = "cpu") -> None:
        actor: Any = ray.remote(FloorStand)
        made = actor.options(num_cpus=0, num_gpus=gpus(device, processes))
        self.stands = [made.remote(trial, layout, device) for _ in range(processes)]
        self.clients, self.cohort, self.at = trial.clients, trial.cohort, 0

    def rounds(self, count: int) -> float:
        """Seconds for so many rounds. Clients take turns; they are dealt to the processes one by one."""
        started = time.perf_counter()
        for _ in range(count):
            own = [(self.at + i) % self.clients for i in range(self.cohort)]
            self.at += self.cohort
            n = len(self.stands)
            ray.get([stand.round.remote(own[i::n], i, n) for i, stand in enumerate(self.stands)])
            self.serve()
        return time.perf_counter() - started

    def serve(self) -> float:
        """Seconds for what the server does after a round."""
        seconds: float = ray.get(self.stands[0].serve.remote(self.cohort))
        return seconds

    def close(self) -> None:
        """Ends the processes."""
        for stand in self.stands:
            ray.kill(stand)


def gpus(device: str, processes: int) -> float:
    """The share of a GPU of each of so many processes: a quarter for all, since several lots of them share one."""
    return 1 / (4 * max(1, processes)) if device == "cuda" else 0.0


def stand(trial: Trial, hosts: int, overlapping: bool = False, device: str = "cpu") -> Any:
    """A server in a process of its own, which trains if there are no hosts."""
    actor: Any = ray.remote(ServerStand)
    share = gpus(device, 1 + hosts)
    how = Execution(hosts=hosts, gpus_per_host=share if hosts else 0.0, gpus_per_server=share)
    return actor.options(num_cpus=0, num_gpus=how.gpus_per_server).remote(trial, how, overlapping)
