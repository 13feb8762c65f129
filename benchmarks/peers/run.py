"""The same FedAvg work on fedstill and on other simulators, in turns, and one table of ratios.

    python benchmarks/peers/run.py [flower] [pfl] [--setting usual|small|large] [--turns 2] [--out DIR]

Runs in fedstill's own environment. Each peer has one of its own, made on demand from its pinned requirements, since
their versions of Ray clash. Every simulator begins with the same parameters and has the same rows on the same
clients; which clients come when, and in which order they see their rows, is its own business. Each is tried in
several ways first (processes, threads, memory format) and then measured in the fastest, and in the way that it is run
if nobody says anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deal import MEASURED, SETTINGS, WARM, deal, trial_of
from table import OURS, Measured, check, table

from harness import bench
from harness.refusal import Refused, unknown

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0))
TRIED = 3  # rounds, after those that warm up, by which a way to run is chosen
LONGEST_S = 3600  # for one run; a simulator that waits for ever is ended


@dataclass(frozen=True)
class Way:
    """How a simulator is run."""

    processes: int
    threads: int
    layout: str = "channels_last"

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} thread{'s' * (self.threads > 1)}, {self.layout}"


@dataclass(frozen=True)
class Peer:
    """A simulator: its driver, its requirements, what it is tried with; whether several processes need torchrun.

    default: how it is run where nothing is said of processes, threads and memory format.
    """

    driver: str
    requirements: str
    ways: tuple[Way, ...]
    default: Way
    torchrun: bool = False


LAYOUTS = ("channels_last", "contiguous")  # of which each peer gets its faster one
SHAPES = dict.fromkeys([(1, 1), (1, CORES), (CORES, 1)])  # processes and threads
WAYS = tuple(Way(*shape, layout) for shape in SHAPES for layout in LAYOUTS)
# Flower gives a client two CPUs, and so threads; pfl is one process, in which torch has a thread for each core.
PEERS = {
    "flower": Peer("flower.py", "flower", WAYS, Way(max(1, CORES // 2), min(2, CORES), "contiguous")),
    "pfl": Peer("pfl_research.py", "pfl", WAYS, Way(1, CORES, "contiguous"), torchrun=True),
}
CODES = ("fl-bench", "kdia", "fedgen")  # research code in checkouts; see fl_bench.py
OUR_WAY = Way(CORES, 1, "channels_last")
US = Peer("ours.py", "", (OUR_WAY,), OUR_WAY)


def known(names: Sequence[str]) -> list[str]:
    """The peers asked for, or all of them. Raises Refused for a name that is none."""
    for name in names:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
    return list(dict.fromkeys(names)) or list(PEERS)


def environment(peer: Peer, folder: Path) -> Path:
    """The Python that runs a peer; its environment is made if it isn't there, or is of other requirements."""
    pinned = (HERE / f"requirements-{peer.requirements}.txt").read_text()
    home, made = folder / peer.requirements, folder / f"{peer.requirements}.made"
    if not made.exists() or made.read_text() != pinned:
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        install = ["-m", "pip", "install", "--quiet", "-r", HERE / f"requirements-{peer.requirements}.txt"]
        subprocess.run([home / "bin" / "python", *install], check=True)
        made.write_text(pinned)
    return home / "bin" / "python"


def drive(python: Path, peer: Peer, way: Way, folder: Path, rounds: int) -> dict[str, Any]:
    """Runs a driver once; what it wrote."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    how = ["--processes", str(way.processes), "--threads", str(way.threads), "--layout", way.layout]
    run = [python]
    if peer.torchrun and way.processes > 1:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={way.processes}"]
    _quiet([*run, HERE / peer.driver, folder, "--rounds", str(rounds), *how, "--out", out])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _quiet(command: Sequence[object]) -> None:
    """Runs a command; what it says is seen only if it fails."""
    words, told = [str(word) for word in command], subprocess.PIPE
    done = subprocess.run(words, stdout=told, stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} ended with {done.returncode}:\n{done.stdout[-4000:]}")


def fastest(name: str, python: Path, peer: Peer, folder: Path) -> tuple[Way, dict[str, float]]:
    """The way to run a simulator that is the best for this work, and the seconds of all that were tried."""
    tried: dict[Way, float] = {}
    for way in peer.ways if len(peer.ways) > 1 else ():
        seconds: list[float] = drive(python, peer, way, folder, WARM + TRIED)["seconds"]
        tried[way] = statistics.median(seconds[WARM:])
        print(f"{name} ({way}): {tried[way]:.3f} s", flush=True)
    best = min(tried, key=tried.__getitem__, default=peer.ways[0])
    return best, {str(way): seconds for way, seconds in tried.items()}


def measure(setting: str, peers: dict[str, tuple[Path, Peer]], turns: int, folder: Path) -> list[Measured]:
    """All simulators in one setting, one after the other, again and again."""
    deal(trial_of(setting), folder)
    found: dict[tuple[str, Way], Measured] = {}
    for name, (python, peer) in peers.items():
        best, tried = fastest(name, python, peer, folder)
        found[name, best] = Measured(setting, name, str(best), [], [], tried=tried)
        if peer.default != best:
            found[name, peer.default] = Measured(setting, name, f"{peer.default} (its default)", [], [])
    for turn in range(turns):
        for name, way in found:
            told = drive(*peers[name], way, folder, WARM + MEASURED[setting])
            found[name, way] = now = replace(
                found[name, way],
                seconds=[*found[name, way].seconds, told["seconds"][WARM:]],
                accuracy=[*found[name, way].accuracy, told["accuracy"][-1]],
                versions=told["versions"],
            )
            seconds = statistics.median(now.seconds[-1])
            print(f"{setting}, turn {turn + 1}: {name} ({way}) {seconds:.3f} s", flush=True)
    return list(found.values())


def from_checkouts(setting: str, checkouts: dict[str, Path], turns: int, folder: Path) -> list[Measured]:
    """Research code, if there are checkouts of it."""
    found = []
    for name, checkout in checkouts.items():
        seconds = []
        for _ in range(turns):
            out = folder / "out.json"
            what = ["--code", name, "--checkout", checkout, "--rounds", MEASURED[setting], "--out", out]
            _quiet([sys.executable, HERE / "fl_bench.py", folder, *what])
            seconds.append(json.loads(out.read_text())["seconds"])
        found.append(Measured(setting, name, "its own", seconds, [None] * turns, same=False))
    return found


def machine() -> str:
    """What it ran on."""
    about = bench.machine()
    return f"{about['cpu']}, {CORES} cores, Python {about['python']}, load {about['load'][0]} at the start"


def main() -> None:
    """The command."""
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("peers", nargs="*", help=f"of {', '.join(PEERS)}; all of them by default")
    words.add_argument("--setting", action="append", choices=SETTINGS, help="all by default")
    words.add_argument("--turns", type=int, default=2)
    words.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "fedstill" / "peers")
    words.add_argument("--out", type=Path, default=Path("results/peers"), help="for raw.json and table.md")
    for code in CODES:
        words.add_argument(f"--{code}", type=Path, metavar="PATH", help="a checkout with an environment in .venv")
    told = words.parse_args()
    try:
        names = known(told.peers)
    except Refused as refused:
        words.exit(2, f"{refused}\n")
    told.envs.mkdir(parents=True, exist_ok=True)
    told.out.mkdir(parents=True, exist_ok=True)
    peers = {OURS: (Path(sys.executable), US)}
    peers |= {name: (environment(PEERS[name], told.envs.resolve()), PEERS[name]) for name in names}
    checkouts = {code: path.resolve() for code in CODES if (path := getattr(told, code.replace("-", "_")))}
    settings, where, found = told.setting or list(SETTINGS), machine(), []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            found += measure(setting, peers, told.turns, Path(folder))
            found += from_checkouts(setting, checkouts, told.turns, Path(folder))
        raw = {"machine": where, "ended": time.strftime("%F %T"), "measured": [asdict(one) for one in found]}
        (told.out / "raw.json").write_text(json.dumps(raw, indent=1))
    command = " ".join(["python benchmarks/peers/run.py", *names, *(f"--setting {s}" for s in settings)])
    text = f"{table(found)}\n{where}. {command} --turns {told.turns}\n"
    (told.out / "table.md").write_text(text)
    print(text)
    check(found)


if __name__ == "__main__":
    main()
