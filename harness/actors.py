"""A client host as a Ray actor, and how its answers are looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from harness import host
from harness.evaluate import Counts
from harness.host import ClientHost, caught
from harness.trees import Parcel, parcel
from harness.work import Answer, Asked, Order, Personal, Report, Setup, Shard, WorkFailed

GONE = (RayActorError, OutOfMemoryError)  # the host is no more; the second one: Ray's memory monitor ended it
# An order, the places of the parts of its inbox, and that of its client's memory, if it has one.
Placed: TypeAlias = tuple[Order, tuple[int, ...], int | None]
SHORT = (OutOfMemoryError, *host.SHORT)


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

    def visits(self, asked: Sequence[Sequence[Placed]], *sent: Parcel) -> list[Any]:
        """Groups of visits, one after the other: a list with a report and a payload for each visit of each group, and
        behind it all memories, each stored apart, so that none is ever moved to the server. A visit that raises has
        `WorkFailed` instead of both. asked: orders with the places of inboxes and memories among what was `sent`.

        Of a chunk that is here as a whole, the means of what is only summed are taken here.
        """
        done: list[Answer | WorkFailed] = []
        for group in asked:
            done += self._group(
                [(o, [sent[at] for at in parts], None if m is None else sent[m]) for o, parts, m in group]
            )
        payloads = self.host.gathered([order for group in asked for order, _, _ in group], done)
        answers: list[tuple[Report, Parcel] | WorkFailed] = []
        memories: list[Parcel | None] = []
        for one, payload in zip(done, payloads, strict=True):
            if isinstance(one, WorkFailed):
                answers.append(one)
                memories.append(None)
            else:
                answers.append((one[0], parcel(payload or {})))
                memories.append(parcel(one[2]))
        ends = list(accumulate(map(len, asked)))
        return [[answers[end - len(group) : end] for end, group in zip(ends, asked, strict=True)], *memories]

    def _group(self, group: Sequence[Asked]) -> Sequence[Answer | WorkFailed]:
        if len(group) > 1:
            return self.host.visits(group)
        return [caught(partial(self.host.visit, *group[0]))]

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


def outcome(ref: Any) -> tuple[Any, Exception | None]:
    """An answer that is there, or what it raises."""
    try:
        return ray.get(ref), None
    except RayError as error:
        return None, error


def death_of(error: Exception) -> str:
    """Why an actor is no more, out of Ray's long words."""
    found = re.search(r"because (.+?)[.\n]", str(error))
    return found[1] if found and isinstance(error, RayActorError) else type(error).__name__
