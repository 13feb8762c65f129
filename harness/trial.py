"""A trial on Ray: the server is a Tune trainable and thereby an actor; its hosts live in its placement group."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from harness import config
from harness.checkpoint import pack, unpack
from harness.data import Arrays
from harness.host import InlinePool
from harness.pool import RayPool
from harness.refusal import Refused
from harness.server import Diverged, Server
from harness.work import Pool, make_setup

REPORT_S = 0.5  # rounds are run until so much time has passed, then reported together


class FederatedTrial(tune.Trainable):
    """Runs one cell after the other; process, hosts and data stay. config: the number of a cell in data["cells"]."""

    failure: str | None
    server: Server | None

    def setup(self, chosen: dict[str, Any], data: dict[str, Any] | None = None) -> None:
        """Begins the first cell. data: "cells", "execution", "traces", and references: of "arrays" by data
        set, and of checkpoints to "resume" from by cell.
        """
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        self.data: dict[str, Any] = data or {}
        self.hosts: RayPool | None = None
        self.inline: InlinePool | None = None
        self._begin(chosen)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins the next cell in this process."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Some rounds. The last result of a cell carries its tables."""
        until, content = time.monotonic() + REPORT_S, None
        try:
            running = self._server()
            while not running.done and content is None and time.monotonic() < until:
                running.step()
                content = self._checkpoint(running)
        except Exception as error:  # a failure is a row, not a hole
            self.failure = reason(error)
        server = self.server
        ended = self.failure is not None or (server is not None and server.done)
        rows = server.rounds if server is not None else []
        seen = (row["accuracy"] for row in reversed(rows) if row["role"] == rows[0]["role"] and "accuracy" in row)
        result = {"rounds_done": server.round if server else 0, "accuracy": next(seen, None), "done": ended}
        if ended:
            return {**result, "tables": self._tables()}
        return result if content is None else {**result, "checkpoint": content}

    def _checkpoint(self, server: Server) -> bytes | None:
        """What the driver should write down now, if this is a round for it."""
        every = self.execution.checkpoint_every
        if not every or server.done or server.round % every:
            return None
        return pack({"server": server.snapshot(), "seconds": time.monotonic() - self.clock})

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's own checkpoints are not used: what is done is known from the tables."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def _begin(self, chosen: dict[str, Any]) -> None:
        self.started, self.clock = time.time(), time.monotonic()
        self.resume = self.data["resume"].get(chosen["cell"])
        self.failure = None
        self.server = None
        self.skew: dict[str, Any] = {}
        # Resolved by the driver already, where the files are that it may name.
        self.settings = config.Trial.model_validate_json(self.data["cells"][chosen["cell"]])
        self.execution = config.Execution.model_validate(self.data["execution"])
        _forget_peak()

    def _server(self) -> Server:
        """The server of the cell, made at its first step so that a failure to make it is the cell's own."""
        if self.server is None:
            trial, how = self.settings, self.execution
            arrays = ray.get(self.data["arrays"][trial.dataset])
            setup, mixes = make_setup(
                trial, arrays, self._proxy(trial), self.data["traces"].get(trial.availability.trace)
            )
            self.skew = {"partition_hash": setup.split.digest}
            self.skew |= {f"partition_{key}": value for key, value in setup.split.statistics.items()}
            device = device_of(how)
            if how.hosts:
                if self.hosts is None:
                    self.hosts = RayPool(how, device)
                self.hosts.load(setup, self.data["arrays"][trial.dataset])
            else:
                if self.inline is None:
                    self.inline = InlinePool(device)
                self.inline.load(setup)
            here = "cuda" if device == "cuda" and (how.gpus_per_server or not how.hosts) else "cpu"
            pool: Pool = self.hosts or self.inline  # type: ignore[assignment]
            self.server = Server(setup, pool, here, mixes)
            if self.resume is not None:
                kept = unpack(ray.get(self.resume))
                self.server.restore(kept["server"])
                self.clock -= kept["seconds"]
        return self.server

    def _proxy(self, trial: config.Trial) -> Arrays | None:
        """The other data set that the proxy rows come from, if they do."""
        found: Arrays | None = None
        if trial.proxy.source not in ("none", "train"):
            found = ray.get(self.data["arrays"][trial.proxy.source])
        return found

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
