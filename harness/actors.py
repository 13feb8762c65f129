"""A client host as a Ray actor, and how its answers are looked at."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from harness.evaluate import Counts
from harness.host import ClientHost
from harness.trees import Parcel, parcel
from harness.work import Order, Personal, Report, Setup, Shard

GONE = (RayActorError, OutOfMemoryError)  # the host is no more; the second one: Ray's memory monitor ended it
SHORT = (OutOfMemoryError, torch.cuda.OutOfMemoryError, MemoryError)


class HostActor:
    """A client host in a process of its own. Trees travel as parcels."""

    def __init__(self, device: str) -> None:
        held: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
        self.gpus = held.get("GPU", 0.0) if device == "cuda" else 1.0
        self.host = ClientHost(device)
        self._arrays: tuple[Any, Any] = (None, None)

    def load(self, setup: Setup, arrays: list[Any], times: int) -> None:
        """Begins a trial. The data set's reference comes in a list, so that it is only fetched when it is new."""
        self._limit(times)
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

    def relax(self, times: int) -> None:
        """Lets go of memory that is only held to be quick. times: of its share of a GPU that it may fill from now."""
        self.host.relax()
        self._limit(times)

    def _limit(self, times: int) -> None:
        if self.gpus < 1:  # Ray's fractions are bookkeeping only
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.gpus * times))


def answers(ref: Any, seconds: float) -> bool:
    """Whether an answer comes in time. Raises what it raises."""
    ready, _ = ray.wait([ref], timeout=seconds)
    if ready:
        ray.get(ref)
    return bool(ready)


def error_of(ref: Any) -> Exception | None:
    """What an answer that is there raises."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def death_of(error: Exception) -> str:
    """Why an actor is no more, out of Ray's long words."""
    found = re.search(r"because (.+?)[.\n]", str(error))
    return found[1] if found and isinstance(error, RayActorError) else type(error).__name__
