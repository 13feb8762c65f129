"""Every registered method passes the conformance suite, and the suite sees what is wrong with broken ones.

A new file in algorithms/ is tested here without a line being added.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent

import numpy as np
import pandas as pd
import pytest
import torch

from harness import catalogue, cli, registry, rig
from harness.check import check
from harness.rig import HELD, LOCAL, ONE_CLASS, SIZES, luck, run, tiny
from harness.watch import FarPool, difference, prints, weigh

HEAD = '''\
"""Broken on purpose.

Paper: none. Travels down: the model. Travels up: the model. Remembered by the client: something.
Differences from FedAvg: see the test.
"""
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from algorithms.fedavg import FedAvg
from harness.losses import cross_entropy
from harness.protocol import Broadcast, trees_of, weights
from harness.trees import clone, leaves, mean, scale, zeros


@dataclass(frozen=True)
class Broken(FedAvg):
    """See above."""

'''

# name: (the checks that must fail, words of the reason of the first, body)
BROKEN: dict[str, tuple[set[str], str, str]] = {
    "unpicklable": (
        {"pickles"},
        "pickle",
        """
        def __post_init__(self):
            object.__setattr__(self, "cache", lambda: 0)
        """,
    ),
    "reads_label_counts": (
        {"needs"},
        "label counts takes needs",
        """
        def init(self, world, rng):
            return {**super().init(world, rng), "counts": torch.tensor(world.label_counts)}
        """,
    ),
    "reads_proxy": (
        {"needs"},
        "proxy data takes needs",
        """
        def merge(self, state, updates, server):
            server.sample(4, server.rng("x"))
            return super().merge(state, updates, server)
        """,
    ),
    "reads_proxy_labels": (
        {"runs"},
        "Target -1 is out of bounds",
        """
        needs: ClassVar = frozenset({"one_net", "proxy"})

        def merge(self, state, updates, server):
            state = super().merge(state, updates, server)
            net = server.world.net(state["net"])
            batch = server.sample(4, server.rng("x"))
            p = server.fit(state["params"], lambda p, b: cross_entropy(net(p, b.x), b.y), lambda i: batch, 1, lr=0.1)
            return {**state, "params": p}
        """,
    ),
    "reads_validation": (
        {"needs"},
        "validation rows takes needs",
        """
        def reply(self, trained):
            trained.bench.scan(lambda x, y: len(y), "validation")
            return super().reply(trained)
        """,
    ),
    "needs_nothing_of_it": (
        {"needs"},
        "declares label_counts, validation, but nothing depends on it",
        """
        needs: ClassVar = frozenset({"one_net", "label_counts", "validation"})
        """,
    ),
    "forgets_the_fleet": (
        {"needs"},
        "nobody trains ['lenet5']",
        """
        needs: ClassVar = frozenset()
        """,
    ),
    "divides_by_other_classes": (
        {"finite"},
        "the update of client 1",
        """
        def prepare(self, net, inbox, memory, bench):
            return {**inbox, "others": (bench.label_counts > 0).sum() - 1}

        def loss(self, net, p, batch, inbox, memory):
            value, seen = super().loss(net, p, batch, inbox, memory)
            return value / inbox["others"], seen
        """,
    ),
    "scales_by_deviation": (
        {"finite"},
        "the update of client 0",  # its last batch has one row
        """
        def loss(self, net, p, batch, inbox, memory):
            value, seen = super().loss(net, p, batch, inbox, memory)
            return value * batch.x.std(0).mean(), seen
        """,
    ),
    "nan_in_the_state": (
        {"finite"},
        "state/spread",
        """
        def merge(self, state, updates, server):
            return {**super().merge(state, updates, server), "spread": torch.ones(1).std()}
        """,
    ),
    "numbers_for_keys": (
        {"state", "resumes"},
        "keys must be strings, not int",
        """
        def merge(self, state, updates, server):
            return {**super().merge(state, updates, server), "seen": {u.visit.client: 1 for u in updates}}
        """,
    ),
    "remembers_an_object": (
        {"state", "resumes"},
        "memory/",
        """
        def reply(self, trained):
            return {"params": trained.end}, {"seen": {trained.round}}
        """,
    ),
    "counts_on_a_tuple": (
        {"resumes"},
        "goes on from a checkpoint",
        """
        def merge(self, state, updates, server):
            state = super().merge(state, updates, server)
            known = isinstance(state.get("pair", (0,)), tuple)
            return {**state, "pair": (0, 1), "params": scale(state["params"], 1.0 if known else 0.5)}
        """,
    ),
    "no_identity": (
        {"identity"},
        "with mu=0.0 the first model is not FedAvg's",
        """
        identity: ClassVar = {"mu": 0.0}
        mu: float = 1.0

        def loss(self, net, p, batch, inbox, memory):
            value, seen = super().loss(net, p, batch, inbox, memory)
            decay = sum(x.square().sum() for _, x in leaves(p))
            return value + (self.mu + 1e-6) * decay, seen
        """,
    ),
    "sends_tensors_in_lists": (
        {"bytes"},
        "were sent",
        """
        def reply(self, trained):
            return {"params": trained.end, "more": [torch.ones(5)]}, {}
        """,
    ),
    "sends_plain_numbers": (
        {"bytes"},
        "220840 bytes up are booked, 220848 were sent",  # 55,210 floats, and a number
        """
        def reply(self, trained):
            return {"params": trained.end, "rows": trained.samples}, {}
        """,
    ),
    "gets_numbers_in_lists": (
        {"bytes"},
        "down are booked",
        """
        def broadcast(self, state, cohort, world):
            return Broadcast(shared={"params": state["params"], "sizes": list(world.sizes)})
        """,
    ),
    "writes_into_the_inbox": (
        {"purity", "order", "ships"},
        "change inbox/0/params",
        """
        def start(self, net, inbox, memory):
            for _, x in leaves(inbox["params"]):
                x.mul_(1.01)
            return inbox["params"]
        """,
    ),
    "writes_into_the_memory": (
        {"purity"},
        "change memory/w",
        """
        def remember(self, net, inbox, rng):
            return {"w": torch.zeros(1)}

        def loss(self, net, p, batch, inbox, memory):
            memory["w"].add_(1)
            return super().loss(net, p, batch, inbox, memory)
        """,
    ),
    "writes_into_payloads": (
        {"purity"},
        "merge changes params/",
        """
        def merge(self, state, updates, server):
            for u in updates:
                for _, x in leaves(u.payload["params"]):
                    x.mul_(1.01)
            return super().merge(state, updates, server)
        """,
    ),
    "writes_while_it_shows": (
        {"purity"},
        "models changes shown of the state",
        """
        def models(self, state):
            state["shown"] = 1 + state.get("shown", 0)
            return super().models(state)
        """,
    ),
    "writes_while_it_keeps": (
        {"purity", "ships"},
        "keeps changes w of a memory",
        """
        needs: ClassVar = frozenset({"one_net", "private_test"})

        def reply(self, trained):
            return {"params": trained.end}, {"params": trained.end, "w": torch.zeros(1)}

        def keeps(self, net, memory):
            memory["w"].add_(1)
            return memory["params"]
        """,
    ),
    "global_luck": (
        {"repeatable", "order", "ships", "resumes"},
        "draw from the generators",
        """
        def draw(self, net, batch, inbox, memory, rng):
            return batch.with_extra(noise=torch.randn(len(batch.y)))

        def loss(self, net, p, batch, inbox, memory):
            value, seen = super().loss(net, p, batch, inbox, memory)
            return value * (1 + 0.1 * batch.extra["noise"].mean()), seen
        """,
    ),
    "host_remembers": (
        {"order", "ships", "resumes"},
        "another order",
        """
        def reply(self, trained):
            before = getattr(self, "last", 0)
            object.__setattr__(self, "last", trained.visit.client + 1)
            return {"params": scale(trained.end, 1 + 0.01 * before)}, {}
        """,
    ),
    "memory_is_the_state": (
        {"ships", "resumes"},
        "as under Ray",
        """
        def remember(self, net, inbox, rng):
            return {"anchor": inbox["params"]["head"]}  # of the first visit, it means

        def merge(self, state, updates, server):
            for (_, x), (_, y) in zip(leaves(state["params"]), leaves(mean(trees_of(updates, "params")))):
                x.copy_(y)  # where the anchor lies, too
            return state
        """,
    ),
    "learns_from_test_rows": (
        {"test rows"},
        "there for testing",
        """
        def merge(self, state, updates, server):
            state = super().merge(state, updates, server)
            whole = sys._getframe(1).f_locals["self"].setup
            return {**state, "params": scale(state["params"], 1 + float(whole.arrays.x_test.mean()) / 1e4)}
        """,
    ),
    "learns_from_private_test_rows": (
        {"test rows"},
        "there for testing",
        """
        needs: ClassVar = frozenset({"one_net", "private_test"})

        def reply(self, trained):
            host = sys._getframe(1).f_locals["self"]
            rows = host.setup.split.test[trained.visit.client]
            seen = float(host.setup.arrays.x_train[rows].mean())
            return {"params": scale(trained.end, 1 + seen / 1e4)}, {"params": trained.end}

        def keeps(self, net, memory):
            return memory["params"]
        """,
    ),
    "ignores_the_last": (
        {"influence"},
        "client 4 took part, but the global model",
        """
        def merge(self, state, updates, server):
            return super().merge(state, [u for u in updates if u.visit.client < 4] or updates, server)
        """,
    ),
    "teacher_ignores_the_first": (
        {"influence"},
        "client 0 took part, but the teacher model",
        """
        def init(self, world, rng):
            state = super().init(world, rng)
            return {**state, "teacher": state["params"]}

        def merge(self, state, updates, server):
            some = [u for u in updates if u.visit.client] or updates
            start = dict(state)
            teacher = mean(trees_of(some, "own"), weights(some))
            return {**super().merge(state, updates, server), "teacher": teacher}

        def broadcast(self, state, cohort, world):
            return Broadcast(shared={"params": state["params"], "teacher": state["teacher"]})

        def start(self, net, inbox, memory):
            return {"params": inbox["params"], "own": inbox["teacher"]}

        def loss(self, net, p, batch, inbox, memory):
            return sum(super(Broken, self).loss(net, q, batch, inbox, memory)[0] for q in p.values()), {}

        def reply(self, trained):
            return trained.end, {}

        def models(self, state):
            return {"student": (state["net"], state["params"]), "teacher": (state["net"], state["teacher"])}
        """,
    ),
}


# Hyper-parameters with which methods show by round 3 what they do later.
AWAKE = {
    "codist": {"mode": "periodic", "period": 1},
    "fedcog": {"start_round": 1, "input_steps": 2},
    "groupmd": {"warm_rounds": 1, "patience": 1},
}


@pytest.fixture(autouse=True)
def _float_mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # hosts turn it on


def file(folder: Path, name: str, body: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(HEAD + indent(dedent(body), "    "), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("method", registry.names())
def test_every_method_bears_a_client_of_one_row(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 has one, which is one of another class than most; nothing that is booked is NaN or infinite."""
    monkeypatch.setattr(rig, "SIZES", (17, 9, 1, 14, 12))
    done = run(tiny(method, {}, registry.make(method, {}).needs, rounds=2, participation=1.0))
    numbers = [x for row in (*done.rounds, *done.clients) for x in row.values() if isinstance(x, float)]
    assert len(done.rounds) >= 2
    assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize("method", registry.names())
def test_every_method_conforms(method: str) -> None:
    findings = check(method)
    assert [f"{f.check}: {f.why}" for f in findings if not f.passed] == []
    assert {"docstring", "needs", "finite", "identity", "ships", "test rows", "influence"} <= {
        f.check for f in findings
    }


@pytest.mark.parametrize("method", AWAKE)
def test_methods_that_begin_late_conform_when_awake(method: str) -> None:
    """The tiny trial has three rounds: with its defaults such a method is still another, simpler one in them."""
    assert [f"{f.check}: {f.why}" for f in check(method, AWAKE[method]) if not f.passed] == []


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, tmp_path: Path) -> None:
    """And nothing else: a check that failed for another's reason would send an author the wrong way."""
    expected, words, body = BROKEN[name]
    found = {f.check: f.why for f in check(file(tmp_path, name, body)) if not f.passed}
    assert found.keys() == expected
    assert any(words in why for why in found.values()), found


def test_a_head_without_its_parts_is_found(tmp_path: Path) -> None:
    path = tmp_path / "headless.py"
    path.write_text(catalogue.EXAMPLE.replace("Travels up:", "Goes up:").replace("Differences from", "Not as in"))
    found = {f.check: f.why for f in check(str(path)) if not f.passed}
    assert found == {"docstring": "the head of the file lacks 'Travels up', 'Differences from'"}


def test_hyper_parameters_can_be_given(tmp_path: Path) -> None:
    body = """
        mu: float = 0.0

        def merge(self, state, updates, server):
            assert self.mu < 1
            return super().merge(state, updates, server)
    """
    method = file(tmp_path, "with_mu", body)
    assert all(f.passed for f in check(method))
    assert [f.check for f in check(method, {"mu": 2.0}) if not f.passed] == ["runs"]


def test_a_need_of_another_variant_is_honest(tmp_path: Path) -> None:
    """What is declared may be used by a choice that is not the default."""
    body = """
        needs: ClassVar = frozenset({"one_net", "label_counts"})
        weighted: bool = False

        def init(self, world, rng):
            return super().init(world, rng) | ({"sizes": world.label_counts.sum(1).tolist()} if self.weighted else {})
    """
    assert all(f.passed for f in check(file(tmp_path, "by_choice", body)))


# ---- the trial that methods are tried on


def test_the_tiny_trial_has_its_odd_clients() -> None:
    needs = frozenset({"one_net", "proxy", "private_test", "validation"})
    setup = tiny("fedavg", {}, needs)
    counts = setup.split.counts
    assert counts.sum(1).tolist() == list(SIZES)
    assert (counts[ONE_CLASS] > 0).sum() == 1
    assert min(SIZES) < LOCAL["batch"]
    assert 1 in {size % LOCAL["batch"] for size in SIZES}
    held = [*setup.split.clients, *setup.split.validation, *setup.split.test]
    rows = np.concatenate(held)
    assert len(set(rows.tolist())) == len(rows) == sum(SIZES) + 2 * HELD * len(SIZES)
    assert setup.proxy is not None
    assert tiny("fedavg", {}, frozenset({"one_net"})).proxy is None


def test_weighing_finds_what_hides() -> None:
    """A float32 has 4 bytes, an int64 has 8; plain numbers count 8 in lists, and anywhere in a payload."""
    inbox = {"params": {"w": torch.zeros(3)}, "round": 3, "net": "mlp", "on": True, "sizes": [1, 2], "a": np.zeros(2)}
    assert weigh(inbox, numbers=False) == 12 + 16 + 16
    assert weigh({"w": torch.zeros(3), "n": 5}, numbers=True) == 12 + 8
    assert weigh({"deep": [{"w": torch.zeros(2, dtype=torch.int64)}]}, numbers=False) == 16


def test_fingerprints_tell_bits_types_and_places() -> None:
    one = {"a": torch.tensor([0.0]), "b": [torch.ones(2), 1]}
    assert prints(one) == prints({"a": torch.tensor([0.0]), "b": [torch.ones(2), 1]})
    for other in (
        {**one, "a": torch.tensor([-0.0])},
        {**one, "a": torch.tensor([0.0], dtype=torch.float64)},
        {**one, "a": torch.tensor([[0.0]])},
    ):
        assert difference(prints(one), prints(other)) == "a"
    assert difference(prints(one), prints({**one, "b": [torch.ones(2), 2]})) == "b/1"
    assert difference(prints(one), prints({"a": one["a"]})) == "b/0"


def test_luck_is_given_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with luck(1):
        torch.rand(7)
    assert torch.equal(torch.rand(2), expected)


def test_a_far_pool_works_in_another_order_and_ships_copies() -> None:
    """What the checks `order` and `ships` stand on: the last visit asked for is done first, and handles are bytes."""
    setup, pool = tiny("fedavg", {}, frozenset({"one_net"}), participation=1.0), FarPool()
    seen: list[int] = []
    work = pool._work
    pool._work = lambda one: (seen.append(one.order.visit.client), work(one))[1]  # type: ignore[method-assign, func-returns-value]
    done = run(setup, pool)
    by_size = sorted(range(len(SIZES)), key=lambda k: -SIZES[k])
    assert seen == by_size[::-1] * done.round
    assert isinstance(pool.put({"x": torch.ones(1)}), bytes)


# ---- the command


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedstill", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(monkeypatch, "check", "fedprox", "mu=0.5") == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    assert said.count("ok") >= 14
    _, words, body = BROKEN["ignores_the_last"]
    assert command(monkeypatch, "check", file(tmp_path, "command_broken", body)) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert words in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fedprx"], "Did you mean 'fedprox'?"),
        (["fedprox", "nu=1"], "unknown key 'nu'"),
        (["fedprox", "mu=-1"], "mu"),
        (["fedprox", "mu=0,1"], "takes one value"),
        (["./nowhere.py"], "no method file 'nowhere.py'"),
    ],
)
def test_the_command_refuses(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "check", *words) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.cluster
def test_a_users_own_file_runs(tmp_path: Path) -> None:
    """The example of algorithms/README.md, outside of the repository, under Ray: server and host load the file."""
    (tmp_path / "unsure.py").write_text(catalogue.EXAMPLE, encoding="utf-8")
    words = ["run", "./unsure.py", "weight=0.5", "rounds=2", "clients=4", "hosts=1", "mlflow=false"]
    line = [sys.executable, "-m", "harness.cli", *words, "--results", "out"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = pd.concat(map(pd.read_parquet, (tmp_path / "out" / "trials").glob("*.parquet"))).to_dict("records")
    assert (row["method"], row["status"], row["rounds_done"]) == ("unsure", "done", 2)
    assert json.loads(row["config"])["hyper"] == {"weight": 0.5}
    assert "unsure" in (tmp_path / "out" / "leaderboard.md").read_text(encoding="utf-8")
