"""Ray that is joined: a cluster whose nodes have the packages, but neither fedstill nor the user's files."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from harness import axes, cluster, registry
from harness.config import Execution
from harness.data import card, load
from harness.record import Store
from harness.refusal import Refused
from harness.work import make_setup

ROOT = Path(__file__).resolve().parent.parent
OWN = """
from dataclasses import dataclass
from algorithms.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    share: float = 1.0
"""
SETTINGS = ("rounds=2", "net=mlp", "clients=4", "epochs=1", "mlflow=false")

# Put on a node's path: what is installed there or lies in the current folder is not found, only what Ray unpacked.
BARE = """
import sys
from importlib.machinery import PathFinder

class Sent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("harness", "algorithms"):
            found = PathFinder.find_spec(name, [p for p in sys.path if "runtime_resources" in p])
            if found is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return found
        return None

sys.meta_path.insert(0, Sent)
"""

# A sweep on a cluster of a method whose file is gone once the cluster was joined.
DRIVER = """
import sys
from pathlib import Path
from harness import axes, cluster, sweep
from harness.progress import Display, console

method, results, *settings = sys.argv[1:]
planned, join = axes.run_sweep(method, settings), cluster.start

def start(*known):
    told = join(*known)
    Path(method).unlink(missing_ok=True)
    return told

cluster.start = start
with Display(console(), planned.axes) as display:
    print(sweep.run(planned, Path(results), display))
"""

CONTROL = """
import os, sys, ray
os.chdir("/")
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote
def find():
    import harness

try:
    ray.get(find.remote())
except Exception as error:
    print(str(error).strip().splitlines()[-1])
"""


def of_no_cluster() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "MLFLOW_TRACKING_URI"}


@dataclass
class Elsewhere:
    """A cluster of one node. environment: for those who have its token."""

    address: str
    environment: dict[str, str]

    def python(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """Python in a folder, with a package there that goes by our name, which nobody may take for ours."""
        (folder / "harness").mkdir(parents=True, exist_ok=True)
        (folder / "harness" / "__init__.py").write_text("raise RuntimeError('the wrong harness')")
        (folder / "script.py").write_text(words[0])
        return subprocess.run(
            [sys.executable, "-P", str(folder / "script.py"), *words[1:]],
            cwd=folder,
            env={**self.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("node")
    (folder / "sitecustomize.py").write_text(BARE)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = {**of_no_cluster(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    # A short path: those of Ray's sockets have at most 107 characters.
    place = f"/tmp/fedstill-{os.getpid()}"
    start = "start --head --block --num-cpus=2 --num-gpus=0 --include-dashboard=false --disable-usage-stats"
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *start.split(), f"--port={port}", f"--temp-dir={place}"],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while "--block" not in (folder / "log").read_text() and time.monotonic() < deadline:
            assert head.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield Elsewhere(f"127.0.0.1:{port}", environment)
    finally:
        head.terminate()
        head.wait(60)
        subprocess.run(["rm", "-rf", place], check=False)


@pytest.mark.long
@pytest.mark.cluster
def test_nodes_need_neither_fedstill_nor_the_method_file(elsewhere: Elsewhere, tmp_path: Path, lab: Any) -> None:
    """The nodes can't import harness by themselves; the sweep runs there with the numbers that it has here."""
    control = elsewhere.python(tmp_path / "control", CONTROL, elsewhere.address)
    assert control.stdout.strip().endswith("No module named 'harness'"), control.stderr

    method = tmp_path / "mine.py"
    method.write_text(OWN)
    trial = axes.run_sweep(str(method), SETTINGS).cells[0]
    setup, _ = make_setup(trial, load(card("digits")))
    server = lab.server(setup)
    while not server.done:
        server.step()

    where = f"address={elsewhere.address}"
    done = elsewhere.python(
        tmp_path / "there", DRIVER, str(method), str(tmp_path / "results"), *SETTINGS, "hosts=1", where
    )
    assert done.returncode == 0, done.stderr
    assert not method.exists()
    assert "(execution.address): 1 node with 2 CPUs." in done.stdout
    store = Store(tmp_path / "results", writable=False)
    (row,) = store.rows("trials")
    assert (row["status"], row["method"], row["reason"]) == ("done", "mine", None)
    seen = [(r["round"], r["accuracy"], r["loss"]) for r in store.rows("rounds")]
    assert seen == [(r["round"], r["accuracy"], r["loss"]) for r in server.rounds]


@pytest.mark.long
@pytest.mark.cluster
def test_the_environment_names_the_cluster_where_the_settings_do_not(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """RAY_ADDRESS is used, and said; what the cluster has no room for is refused with what it has."""
    command = [sys.executable, "-P", "-m", "harness.cli", "run", "fedavg", *SETTINGS, "hosts=3"]
    environment = {**elsewhere.environment, "RAY_ADDRESS": elsewhere.address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "fedstill: a trial needs 3 CPUs (3 hosts and a server), but there are 2: lower execution.hosts or the "
        "cpus_per_host and cpus_per_server\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unjoined(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has no Ray yet."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return monkeypatch


def test_which_cluster(unjoined: pytest.MonkeyPatch) -> None:
    assert cluster.address(Execution()) == ""
    assert cluster.address(Execution(address="auto")) == "auto"
    unjoined.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.address(Execution()) == "10.0.0.1:6379"
    assert cluster.address(Execution(address="10.0.0.2:6379")) == "10.0.0.2:6379"
    assert cluster.address(Execution(address="local")) == ""


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "RAY_ADDRESS = 'ray://127.0.0.1:10001': an address is HOST:PORT or auto"),
        ("redis://:hush@127.0.0.1:1", "'redis://***@127.0.0.1:1'"),
        ("ann:hush@127.0.0.1:1", "'***@127.0.0.1:1'"),
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(
    unjoined: pytest.MonkeyPatch, address: str, said: str
) -> None:
    unjoined.setenv("RAY_ADDRESS", address)
    unjoined.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(Refused) as caught:
        cluster.start(Execution())
    assert said in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_missing_token_is_named(unjoined: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Ray says it many times over, by itself, on the process's stderr, and then raises something else."""

    def init(*_: object, **__: object) -> None:
        os.write(2, b"[W 1 1] gcs_client.cc:210: Unauthenticated: RPC error: InvalidAuthToken\n" * 20)
        raise ConnectionError("Failed to connect to Ray cluster")

    unjoined.setattr(ray, "init", init)
    unjoined.setattr(cluster, "_knock", lambda address: None)
    with pytest.raises(Refused, match="the token is missing or is not the cluster's: set RAY_AUTH_MODE=token"):
        cluster.start(Execution(address="10.0.0.1:6379"))
    assert capfd.readouterr().err == ""


def test_what_travels_runs_alone(tmp_path: Path) -> None:
    """The folder that goes to the nodes is all that a fresh Python needs to know a method whose file is elsewhere."""
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    (cell,) = axes.run_sweep(str(path)).cells
    path.unlink()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from harness import cards, registry\n"
        "registry.pin(*sys.argv[2:]); print(registry.make(sys.argv[2], {'share': 0.5}))\n"
        "print(registry.names(), cards.names('datasets'), cards.names('sweeps'), registry.__file__)"
    )
    with cluster._staged([cell]) as folder:
        command = [sys.executable, "-I", "-c", code, folder, cell.method, cell.source]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert not list(Path(folder).rglob("*.pyc")) or done.returncode == 0
    assert done.returncode == 0, done.stderr
    assert "Mine(share=0.5)" in done.stdout
    assert "'kdia'" in done.stdout and "'digits'" in done.stdout and "'quickstart'" in done.stdout
    assert done.stdout.strip().endswith(f"{folder}/harness/registry.py")
    assert not Path(folder).exists()


def test_a_method_file_that_changed_is_not_taken_for_the_one_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process than the one that read it before; the text that came along is checked as well."""
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    (cell,) = axes.run_sweep(str(path)).cells
    monkeypatch.setattr(registry, "_texts", {})
    assert registry.load(cell.method).__name__ == "Mine"
    path.write_text(OWN + "# changed\n")
    monkeypatch.setattr(registry, "_texts", {})
    with pytest.raises(Refused, match="content changed"):
        registry.load(cell.method)
    monkeypatch.setattr(registry, "SENT", tmp_path)
    (tmp_path / f"{cell.source}.py").write_text(OWN + "# forged\n")
    with pytest.raises(Refused, match="content changed"):
        registry.load(cell.method)


def test_a_sweep_ends_when_its_nodes_are_gone(unjoined: pytest.MonkeyPatch) -> None:
    """Two nodes of 2 cores; a trial takes 3. One is lost for a while, then for good; nothing is running."""
    now, nodes = [0.0], [{"Alive": True, "Resources": {"CPU": 2.0}} for _ in range(2)]
    unjoined.setattr(ray, "is_initialized", lambda: True)
    unjoined.setattr(ray, "nodes", lambda: nodes)
    unjoined.setattr(cluster.time, "monotonic", lambda: now[0])
    how = Execution(hosts=3)
    assert cluster.placeable(how) is None
    lookout = cluster.Lookout(how)

    def until(seconds: float, running: bool = False) -> str | None:
        while now[0] < seconds:
            now[0] += 1
            if why := lookout(running):
                return why
        return None

    assert until(1000) is None, "an idle wait for room that is there is none"
    nodes[1]["Alive"] = False
    assert cluster.placeable(how) == (
        "a trial needs 3 CPUs (3 hosts and a server), but there are 2: lower execution.hosts or the cpus_per_host "
        "and cpus_per_server"
    )
    assert until(1100) is None, "it may come back"
    nodes[1]["Alive"] = True
    assert until(2000) is None
    nodes[1]["Alive"] = False
    assert until(3000, running=True) is None, "what runs may end"
    why = until(4000)
    assert why is not None and why.startswith("for 120 s there was no room for any trial: a trial needs 3 CPUs")
    assert 3100 < now[0] < 3140


def test_no_reference_goes_while_ray_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a collection of garbage takes away is gone before, and no thread collects meanwhile."""

    class Knot:
        pass

    knot = Knot()
    knot.itself = knot  # type: ignore[attr-defined]
    there, seen = weakref.ref(knot), []
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append((there() is None, gc.isenabled())))
    gc.disable()  # or it might be collected by chance
    del knot
    assert there() is not None
    cluster.stop()
    assert seen == [(True, False)] and gc.isenabled()
