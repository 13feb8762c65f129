"""What `fedstill bench` measures: rounds against a floor, starts, empty rounds, servers, growth, sweeps."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import ray

from harness import config
from harness.axes import run_sweep
from harness.config import Trial
from harness.floor import LAYOUTS
from harness.stand import Floor, stand
from harness.sweep import run

Figure = dict[str, Any]
WARM = 3  # rounds that are not counted: pages are touched, memories made
# The settings that speed is promised for.
USUAL = {
    **{"dataset": "fashion-mnist", "net": "lenet5", "clients": 100, "cohort": 10, "rounds": 10**6},
    **{"partition": {"kind": "iid"}, "local": {"epochs": 5, "batch": 64, "lr": 0.02}, "evaluation": {"every": 1}},
}
SMALL = USUAL | {"clients": 1200, "cohort": 50, "local": {"epochs": 1, "batch": 10, "lr": 0.02}}
LARGE = SMALL | {"net": "mcmahan-cnn"}  # 1.6 million parameters
LOOPS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("usual", USUAL, ("fedavg", "fedntd", "moon", "kdia", "fedgen")),
    ("small", SMALL, ("fedavg",)),
    ("large", LARGE, ("fedavg",)),
)
HYPER: dict[str, dict[str, Any]] = {"kdia": {"generator_epochs": 2, "generator_iterations": 25}}
PROXY = {"proxy": {"source": "train", "rows": 5000}}
NOOP = '''
from collections.abc import Sequence
from dataclasses import dataclass

from algorithms.fedavg import FedAvg
from harness.protocol import Inbox, Phase, World
from harness.trees import Tree


@dataclass(frozen=True)
class Noop(FedAvg):
    """Sends the model down and up again, untrained."""

    def plan(self, world: World, inbox: Inbox, memory: Tree) -> Sequence[Phase]:
        """Nothing is trained."""
        return ()
'''


def cell(method: str, settings: Mapping[str, Any], **more: Any) -> Trial:
    """A trial of a method under some settings."""
    return config.resolve({**settings, "method": method, "hyper": HYPER.get(method, {}), **more})


def loop(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Seconds of a round, all included, against the floor's, measured in turns."""
    for setting, settings, methods in LOOPS:
        for method in methods:
            found = against_floor(cell(method, settings), hosts, repeats, device)
            yield {"setting": setting, "method": method, **found}


def against_floor(trial: Trial, hosts: int, repeats: int, device: str = "cpu") -> Figure:
    """Ours and the floor, one after the other, again and again; the better memory format of the floor counts."""
    ours = stand(trial, hosts, device=device)
    ray.get(ours.rounds.remote(WARM))
    floors = {layout: Floor(trial, layout, hosts, device) for layout in LAYOUTS}
    for floor in floors.values():
        floor.rounds(1)
    count = max(1, round(2 / floors[LAYOUTS[0]].rounds(1)))  # about two seconds at a time
    before, own = ray.get(ours.samples.remote()), []
    raw: dict[str, list[float]] = {layout: [] for layout in floors}
    for _ in range(repeats):
        own.append(ray.get(ours.rounds.remote(count)) / count)
        for layout, floor in floors.items():
            raw[layout].append(floor.rounds(count) / count)
    samples = (ray.get(ours.samples.remote()) - before) / (repeats * count)
    for floor in floors.values():
        floor.close()
    ray.kill(ours)
    best = min(raw, key=lambda layout: statistics.median(raw[layout]))
    ratios = [theirs / mine for mine, theirs in zip(own, raw[best], strict=True)]
    overhead = (statistics.median(own) - statistics.median(raw[best])) * hosts / trial.cohort
    return {
        **spread("efficiency", ratios),
        "round_s": statistics.median(own),
        "floor_s": statistics.median(raw[best]),
        "overhead_per_visit_ms": 1000 * overhead,
        "samples_per_s": samples / statistics.median(own),
        "floor_layout": best,
    }


def spread(name: str, values: list[float]) -> Figure:
    """The median under a name, and the ends."""
    return {name: statistics.median(values), "lowest": min(values), "highest": max(values)}


class Clock:
    """A watcher of a sweep that only looks at the clock: when the first trial started, and when each ended."""

    def __init__(self) -> None:
        self.started = 0.0
        self.ended: list[float] = []
        self.busy = 0.0  # seconds that trials say they took

    def begin(self, trials: int, rounds: int, done: int) -> None:
        """The sweep begins."""

    def start(self, trial: Trial) -> None:
        """A trial begins."""
        self.started = self.started or time.monotonic()

    def end(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """A trial has ended, and its row was written."""
        self.ended.append(time.monotonic())
        self.busy += row["seconds"]

    def note(self, text: str) -> None:
        """Not of interest."""

    def round(self, trial: Trial, rounds_done: int, accuracy: float | None) -> None:
        """Not of interest."""

    def rest(self, trial: Trial) -> None:
        """Not of interest."""


def timed(words: list[str]) -> tuple[Clock, float]:
    """A sweep of FedAvg into a folder that is thrown away, and when it was called."""
    clock, began = Clock(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run(run_sweep("fedavg", words), Path(folder) / "results", clock)
    return clock, began


def start(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Seconds that a trial costs beside its rounds, in a sweep of trials of one short round, one at a time.

    The first has Ray, its process and the data to wait for; the others take over its process. Upper bounds of the
    time to the first round: its training, its row and its MLflow run are in them.
    """
    words = ["dataset=digits", "net=mlp", "clients=10", "rounds=1", "local.epochs=1", "execution.parallel=1"]
    clock, began = timed([*words, f"seeds={3 + 3 * repeats}"])
    gaps = [after - before for before, after in pairwise(clock.ended[2:])]
    yield {"first_s": clock.ended[0] - began, **spread("reused_s", gaps)}


def rounds(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Seconds of a round in which nothing is trained, by net and cohort, and the memory of its server."""
    with tempfile.TemporaryDirectory() as folder:
        method = Path(folder) / "noop.py"
        method.write_text(NOOP)
        for net, cohort in (("kdia-lenet", 10), ("kdia-lenet", 50), ("kdia-lenet", 1000), ("resnet18", 10)):
            trial = cell(str(method), USUAL, net=net, cohort=cohort, clients=1000, evaluation={"every": 10**6})
            ours = stand(trial, hosts, device=device)
            ray.get(ours.rounds.remote(WARM))
            seen = [ray.get(ours.rounds.remote(5)) / 5 for _ in range(repeats)]
            held = ray.get(ours.memory.remote())
            ray.kill(ours)
            yield {"net": net, "cohort": cohort, **spread("round_s", seen), **_megabytes(held)}


def _megabytes(held: Mapping[str, Mapping[str, int]]) -> Figure:
    """Peak resident memory, and what is a process's own."""
    names = {"peak_bytes": "peak_mb", "private_bytes": "private_mb"}
    return {f"{who}_{names[what]}": n / 1e6 for who, found in held.items() for what, n in found.items()}


def scale(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Seconds of a round and memory of its processes by population, for the same cohort; KDIA with 1,000 clients."""
    small = {"net": "kdia-lenet", "local": {"epochs": 1, "batch": 10, "lr": 0.02}, "partition": {"kind": "iid"}}
    kept = {"hyper": {"generator_epochs": 0}}  # its server keeps the latest model of every client
    cases = [*(("fedavg", n, 50) for n in (100, 1000, 10_000, 100_000)), ("kdia", 1000, 200)]
    for method, clients, cohort in cases:
        settings = USUAL | small | {"evaluation": {"every": 10**6}, "clients": clients, "cohort": cohort}
        ours = stand(cell(method, settings, **(kept if method == "kdia" else {})), hosts, True, device)
        ray.get(ours.rounds.remote(WARM if method != "kdia" else 15))  # until all have been visited
        seen = [ray.get(ours.rounds.remote(3)) / 3 for _ in range(repeats)]
        held = ray.get(ours.memory.remote())
        ray.kill(ours)
        yield {"method": method, "clients": clients, "cohort": cohort, **spread("round_s", seen), **_megabytes(held)}


def server(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Seconds of the server's own part of a round against the same arithmetic by hand, in one process each."""
    light = {"local": {"epochs": 1, "batch": 600, "lr": 0.02}, "evaluation": {"every": 10**6}}
    for method, clients in (("kdia", 100), ("kdia", 1000), ("fedgen", 100), ("feddf", 100)):
        trial = cell(method, USUAL | light, clients=clients, **(PROXY if method == "feddf" else {}))
        ours, floor = stand(trial, 0, device=device), Floor(trial, "channels_last", 1, device)
        ray.get(ours.rounds.remote(2))
        floor.serve()
        own, raw = [], []
        for _ in range(repeats):
            ray.get(ours.rounds.remote(1))
            own.append(ray.get(ours.served.remote(1)))
            raw.append(floor.serve())
        ray.kill(ours)
        floor.close()
        ratios = [theirs / mine for mine, theirs in zip(own, raw, strict=True)]
        figures = {"server_s": statistics.median(own), "floor_s": statistics.median(raw)}
        yield {"method": method, "clients": clients, **spread("efficiency", ratios), **figures}


def clients(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Seconds of a visit in a round of 16, one by one and as many together, by net and batch, measured in turns.

    gain: how many times faster than one by one.
    """
    few = {"clients": 160, "cohort": 16, "evaluation": {"every": 10**6}}
    for net, batch in product(("mlp", "lenet5", "kdia-lenet", "mcmahan-cnn"), (10, 64)):
        settings = USUAL | few | {"net": net, "local": {"epochs": 1, "batch": batch, "lr": 0.02}}
        stands = {k: stand(cell("fedavg", settings, together=k), 0, device=device) for k in (1, 4, 16)}
        seen: dict[int, list[float]] = {k: [] for k in stands}
        for ours in stands.values():
            ray.get(ours.rounds.remote(1))
        for k in [*stands] * repeats:
            seen[k].append(ray.get(stands[k].rounds.remote(1)) / 16)
        for k, ours in stands.items():
            ray.kill(ours)
            gains = [alone / own for alone, own in zip(seen[1], seen[k], strict=True)]
            visit = statistics.median(seen[k])
            yield {"net": net, "batch": batch, "together": k, "visit_s": visit, **spread("gain", gains)}


def sweep(hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """Trials per hour against trials at once, each on a core of its own, from the first start to the last row.

    share: what the trials say they took, of slots x time.
    """
    words = ["dataset=fashion-mnist", "net=lenet5", "clients=100", "participation=0.1", "rounds=12", "local.epochs=1"]
    most = min(os.cpu_count() or 1, 64)
    for slots in [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]:
        trials = 6 * slots
        clock, _ = timed([*words, f"execution.parallel={slots}", f"seeds={trials}"])
        took = clock.ended[-1] - clock.started
        figures = {"trials_per_hour": 3600 * trials / took, "trial_s": clock.busy / trials}
        yield {"slots": slots, "trials": trials, **figures, "share": clock.busy / (slots * took)}
