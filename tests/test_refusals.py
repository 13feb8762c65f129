"""Every bad input of the list B1 to B18, through the command; what is tried elsewhere is named in `ELSEWHERE`.

Each time one line on stderr, with what was wrong, what is allowed and what was probably meant; exit code 2; before
Ray starts; with nothing written. And whatever a card or a list of overrides holds: it resolves, or that happens.
"""

from __future__ import annotations

import ast
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import ray
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness import axes, cli, cluster, config, overrides, sources, sweep
from harness.record import Store
from harness.space import Search

HERE = Path(__file__).parent
EXAMPLES = int(os.environ.get("FEDSTILL_EXAMPLES", "60"))  # more of them: FEDSTILL_EXAMPLES=5000 pytest ...
ELSEWHERE = {
    "B3 a share that leaves clients empty": "test_partitions.py::test_what_cannot_be_dealt_is_refused",
    "B7 missing data": "test_data.py::test_missing_data_says_which_file_goes_where",
    "B7 a part is missing": "test_data.py::test_an_incomplete_folder_names_what_is_missing",
    "B7 a download that fails": "test_data.py::test_a_download_that_fails_or_is_wrong_leaves_nothing",
    "B8 a wrong checksum": "test_data.py::test_a_wrong_checksum_shows_both",
    "B8 an archive's wrong checksum": "test_data.py::test_a_wrong_archive_is_not_even_opened",
    "B9 an archive that leads out": "test_data.py::test_harmful_and_damaged_archives_are_refused",
    "B9 an archive that is a bomb": "test_data.py::test_archives_that_unpack_to_too_much_are_refused",
    "B10 a pickle with code": "test_data.py::test_a_pickle_that_names_anything_else_is_refused_and_not_run",
    "B11 a name that leads out": "test_config.py::test_names_that_could_lead_elsewhere_are_refused",
    "B11 an id that is a path": "test_record.py::test_a_bit_of_another_trial_or_a_path_for_an_id_is_an_error",
    "B12 folders that can not serve": "test_record.py::test_folders_that_can_not_serve_are_refused",
    "B12 a full disk": "test_record.py::test_a_full_disk_is_found_before_anything_starts",
    "B13 room on several nodes": "test_room.py::test_a_trial_is_refused_exactly_when_no_placement_exists",
    "B14 a checkpoint of strange bytes": "test_checkpoint.py::test_strange_bytes_are_refused",
    "B14 a damaged checkpoint": "test_checkpoint.py::test_a_damaged_one_gives_way_to_the_one_before",
    "B15 CSV": "test_board.py::test_no_text_of_the_csv_is_a_formula",
    "B15 Markdown": "test_board.py::test_a_name_can_not_break_the_table",
    "B15 LaTeX": "test_typeset.py::test_no_name_is_a_command",
    "B15 HTML": "test_page.py::test_hostile_text_is_text",
    "B15 HTML in a browser": "test_page.py::test_hostile_text_is_shown_as_text",
    "B16 MLflow's password": "test_tracking.py::test_a_dead_server_is_a_message",
    "B16 passwords in messages": "test_tracking.py::test_credentials_are_masked",
    "B17 nets that do not take the data": "test_nets.py::test_refused",
    "B17 labels beyond the card's": "test_data.py::test_arrays_that_differ_from_the_card_are_refused",
    "B18 a checkpoint of other packages": (
        "test_faults.py::test_f25_a_checkpoint_of_another_torch_is_refused_unless_that_is_allowed"
    ),
    "B18 a method file that changed": "test_config.py::test_a_users_method_counts_by_name_and_content",
}
METHOD = """
from dataclasses import dataclass
from algorithms.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
"""
FEDAVG = 'methods = ["fedavg"]\n'
KDIA = 'methods = ["fedavg", "kdia"]\n[base]\nholdout.validation = 0.1\n'
RANGE = '[search.space]\n"local.lr" = { uniform = [0.1, 1] }\n'


@dataclass(frozen=True)
class Bad:
    """words: of the command, in a folder with these files. A text alone is a card, own.toml. said: all of it."""

    words: Sequence[str]
    said: Sequence[str]
    files: dict[str, str | bytes] = field(default_factory=dict)


def card(text: str | bytes, *said: str, more: Sequence[str] = ()) -> Bad:
    return Bad(("sweep", "own.toml", *more), said, {"own.toml": text})


def words(text: str, *said: str, **files: str | bytes) -> Bad:
    return Bad(text.split(), said, {f"{name}.py": content for name, content in files.items()})


def method(text: str, *said: str, more: Sequence[str] = ()) -> Bad:
    return Bad(("run", "mine.py", *more), ("mine", *said), {"mine.py": text})


ROWS = {
    "B1 a misspelt key": [
        card('method = ["fedavg"]', "own.toml, line 1, method", "Did you mean 'methods'?"),
        card(FEDAVG + "[bsae]\nclients = 3", "own.toml, line 2, bsae", "Did you mean 'base'?"),
        card(FEDAVG + "[base]\ncleints = 3", "own.toml, line 3, base.cleints", "Did you mean 'clients'?"),
        card(FEDAVG + "[base.local]\nlrr = 3", "own.toml, line 3", "Did you mean 'local.lr'?"),
        card(FEDAVG + "[base.locl]", "own.toml, line 2, base.locl: unknown key 'locl'"),
        card(FEDAVG + "[base]\nclients = {}", "clients must be a whole number", "got {}"),
        card(FEDAVG + "[base.partition]\nalhpa = 1", "Did you mean 'partition.alpha'?"),
        card(FEDAVG + "[base.proxy]\nsorce = 'train'", "Did you mean 'proxy.source'?"),
        card(FEDAVG + "[base.fleet]\nnet = ['mlp']", "Did you mean 'fleet.nets'?"),
        card(FEDAVG + "[base.availability]\ndropuot = 1", "Did you mean 'availability.dropout'?"),
        card(FEDAVG + "[base.faults]\nclinet = 'skip'", "Did you mean 'faults.client'?"),
        card(FEDAVG + "[base.evaluation]\nevry = 1", "Did you mean 'evaluation.every'?"),
        card(FEDAVG + "[base.holdout]\nvaldiation = 0.1", "Did you mean 'holdout.validation'?"),
        card(FEDAVG + "[gird]", "Did you mean 'grid'?"),
        card(FEDAVG + '[grid]\n"locl.lr" = [1]', "own.toml, line 3, grid.locl.lr", "Did you mean 'local.lr'?"),
        card(
            FEDAVG + "[grid.local]\nlr = {}", "own.toml, line 3, grid.local.lr: an axis is a list of values, got {}"
        ),
        card(FEDAVG + "[execution]\nhost = 1", "Did you mean 'execution.hosts'?"),
        card(FEDAVG + "[hyper.kdia]", "method kdia is not in this sweep"),
        card(FEDAVG + "[hyper.fedavg]\nmu = 1", "method fedavg has no hyper-parameters"),
        card(FEDAVG + "[hyper]\nmu = 1", "unknown key 'mu'", "Allowed: none, with these methods"),
        card(KDIA + "[hyper.kdia]\ntua = 1", "hyper.kdia.tua", "Did you mean 'kdia.tau'?"),
        card(KDIA + "[search]\ntrails = 2\n" + RANGE, "Did you mean 'search.trials'?"),
        card(KDIA + '[search.spcae]\n"local.lr" = { int = [1, 2] }', "Did you mean 'search.space'?"),
        card(KDIA + "[search.kdia]\ntua = { int = [1, 2] }", "own.toml, line 5", "Did you mean 'kdia.tau'?"),
        card(KDIA + '[search.space]\n"local.lr" = { unifrom = [1, 2] }', "Did you mean 'uniform'?"),
        words("run fedavg aplha=1", "override 'aplha=1'", "Did you mean 'partition.alpha'?"),
        words("check kdia tuu=1", "Did you mean 'kdia.tau'?"),
    ],
    "B2 an unknown name": [
        words("run fedavgg", "unknown method 'fedavgg'", "Did you mean 'fedavg'?", "scaffold"),
        words("run fedavg dataset=digit", "Did you mean 'digits'?", "cifar10"),
        words("run fedavg net=lenet", "unknown net 'lenet'", "mlp"),
        words("run fedavg fleet.nets=[mlp,lent]", "override 'fleet.nets=[mlp,lent]'", "Did you mean 'lenet5'?"),
        words("run fedavg proxy.source=mnits proxy.rows=1", "Did you mean 'mnist'?"),
        card(FEDAVG + 'published = "kdai"', "own.toml, line 2", "Did you mean 'kdia'?"),
        words("sweep quickstrat", "Did you mean 'quickstart'?"),
        words("run none.py", "no method file 'none.py'", "fedavg, "),
        words("run mine.py", "mine.py", "SyntaxError", mine="def ("),
        words("run mine.py", "mine.py", "exactly one frozen dataclass", mine=""),
        words(
            "run mine.py",
            "mine.py",
            "exactly one frozen dataclass",
            mine=METHOD + "    a: int = 1\nclass B(Mine): pass",
        ),
        words("run mine.py", "does not import: SystemExit: 0", mine="import sys; sys.exit(0)"),
        words("run mine.py", "does not import: MemoryError", mine="raise MemoryError"),
        words("run mine.py", "null bytes", mine=b"a\0b"),
        words(
            "sweep quickstart methods=fedavg,fedavg.py", "two methods are called 'fedavg'", fedavg=METHOD + "    pass"
        ),
        method(METHOD + "    a: 'Nope' = 1", "annotations can't be read", "Nope"),
        method(METHOD + "    a: type = int", "a (hyper-parameter of method mine)", "numbers, texts"),
        method(METHOD + "    a: object = ...", "a (hyper-parameter of method mine) must be of true or false"),
        method(METHOD + "    a: int = 1\n    def __post_init__(self): 1 / 0", "can't be made: ZeroDivisionError"),
        method(METHOD + "    needs = 3", "needs must be a frozenset of one_net, ", "got 3"),
        method(METHOD + "    needs = frozenset({'prxy'})", "unknown need 'prxy'", "Did you mean 'proxy'?"),
        method(METHOD + "    a: float = float('nan')", "finite number, got nan"),
        method("raise ValueError('\\x1b[31m\\u202e\\n\\ud800')", r"\x1b[31m\u202e \ud800"),
        Bad(("run", "a b.py"), ("name", "ASCII letters"), {"a b.py": METHOD + "    pass"}),
        Bad(
            ("sweep", "quickstart", "methods='=cmd.py'"),
            ("a method file's name", "=cmd"),
            {"=cmd.py": METHOD + "    pass"},
        ),
    ],
    "B3 a concentration": [
        *(
            words(f"run fedavg alpha={value}", "partition.alpha must be a finite number in (0, 1e+06]", f"got {got}")
            for value, got in (("0", "0"), ("-1", "-1"), ("nan", "nan"), ("inf", "inf"), ("1e7", "10000000.0"))
        ),
        words("run fedavg size_alpha=0 kind=quantity", "partition.size_alpha"),
        words(
            "run fedavg kind=dirichlet-capped alpha=1e-300",
            "1000 draws",
            "lower partition.min_samples or clients, or raise partition.alpha",
        ),
        words("run fedavg clients=10000000", "10000000 clients", "1442"),
    ],
    "B4 numbers out of range": [
        *(
            words(f"run fedavg {key}={value}", f"override '{key}={value}'", name, limits, f"got {value}")
            for key, value, name, limits in (
                ("participation", "0", "participation", "(0, 1]"),
                ("participation", "1.5", "participation", "(0, 1]"),
                ("clients", "0", "clients", "[1, 10000000]"),
                ("rounds", "-1", "rounds", "[1, "),
                ("lr", "0", "local.lr", "(0, inf)"),
                ("local.batch", "0", "local.batch", "[1, "),
                ("epochs", "-2", "local.epochs", "[1, "),
                ("momentum", "1", "local.momentum", "[0, 1)"),
                ("seed", "-1", "seed", "[0, "),
                ("every", "0", "evaluation.every", "[1, "),
                ("dropout", "1", "availability.dropout", "[0, 1)"),
                ("hosts", "-1", "execution.hosts", "[0, 100000]"),
            )
        ),
        words("run kdia tau=-1", "tau (hyper-parameter of method kdia) must be a finite number in (0, inf), got -1"),
        words("run fedavg cohort=21", "cohort must be at most the 20 clients there are, got 21"),
        words("run fedavg rounds=99999999999999999999", "rounds must be a whole number in [1, 2147483647]"),
        words("run fedavg holdout.test=0.6 holdout.validation=0.6", "override 'holdout.test=0.6'", "less than 1"),
        words("run fedavg fleet.nets=[mlp,lenet5] fleet.shares=[1]", "override 'fleet.shares=[1]'", "2 numbers"),
        words("run fedavg window=0.3", "override 'window=0.3'", "availability.pattern = cyclic"),
        words("run fedavg trace_hash=a", "override 'trace_hash=a'", "availability.trace"),
        words("run fedavg seeds=0", "at least one is needed"),
        words("run fedavg seeds=100001", "100000 trials"),
    ],
    "B5 types": [
        *(
            card(FEDAVG + f"[base]\n{key} = {value}", "own.toml, line 3", f"{key} must be {what}", f"got {got}")
            for key, value, what, got in (
                ("clients", '"3"', "a whole number", "'3'"),
                ("clients", "true", "a whole number", "True"),
                ("clients", "3.0", "a whole number", "3.0"),
                ("clients", "[1, 2]", "a whole number", "[1, 2]"),
                ("clients", "1979-05-27", "a whole number", "datetime.date"),
                ("local.lr", '"1e-3"', "a finite number", "'1e-3'"),
                ("local.lr", "nan", "a finite number", "nan"),
                ("local.lr", "[]", "a finite number", "[]"),
                ("local.augment", "1", "true or false", "1"),
                ("net", "3", "plain text on one line", "3"),
                ("evaluation.targets", "0.5", "a list", "0.5"),
                ("evaluation.targets", "[true]", "a list", "True"),
            )
        ),
        card(FEDAVG + "[base]\nlocal = []", "local is a table: set one of local.epochs"),
        card(FEDAVG + "[base]\nclients = { a = 1 }", "unknown key 'clients.a'", "Did you mean 'clients'?"),
        card(FEDAVG + '[grid]\n"local.lr" = []', "an axis is a list of values, got []"),
        card(FEDAVG + "[[base]]\nclients = 1", "[base] must be a table"),
        card(FEDAVG + "methods = []", "own.toml: Cannot overwrite a value", "a key is there twice"),
        card(FEDAVG + "[base]\n[base]", "twice (at line 3"),
        card(FEDAVG + "title = '''a\nb'''", "own.toml, line 2, title", "plain text on one line"),
        card(FEDAVG + 'title = "\\u001b[31m"', "title must be plain text on one line"),
        card("methods = [", "own.toml: ", "at end of document"),
        card(b"\xff\xfe", "own.toml: not UTF-8 text (byte 0)"),
        card(b"\x00", "own.toml: Invalid statement (at line 1, column 1)"),
        card(FEDAVG + "[base]\nclients = 0x" + "f" * 9000, "thousands of digits"),
        card("methods = " + "[" * 5000, "own.toml"),
        Bad(("sweep", "folder.toml"), ("no sweeps card at 'folder.toml'",), {"folder.toml/file": ""}),
        words("sweep none.toml", "no sweeps card at 'none.toml'", "quickstart"),
        words("run fedavg lr=true", "got True"),
        words("run fedavg clients=1e3", "a whole number"),
    ],
    "B6 tags of another language": [
        card("!!python/object/apply:os.system ['touch gotcha']", "own.toml: Invalid statement (at line 1"),
        card(FEDAVG + "seeds = \"__import__('os').system('touch gotcha')\"", "seed must be a whole number"),
        words("run fedavg alpha=__import__('os').system('touch_gotcha')", "partition.alpha must be a finite number"),
    ],
    "B7 data that is not there": [
        words("run fedavg dataset=mnist", "no network", "train-images-idx3-ubyte", "FEDSTILL_DATA"),
        words("run fedavg data=none", "execution.data = 'none' is not a folder"),
    ],
    "B11 names": [
        *(
            card(FEDAVG + f"name = {json.dumps(name)}", "own.toml, line 2, name", "ASCII letters")
            for name in ("../x", "/x", "~", "a\x00b", "a\nb", "x" * 300, "\u0430bc", "a.", "..", "")
        ),
        *(
            card(FEDAVG + f"name = '{name}'", "own.toml, line 2, name", "is reserved")
            for name in ("CON", "nul", "com1.txt", "published", "leaderboards")
        ),
        Bad(("run", "fedavg", "--results", ""), ("an argument is empty",)),
        Bad(("board", ""), ("an argument is empty",)),
    ],
    "B12 results": [
        Bad(("run", "fedavg", "--results", "file"), ("file is a file",), {"file": "mine"}),
        Bad(("run", "fedavg", "--results", "file/below"), ("can't be written",), {"file": "mine"}),
        Bad(("run", "fedavg", "--results", "/proc/fedstill"), ("can't be written",)),
        Bad(("run", "fedavg", "--results", "x" * 300), ("too long",)),
        Bad(("compact", "folder"), ("folder is no results folder",), {"folder/file": "mine"}),
    ],
    "B13 a GPU that is not there": [
        words("run fedavg gpus_per_host=1", "a trial needs 1 GPUs", "there are 0"),
        words("run fedavg device=cuda", "execution.device = 'cuda' needs gpus_per_host"),
        words("run fedavg gpus_per_host=0.7", "gpus_per_host must be 0, 1/n (0.5, 0.25, 0.2, ...) or a whole number"),
        words("run fedavg gpus_per_host=1.5", "gpus_per_host must be 0, 1/n"),
        words(
            "run fedavg hosts=1 gpus_per_host=0.5", "a trial needs 0.5 GPUs (1 hosts and a server), but there are 0"
        ),
        words(
            "run fedavg cpus_per_host=1e-9 hosts=1", "execution.cpus_per_host must be a finite number in [0.0001, "
        ),
        words("run fedavg cpus_per_server=1e-9", "execution.cpus_per_server must be 0, or 0.0001 or more"),
        words("run fedavg hosts=1000", "a trial needs 1000 CPUs"),
        words(
            "run fedavg address=nowhere", "no Ray cluster at execution.address = 'nowhere': an address is HOST:PORT"
        ),
        words("run fedavg address=ray://ann:s3cret@h:1", "***@h:1", "an address is HOST:PORT"),
    ],
    "B17 shapes": [
        words(
            "run fedavg proxy.source=mnist proxy.rows=9", "override 'proxy.source=mnist'", "shape (1, 8, 8) of digits"
        ),
        words("run fedavg proxy.source=digits proxy.rows=1443", "proxy.rows = 1443 is more than there are", "1442"),
        words("run fedavg net=gru-small", "override 'net=gru-small'", "takes tokens", "(1, 8, 8)"),
        words("run fedavg dataset=wordnet net=mlp", "takes images"),
        words("run fedavg fleet.nets=[mlp,gru-small]", "override 'fleet.nets=[mlp,gru-small]'", "takes tokens"),
        words("run fedavg fleet.nets=[mlp,lenet5]", "method fedavg needs one net for all clients, not mlp, lenet5"),
        words("run fedmd", "proxy.source", "set proxy.source=train"),
        Bad(
            ("run", "fedavg", "pattern=trace", "trace=file"),
            ("override 'trace=file'", "columns round and client"),
            {"file": "x"},
        ),
        Bad(("run", "fedavg", "pattern=trace", "trace=."), ("override 'trace=.'", "is no file")),
    ],
}
EACH = [(row, bad) for row, found in ROWS.items() for bad in found]


class Passed(BaseException):
    """The input was taken: the next thing would be to write."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, on a machine without network and GPU. Nothing may start Ray."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in ("FEDSTILL_DATA", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    starts: list[Any] = []

    def offline(*_: object) -> None:
        raise URLError("no network")

    def started(*given: object, **_: object) -> None:
        starts.append(given)
        raise AssertionError("Ray was started")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sources, "_fetch", offline)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", started)
    yield place
    torch.set_flush_denormal(False)  # `fedstill check` turns it on
    assert starts == []


class Told:
    """Runs the command in this process: its exit code and output, or None where the input was taken."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, *given: str) -> tuple[int, str, str] | None:
        self.patch.setattr(sys, "argv", ["fedstill", *given])
        with pytest.raises((SystemExit, Passed)) as ended:
            cli.main()
        said = self.capture.readouterr()
        return (int(ended.value.code or 0), said.out, said.err) if isinstance(ended.value, SystemExit) else None


@pytest.fixture
def fedstill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(monkeypatch, capsys)


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken ends just before anything would be written."""

    def opened(results: Path) -> None:
        raise Passed

    monkeypatch.setattr(sweep, "_opened", opened)


def one_line(told: tuple[int, str, str] | None) -> str:
    """The line of a refusal, which goes to any terminal as it is."""
    assert told is not None, "it was taken"
    code, out, err = told
    assert (code, out) == (2, ""), err
    assert err.startswith("fedstill: ") and err.endswith("\n")
    assert err[:-1].isprintable(), err
    return err[:-1]


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def names(bad: Bad) -> str:
    return re.sub(r"\W+", "-", " ".join((*bad.words, *map(str, bad.files.values()))).removeprefix("sweep own.toml"))[
        :60
    ]


def test_every_row_is_here_or_elsewhere() -> None:
    found = {key.split()[0] for key in (*ROWS, *ELSEWHERE)}
    own = {name.split("_")[1].upper() for name in globals() if re.match(r"test_b\d+_", name)}
    assert found | own == {f"B{number}" for number in range(1, 19)}


@pytest.mark.parametrize("row", ELSEWHERE)
def test_what_is_tried_elsewhere_is_there(row: str) -> None:
    file, _, name = ELSEWHERE[row].partition("::")
    tree = ast.parse((HERE / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("row", "bad"), EACH, ids=[f"{row.split()[0]}-{names(bad)}" for row, bad in EACH])
def test_it_is_refused_in_one_line_and_leaves_nothing(here: Path, fedstill: Told, row: str, bad: Bad) -> None:
    for name, text in bad.files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = content(here)
    line = one_line(fedstill(*bad.words))
    for part in bad.said:
        assert part in line
    assert content(here) == before


def test_a_card_with_a_mark_at_its_beginning_is_taken(here: Path, fedstill: Told, halted: None) -> None:
    (here / "own.toml").write_bytes(b"\xef\xbb\xbf" + FEDAVG.encode())
    assert fedstill("sweep", "own.toml") is None


KNOWN = overrides.targets(["kdia"])
TABLES = {"trial": "base", "execution": "execution", "hyper": "hyper"}


def written(key: str, value: str, spelled: str = "") -> str:
    """A card of KDIA in which a key has this value."""
    table = TABLES[KNOWN[key].scope]
    return f'methods = ["kdia"]\n[{table}]\n{(spelled or key).removeprefix("execution.")} = {value}\n'


@pytest.mark.parametrize("scope", TABLES)
def test_b1_every_key_that_is_misspelt_is_guessed(here: Path, fedstill: Told, halted: None, scope: str) -> None:
    """Every key there is, without the last letter but one of its name: the guess begins in the same table."""
    for key in (key for key, target in KNOWN.items() if target.scope == scope and len(key.rpartition(".")[2]) > 3):
        wrong = key[:-2] + key[-1]
        (here / "own.toml").write_text(written(key, "1", wrong))
        line = one_line(fedstill("sweep", "own.toml"))
        assert re.search(rf"own.toml, line 3, \S*{re.escape(wrong)}: unknown ", line), line
        guess = re.search(r"Did you mean '(.+?)'", line)
        assert guess and guess[1].rpartition(".")[0] == key.rpartition(".")[0], line
        assert re.search(rf"Allowed: .*\b{re.escape(key)}\b", line), line


BAD_VALUES = (
    '"text"',
    "true",
    "[[1]]",
    "{}",
    "nan",
    "-inf",
    "-1",
    "1" + "0" * 30,
    "2020-01-01",
    '"\\u0000"',
    "1e-30",
)


@pytest.mark.parametrize("value", BAD_VALUES)
def test_b5_no_key_takes_what_is_of_another_type(
    here: Path, fedstill: Told, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Every key with every such value: it is taken as it is, or the line says where, which key, and what it got."""

    def run(planned: axes.Sweep, *_: object) -> None:
        taken.append(planned)
        raise Passed

    taken: list[axes.Sweep] = []
    monkeypatch.setattr(sweep, "run", run)
    for key in KNOWN:
        (here / "own.toml").write_text(written(key, value))
        told = fedstill("sweep", "own.toml")
        if told is not None:
            line = one_line(told)
            assert "own.toml, line 3, " in line and key.rpartition(".")[2] in line.partition(": ")[2], line
    whole = [cell for planned in taken for cell in planned.cells]
    assert all(config.resolve(json.loads(cell.model_dump_json())) == cell for cell in whole)


@pytest.mark.parametrize("results", ["link", "default", "dangling", "inside"])
def test_b12_a_results_folder_that_leads_elsewhere(tmp_path: Path, here: Path, fedstill: Told, results: str) -> None:
    """Also by its default name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (here / "link").symlink_to(elsewhere)
    (here / "dangling").symlink_to(tmp_path / "none")
    (here / "inside").mkdir()
    (here / "inside" / "rounds").symlink_to(elsewhere)
    (here / "results").mkdir()
    (here / "results" / "run-fedavg").symlink_to(elsewhere)
    if results == "default":
        assert "is a link to" in one_line(fedstill("run", "fedavg"))
    else:
        assert "is a link to" in one_line(fedstill("run", "fedavg", "--results", results))
    assert list(elsewhere.iterdir()) == [] and not (tmp_path / "none").exists()


def test_b11_a_name_on_the_screen_is_no_markup(here: Path, fedstill: Told) -> None:
    """Rich would take [/x] for the end of a style that was never begun, and fail."""
    (here / "mine.py").write_text('"""[/x] A method."""\n' + METHOD + "    a: str = '[/x]'")
    assert fedstill("show", "methods", "mine.py") is not None
    (here / "own.toml").write_text(FEDAVG + 'title = "[/x]"')
    code, out, err = fedstill("show", "sweeps", "own.toml") or (1, "", "")
    assert (code, err) == (0, "") and "own.toml: [/x]" in out
    (here / "odd.py").write_text(METHOD + "    def init(self, world, rng): raise ValueError('[/x]')")
    code, out, err = fedstill("check", "odd.py") or (0, "", "")
    assert (code, err) == (1, "") and "[/x]" in out


def test_b18_rows_of_other_settings_are_told_and_stay(
    here: Path, fedstill: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that was changed in between makes other trials: the line names the setting with both values."""
    old = config.resolve({"method": "fedavg", "rounds": 50})
    row = {"trial_id": config.trial_id(old), "sweep": "own", "status": "done", "config": old.model_dump_json()}
    Store(here / "results" / "own").commit(row, [], [])
    before = (here / "results" / "own" / "trials" / f"{config.trial_id(old)}.parquet").read_bytes()
    (here / "own.toml").write_text(FEDAVG + "[base]\nrounds = 7\n[execution]\nmlflow = false")

    def start(*_: object) -> str:
        raise Passed

    monkeypatch.setattr(cluster, "start", start)
    monkeypatch.setattr(sys, "argv", ["fedstill", "sweep", "own.toml"])
    with pytest.raises(Passed):
        cli.main()
    out = fedstill.capture.readouterr().out
    assert "1 rows of other settings stay in" in out and "rounds = 50 there, 7 now" in out and "--fresh" in out
    assert (here / "results" / "own" / "trials" / f"{config.trial_id(old)}.parquet").read_bytes() == before


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalr-5ecret",
    "MLFLOW_TRACKING_PASSWORD": "hunter-5ecret",
    "MLFLOW_TRACKING_TOKEN": "bearer-5ecret",
    "FEDSTILL_TEST_KEY": "plain-5ecret",
}


@pytest.mark.cluster
@pytest.mark.long
def test_b16_what_is_in_the_environment_is_in_no_table_and_no_run(tmp_path: Path) -> None:
    """A whole run, once with MLflow on a file and once on a server behind a password that is not there."""
    words = ["run", "fedavg", "rounds=1", "clients=2", "epochs=1", "net=mlp", "--results", str(tmp_path / "r")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    said = ""
    for uri in (f"sqlite:///{tmp_path}/mlflow.db", "http://ann:url-5ecret@127.0.0.1:9/?token=query-5ecret"):
        own = SECRETS | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        command = [sys.executable, "-m", "harness.cli", *words, "seed=1" if "@" in uri else "seed=0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=kept | own, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert "MLflow at http://***@127.0.0.1:9" in said and "5ecret" not in said
    store = Store(tmp_path / "r", writable=False)
    assert len(store.rows("trials")) == 2 and (tmp_path / "mlflow.db").is_file()
    assert not any("5ecret" in str(store.rows(table)) for table in ("trials", "rounds", "clients", "events"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"5ecret" in path.read_bytes()]


AS_A_USER = """
import sys
from harness.cli import main
try:
    main()
except SystemExit as end:
    ray = sys.modules.get("ray")
    print("code", end.code, "ray", bool(ray) and ray.is_initialized())
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sweep", "own.toml"], "own.toml, line 3, base.cleints"),
        (["run", "fedavg", "net=\udcff\x1b31m"], "net must be plain text on one line"),
        (["run", "exit.py"], "does not import: SystemExit: 3"),
    ],
)
def test_the_real_command_refuses_too(here: Path, given: list[str], said: str) -> None:
    """In processes of their own, for all that a test within Python can't see."""
    (here / "own.toml").write_text(FEDAVG + "[base]\ncleints = 3")
    (here / "exit.py").write_text("import sys; sys.exit(3)")
    before = content(here)
    command = [sys.executable, "-c", AS_A_USER, *(os.fsencode(word) for word in given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here, check=False)
    assert done.stdout == "code 2 ray False\n", done.stderr
    assert said in one_line((2, "", done.stderr))
    assert content(here) == before


# --- whatever it holds

SECTIONS = ["base", "grid", "hyper", "hyper.kdia", "search", "search.space", "search.kdia", "execution"]
SECTIONS += [f"base.{name}" for name in ("local", "partition", "proxy", "fleet", "availability", "evaluation")]
LEAVES = sorted({name for key in KNOWN for name in (key, key.rpartition(".")[2], key.removeprefix("execution."))})
SEARCHES = sorted(Search.model_fields)
SCALARS = st.one_of(
    st.sampled_from(
        ["1", "0.5", "2", "true", "'train'", "'iid'", "'mlp'", "'digits'", "'x'", "[]", "[1, 0.5]", "{}"]
    ),
    st.sampled_from(["['mlp', 'lenet5']", "{ uniform = [0.1, 1] }", "{ choice = [1, 2] }", "['1 local.lr = 1']"]),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12).map(json.dumps),
    st.dates().map(datetime.date.isoformat),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda found: f"[{', '.join(found)}]"),
        st.tuples(st.sampled_from(["a", "lr", "int", "''"]), inner).map(lambda pair: f"{{ {pair[0]} = {pair[1]} }}"),
    ),
    max_leaves=4,
)


def misspelt(name: str, at: int) -> str:
    at %= len(name)
    return name[:at] + name[at + 1 :]


NAMES = st.sampled_from([*LEAVES, *SEARCHES, "methods", "seeds", "name", "title", "published"])
KEYS = st.one_of(
    NAMES,
    st.builds(misspelt, NAMES, st.integers(0, 30)),
    st.sampled_from(LEAVES).map(json.dumps),
    st.text(max_size=8).map(json.dumps),
)
LINES = st.one_of(
    st.tuples(KEYS, st.one_of(SCALARS, NESTED)).map(" = ".join),
    st.sampled_from([*SECTIONS, *SECTIONS, "bsae", "base.locl", "search.kdai"]).map("[{}]".format),
    st.sampled_from(["holdout.validation = 0.1", "[[base]]", "[", "seeds = 2", "'local.lr' = [1, 2]", "# no"]),
)
HEADS = st.sampled_from(
    [FEDAVG, 'methods = ["kdia"]\n', 'methods = ["fedavg", "kdia"]\nseeds = [1]\n', "", 'methods = ["fedmd"]\n']
)
CARDS = st.one_of(
    st.builds(
        lambda head, lines: "\n".join([head, *lines]).encode(errors="replace"), HEADS, st.lists(LINES, max_size=6)
    ),
    st.builds(
        lambda table, key, value: f'methods = ["kdia"]\n[{table}]\n{key} = {value}\n'.encode(errors="replace"),
        st.sampled_from(SECTIONS),
        KEYS,
        NESTED,
    ),
    st.binary(max_size=40),
)
TEXTS = st.one_of(
    st.builds("{}={}".format, KEYS, st.one_of(SCALARS, NESTED, st.text(max_size=8))),
    st.sampled_from(
        ["alpha=0.1,1", "seeds=2", "methods=fedavg,kdia", "hosts=1", "rounds=3", "proxy.rows=5", "net=mlp"]
    ),
    st.text(min_size=1, max_size=8).filter(lambda text: not text.startswith("-")),
)
ANY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def taken_or_one_line(here: Path, fedstill: Told, *given: str) -> None:
    """What is taken resolves to trials that can be written down and read back; what is not is one line."""
    before = content(here)
    told = fedstill(*given)
    if told is not None:
        assert "\x00" not in one_line(told)
    assert content(here) == before


@ANY
@given(CARDS, st.lists(TEXTS, max_size=2))
@example(b"methods = ['fedavg']\n[base]\n'a.' = 1", ["\udc80"])
@example(b"methods = ['kdia']\n[search.space]\nhyper = { choice = [1, {}] }", [])
def test_any_card_is_taken_or_refused_in_one_line(
    here: Path, fedstill: Told, halted: None, text: bytes, texts: list[str]
) -> None:
    (here / "any.toml").write_bytes(text)
    taken_or_one_line(here, fedstill, "sweep", "any.toml", *texts)


@ANY
@given(st.sampled_from(["fedavg", "kdia", "fedmd", "any.py"]), st.lists(TEXTS, min_size=1, max_size=4))
@example("kdia", ["a\x1b\u202eb=1"])
def test_any_overrides_are_taken_or_refused_in_one_line(
    here: Path, fedstill: Told, halted: None, name: str, texts: list[str]
) -> None:
    (here / "any.py").write_text(METHOD + "    lr: float = 1.0\n    word: str | None = None")
    taken_or_one_line(here, fedstill, "run", name, *texts)


FIELDS = st.sampled_from(
    ["a: int = 1", "a: 'B' = 1", "a: list = None", "a: tuple[int, ...] = (1,)", "a: int", "a = 1"]
)
BODIES = st.sampled_from(
    [
        *("needs = 1", "needs = frozenset({'fleet'})", "needs = property(lambda self: 1 / 0)", "identity = 3"),
        *(
            "def __post_init__(self): raise OSError('no')",
            "def __post_init__(self): raise SystemExit",
            "pass",
            "return 1",
        ),
        *("def roles(self, world): 1 / 0", "__slots__ = ()", "class Inner: pass", "def __eq__(self, other): 1 / 0"),
        *("def __hash__(self): 1 / 0", "def __repr__(self): 1 / 0", "a: object = float('inf')", "b: dict = None"),
    ]
)


@ANY
@given(
    st.lists(st.one_of(FIELDS, BODIES), max_size=3),
    st.sampled_from(["", "x = (", "raise Exception", "class B(Mine): pass"]),
)
def test_any_method_file_is_taken_or_refused_in_one_line(
    here: Path, fedstill: Told, halted: None, lines: list[str], last: str
) -> None:
    (here / "any.py").write_text(METHOD + "".join(f"    {line}\n" for line in ["x: int = 0", *lines]) + last)
    taken_or_one_line(here, fedstill, "run", "any.py")
