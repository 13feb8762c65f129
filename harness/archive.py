"""Checkpoints on their way from the driver to a trial, wherever in the cluster it runs."""

from __future__ import annotations

import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

START_S = 120.0


class _Archive:
    """Holds references of checkpoints until they are fetched. The bytes stay in the object store."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def put(self, name: str, boxed: list[Any]) -> None:
        self.kept[name] = boxed

    def take(self, name: str) -> list[Any]:
        boxed: list[Any] = self.kept.pop(name)
        return boxed


class Archive:
    """The driver's end. Its actor is started when the first checkpoint is handed in, beside the driver."""

    def __init__(self) -> None:
        self.address = f"fedstill-{uuid.uuid4().hex}"
        self._actor: Any = None

    def put(self, name: str, content: bytes) -> None:
        """Hands a trial's checkpoint in."""
        if self._actor is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            actor: Any = ray.remote(_Archive)
            self._actor = actor.options(name=self.address, num_cpus=0, scheduling_strategy=here).remote()
        ray.get(self._actor.put.remote(name, [ray.put(content)]), timeout=START_S)

    def close(self) -> None:
        """Ends the actor."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None


def take(address: str, name: str) -> bytes:
    """A trial's end: its checkpoint, which is then gone from the archive."""
    archive: Any = ray.get_actor(address)
    boxed = ray.get(archive.take.remote(name), timeout=START_S)
    content: bytes = ray.get(boxed[0])
    return content
