"""Every fault that a sweep has to survive, by its number; what is tried elsewhere is named in `ELSEWHERE`.

Each time: one row for every cell, with the values of a sweep left alone, or with the reason.
"""

from __future__ import annotations

import ast
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harness import config, durable, sweep, trial
from harness.axes import load_sweep
from harness.checkpoint import Shelf, pack
from harness.record import Store
from harness.refusal import Refused
from harness.tracking import sync
from harness.verify import mlflow_agrees

HERE = Path(__file__).parent
ELSEWHERE = {
    "F1 a host killed": "test_faults_in_rounds.py::test_hosts_that_are_killed_change_no_number",
    "F2 every host killed": "test_faults_in_rounds.py::test_hosts_that_are_killed_change_no_number",
    "F4 the driver killed": "test_resume.py::test_a_driver_that_is_killed_goes_on_from_the_checkpoint",
    "F6 signals": "test_sweep.py::test_ctrl_c_keeps_what_has_ended_and_the_same_command_goes_on",
    "F8 a read-only folder": "test_record.py::test_folders_that_can_not_serve_are_refused",
    "F11 MLflow down": "test_tracking.py::test_a_dead_server_is_a_message",
    "F11 MLflow slow": "test_tracking.py::test_a_slow_server_holds_nothing_up",
    "F10 a torn table, told": "test_verify.py::test_a_torn_file_is_found_and_the_others_are_checked_all_the_same",
    "F11 MLflow's database broken": "test_tracking.py::test_a_lost_or_broken_database_is_rebuilt_from_the_tables",
    "F12 an update that is not finite": "test_server.py::test_an_update_that_is_not_finite_can_be_skipped",
    "F13 a model that is not finite": "test_server.py::test_a_model_that_is_not_finite_ends_the_trial",
    "F14 clients of no row": "test_server.py::test_clients_without_rows_are_never_picked",
    "F14 clients of one row": "test_conformance.py::test_every_method_bears_a_client_of_one_row",
    "F14 clients of one class": "test_server.py::test_a_client_of_one_class_is_one_of_many",
    "F15 empty rounds": "test_server.py::test_too_many_empty_rounds_end_the_trial",
    "F16 a host without memory": "test_pool_faults.py::test_a_host_ended_by_the_memory_monitor_is_a_shortage",
    "F16 a trial without memory": "test_desk.py::test_a_crash_is_tried_again_for_want_of_memory_with_half_as_many",
    "F17 a GPU without memory": "test_pool_faults.py::test_a_shortage_of_memory_halves_the_hosts_at_work",
    "F18 a visit that hangs": "test_pool_faults.py::test_a_visit_that_hangs_is_given_again_once",
    "F19 out of order": "test_trial.py::test_the_order_of_completion_changes_no_number",
    "F20 two runs of one folder": "test_resume.py::test_two_runs_of_one_folder_are_kept_apart",
    "F22 a thousand rounds": "test_memory.py::test_f22_a_thousand_rounds_leave_nothing_behind",
    "F8 a folder that vanishes": "test_faults_in_rounds.py::test_f8_a_folder_that_vanishes_ends_the_sweep",
    "F12 in a sweep": "test_faults_in_rounds.py::test_f12_an_update_that_is_not_finite_fails_the_trial",
    "F13 in a sweep": "test_faults_in_rounds.py::test_f13_a_model_that_is_not_finite_is_a_result",
    "F14 in a sweep": "test_faults_in_rounds.py::test_f14_clients_of_a_few_rows_and_of_one_class",
    "F15 in a sweep": "test_faults_in_rounds.py::test_f15_rounds_from_which_nothing_comes_back_fail_the_trial",
    "F16 memory": "test_faults_in_rounds.py::test_f16_rays_own_memory_monitor_ends_a_host_and_the_sweep_goes_on",
    "F16, F17 in a sweep": "test_faults_in_rounds.py::test_a_host_short_of_memory_is_spared_and_no_number_changes",
    "F18 in a sweep": "test_faults_in_rounds.py::test_f18_a_visit_that_hangs_is_given_to_another_host",
    "F19 in a sweep": "test_faults_in_rounds.py::test_f19_stragglers_change_no_number",
    "F24 what clients say": "test_faults_in_rounds.py::test_f15_rounds_from_which_nothing_comes_back_fail_the_trial",
    "D1 twice the same": "test_trial.py::test_reusing_an_actor_changes_nothing",
    "D2 one, two or four hosts": "test_trial.py::test_the_number_of_hosts_changes_no_number",
    "D3 stopped after any round": "test_resume.py::test_stop_and_go_on_after_any_round",
    "D4 the order of completion": "test_trial.py::test_the_order_of_completion_changes_no_number",
    "D5 MLflow": "test_faults.py::test_d5_mlflow_moves_no_number",
    "D5 evaluations": "test_faults.py::test_d5_an_evaluation_moves_no_number_of_the_training",
}
CLOCKS = {"seconds", "server_seconds", "started", "peak_memory_bytes", "hosts", "time", "sweep", "commit", "clean"}
CARD = """
methods = {methods}
seeds = {seeds}
[base]
clients = 6
participation = 0.5
rounds = 12
net = "mlp"
local = {{ epochs = 1, batch = 32, lr = 0.1 }}
[execution]
mlflow = false
parallel = 1
checkpoint_every = 2
"""
cluster = pytest.mark.cluster


def card(folder: Path, methods: list[str] | None = None, seeds: int = 1, **base: Any) -> Path:
    path = folder / "small.toml"
    text = CARD.format(methods=methods or ["scaffold"], seeds=seeds)
    for key, value in base.items():
        text = text.replace("[execution]", f"{key} = {value!r}\n[execution]")
    path.write_text(text)
    return path


def numbers(results: Path) -> dict[str, list[dict[str, Any]]]:
    store = Store(results, writable=False)
    return {
        table: [{k: v for k, v in row.items() if k not in CLOCKS} for row in store.rows(table)]
        for table in ("trials", "rounds", "clients")
    }


def events(results: Path) -> list[tuple[str, str]]:
    return [(row["trial_id"], row["kind"]) for row in Store(results, writable=False).rows("events")]


@pytest.fixture(scope="module")
def alone(cluster: None, tmp_path_factory: pytest.TempPathFactory, diary_of: Any) -> Path:
    """The results of the small card, left alone: SCAFFOLD, with memories on the clients, on two seeds."""
    folder = tmp_path_factory.mktemp("alone")
    sweep.run(load_sweep(card(folder, seeds=2)), folder / "results", diary_of())
    return folder / "results"


def of_seed(tables: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, list[dict[str, Any]]]:
    names = {row["trial_id"] for row in tables["trials"] if row["seed"] == seed}
    return {table: [row for row in rows if row["trial_id"] in names] for table, rows in tables.items()}


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_what_is_tried_elsewhere_is_there(fault: str) -> None:
    file, _, name = ELSEWHERE[fault].partition("::")
    tree = ast.parse((HERE / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


KILLER = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from algorithms.scaffold import Scaffold

@dataclass(frozen=True)
class Mine(Scaffold):
    def merge(self, state, updates, server):
        mark = Path({mark!r})
        if server.round == 7 and not mark.exists():
            mark.touch()
            {what}
        return super().merge(state, updates, server)
"""


def killer(folder: Path, what: str) -> str:
    path = folder / "scaffold.py"
    path.write_text(KILLER.format(mark=str(folder / "mark"), what=what))
    return str(path)


def same_but_named(left: dict[str, list[dict[str, Any]]], right: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether the numbers are equal; the method's file makes another id, config and command."""
    own = ("trial_id", "config", "config_hash", "command")
    plain = [
        {t: [{k: v for k, v in row.items() if k not in own} for row in rows] for t, rows in tables.items()}
        for tables in (left, right)
    ]
    return plain[0] == plain[1]


@pytest.mark.long
@cluster
def test_f3_a_server_that_is_killed_goes_on_from_its_checkpoint_in_the_same_run(
    tmp_path: Path, alone: Path, diary: Any
) -> None:
    """SIGKILL in round 7, once. The checkpoint is that of round 6; the others go on meanwhile."""
    own = killer(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    outcome = sweep.run(load_sweep(card(tmp_path, [own], seeds=1)), tmp_path / "r", diary)
    assert (outcome.done, outcome.failed) == (1, 0)
    assert diary.started == [own, own] and diary.rested == [own]
    assert [at for _, at, _ in diary.rounds].count(12) == 1
    assert same_but_named(numbers(tmp_path / "r"), of_seed(numbers(alone), 0))
    assert [kind for _, kind in events(tmp_path / "r")] == ["trial_lost", "trial_resumed"]
    (resumed,) = [r for r in Store(tmp_path / "r").rows("events") if r["kind"] == "trial_resumed"]
    assert resumed["detail"] == "from round 6"


@pytest.mark.long
@cluster
def test_f3_a_server_that_always_dies_is_a_row(tmp_path: Path, alone: Path, diary: Any) -> None:
    own = killer(tmp_path, "mark.unlink(); os.kill(os.getpid(), signal.SIGKILL)")
    outcome = sweep.run(load_sweep(card(tmp_path, [own], seeds=1), ["retries=2"]), tmp_path / "r", diary)
    assert (outcome.done, outcome.failed, len(diary.started)) == (0, 1, 3)
    (row,) = Store(tmp_path / "r").rows("trials")
    assert row["status"] == "failed" and row["reason"].startswith("crashed: ")
    assert [kind for _, kind in events(tmp_path / "r")].count("trial_lost") == 3


@cluster
@pytest.mark.long
def test_f4_ten_kills_at_random_moments(tmp_path: Path) -> None:
    """Three here; `python tests/chaos.py --kills 10` does ten, of the quickstart as it is."""
    sys.path.insert(0, str(HERE))
    try:
        import chaos
    finally:
        sys.path.remove(str(HERE))
    words = ["quickstart", "seeds=1", "rounds=20", "methods=fedavg,kdia", "checkpoint_every=3", "mlflow=false"]
    assert chaos.chaos(words, 3, 7, tmp_path) >= 1


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A disk without room for files whose path has one of these words in it."""
    words: list[str] = []
    real = durable.write

    def write(target: Path, content: Any) -> None:
        if any(word in str(target) for word in words):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(target, content)

    for module in ("checkpoint", "record"):
        monkeypatch.setattr(f"harness.{module}.write", write)
    yield words


@cluster
def test_f7_a_disk_too_full_for_a_checkpoint_costs_no_number(
    tmp_path: Path, alone: Path, diary: Any, full: list[str]
) -> None:
    full.append("checkpoints")
    outcome = sweep.run(load_sweep(card(tmp_path)), tmp_path / "r", diary)
    assert outcome.done == 1
    assert any("No space left" in problem for problem in outcome.problems)
    assert numbers(tmp_path / "r") == of_seed(numbers(alone), 0)


@pytest.mark.long
@cluster
def test_f7_a_disk_too_full_for_a_row_ends_the_sweep_and_the_next_command_goes_on(
    tmp_path: Path, alone: Path, diary: Any, full: list[str]
) -> None:
    full.append("/rounds/")
    with pytest.raises(OSError, match="No space left"):
        sweep.run(load_sweep(card(tmp_path)), tmp_path / "r", diary)
    assert Store(tmp_path / "r", writable=False).rows("trials") == []
    assert not list((tmp_path / "r").rglob("*.draft"))
    full.clear()
    assert sweep.run(load_sweep(card(tmp_path)), tmp_path / "r", diary).done == 1
    assert numbers(tmp_path / "r") == of_seed(numbers(alone), 0)


def checkpointed(results: Path, cell: config.Trial, every: tuple[int, ...] = (2, 4)) -> Shelf:
    """A folder as a driver leaves it that was killed: checkpoints, and no row."""
    from harness.data import card as data_card
    from harness.data import load
    from harness.inline import InlinePool
    from harness.server import Server
    from harness.work import make_setup

    setup, mixes = make_setup(cell, load(data_card(cell.dataset)))
    pool = InlinePool()
    pool.load(setup)
    server, shelf = Server(setup, pool, mixes=mixes), Shelf(results)
    skew = {"partition_hash": setup.split.digest}
    skew |= {f"partition_{key}": value for key, value in setup.split.statistics.items()}
    while server.round < max(every):
        server.step()
        if server.round in every:
            summary = {"seconds": 1.0, "started": 1.0, "drift": None, "skew": skew}
            made_by = trial.maker(trial._device_name("cpu"))
            content = pack({"server": server.snapshot(), "summary": summary, "made_by": made_by})
            shelf.put(config.trial_id(cell), server.round, content)
    return shelf


@cluster
@pytest.mark.parametrize("damaged", [1, pytest.param(2, marks=pytest.mark.long)])
def test_f9_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, alone: Path, diary: Any, damaged: int
) -> None:
    planned = load_sweep(card(tmp_path))
    shelf = checkpointed(tmp_path / "r", planned.cells[0])
    for file in sorted((shelf.path / config.trial_id(planned.cells[0])).iterdir(), reverse=True)[:damaged]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    outcome = sweep.run(planned, tmp_path / "r", diary)
    assert outcome.done == 1
    assert len([p for p in outcome.problems if "is damaged" in p]) == damaged
    assert numbers(tmp_path / "r") == of_seed(numbers(alone), 0)
    assert ("trial_resumed" in dict(map(reversed, events(tmp_path / "r")))) == (damaged == 1)  # type: ignore[arg-type]


@pytest.mark.long
@cluster
@pytest.mark.parametrize("table", ["trials", "rounds"])
def test_f10_a_torn_table_is_put_aside_and_its_trial_runs_again(
    tmp_path: Path, alone: Path, diary: Any, table: str
) -> None:
    planned = load_sweep(card(tmp_path))
    sweep.run(planned, tmp_path / "r", diary)
    (file,) = (tmp_path / "r" / table).glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    outcome = sweep.run(planned, tmp_path / "r", diary)
    assert outcome.done == 1 and any("damaged" in note for note in diary.notes)
    assert numbers(tmp_path / "r") == of_seed(numbers(alone), 0)


@pytest.mark.long
@cluster
def test_f10_a_torn_table_makes_verify_fail(tmp_path: Path, alone: Path) -> None:
    """The command, as a user calls it: 0 for the folder as it was left, 1 with a line that names the file."""
    results = shutil.copytree(alone, tmp_path / "r")

    def verify() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "harness.cli", "verify", str(results)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)

    assert verify().returncode == 0
    file = next((results / "clients").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    torn = verify()
    assert torn.returncode == 1 and f"files: {file} is damaged" in torn.stdout, torn.stdout + torn.stderr


class Mlflow:
    """A real `mlflow server` on a port of this machine, with its database in a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns before it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            # A group of its own, with the processes that it starts; of these none that wait for jobs, and outlive it.
            self.process = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait(self) -> None:
        end = time.monotonic() + 120
        while not self.answers():
            said = (self.folder / "server.log").read_text()
            assert self.process.poll() is None and time.monotonic() < end, said
            time.sleep(0.2)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mlflow]:
    (tmp_path / "server").mkdir()
    there = Mlflow(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there.uri)
    there.start()
    there.wait()
    yield there
    there.stop()


@cluster
@pytest.mark.long
@pytest.mark.parametrize("back", ["in mid-sweep", "afterwards"])
def test_f11_an_mlflow_server_that_is_stopped_and_started_again(
    tmp_path: Path, server: Mlflow, diary_of: Any, back: str
) -> None:
    """Six trials; the server goes with the second and comes back with the fourth, or when the sweep is over."""
    path = card(tmp_path, seeds=6)
    sweep.run(load_sweep(path), tmp_path / "alone", diary_of())
    path.write_text(path.read_text().replace("mlflow = false\n", ""))

    class Saboteur(diary_of):  # type: ignore[misc, valid-type]
        def end(self, trial: config.Trial, row: Any) -> None:
            super().end(trial, row)
            if len(self.ended) == 2:
                server.stop()
                assert not server.answers()
            if len(self.ended) == 4 and back == "in mid-sweep":
                server.start()
                server.wait()

    outcome = sweep.run(load_sweep(path), tmp_path / "r", Saboteur())
    assert (outcome.done, outcome.failed) == (6, 0)
    assert numbers(tmp_path / "r") == numbers(tmp_path / "alone")
    if back == "in mid-sweep":
        assert outcome.problems == []
    else:
        (problem,) = outcome.problems
        assert server.uri in problem and "fedstill sync" in problem
        with pytest.raises(Refused, match="can't be brought up to date"):
            sync(tmp_path / "r")
        server.start()
        server.wait()
        again = sweep.run(load_sweep(path), tmp_path / "r", diary_of())
        assert (again.already, again.done, again.problems) == (6, 0, [])
    mirrored = mlflow_agrees(Store(tmp_path / "r", writable=False))
    assert (mirrored.looked, mirrored.faults, dict(mirrored.left)) == (6, [], {})
    assert sync(tmp_path / "r")[-1].endswith(": 0 runs written, 0 removed.")


@cluster
def test_f21_a_clock_that_jumps_back_makes_no_time_negative(tmp_path: Path, alone: Path, diary: Any) -> None:
    own = killer(tmp_path, "import time; time.time = lambda: 0.0")
    sweep.run(load_sweep(card(tmp_path, [own])), tmp_path / "r", diary)
    found = Store(tmp_path / "r")
    assert all(row["seconds"] >= 0 for table in ("trials", "rounds", "clients") for row in found.rows(table))
    assert same_but_named(numbers(tmp_path / "r"), of_seed(numbers(alone), 0))


@cluster
def test_f25_a_checkpoint_of_another_torch_is_refused_unless_that_is_allowed(
    tmp_path: Path, alone: Path, diary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = load_sweep(card(tmp_path))
    here = trial.versions()
    with monkeypatch.context() as patch:
        patch.setattr(trial, "versions", lambda: {**here, "torch": "1.0"})
        checkpointed(tmp_path / "r", planned.cells[0])
    with pytest.raises(Refused, match=r"torch was 1\.0, is .*--allow-drift .*--fresh"):
        sweep.run(planned, tmp_path / "r", diary)
    assert Store(tmp_path / "r", writable=False).rows("trials") == []
    sweep.run(load_sweep(card(tmp_path), ["allow_drift=true"]), tmp_path / "r", diary)
    (row,) = Store(tmp_path / "r").rows("trials")
    assert row["status"] == "done" and row["drift"].startswith("torch was 1.0, is ")


@cluster
def test_d5_mlflow_moves_no_number(tmp_path: Path, alone: Path, diary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outcome = sweep.run(load_sweep(card(tmp_path), ["mlflow=true"]), tmp_path / "r", diary)
    assert (outcome.done, outcome.problems) == (1, []) and (tmp_path / "mlflow.db").exists()
    assert numbers(tmp_path / "r") == of_seed(numbers(alone), 0)


@cluster
def test_d5_an_evaluation_moves_no_number_of_the_training(tmp_path: Path, alone: Path, diary: Any) -> None:
    """Every fifth round instead of each, towards other targets, in other batches: what is measured is the same."""
    words = ["every=5", "targets=[0.2,0.4]", "evaluation.batch=50"]
    sweep.run(load_sweep(card(tmp_path), words), tmp_path / "r", diary)
    mine, theirs = numbers(tmp_path / "r"), of_seed(numbers(alone), 0)
    bare = [{k: v for k, v in row.items() if k != "trial_id"} for row in (*mine["clients"], *theirs["clients"])]
    assert len(bare) == 2 * 3 * 12 and bare[:36] == bare[36:]
    costs = ("round", "role", "up_bytes", "down_bytes", "steps", "server_steps", "samples")
    assert [[r[k] for k in costs] for r in mine["rounds"]] == [[r[k] for k in costs] for r in theirs["rounds"]]
    seen = [(row["round"], row["accuracy"]) for row in mine["rounds"] if row["accuracy"] is not None]
    assert [round for round, _ in seen] == [4, 9, 11]
    assert set(seen) <= {(row["round"], row["accuracy"]) for row in theirs["rounds"]}


@pytest.mark.long
@cluster
def test_fresh_throws_away_what_was_there_and_says_so(tmp_path: Path, alone: Path, diary: Any) -> None:
    planned = load_sweep(card(tmp_path))
    sweep.run(planned, tmp_path / "r", diary)
    before = (tmp_path / "r" / "trials" / f"{config.trial_id(planned.cells[0])}.parquet").stat().st_mtime_ns
    outcome = sweep.run(planned, tmp_path / "r", diary, fresh=True)
    assert (outcome.done, outcome.already) == (1, 0)
    assert any(note.startswith("--fresh: 1 row") for note in diary.notes)
    after = (tmp_path / "r" / "trials" / f"{config.trial_id(planned.cells[0])}.parquet").stat().st_mtime_ns
    assert after > before


TINY_STORE = """
import sys
from pathlib import Path
import ray
from harness import sweep
from harness.axes import load_sweep
from harness.progress import Display, console
ray.init("local", num_cpus=3, object_store_memory=100 * 1024 * 1024, include_dashboard=False, log_to_driver=False)
planned = load_sweep(sys.argv[1], ["hosts=2", "rounds=3"])
with Display(console(), planned.axes) as display:
    print(sweep.run(planned, Path(sys.argv[2]), display).done)
"""


@cluster
@pytest.mark.long
def test_f23_a_tiny_object_store_spills_and_the_sweep_goes_through(tmp_path: Path) -> None:
    """100 MB, for SCAFFOLD's memories on 6 clients and its broadcasts, of a net of 1.6 million parameters."""
    path = card(tmp_path)
    path.write_text(path.read_text().replace('"mlp"', '"mcmahan-cnn"'))
    words = [sys.executable, "-c", TINY_STORE, str(path), str(tmp_path / "r")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = Store(tmp_path / "r").rows("trials")
    assert row["status"] == "done", row["reason"]


LOST_NODE = """
import os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from harness import cluster, sweep
from harness.axes import load_sweep
from harness.progress import Display, console

os.environ.update(cluster.ENVIRONMENT)
os.environ["RAY_health_check_failure_threshold"] = "3"
there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes = [there.add_node(num_cpus=4, num_gpus=1) for _ in range(2)]
ray.init(address=there.address, log_to_driver=False)
planned = load_sweep(sys.argv[1])
results = Path(sys.argv[2])

def lose() -> None:
    while len(list(results.glob("trials/*.parquet"))) < 3:
        time.sleep(0.1)
    there.remove_node(nodes[1], allow_graceful=False)
    print("node lost", flush=True)

threading.Thread(target=lose, daemon=True).start()
with Display(console(), planned.axes) as display:
    outcome = sweep.run(planned, results, display)
print("done", outcome.done, "failed", outcome.failed)
end = time.monotonic() + 60
while ray.available_resources().get("GPU", 0) < 1 and time.monotonic() < end:
    time.sleep(0.5)
print("GPUs free", ray.available_resources().get("GPU", 0))
"""


@cluster
@pytest.mark.long
def test_f5_a_node_that_is_lost_takes_no_trial_with_it(tmp_path: Path) -> None:
    """Twelve trials with two hosts on a quarter of a GPU each, on three nodes with made-up GPUs; one node goes."""
    path = card(tmp_path, ["fedavg", "scaffold"], seeds=6)
    text = path.read_text().replace("parallel = 1\n", "")
    path.write_text(text + 'hosts = 2\ngpus_per_host = 0.25\ndevice = "cpu"\nretries = 3\n')
    results = tmp_path / "r"
    words = [sys.executable, "-c", LOST_NODE, str(path), str(results)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "node lost" in done.stdout and "done 12 failed 0" in done.stdout, done.stdout
    assert "GPUs free 1.0" in done.stdout, "all that the trials had was given back"
    lost = {name for name, kind in events(results) if kind in ("trial_lost", "host_lost")}
    assert lost, "the node had work"
    inline = path.with_name("inline.toml")
    inline.write_text(card(tmp_path, ["fedavg", "scaffold"], seeds=6).read_text().replace("parallel = 1\n", ""))
    words = [sys.executable, "-m", "harness.cli", "sweep", str(inline), "--results", str(tmp_path / "inline")]
    assert subprocess.run(words, capture_output=True, timeout=600, check=False).returncode == 0
    assert numbers(results) == numbers(tmp_path / "inline")


@cluster
@pytest.mark.long
def test_f6_sigterm_ends_with_143_and_nothing_is_left_running(tmp_path: Path) -> None:
    path = card(tmp_path, seeds=3)
    words = [sys.executable, "-m", "harness.cli", "sweep", str(path), "--results", str(tmp_path / "r")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not list(tmp_path.glob("r/trials/*.parquet")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    children = _below(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    end = time.monotonic() + 60
    while (left := {pid for pid in children if _alive(pid)}) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left


def _below(pid: int) -> set[int]:
    """A process's descendants."""
    found: set[int] = set()
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    front = {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return found


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
