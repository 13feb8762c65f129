"""`fedstill plan`: what it counts is what the sweep then does, and it leaves everything as it is."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import axes, checkpoint, cli, cluster, lock, outlook, preview, stacks, sweep
from harness.config import Execution, resolve, trial_id
from harness.costs import HOP_S, Course, cost
from harness.data import card, load
from harness.probes import Subject
from harness.record import Store
from harness.refusal import Refused
from harness.server import Server
from harness.trees import nbytes, stream
from harness.tryout import BriefPool, Round, Sample, Task, Visited, samples
from harness.work import Stages, make_setup

# Two models and two kinds of bytes, evaluation every other round and in the last, clients that come and go.
CARD = """
methods = ["fedavg", "scaffold", "kdia"]
seeds = 2
[base]
clients = 6
participation = 0.5
rounds = 5
net = "mlp"
evaluation = { every = 2 }
local = { epochs = 1, batch = 32, lr = 0.1 }
availability = { pattern = "cyclic", period = 3, dropout = 0.3 }
[hyper.kdia]
generator_epochs = 1
generator_iterations = 2
"""
PLAIN = """
methods = ["fedavg", "scaffold"]
seeds = 2
[base]
clients = 4
rounds = 3
net = "mlp"
local = { epochs = 1, batch = 32, lr = 0.1 }
"""


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything below a folder, with its time."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def planned(folder: Path, text: str = PLAIN, *settings: str) -> axes.Sweep:
    (folder / "tiny.toml").write_text(text)
    return axes.load_sweep(folder / "tiny.toml", ["mlflow=false", *settings])


def counted(found: outlook.Outlook) -> Counter[str]:
    return sum((kind.rows for kind in found.kinds), Counter())


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cores and no GPU, on which nothing may start Ray."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "machine", lambda: {"CPU": 2.0, "GPU": 0.0})
    monkeypatch.setattr(cluster, "supply", lambda: [cluster.machine()])
    monkeypatch.setattr(cluster, "start", started)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.long
def test_the_rows_are_those_that_the_sweep_writes(cluster: None, tmp_path: Path, diary: Any) -> None:
    """With cohorts that differ from round to round and visits that are lost; then nothing is left, nothing moved."""
    card, results = planned(tmp_path, CARD), tmp_path / "results"
    before = outlook.look(card, results, trying=False)
    assert (before.every, before.done, before.to_do, before.exact, before.bound) == (6, 0, 6, True, False)
    assert not results.exists()
    sweep.run(card, results, diary)
    store = Store(results, writable=False)
    assert counted(before) == {table: len(store.rows(table)) for table in ("trials", "rounds", "clients")}
    content = files(results)
    after = outlook.look(card, results)
    assert (after.done, after.to_do, after.kinds, after.seconds) == (6, 0, [], None)
    assert files(results) == content


@pytest.mark.usefixtures("alone")
def test_it_takes_up_what_is_there(tmp_path: Path) -> None:
    """Of four cells one is done, one rests on a checkpoint after 2 of 3 rounds, and the row of one is damaged."""
    card, results = planned(tmp_path), tmp_path / "results"
    store = Store(results)
    done, resting, hurt, _ = card.cells
    for cell in (done, hurt):
        row = {"trial_id": trial_id(cell), "status": "done", "sweep": "tiny", "reason": None}
        store.commit(row | {"config": cell.model_dump_json()}, [], [])
    file = results / "trials" / f"{trial_id(hurt)}.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    made_by = sweep.versions() | {"device": "x86_64", "threads": "1"}
    content = checkpoint.pack({"server": {"round": 2}, "summary": {}, "made_by": made_by})
    checkpoint.Shelf(results).put(trial_id(resting), 2, content)
    lock.take(results)  # a sweep: it has put aside what is damaged, so here it would be refused
    try:
        with pytest.raises(Refused, match="is damaged"):
            outlook.look(card, results, trying=False)
        with pytest.raises(Refused, match="in use by process"):
            lock.take(results)
    finally:
        lock.give_back(results)
    before = files(results)
    found = outlook.look(card, results, trying=False)
    assert (found.done, found.to_do, found.resting) == (1, 3, 1)
    assert sorted(rounds for kind in found.kinds for rounds in kind.rounds) == [1, 3, 3]
    assert any(f"{file} is damaged" in note for note in found.notes)
    assert files(results) == before


@pytest.mark.usefixtures("alone")
def test_a_sweep_that_runs_is_said(tmp_path: Path) -> None:
    card, results = planned(tmp_path), tmp_path / "results"
    Store(results)
    assert lock.holder(results) == ""
    lock.take(results)
    try:
        assert any("A sweep runs there now (process" in n for n in outlook.look(card, results, trying=False).notes)
    finally:
        lock.give_back(results)
    assert lock.holder(results) == ""


@pytest.mark.usefixtures("alone")
def test_a_search_is_counted_in_draws_and_finals(tmp_path: Path) -> None:
    """4 methods: 8 draws and 3 finals each, of 30 rounds. Stopped early there may be fewer rounds."""
    found = outlook.look(axes.load_sweep("tune"), tmp_path / "results", trying=False)
    assert (found.every, found.to_do, found.bound) == (4 * (8 + 3), 44, False)
    assert counted(found)["trials"] == 44
    asha = axes.load_sweep("tune", ["search.scheduler=asha"])
    assert outlook.look(asha, tmp_path / "results", trying=False).bound


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fedstill", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "setting",
    [
        "hosts=8",
        "execution.cpus_per_host=3 hosts=1",
        "gpus_per_host=0.5",
        "clients=100 min_samples=500",
        "device=cuda",
    ],
)
def test_it_refuses_what_the_sweep_refuses(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = told(monkeypatch, capsys, "plan", "quickstart", *setting.split())
    assert (code, out) == (2, "")
    assert told(monkeypatch, capsys, "sweep", "quickstart", *setting.split()) == (2, "", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two methods, two seeds, 3 rounds of 4 clients: 4 trials, 12 rows of rounds, 48 of clients."""
    monkeypatch.chdir(tmp_path)
    planned(tmp_path)
    code, out, err = told(monkeypatch, capsys, "plan", "tiny.toml")
    assert (code, err) == (0, "")
    assert "tiny: 4 trials, 0 done, 4 to do" in out
    assert "A trial takes 1 CPUs for its server. Room: 1 node with 2 CPUs (this machine), 2 at once." in out
    assert "Rows to write: 4 in trials, 12 in rounds, 48 in clients" in out
    assert "Time: about" in out and "Memory: a process has up to" in out
    assert "batch 32" in out and re.search(r"together=\d+ trains [\d.]+ times as fast", out)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.toml"]
    code, out, _ = told(monkeypatch, capsys, "plan", "tiny.toml", "--no-probe", "seeds=1")
    assert code == 0 and "Rows to write: 2 in trials, 6 in rounds, 24 in clients" in out and "Time" not in out


def test_bytes_are_those_that_travel() -> None:
    """Three tried rounds of seven tell the traffic of all: the same tree goes down and up in each visit.

    fedavg's tree is the net's, so 7 rounds x 4 clients x its bytes.
    """
    cell = resolve({"method": "fedavg", "net": "mlp", "clients": 4, "rounds": 7, "local": {"epochs": 1}})
    arrays = load(card("digits"))
    setup, _ = make_setup(cell, arrays)
    *_, seen = samples(Task(cell, 0.01), {"digits": arrays}, {})
    way = outlook.course(setup)
    assert (way.came, way.clients, way.share) == (28, 4, 1)
    found = cost(cell, way, seen, {"trials": 1, "rounds": 7, "clients": 28}, hosts=0)
    size = nbytes(Stages(setup).at(0).world.net("mlp").init(stream("any")))
    assert (found.up, found.down) == (7 * 4 * size, 7 * 4 * size)
    assert found.seconds > 0 and found.disk > 20_000 and seen.memory > 0


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedgen", "codist"])
def test_a_round_is_cut_short_and_still_a_round(method: str) -> None:
    """Without time for visits one in each role is trained, and the others answer as that one did."""
    pool = BriefPool()
    setup = Subject(method, {}).setup()
    pool.load(setup)
    pool.allowance = 0.0
    server = Server(setup, pool)
    server.step()
    server.flush()
    assert len(pool.seen) == len(server.roles) < len(server.clients)
    assert len({(row["client"], row["role"]) for row in server.clients}) == len(server.clients)


def test_visits_together_are_timed_together() -> None:
    """Four visits in two groups of two: each of a group took half of its time, and all rows are counted."""
    pool = BriefPool()
    setup = Subject("fedavg", {}).setup()
    setup = replace(setup, trial=setup.trial.model_copy(update={"together": 2}))
    pool.load(setup)
    server = Server(setup, pool)
    server.step()
    server.flush()
    visits = [row["client"] for row in server.clients]
    assert len(pool.seen) == len(visits) > 2
    assert pool.seen[0].seconds == pool.seen[1].seconds != pool.seen[-1].seconds
    assert sum(one.load for one in pool.seen) == sum(len(setup.split.clients[k]) for k in visits)


def test_what_is_quicker_is_proposed() -> None:
    """2 s for 100 rows one by one; 0.5 s together is 4 times as fast, 2.5 s is 0.8 times as fast. A first round
    that was slower does not count.
    """

    def sample(seconds: float) -> Sample:
        def ran(number: int, took: float) -> Round:
            return Round(number, number == 0, True, 0.0, (Visited("global", 100.0, took),), 1, 1, 1, 0, 0)

        return Sample(0.0, (ran(0, 9 * seconds), ran(1, seconds)))

    cell = resolve({"method": "fedavg", "net": "mlp", "clients": 4, "together": 4, "local": {"batch": 10}})
    assert stacks.told([(cell, cell)], [sample(2.0), sample(0.5)])[0].startswith(
        "fedavg on mlp, batch 10: together=4 trains 4 times as fast."
    )
    slower = "One by one is right for fedavg on mlp, batch 10: together=4 trains 0.8 times as fast."
    assert stacks.told([(cell, cell)], [sample(2.0), sample(2.5)]) == [slower]
    assert stacks.told([(cell, cell)], [sample(2.0), None]) == []


def test_a_cost_is_what_its_rounds_say() -> None:
    """A warm sample: 10 s for 100 rows, .5 s beside in a round with evaluation, .1 s in one without.

    A trial of 4 rounds, evaluated in the 2nd and 4th, with two visits of 20 and 40 rows in each: 4 * 60 * .1 + 2 * .5
    + 2 * .1 + 3 s to set up = 28.2 s. On two hosts a round's visits take as long as the longer one, 4 s, and each has
    to travel: 4 * (4 + 2 * HOP) + 1.2 + 3. The first round sends 5 bytes up a visit, the others 2: 2*5 + 6*2 = 22.
    """
    cell = resolve(
        {"method": "fedavg", "clients": 2, "rounds": 4, "evaluation": {"every": 2}, "local": {"epochs": 1}}
    )
    visits = (Visited("global", 100, 10.0),)
    rounds = (
        Round(0, True, False, 9.0, visits * 9, 1, 2, 2, 10, 20),
        Round(1, False, True, 0.5, visits, 1, 2, 2, 4, 8),
        Round(2, False, False, 0.1, visits, 1, 2, 2, 4, 8),
    )
    sample = Sample(3.0, rounds, 7, 100, 10.0, {"trials": 1000.0, "rounds": 10.0, "clients": 1.0})
    way = Course([[("global", 20), ("global", 40)]] * 4, 1.0, 2)
    rows = {"trials": 1, "rounds": 4, "clients": 8}
    found = cost(cell, way, sample, rows, hosts=0)
    assert found.seconds == pytest.approx(28.2)
    assert (found.up, found.down) == (22, 2 * 10 + 6 * 4 + 2 * 7)
    assert (found.disk, found.held) == (1000 + 40 + 8, 2 * (100 + 2 * 10))
    assert cost(cell, way, sample, rows, hosts=2).seconds == pytest.approx(4 * (4 + 2 * HOP_S) + 4.2)


@pytest.mark.parametrize("number", [*range(1, 65)])
def test_a_share_of_a_gpu_is_one_that_can_be_set(number: int) -> None:
    share = float(preview.share(number))
    assert Execution(gpus_per_host=share).gpus_per_host * number <= 1


def test_a_share_follows_from_memory_and_cores() -> None:
    """A client takes 3 of 24 GB: 7 fit into 90 % of it; with 4 cores beside the GPU only 4."""
    seen = [Sample(0.0, device_memory=3 * 10**9, device_room=24 * 10**9)]

    def found(cpus: float) -> Any:
        return SimpleNamespace(sweep=SimpleNamespace(execution=Execution()), nodes=[{"CPU": cpus, "GPU": 1.0}])

    assert "gpus_per_host=0.1428 puts 7 on a GPU, as many as its memory allow" in preview.shares(seen, found(16))[0]
    assert "gpus_per_host=0.25 puts 4 on a GPU, as many as the cores" in preview.shares(seen, found(4))[0]
    big = [Sample(0.0, device_memory=3 * 10**10, device_room=24 * 10**9)]
    assert "too much for this GPU" in preview.shares(big, found(4))[0]
