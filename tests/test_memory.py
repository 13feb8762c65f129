"""What a thousand rounds leave in the memory of a server and of its host: nothing."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from scipy.stats import theilslopes

from harness import config
from harness.data import card, load
from harness.pool import RayPool
from harness.server import Server
from harness.work import make_setup

pytestmark = [pytest.mark.cluster, pytest.mark.long]
ROUNDS, EVERY, WARM = 1000, 50, 50  # WARM: rounds after which nothing may grow


def private_bytes(process: int) -> int:
    """What a process has written and nobody shares. Clean pages, of libraries, are others' as well, or not."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def settled() -> int:
    """Private bytes of this process, after all that it need not hold was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_bytes(os.getpid())


class Trialist:
    """A server in a process of its own, with one host in another."""

    def __init__(self, method: str) -> None:
        trial = config.resolve(
            {
                **{"method": method, "clients": 20, "participation": 0.2, "rounds": ROUNDS, "net": "mlp"},
                **{"local": {"epochs": 1, "batch": 32, "lr": 0.05}, "evaluation": {"every": 1}},
            }
        )
        arrays = load(card("digits"))
        setup, mixes = make_setup(trial, arrays)
        self.pool = RayPool(config.Execution(hosts=1), "cpu")
        self.pool.load(setup, ray.put(arrays))
        self.server = Server(setup, self.pool, mixes=mixes)

    def run(self, rounds: int) -> tuple[int, int]:
        """Private bytes of the server and of its host, so many rounds later."""
        for _ in range(rounds):
            self.server.step()
        look = settled  # by value: this module is not there to be imported on a host
        return settled(), ray.get(self.pool.hosts[0].__ray_call__.remote(lambda _: look()))


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_f22_a_thousand_rounds_leave_nothing_behind(cluster: None, method: str) -> None:
    """Less than 1 % from round 50 to round 1000, by the median slope between what is seen every 50 rounds.

    What leaks does so every round, and is in all slopes. What a process takes once, and keeps (an arena of the
    allocator, a buffer of Ray's), comes at any time, is in fewer than half of them, and leaves the median alone.
    """
    actor: Any = ray.remote(Trialist)
    trialist = actor.options(num_cpus=0).remote(method)
    ray.get(trialist.run.remote(WARM))
    seen = np.array([ray.get(trialist.run.remote(EVERY)) for _ in range((ROUNDS - WARM) // EVERY)], float)
    ray.kill(trialist)
    rounds = np.arange(1, len(seen) + 1) * EVERY
    for name, bytes_of in zip(("server", "host"), seen.T, strict=True):
        slope, start, *_ = theilslopes(bytes_of, rounds)
        growth = slope * (ROUNDS - WARM) / start
        print(f"{method}: {name} {start / 1e6:.0f} MB, growth {growth:.2%} in {ROUNDS - WARM} rounds")
        assert growth < 0.01, (name, bytes_of)
