"""What `fedstill plan` prints."""

from __future__ import annotations

import os
from pathlib import Path

from rich.table import Table
from rich.text import Text

from harness.axes import Sweep
from harness.cluster import machine
from harness.outlook import Kind, Outlook, look
from harness.progress import duration
from harness.registry import label
from harness.room import amount, bundles, listed
from harness.terminal import console
from harness.tryout import Sample

SPARE = 0.9  # of a GPU's memory that hosts may fill
MOST_SHARING = 64  # hosts on a GPU


def preview(sweep: Sweep, results: Path, trying: bool = True) -> None:
    """Prints what a sweep will do and about what it will take. Raises Refused for what the sweep would refuse."""
    found, out = look(sweep, results, trying), console()

    def say(text: str) -> None:
        out.print(text, highlight=False, markup=False, soft_wrap=True)

    for line in (*_size(found, results), *_room(found)):
        say(line)
    if any(kind.rows for kind in found.kinds):
        say("")
        out.print(_table(found), "")
    for line in (*_totals(found), *_memory(found), *found.notes):
        say(line)


def _size(found: Outlook, results: Path) -> list[str]:
    rest = f", {found.resting} of them from a checkpoint" if found.resting else ""
    lines = [f"{found.sweep.name}: {found.every} trials, {found.done} done, {found.to_do} to do{rest} ({results})"]
    if found.sweep.search is not None:
        how, groups = found.sweep.search.how, [g for g in found.sweep.search.groups if g.dimensions]
        budget = f"{how.trials} draws of one seed" + (f", at most {how.steps:,} steps" if how.steps else "")
        finals = max((len(group.seeds) for group in groups), default=0)
        kinds = f"{how.sampler} and {how.scheduler}" if how.scheduler != "pbt" else "a population (pbt)"
        lines.append(f"Search by {kinds}: {len(groups)} groups, each with {budget}, then {finals} finals")
        lines += [f"  {group.key}" for group in groups]
    return lines


def _room(found: Outlook) -> list[str]:
    how = found.sweep.execution
    server, *hosts = bundles(how)
    demand = (
        amount(server) + " for its server" + (f", {amount(hosts[0])} for each of {how.hosts} hosts" if hosts else "")
    )
    where = "the cluster" if found.joined else "this machine"
    return [f"A trial takes {demand}. Room: {listed(found.nodes)} ({where}), {found.lanes} at once."]


def _table(found: Outlook) -> Table:
    grid = Table(show_edge=False, pad_edge=False)
    wanted = [
        ("method", ""),
        ("data", ""),
        ("net", ""),
        *((name, "right") for name in ("clients", "trials", "rounds")),
    ]
    if any(kind.cost for kind in found.kinds):
        wanted += [(name, "right") for name in ("s a round", "a trial", "up", "down", "disk", "checkpoint")]
    for name, side in wanted:
        grid.add_column(Text(name), justify="right" if side else "left", no_wrap=True)
    for kind in found.kinds:
        grid.add_row(*map(Text, (*_setting(kind), *_costs(kind))))
    return grid


def _setting(kind: Kind) -> tuple[str, ...]:
    cell = kind.cell
    who = f"{cell.cohort} of {cell.clients}"
    return label(cell.method), cell.dataset, cell.net, who, str(len(kind.rounds)), str(cell.rounds)


def _costs(kind: Kind) -> tuple[str, ...]:
    if kind.cost is None:
        return ()
    one, mark = kind.cost, " *" if kind.told_from is not None else ""
    times = (f"{one.round_s:.3g}{mark}", duration(one.seconds))
    return (*times, *map(size, (one.up, one.down, one.disk, one.held)))


def _totals(found: Outlook) -> list[str]:
    if not found.kinds:
        return ["Nothing is left to do."]
    if not any(kind.rows for kind in found.kinds):
        return []
    most = "at most " if found.bound else "" if found.exact else "about "
    rows = {table: sum(kind.rows[table] for kind in found.kinds) for table in ("trials", "rounds", "clients")}
    lines = [f"Rows to write: {most}" + ", ".join(f"{number:,} in {table}" for table, number in rows.items())]
    if found.seconds is not None:
        costs = [(kind.cost, len(kind.rounds)) for kind in found.kinds if kind.cost is not None]
        up, down, disk = (sum(getattr(c, name) * n for c, n in costs) for name in ("up", "down", "disk"))
        held = max(c.held for c, _ in costs) * found.lanes
        lines.append(
            f"Bytes: {most}{size(up)} from clients, {size(down)} to clients; {size(disk)} of tables on the disk, "
            f"and up to {size(held)} of checkpoints while it runs"
        )
        lines.append(
            f"Time: {most or 'about '}{duration(found.seconds)} with {found.lanes} at once"
            + (", by the speed of this machine" if found.joined else "")
        )
    told = [kind for kind in found.kinds if kind.told_from is not None]
    for kind in told[:4]:
        assert kind.told_from is not None
        lines.append(
            f"* {label(kind.cell.method)} was not tried for want of time: told from {label(kind.told_from.method)}"
        )
    if (load := os.getloadavg()[0]) > machine()["CPU"] * 1.5 and found.seconds is not None:
        lines.append(f"This machine is busy with other work (load {load:.1f}): on a quiet one it takes less.")
    return lines


def _memory(found: Outlook) -> list[str]:
    peak = max((kind.sample.memory for kind in found.kinds if kind.sample is not None), default=0)
    lines = []
    if peak:
        free = free_memory()
        wanted = found.lanes * (1 + found.sweep.execution.hosts)
        room = f": {size(free)} free here hold {free // peak}" if free and not found.joined else ""
        lines.append(f"Memory: a process has up to {size(peak)} of its own{room}")
        if free and not found.joined and wanted * peak > free:
            lines.append(f"That is less than the {wanted} processes at once: lower execution.parallel or hosts.")
    return lines + (shares(found.graphics, found) if found.graphics else [])


def shares(seen: list[Sample], found: Outlook) -> list[str]:
    """How many hosts a GPU holds by what their tryouts took of it, and the setting for that."""
    need, room = max(one.device_memory for one in seen), min(one.device_room for one in seen)
    by_cpu = max(
        (
            int(n.get("CPU", 0) / max(1, n.get("GPU", 0)) / found.sweep.execution.cpus_per_host)
            for n in found.nodes
            if n.get("GPU")
        ),
        default=1,
    )
    fits = int(SPARE * room // need)
    line = f"GPU memory: a client's process takes up to {size(need)} of {size(room)}"
    if not fits:
        return [f"{line}: that is too much for this GPU"]
    number = max(1, min(fits, by_cpu, MOST_SHARING))
    limit = "the cores there are beside it" if number < fits else "its memory"
    return [f"{line}: gpus_per_host={share(number)} puts {number} on a GPU, as many as {limit} allow"]


def share(number: int) -> str:
    """1/number as `execution.gpus_per_host` takes it: rounded down, so that they fit."""
    return f"{10_000 // number / 10_000:g}"


def free_memory() -> int:
    """Bytes that new processes may take here: of the machine, and of the container that this is; 0: not known."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            found.append(int(most) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass
    return max(0, min(found, default=0))


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
