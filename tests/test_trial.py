"""Laws 3, 4 and 7 on a real Ray: who trains, when and how often changes no number; a failure is a row."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from harness import config, sweep
from harness.axes import load_sweep
from harness.data import card, load
from harness.pool import RayPool
from harness.record import Store
from harness.server import Server
from harness.work import Setup, WorkFailed, make_setup

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]
METHODS = ("fedavg", "scaffold", "kdia")
CLOCKS = {"seconds", "server_seconds", "started", "peak_memory_bytes", "hosts"}  # all that may differ
CARD = """
methods = {methods}
[base]
clients = 6
participation = 0.5
rounds = 4
net = "mlp"
holdout = {{ validation = 0.2 }}
local = {{ epochs = 1, batch = 32, lr = 0.1 }}
evaluation = {{ batch = 100 }}
[execution]
mlflow = false
parallel = 1
"""
SHORT = ("generator_epochs=1", "generator_iterations=2")  # for KDIA
Rows = list[dict[str, Any]]
Tables = dict[str, Rows]


def run(folder: Path, watcher: Any, methods: Sequence[object], *overrides: str) -> Tables:
    """The tables of a small sweep, one trial after the other, without what the clock says."""
    path = folder / "small.toml"
    path.write_text(CARD.format(methods=[str(method) for method in methods]))
    sweep.run(load_sweep(path, overrides), folder / "results", watcher)
    store = Store(folder / "results", writable=False)
    return {table: clockless(store.rows(table)) for table in ("trials", "rounds", "clients")}


def clockless(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def finished(server: Server) -> tuple[Rows, Rows]:
    """What a server books when it runs to its end."""
    while not server.done:
        server.step()
    return clockless(server.rounds), clockless(server.clients)


def method_file(folder: Path, name: str, hook: str, line: str) -> Path:
    """A method of one's own: FedAvg, with a line more at the beginning of a hook."""
    takes = {"merge": "state, updates, server", "loss": "net, p, batch, inbox, memory"}[hook]
    path = folder / f"{name}.py"
    path.write_text(
        "import os, signal, time\nfrom dataclasses import dataclass\nfrom algorithms.fedavg import FedAvg\n\n"
        f"@dataclass(frozen=True)\nclass Mine(FedAvg):\n    def {hook}(self, {takes}):\n        {line}\n"
        f"        return super().{hook}({takes})\n"
    )
    return path


@dataclass
class Inline:
    """A sweep of the three methods, one after the other, in one server that trains itself."""

    watcher: Any
    tables: Tables = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)  # of the server, by report

    def of(self, table: str, method: str) -> Rows:
        (row,) = (row for row in self.tables["trials"] if row["method"] == method)
        return [r for r in self.tables[table] if r["trial_id"] == row["trial_id"]]


@pytest.fixture(scope="module")
def inline(cluster: None, tmp_path_factory: pytest.TempPathFactory, diary_of: Callable[[], Any]) -> Inline:
    found = Inline(diary_of())
    told = sweep.Scribe.on_trial_result

    def listen(scribe: Any, iteration: int, trials: Any, trial: Any, result: Any, **more: Any) -> None:
        found.pids.append(result["pid"])
        told(scribe, iteration, trials, trial, result, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.Scribe, "on_trial_result", listen)
        found.tables = run(tmp_path_factory.mktemp("inline"), found.watcher, METHODS, "hosts=0", *SHORT)
    return found


@pytest.mark.parametrize(
    "hosts", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)]
)
def test_the_number_of_hosts_changes_no_number(tmp_path: Path, inline: Inline, diary: Any, hosts: int) -> None:
    """Nor does the order of the trials, which is turned round here; their hosts are reused, too."""
    tables = run(tmp_path, diary, METHODS[::-1], f"hosts={hosts}", *SHORT)
    assert [row["status"] for row in tables["trials"]] == ["done"] * 3
    assert len(tables["rounds"]) == (1 + 1 + 2) * 4
    assert len(tables["clients"]) == 3 * 4 * 3
    assert tables == inline.tables


def test_reusing_an_actor_changes_nothing(inline: Inline, lab: Any) -> None:
    """One process ran all three trials; a fresh server here, with one of them as its first, books the same rows."""
    assert len(set(inline.pids)) == 1
    for method in METHODS:
        (row,) = inline.of("trials", method)
        trial = config.Trial.model_validate_json(row["config"])
        setup, _ = make_setup(trial, load(card(trial.dataset)))
        rounds, clients = finished(lab.server(setup))
        assert_within(inline.of("rounds", method), sorted(rounds, key=lambda r: (r["round"], r["role"])))
        assert_within(inline.of("clients", method), sorted(clients, key=lambda r: (r["round"], r["client"])))


def assert_within(booked: Rows, seen: Rows) -> None:
    """Every number seen is booked."""
    assert len(booked) == len(seen) > 0
    for there, here in zip(booked, seen, strict=True):
        plain = {key: value for key, value in here.items() if not isinstance(value, dict)}
        assert plain.items() >= {"round": there["round"]}.items()
        assert {key: there[key] for key in plain} == plain


def test_a_trial_reports_its_primary_model(inline: Inline) -> None:
    """Of KDIA's two models the student; on its way and at its end."""
    student = [row["accuracy"] for row in inline.of("rounds", "kdia") if row["role"] == "student"]
    told = [(at, accuracy) for method, at, accuracy in inline.watcher.rounds if method == "kdia"]
    assert told[-1] == (4, student[-1])
    assert inline.watcher.started == list(METHODS)
    assert [row["method"] for row in inline.watcher.ended] == list(METHODS)


@pytest.mark.long
def test_a_failure_is_a_row_and_the_others_go_on(tmp_path: Path, inline: Inline, diary: Any) -> None:
    """One raises, one diverges, one kills its own server, each in its second round; fedavg comes last."""
    files = [
        method_file(tmp_path, "raises", "merge", "if server.round: raise ValueError('bad\\nluck')"),
        method_file(tmp_path, "diverges", "loss", "if inbox['round']: batch.x.fill_(float('nan'))"),
        method_file(tmp_path, "crashes", "merge", "if server.round: os.kill(os.getpid(), signal.SIGKILL)"),
    ]
    tables = run(tmp_path, diary, [*files, "fedavg"], "hosts=0")
    found = {row["method"]: row for row in tables["trials"]}
    names = ["raises", "diverges", "crashes"]
    assert {name: row["status"] for name, row in found.items()} == {
        **dict.fromkeys(names, "failed"),
        "fedavg": "done",
    }
    assert [row["method"] for row in diary.ended] == [*names, "fedavg"]
    assert found["raises"]["reason"] == "ValueError: bad luck"
    assert found["diverges"]["reason"].startswith("diverged: the update of client")
    assert found["crashes"]["reason"].startswith("crashed: ")
    assert "\n" not in found["crashes"]["reason"]
    assert [found[name]["rounds_done"] for name in names[:2]] == [1, 1]
    own = [row for row in tables["rounds"] if row["trial_id"] == found["fedavg"]["trial_id"]]
    assert own == inline.of("rounds", "fedavg")


class Watched(RayPool):
    """Two hosts that live as long as the module; `before` is called with the number of each visit."""

    before: Callable[[int], None] = staticmethod(lambda visit: None)  # type: ignore[assignment]
    came = 0

    def visit(self, *order: Any) -> Any:
        self.before(self.came)
        self.came += 1
        return super().visit(*order)

    def kill(self, at: int) -> None:
        """SIGKILL, whatever the host is doing."""
        os.kill(self.pids[self.hosts[at]], signal.SIGKILL)

    def note_pids(self) -> None:
        self.pids = {host: ray.get(host.__ray_call__.remote(lambda _: os.getpid())) for host in self.hosts}

    def finished(self, setup: Setup) -> tuple[Rows, Rows]:
        """What a server in this process books that has its hosts here."""
        self.load(setup, ray.put(setup.arrays))
        return finished(Server(setup, self))


@pytest.fixture(scope="module")
def both(cluster: None) -> Iterator[Watched]:
    made = Watched(config.Execution(hosts=2), "cpu")
    yield made
    for host in made.hosts:
        ray.kill(host)


def test_the_order_of_completion_changes_no_number(tmp_path: Path, lab: Any, both: Watched) -> None:
    """The largest client is visited first and sleeps, so that another one, sent later, overtakes it each round."""
    sizes = (3, 4, 8, 5, 2)
    sleepy = method_file(tmp_path, "sleepy", "loss", "time.sleep(0.3 if len(batch.x) == 8 else 0)")
    setup = lab.setup(str(sleepy), sizes=sizes, rounds=2)
    both.load(setup, ray.put(setup.arrays))
    server = Server(setup, both)
    found = finished(server)
    slow, overtaking = ([row["seconds"] for row in server.clients if row["client"] == k] for k in (2, 3))
    assert min(slow) > 0.3 > max(overtaking)
    assert found == finished(lab.server(lab.setup("fedavg", sizes=sizes, rounds=2)))


def test_a_killed_host_changes_no_number(lab: Any, both: Watched) -> None:
    """One dies with work under way in round 0, both in round 2. Scaffold's clients have memories to lose."""
    setup = lab.setup("scaffold", sizes=(40, 60, 30, 50, 20, 10), rounds=3, local={"epochs": 3})
    born = list(both.hosts)

    def murder(visit: int) -> None:
        if visit - first in (0, 12):  # rounds 0 and 2 begin
            both.note_pids()
        for at in {3: [0], 15: [0, 1]}.get(visit - first, []):
            both.kill(at)

    first = both.came
    both.before = murder  # type: ignore[method-assign]
    try:
        found = both.finished(setup)
    finally:
        del both.before
    assert both.came - first == 18
    assert not set(both.hosts) & set(born), "both hosts were replaced"
    assert found == finished(lab.server(setup))


def test_what_a_failed_trial_left_behind_does_not_fail_the_next(tmp_path: Path, lab: Any, both: Watched) -> None:
    """Every visit of the first trial raises; those under way when it ends are not taken for the second's.

    And a host that died when nothing was under way is replaced.
    """
    bad = lab.setup(str(method_file(tmp_path, "raising", "loss", "raise ValueError('no')")), sizes=(3, 4, 8, 5, 2))
    with pytest.raises(WorkFailed, match="ValueError: no"):
        both.finished(bad)
    both.note_pids()
    both.kill(1)
    good = lab.setup("fedavg", sizes=(3, 4, 8, 5, 2))
    assert both.finished(good) == finished(lab.server(good))
