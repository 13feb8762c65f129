"""Whether trials have room on some nodes, and how many of them at once. Only arithmetic: Ray is asked elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import floor, inf

from harness.config import Execution
from harness.refusal import Refused
from harness.trial import device_of

Node = Mapping[str, float]  # "CPU", "GPU" and more -> how much of it a node has
EPS = 1e-6


def bundles(how: Execution) -> list[dict[str, float]]:
    """The resources of a trial's server and hosts. Without hosts the server trains, and has their share of a GPU."""
    server_gpus = how.gpus_per_server or (0.0 if how.hosts else how.gpus_per_host)
    server = {"CPU": how.server_cpus, "GPU": server_gpus}
    host = {"CPU": how.cpus_per_host, "GPU": how.gpus_per_host}
    return [{k: v for k, v in b.items() if v or k == "CPU"} for b in [server, *[host] * how.hosts]]


def check_room(how: Execution, nodes: Sequence[Node]) -> None:
    """Refuses what could never be placed: Ray would wait for ever without a word."""
    server, *hosts = wanted = bundles(how)
    for kind in ("CPU", "GPU"):
        demand, there = (sum(part.get(kind, 0.0) for part in parts) for parts in (wanted, nodes))
        if demand > there + EPS:
            raise Refused(
                f"a trial needs {demand:g} {kind}s ({how.hosts} hosts and a server), but there are {there:g}: lower "
                f"execution.hosts or the {kind.lower()}s_per_host and {kind.lower()}s_per_server"
            )
    if device_of(how) == "cuda" and not any(b.get("GPU") for b in wanted):
        raise Refused("execution.device = 'cuda' needs gpus_per_host (or gpus_per_server) greater than 0")
    if not _fits(server, hosts, nodes):
        each = f" and {amount(hosts[0])} for each of {how.hosts} hosts" if hosts else ""
        raise Refused(
            f"a trial needs {amount(server)} for its server{each}, none of them split between nodes, but there are "
            f"{listed(nodes)}: lower execution.cpus_per_host, gpus_per_host, cpus_per_server or gpus_per_server"
        )


def at_once(how: Execution, nodes: Sequence[Node], most: int) -> int:
    """How many trials have room at the same time, at most `most`. With hosts on several nodes an estimate."""
    server, *hosts = bundles(how)
    room = sum(beside(node, {}, hosts[0] if hosts else server) for node in nodes) // max(1, len(hosts))
    for kind in ("CPU", "GPU"):
        demand, there = (sum(part.get(kind, 0.0) for part in parts) for parts in ([server, *hosts], nodes))
        room = min(room, floor(there / demand + EPS) if demand else inf)
    return int(max(1, min(room, most, how.parallel or most)))


def _fits(server: Node, hosts: Sequence[Node], nodes: Sequence[Node]) -> bool:
    """Whether the server finds a node so that the hosts find room, there and on the others."""
    host = hosts[0] if hosts else {}
    room = [beside(node, {}, host) if hosts else 0 for node in nodes]
    places = [(i, beside(node, server, host)) for i, node in enumerate(nodes)]
    return any(here >= 0 and sum(room) - room[i] + here >= len(hosts) for i, here in places)


def beside(node: Node, server: Node, host: Node) -> float:
    """How many hosts a node has room for beside a server; -1 if not even for that. A share of a GPU is of one GPU."""
    cpus, gpus = node.get("CPU", 0.0) - server.get("CPU", 0.0), floor(node.get("GPU", 0.0) + EPS)
    mine, each = server.get("GPU", 0.0), host.get("GPU", 0.0)
    gpus, rest = (gpus - 1, 1 - mine) if 0 < mine < 1 else (gpus - floor(mine), 0.0)
    if cpus < -EPS or gpus < 0:
        return -1
    by_cpu = floor(cpus / host["CPU"] + EPS) if host.get("CPU") else inf
    if not each:
        return by_cpu
    by_gpu = floor(gpus / each + EPS) if each >= 1 else gpus * floor(1 / each + EPS) + floor(rest / each + EPS)
    return min(by_cpu, by_gpu)


def amount(what: Node) -> str:
    """Resources in words: "2 CPUs and 0.5 GPUs"."""
    kinds = ("CPU", "GPU") if what.get("GPU") else ("CPU",)
    return " and ".join(f"{what.get(kind, 0.0):g} {kind}s" for kind in kinds)


def listed(nodes: Sequence[Node]) -> str:
    """Nodes in words: "2 nodes with 4 CPUs, 1 node with 8 CPUs and 1 GPUs"."""
    kinds = Counter(amount(node) for node in nodes)
    found = [f"{count} node{'s' * (count > 1)} with {amount}" for amount, count in kinds.items()]
    return ", ".join(found) or "no nodes"
