"""Ray itself: started here or joined, what travels to its nodes, and whether a trial has room on them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness import cards, registry
from harness.config import Execution, Trial
from harness.refusal import Refused
from harness.room import Node, at_once, beside, bundles, check_room, listed

__all__ = ["at_once", "bundles", "check_room"]
KNOCK_S = 5.0
START_S = 120.0  # for a node to unpack the code and import torch
LOOK_S = 10.0
PATIENCE_S = 120.0
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the tables are ours
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # nor is its own state of use: it would grow with every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, and the next command goes on
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # within a submitted job: the code that travels is this one
}
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def address(how: Execution) -> str:
    """Of the cluster to join: execution.address, else what RAY_ADDRESS says. Empty: Ray is started here."""
    there = how.address or os.environ.get("RAY_ADDRESS", "")
    return "" if there == "local" else there


def start(how: Execution, cells: Iterable[Trial] = ()) -> str:
    """Starts Ray here or joins the cluster, unless this process has one. Returns what the user should know of it.

    cells: whose method files travel along. Raises Refused if there is no such cluster, or no room in it.
    """
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    if ray.is_initialized():
        return ""
    there, told, ends = address(how), "", signal.getsignal(signal.SIGTERM)
    if there:
        key = "execution.address" if how.address else "RAY_ADDRESS"
        try:
            _join(there, cells)
        except (OSError, ValueError, RuntimeError, RayError) as error:
            why = error.__cause__ or error  # the cause may be a trace in one string
            line = next((line for line in reversed(str(why).splitlines()) if line.strip()), type(why).__name__)
            raise Refused(f"no Ray cluster at {key} = {there!r}: {line}") from None
        told = f"On the Ray cluster at {ray.get_runtime_context().gcs_address} ({key}): {listed(supply())}."
    else:
        with _alone():
            ray.init("local", include_dashboard=False, **QUIET)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends)  # Ray's own handler aborts this process, and leaves its children behind
    check_room(how, supply())
    if there:
        _check_nodes(how)
    return told


def stop() -> None:
    """Ends the Ray of this process, or leaves the cluster.

    A reference of Ray's that goes while Ray shuts down ends the whole process, and a collection of garbage may let
    one go in any thread, such as MLflow's: so it is collected before, and not meanwhile.
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def machine() -> Node:
    """What a local Ray would find here."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


def supply() -> list[Node]:
    """The nodes there are and those that an autoscaler would add; this machine while Ray has not been started."""
    if not ray.is_initialized():
        return [machine()]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def placeable(how: Execution) -> str | None:
    """Why no trial can be placed in the cluster as it is now, be it ever so idle; None if one can."""
    try:
        check_room(how, supply())
    except (Refused, RayError) as error:
        return str(error)
    return None


@contextmanager
def patient() -> Iterator[None]:
    """Lets a sweep outlive its nodes. Ray waits for one that has vanished when a trial's room there is given back,
    then raises, for which Tune would give up all; so the room is given back beside the sweep.
    """
    owner: Any = importlib.import_module("ray.air.execution.resources.placement_group")
    before = owner.remove_placement_group

    def give_back(room: Any) -> None:
        with suppress(RayError):  # it is given back once Ray knows that the node is dead, or when the sweep ends
            before(room)

    owner.remove_placement_group = lambda room: threading.Thread(target=give_back, args=(room,), daemon=True).start()
    try:
        yield
    finally:
        owner.remove_placement_group = before


class Lookout:
    """Ends a silent wait. Asked again and again, it says at last why nothing more can run."""

    def __init__(self, how: Execution) -> None:
        self.how = how
        self.looked = time.monotonic()
        self.well: float | None = None  # when a trial last had room, or was running

    def __call__(self, running: bool) -> str | None:
        """running: whether any trial is. Returns a reason once there was no room for any for PATIENCE_S."""
        now = time.monotonic()
        if running or self.well is None:
            self.well = now
        if running or now - self.looked < LOOK_S:
            return None
        self.looked, why = now, placeable(self.how)
        if why is None:
            self.well = now
        if now - self.well < PATIENCE_S:
            return None
        return f"for {PATIENCE_S:.0f} s there was no room for any trial: {why}"


def _join(there: str, cells: Iterable[Trial]) -> None:
    if there != "auto" and not re.fullmatch(r"[^\s/@]+:[0-9]{1,5}", there):
        raise ValueError("an address is HOST:PORT or auto, of a cluster that this machine is a node of")
    _knock(there)
    with _staged(cells) as folder, _overheard() as said:
        try:
            # A working directory, not py_modules: with one, Ray puts no path of this machine on the nodes' sys.path.
            ray.init(there, runtime_env={"working_dir": folder}, **QUIET)
        except (ConnectionError, RayError) as error:
            if "Unauthenticated" in said() or isinstance(error, AuthenticationError):
                hint = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
                raise ValueError(f"the token is missing or is not the cluster's: {hint}") from None
            raise


@contextmanager
def _overheard() -> Iterator[Callable[[], str]]:
    """Keeps what Ray's core writes on stderr, to be asked for: it repeats itself there for half a minute."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 2**20, 0).decode(errors="replace")
        finally:
            os.dup2(before, 2)
            os.close(before)


@contextmanager
def _staged(cells: Iterable[Trial]) -> Iterator[str]:
    """A folder with all that runs a trial, as in a wheel: the nodes need the packages, but not fedstill."""
    with tempfile.TemporaryDirectory(prefix="fedstill-") as name:
        folder = Path(name)
        for package in ("harness", "algorithms"):
            spec = importlib.util.find_spec(package)
            assert spec is not None and spec.submodule_search_locations
            left = shutil.ignore_patterns("__pycache__", "_cards", "_methods")
            shutil.copytree(spec.submodule_search_locations[0], folder / package, ignore=left)
        for kind in ("datasets", "sweeps"):
            shutil.copytree(cards.root(kind), folder / "harness" / "_cards" / kind)
        sent = folder / "harness" / registry.SENT.name
        sent.mkdir()
        for cell in cells:
            if cell.source:
                (sent / f"{cell.source}.py").write_bytes(registry.text(cell.method, cell.source))
        yield name


def _knock(address: str) -> None:
    """Raises an OSError at once where nobody listens: Ray would try for minutes, then kill this process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


@contextmanager
def _alone() -> Iterator[None]:
    """Lets Ray listen on the loopback interface only, and take work only from those who have its token."""
    constants: Any = sys.modules.get("ray._private.ray_constants")
    before = getattr(constants, "ENABLE_RAY_CLUSTER", True)
    # Ray asks for a token by itself, unless RAY_AUTH_MODE says otherwise; set here, it would come too late for it.
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not has_token and not Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would write one into the home folder
    try:
        constants.ENABLE_RAY_CLUSTER = False  # what Ray does on systems where it runs on one machine only
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _versions() -> dict[str, str]:
    """What a number may depend on, on the node where this is called."""
    import numpy
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def _check_nodes(how: Execution) -> None:
    """Refuses nodes that lack packages, or have others than this machine: a row names the versions of one only."""
    server, *hosts = bundles(how)
    ask, mine = ray.remote(num_cpus=0, max_retries=0)(_versions), _versions()
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and max(beside(node["Resources"], part, {}) for part in (server, *hosts[:1])) >= 0:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = ask.options(scheduling_strategy=there).remote()
    for name, ref in asked.items():
        try:
            found = ray.get(ref, timeout=START_S)
        except RayError as error:
            why = (str(error).strip() or f"no answer for {START_S:.0f} s").splitlines()[-1]
            raise Refused(f"node {name} of the cluster can't run trials: {why}") from None
        if found != mine and not how.allow_drift:
            other = ", ".join(f"{key} {found[key]}" for key in mine if found[key] != mine[key])
            here = ", ".join(f"{key} {mine[key]}" for key in mine if found[key] != mine[key])
            raise Refused(f"node {name} has {other}, this machine {here}: numbers could differ; make them the same")
