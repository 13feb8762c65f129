"""Ray itself: the one this process starts or the cluster it joins, and whether a trial has room there."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import ray

from harness.config import Execution
from harness.refusal import Refused
from harness.trial import device_of

KNOCK_S = 5.0
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the tables are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, and the next command goes on
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def machine() -> dict[str, float]:
    """What a local Ray would find here."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


def bundles(how: Execution) -> list[dict[str, float]]:
    """The resources of a trial's server and hosts. Without hosts the server trains, and has their share of a GPU."""
    server_gpus = how.gpus_per_server or (0.0 if how.hosts else how.gpus_per_host)
    server = {"CPU": how.server_cpus, "GPU": server_gpus}
    host = {"CPU": how.cpus_per_host, "GPU": how.gpus_per_host}
    return [{k: v for k, v in b.items() if v or k == "CPU"} for b in [server, *[host] * how.hosts]]


def check_room(how: Execution, supply: Mapping[str, float]) -> None:
    """Refuses what could never be placed: Ray would wait for ever without a word."""
    wanted = bundles(how)
    for kind in ("CPU", "GPU"):
        demand, there = sum(b.get(kind, 0.0) for b in wanted), supply.get(kind, 0.0)
        if demand > there + 1e-9:
            raise Refused(
                f"a trial needs {demand:g} {kind}s ({how.hosts} hosts and a server), but there are {there:g}: lower "
                f"execution.hosts or the {kind.lower()}s_per_host and {kind.lower()}s_per_server"
            )
    if device_of(how) == "cuda" and not any(b.get("GPU") for b in wanted):
        raise Refused("execution.device = 'cuda' needs gpus_per_host (or gpus_per_server) greater than 0")


def start(how: Execution) -> None:
    """Starts or finds Ray, if that was not done before."""
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    if ray.is_initialized():
        return
    where: dict[str, Any] = {"address": how.address} if how.address else {"include_dashboard": False}
    try:
        knock(how.address)
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise Refused(f"no Ray cluster at execution.address = {how.address!r}: {error}") from None
    check_room(how, ray.cluster_resources())


def knock(address: str) -> None:
    """Raises an OSError at once where nobody listens: Ray would try for minutes, then kill this process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
