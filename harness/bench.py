"""`fedstill bench`: runs the timings, one after the other, and writes them down with the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from harness import cluster, durable, timings
from harness.config import Execution
from harness.refusal import Refused, unknown
from harness.timings import Figure

NAMES = ("loop", "start", "rounds", "scale", "server", "clients", "sweep")
BENCHES: Mapping[str, Callable[[int, int, str], Iterator[Figure]]] = {name: getattr(timings, name) for name in NAMES}
HOSTED = ("loop", "rounds", "scale")  # which train on hosts; the others in the processes of their servers
OWN_RAY = ("start", "sweep")  # which begin by starting it, and stay on the CPU
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "mlflow")


def chosen(names: Sequence[str], device: str) -> list[str]:
    """The benchmarks of these names, all that there are for the device if none is given.

    Raises Refused for a name that is none, and for a device that is not there or that a benchmark is not for.
    """
    for name in names:
        if name not in BENCHES:
            raise unknown("benchmark", name, list(BENCHES))
    if device not in ("cpu", "cuda"):
        raise unknown("device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: there is no GPU here")
    there = [name for name in BENCHES if device == "cpu" or name not in OWN_RAY]
    if strays := sorted(set(names) - set(there)):
        raise Refused(f"--device {device}: {', '.join(strays)} is measured on the CPU; there are {', '.join(there)}")
    return list(dict.fromkeys(names)) or there


def run_all(
    names: Sequence[str], hosts: int, repeats: int, file: Path | None, out: Path, device: str = "cpu"
) -> None:
    """Measures, shows each figure as it comes, and writes a table for each benchmark, and all into one file."""
    names = chosen(names, device)
    found: dict[str, list[Figure]] = {}
    if hosts > (os.cpu_count() or 1):
        raise Refused(f"--hosts {hosts} is more than the {os.cpu_count()} cores there are")
    for target in (out, *([file.parent] if file else [])):
        target.mkdir(parents=True, exist_ok=True)  # before hours of work
    where = machine()
    for name in names:
        print(f"{name}: {' '.join((BENCHES[name].__doc__ or '').split())}", flush=True)
        figures = found[name] = []
        for figure in measure(name, hosts, repeats, device):
            figures.append(figure)
            print("  " + "  ".join(f"{key} {_shown(value)}" for key, value in figure.items()), flush=True)
        command = f"fedstill bench {name}" + f" --hosts {hosts}" * (name in HOSTED) + f" --repeats {repeats}"
        write(out, name, figures, command + f" --device {device}" * (device != "cpu"), where)
    if file:
        content = json.dumps({"machine": where, **digest(found)}, indent=1)
        durable.write(file, f"{content}\n".encode())


def measure(name: str, hosts: int, repeats: int, device: str) -> Iterator[Figure]:
    """The figures of a benchmark, as they come."""
    if name in OWN_RAY:
        yield from BENCHES[name](hosts, repeats, device)
        return
    cluster.start(Execution(hosts=hosts))
    try:
        yield from BENCHES[name](hosts, repeats, device)
    finally:
        cluster.stop()


def machine() -> dict[str, Any]:
    """What figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(folder: Path, name: str, figures: Sequence[Figure], command: str, where: Mapping[str, Any]) -> None:
    """A table for people and the same figures for programs."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{package} {number}" for package, number in where["versions"].items())
    about = f"{where['cpu']}, {where['cores']} cores, load {where['load'][0]} at the start"
    gpus = f", {', '.join(where['gpus'])}" if where["gpus"] else ""
    said = " ".join((BENCHES[name].__doc__ or "").split())
    facts = f"- command: `{command}`\n- machine: {about}{gpus}\n- {versions}\n"
    text = f"# {name}\n\n{said}\n\n{markdown(figures)}\n\n{facts}"
    durable.write(folder / f"{name}.md", text.encode())
    content = {"command": command, "machine": where, name: list(figures)}
    durable.write(folder / f"{name}.json", f"{json.dumps(content, indent=1)}\n".encode())


def markdown(figures: Sequence[Figure]) -> str:
    """A table with a row for each figure. Times and memories to three significant digits."""
    columns = list(dict.fromkeys(key for figure in figures for key in figure))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_shown(figure.get(column, "")) for column in columns] for figure in figures]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def digest(found: Mapping[str, Sequence[Figure]]) -> dict[str, Any]:
    """What `--json` writes: all figures, the efficiencies of `loop` by setting and method, the times of `start`."""
    result: dict[str, Any] = {"figures": {name: list(figures) for name, figures in found.items()}}
    for figure in found.get("loop", ()):
        result.setdefault("efficiency", {}).setdefault(figure["setting"], {})[figure["method"]] = figure["efficiency"]
    for figure in found.get("start", ()):
        result |= {"first_s": figure["first_s"], "reused_s": figure["reused_s"]}
    return result
