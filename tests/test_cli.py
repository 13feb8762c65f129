"""The command as a user meets it: misuse is one line on stderr, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from urllib.error import URLError

import pytest
import ray
import torch

from harness import cli, sources
from harness.record import Store

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "harness.cli"]
COMMANDS = ("sweep", "run", "board", "partition", "show")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, on a machine without network and GPU, where nothing may start Ray."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def offline(*_: object) -> None:
        raise URLError("no network")

    def started(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(sources, "_fetch", offline)
    monkeypatch.setattr(ray, "init", started)
    return place


class Told:
    """Runs the command in this process: exit code, and what it printed."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.patch.setattr(sys, "argv", ["fedstill", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        said = self.capture.readouterr()
        return code or 0, said.out, said.err


@pytest.fixture
def fedstill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(monkeypatch, capsys)


def refused(told: tuple[int, str, str], *parts: str) -> str:
    """The one line of a refusal, with all of these in it."""
    code, out, err = told
    assert (code, out) == (2, ""), err
    assert err.startswith("fedstill: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err
    return err


MISUSE = [
    # names that do not exist: what there is, and the nearest
    ("swep quickstart", "unknown command 'swep'", "Did you mean 'sweep'?", "partition, plan, run, show"),
    ("sweep quickstrat", "unknown sweeps card", "Did you mean 'quickstart'?"),
    ("sweep nowhere.toml", "no sweeps card at 'nowhere.toml'", "quickstart"),
    ("run fedavgg", "unknown method 'fedavgg'", "Did you mean 'fedavg'?", "scaffold"),
    ("run nowhere.py", "no method file 'nowhere.py'", "fedavg"),
    ("sweep quickstart method=scafold", "override 'method=scafold'", "Did you mean 'scaffold'?"),
    ("run fedavg aplha=1", "unknown key 'aplha'", "partition.alpha", "local.lr"),
    ("run fedavg dataset=digit", "unknown dataset 'digit'", "Did you mean 'digits'?", "cifar10"),
    ("run fedavg net=lenet", "unknown net 'lenet'", "Did you mean", "mlp"),
    ("run fedavg partition.kind=dirichlett", "partition.kind", "Did you mean 'dirichlet'?", "pathological"),
    ("run kdia lambda_kdd=1", "lambda_kdd", "Did you mean 'kdia.lambda_kd'?"),
    ("sweep quickstart method=fedavg kdia.tau=1", "method kdia is not in this sweep"),
    ("show method", "unknown thing to show 'method'", "Did you mean 'methods'?"),
    ("show methods fedavgg", "Did you mean 'fedavg'?"),
    ("show datasets digit", "Did you mean 'digits'?"),
    ("show nets lenet", "Did you mean"),
    ("show partitions iidd", "Did you mean 'iid'?"),
    ("show sweeps quick", "unknown sweeps card 'quick'"),
    # values out of their range
    ("run fedavg alpha=0", "override 'alpha=0'", "partition.alpha must be a finite number in (0, 1e+06], got 0"),
    ("run fedavg alpha=-1", "partition.alpha", "(0, "),
    ("run fedavg alpha=nan", "partition.alpha", "finite"),
    ("run fedavg alpha=inf", "partition.alpha", "finite"),
    ("run fedavg alpha=0.1,0", "partition.alpha", "got 0"),
    ("run fedavg alpha=many", "partition.alpha must be a finite number"),
    ("partition alpha=0", "partition.alpha"),
    ("run fedavg participation=0", "participation must be a finite number in (0, 1], got 0"),
    ("run fedavg participation=1.5", "participation", "(0, 1], got 1.5"),
    ("run fedavg participation=-0.1", "participation", "(0, 1]"),
    ("run fedavg cohort=21", "cohort must be at most the 20 clients there are, got 21"),
    ("run fedavg clients=10 participation=0.5 cohort=7", "participation 0.5 of 10 clients is 5, but cohort is 7"),
    ("run fedavg clients=0", "clients must be a whole number in [1, "),
    ("run fedavg rounds=-1", "rounds must be a whole number"),
    ("run fedavg lr=0", "local.lr"),
    ("run kdia tau=-1", "tau"),
    ("run fedavg seeds=0", "seeds", "at least one"),
    ("run fedavg seed=x", "seed must be a whole number"),
    ("run fedavg alpha", "write key=value"),
    ("run fedavg lr=0.1 local.lr=0.2", "local.lr is set twice"),
    ("run fedavg classes_per_client=3", "changes nothing with dirichlet", "pathological"),
    # what the data can't give
    ("run fedavg clients=2000", "2000 clients", "1442"),
    ("run fedavg clients=100 min_samples=15", "min_samples"),
    ("run fedavg dataset=mnist", "mnist", "no network", "train-images-idx3-ubyte", "FEDSTILL_DATA"),
    ("partition dataset=svhn", "svhn", "train_32x32.mat"),
    ("run fedavg dataset=mnist data=nowhere", "nowhere"),
    # what the machine can't give
    ("run fedavg hosts=1000", "a trial needs 1000 CPUs (1000 hosts and a server), but there are"),
    ("run fedavg cpus_per_host=1000 hosts=1", "needs 1000 CPUs"),
    ("run fedavg gpus_per_host=0.5 hosts=1", "a trial needs 0.5 GPUs (1 hosts and a server), but there are 0"),
    ("run fedavg gpus_per_host=1", "needs 1 GPUs"),
    ("run fedavg gpus_per_host=0.3 hosts=1", "gpus_per_host must be 0, 1/n"),
    ("run fedavg device=cuda", "execution.device = 'cuda' needs gpus_per_host"),
    ("run fedavg device=tpu", "unknown value of execution.device 'tpu'", "auto, cpu, cuda"),
    ("run fedavg address=127.0.0.1:1", "no Ray cluster at execution.address = '127.0.0.1:1'"),
    # what the command's own grammar does not know
    ("sweep", "Missing argument", "see fedstill sweep --help"),
    ("run fedavg --result x", "No such option", "see fedstill run --help"),
    ("board results again", "unexpected extra argument", "see fedstill board --help"),
    ("sweep quickstart --results", "requires an argument"),
    ("--version", "No such option"),
    # results that are not there
    ("board results", "there is no results folder results", "fedstill sweep"),
    ("run fedavg execution.data=nowhere", "execution.data = 'nowhere' is not a folder"),
]


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A results folder with two methods of three seeds."""
    store = Store(tmp_path / "ended")
    for number, (method, seed) in enumerate(product(("fedavg", "kdia"), range(3))):
        value = 0.5 + 0.1 * (method == "kdia") + seed / 100 + number / 1000
        row = {"trial_id": str(number), "status": "done", "method": method, "dataset": "digits", "seed": seed}
        row |= {"config": json.dumps({"method": method, "seed": seed}), "global_accuracy_auc": value}
        store.commit(row | {"global_accuracy_last10": value}, [], [])
    return store.path


def test_board_compares_with_a_baseline_and_writes_files(fedstill: Told, ended: Path, tmp_path: Path) -> None:
    code, out, err = fedstill("board", str(ended), "--baseline", "kdia", "--out", str(tmp_path / "paper"))
    assert (code, err) == (0, "")
    assert "difference to kdia" in out
    assert "performance-profile.png" in out.splitlines()[-1]
    names = {path.name for path in (tmp_path / "paper").iterdir()}
    assert {"leaderboard.md", "leaderboard.csv", "leaderboard.tex", "performance-profile.svg"} <= names
    assert not (ended / "leaderboard.md").exists()


def test_board_refuses_what_there_is_not(fedstill: Told, ended: Path) -> None:
    refused(fedstill("board", str(ended), "--baseline", "kdai"), "unknown baseline 'kdai'", "Did you mean 'kdia'?")
    refused(fedstill("board", str(ended), "--metric", "loss_last"), "unknown metric", "Did you mean 'loss_last10'?")
    refused(fedstill("board", str(ended), "--out", str(ended / "trials" / "0.parquet")), "can't be written")


def test_board_needs_no_torch(ended: Path) -> None:
    code = f"import sys; sys.argv = ['fedstill', 'board', {str(ended)!r}]; from harness.cli import main\n" + (
        "try: main()\nexcept SystemExit: print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("words", "parts"), [(words, parts) for words, *parts in MISUSE], ids=lambda x: str(x)[:50])
def test_misuse_is_one_line_and_leaves_nothing(here: Path, fedstill: Told, words: str, parts: list[str]) -> None:
    refused(fedstill(*words.split()), *parts)
    assert list(here.iterdir()) == []


LONG = "x" * 300


@pytest.mark.parametrize(
    ("results", "part"),
    [("file", "is a file"), ("file/results", "file/results"), (LONG, "too long"), ("link", "is a link")],
)
def test_a_results_folder_that_cannot_be(tmp_path: Path, here: Path, fedstill: Told, results: str, part: str) -> None:
    (here / "file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (here / "folder").mkdir()
    (here / "link").mkdir()
    (here / "link" / "trials").symlink_to(tmp_path / "elsewhere")
    before = sorted(here.rglob("*"))
    refused(fedstill("run", "fedavg", "--results", results), part)
    assert sorted(here.rglob("*")) == before
    assert (here / "file").read_text() == "mine"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_results_folder_without_permission(here: Path, fedstill: Told) -> None:
    (here / "mine").mkdir(mode=0o555)
    refused(
        fedstill("run", "fedavg", "--results", "mine/results"), "mine/results can't be written: Permission denied"
    )


METHOD_FILES = {
    "broken.py": ("class (", "does not import: SyntaxError"),
    "raises.py": ("1 / 0", "does not import: ZeroDivisionError"),
    "binary.py": ("\0\x01", "does not import"),
    "empty.py": ("", "must define exactly one frozen dataclass"),
    "plain.py": (
        "from algorithms.fedavg import FedAvg\nclass A(FedAvg): pass\nclass B(FedAvg): pass",
        "must define exactly one frozen dataclass",
    ),
}


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_method_file_that_is_none(tmp_path: Path, here: Path, fedstill: Told, name: str) -> None:
    text, part = METHOD_FILES[name]
    path = tmp_path / name
    path.write_text(text)
    refused(fedstill("run", str(path)), str(path), part)
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_method_file_that_cannot_be_read(tmp_path: Path, fedstill: Told) -> None:
    path = tmp_path / "secret.py"
    path.write_text("")
    path.chmod(0)
    refused(fedstill("run", str(path)), "secret.py", "Permission")


def test_a_folder_is_no_method_file(tmp_path: Path, fedstill: Told) -> None:
    (tmp_path / "folder.py").mkdir()
    refused(fedstill("run", str(tmp_path / "folder.py")), "no method file")


CARDS = {
    "syntax": ("methods = [\n1 = 2", "card.toml", "line 2"),
    "key": ('method = ["fedavg"]', "card.toml, line 1, method", "Did you mean 'methods'?"),
    "base": ('methods = ["fedavg"]\n[base]\nrouns = 3', "card.toml, line 3, base.rouns", "Did you mean 'rounds'?"),
    "value": ('methods = ["fedavg"]\n[grid]\n"partition.alpha" = [0.1, 0]', "card.toml, line 3", "partition.alpha"),
    "name": ('name = "../up"\nmethods = ["fedavg"]', "card.toml, line 1, name"),
    "code": ("methods = [\"fedavg\"]\nseeds = \"__import__('os').system('touch gotcha')\"", "seed"),
}


@pytest.mark.parametrize("card", CARDS)
def test_a_bad_card_says_where(tmp_path: Path, here: Path, fedstill: Told, card: str) -> None:
    text, *parts = CARDS[card]
    (tmp_path / "card.toml").write_text(text)
    refused(fedstill("sweep", str(tmp_path / "card.toml")), *parts)
    assert list(here.iterdir()) == []


def test_a_heat_map_without_a_place(here: Path, fedstill: Told) -> None:
    (here / "file").write_text("mine")
    code, _, err = fedstill("partition", "--out", "file/map.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "file/map.png can't be written" in err


def test_the_real_command_refuses_at_once(here: Path) -> None:
    """As a process of its own, for all that a test within Python can't see: traces, warnings, exit code."""
    done = subprocess.run(
        [*COMMAND, "run", "fedavg", "hosts=1000"], capture_output=True, text=True, timeout=60, cwd=here, check=False
    )
    refused((done.returncode, done.stdout, done.stderr), "needs 1000 CPUs")
    assert list(here.iterdir()) == []


def test_a_reader_that_goes_away_is_no_crash(here: Path) -> None:
    """`fedstill show methods | head -0`."""
    with subprocess.Popen([*COMMAND, "show", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert "Traceback" not in said


def test_help_lists_the_commands(fedstill: Told) -> None:
    for words in ([], ["--help"]):
        code, out, err = fedstill(*words)
        assert (code, err) == (0, "")
        assert all(re.search(rf"^\s+{name}\s", out, re.MULTILINE) for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = fedstill(name, "--help")
        assert code == 0
        assert f"fedstill {name}" in out
