"""A trial on Ray: the server is a Tune trainable and thereby an actor; its hosts live in its placement group."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from harness import RULES_VERSION, __version__, archive, config
from harness.checkpoint import pack, unpack
from harness.data import Arrays
from harness.fit import settle
from harness.inline import InlinePool
from harness.pool import RayPool
from harness.refusal import Refused
from harness.server import Diverged, Server
from harness.work import Pool, make_setup

REPORT_S = 0.5  # rounds are run until so much time has passed, then reported together


class FederatedTrial(tune.Trainable):
    """Runs one job after the other; process, hosts and data stay.

    A job: "cell", the trial's settings as JSON; "until", the rounds after which it ends, or rests if that is before
    its end; "metric", the validation metric that a search watches, or empty; "resume", whether the archive has a
    checkpoint of it.
    """

    failure: str | None
    server: Server | None

    def setup(self, job: dict[str, Any], data: dict[str, Any] | None = None) -> None:
        """Begins the first job. data: "execution", "traces", "archive", and references of "arrays" by data set."""
        settle()
        self.data: dict[str, Any] = data or {}
        self.hosts: RayPool | None = None
        self.inline: InlinePool | None = None
        self._begin(job)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins the next job in this process."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Some rounds. The last result of a job carries its tables, and so do all that a search watches."""
        until, content, seen = time.monotonic() + REPORT_S, None, False
        try:
            running = self._server()
            while running.round < self.job["until"] and content is None and not seen and time.monotonic() < until:
                running.step()
                content, seen = self._checkpoint(running), self._watched(running)
        except Exception as error:  # a failure is a row, not a hole
            self.failure = reason(error)
        server = self.server
        ended = self.failure is not None or (server is not None and server.done)
        rests = not ended and server is not None and server.round >= self.job["until"]
        rows = server.rounds if server is not None else []
        result = {"rounds_done": server.round if server else 0, "accuracy": _last(rows), "done": ended or rests}
        result |= {"rests": rests} | ({"curve": self._curve(rows)} if seen else {})
        if ended or seen:
            result["tables"] = self._tables()
        return result if content is None or ended else {**result, "checkpoint": content}

    def _checkpoint(self, server: Server) -> bytes | None:
        """What the driver should write down now, if this is a round for it."""
        every, rests = self.execution.checkpoint_every, server.round == self.job["until"]
        if server.done or not (rests or (every and server.round % every == 0)):
            return None
        content = {"server": server.snapshot(), "summary": self._summary(), "made_by": maker(self._device())}
        return pack(content)

    def _watched(self, server: Server) -> bool:
        """Whether a search has something new to look at: then this round is booked at once."""
        due = server.round % self.settings.evaluation.every == 0
        if not self.job["metric"] or server.done or not due:
            return False
        server.flush()
        return True

    def _curve(self, rows: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
        """Rounds done and score, for every evaluated round of the primary model."""
        metric = f"validation_{self.job['metric']}"
        sign = -1.0 if metric.endswith("loss") else 1.0
        own = [row for row in rows if row["role"] == rows[0]["role"] and row.get(metric) is not None]
        return [(row["round"] + 1, sign * row[metric]) for row in own]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's own checkpoints are not used: what is done is known from the tables."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def _begin(self, job: dict[str, Any]) -> None:
        self.started, self.clock = time.time(), time.monotonic()
        self.job = job
        self.failure = None
        self.server = None
        self.drift: str | None = None
        self.skew: dict[str, Any] = {}
        # Resolved by the driver already, where the files are that it may name.
        self.settings = config.Trial.model_validate_json(job["cell"])
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
            if self.job["resume"]:
                self._resume(self.server)
        return self.server

    def _resume(self, server: Server) -> None:
        kept = unpack(archive.take(self.data["archive"], config.trial_id(self.settings)))
        self.drift = drift(kept["made_by"], maker(self._device()))
        if self.drift and not self.execution.allow_drift:
            raise Refused(f"{DRIFTED}: {self.drift}; {WAYS_ON}")
        server.restore(kept["server"])
        self.drift = self.drift or kept["summary"]["drift"]
        self.clock -= kept["summary"]["seconds"]
        self.started = kept["summary"]["started"]

    def _proxy(self, trial: config.Trial) -> Arrays | None:
        """The other data set that the proxy rows come from, if they do."""
        found: Arrays | None = None
        if trial.proxy.source not in ("none", "train"):
            found = ray.get(self.data["arrays"][trial.proxy.source])
        return found

    def _summary(self) -> dict[str, Any]:
        server = self.server
        return {
            "status": "failed" if self.failure else "done",
            "reason": self.failure,
            "started": self.started,
            "seconds": time.monotonic() - self.clock,
            "rounds_done": server.round if server else 0,
            "peak_memory_bytes": _peak(),
            "device": self._device(),
            "threads": torch.get_num_threads(),
            "drift": self.drift,
            "skew": self.skew,
        }

    def _tables(self) -> bytes:
        server = self.server
        found = {"rounds": [], "clients": [], "events": []} if server is None else server.tables()
        return json.dumps({"summary": self._summary(), **found}).encode()

    def _device(self) -> str:
        return _device_name(device_of(self.execution))


DRIFTED = "its checkpoint was made under other conditions"
WAYS_ON = "--allow-drift goes on all the same and says so in the row, --fresh starts over"


def versions() -> dict[str, str]:
    """What has to be the same for numbers to be the same, beside the settings, wherever a trial runs."""
    numbers = {"torch": torch.__version__, "numpy": np.__version__}
    return {"fedstill": __version__, "rules": str(RULES_VERSION), **numbers}


def maker(device: str) -> dict[str, str]:
    """The same, and what a trial's process has of its own."""
    return {**versions(), "device": device, "threads": str(torch.get_num_threads())}


def drift(before: dict[str, str], now: dict[str, str]) -> str | None:
    """What has changed between two makers, if anything has."""
    changed = [f"{k} was {before.get(k)}, is {value}" for k, value in now.items() if before.get(k) != value]
    return ", ".join(changed) or None


def device_of(how: config.Execution) -> str:
    """cpu or cuda. Asking for a GPU where none is visible is an error: the CPU never steps in silently."""
    if how.device != "auto":
        return how.device
    return "cuda" if how.gpus_per_host or how.gpus_per_server else "cpu"


def reason(error: Exception) -> str:
    """One line for the table."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, Diverged | Refused) else f"{type(error).__name__}: {text}"


def _last(rows: Sequence[dict[str, Any]]) -> float | None:
    """Accuracy of the primary model when it was last evaluated."""
    seen = (row["accuracy"] for row in reversed(rows) if row["role"] == rows[0]["role"] and "accuracy" in row)
    return next(seen, None)


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
