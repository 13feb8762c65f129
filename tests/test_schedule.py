"""Settings that change while a trial runs: how they are written, what is refused, and that they do what they say."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from harness import axes, config, schedule
from harness.checkpoint import pack, unpack
from harness.data import card, load
from harness.inline import InlinePool
from harness.pool import RayPool
from harness.refusal import Refused
from harness.schedule import Change
from harness.scribe import command_of
from harness.server import Server
from harness.settings import Unfit
from harness.work import make_setup

CLOCKS = ("seconds", "server_seconds")
BASICS = {
    "clients": 8,
    "cohort": 3,
    "rounds": 6,
    "local": {"epochs": 1, "batch": 16, "lr": 0.05, "lr_decay": 0.9},
    "net": "mlp",
}


@pytest.fixture(autouse=True, scope="module")
def denormals() -> Iterator[None]:
    """Hosts in this process have denormal numbers flushed to zero; other tests need them."""
    yield
    torch.set_flush_denormal(False)


def trial(*texts: str, method: str = "kdia", **more: Any) -> config.Trial:
    return config.resolve({"method": method, **BASICS, "schedule": texts, **more})


def refusal(*texts: str, method: str = "kdia") -> str:
    with pytest.raises(Unfit) as caught:
        trial(*texts, method=method)
    assert caught.value.key == "schedule"
    return str(caught.value)


# ---- how it is written


def test_a_change_is_a_round_and_settings() -> None:
    text = '20 hyper.tau=3 local.lr=0.1 hyper.words=["a b",2] hyper.kind=ema hyper.quoted="true \\" =" hyper.off=null'
    change = schedule.parse(text)
    assert change.round == 20
    assert change.settings == {
        "hyper.tau": 3,
        "local.lr": 0.1,
        "hyper.words": ("a b", 2),
        "hyper.kind": "ema",
        "hyper.quoted": 'true " =',
        "hyper.off": None,
    }
    assert schedule.parse(str(change)) == change
    assert [type(value) for value in change.settings.values()] == [int, float, tuple, str, str, type(None)]


@pytest.mark.parametrize(
    "text",
    ["", "20", "local.lr=0.1", "3 local.lr", "3 local.lr=", "3.5 local.lr=1", "-3 local.lr=1", "3 local.lr=[1", "x"],
)
def test_what_is_no_change_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="a change is a round and its new settings"):
        schedule.parse(text)


@pytest.mark.parametrize(("text", "said"), [("3 a=1 a=2", "a is set twice"), ("3 a=1x", "1x is no value")])
def test_a_change_that_says_nothing_clear_is_refused(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        schedule.parse(text)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["0 local.lr=0.1"], "after round 0 and before round 6"),
        (["6 local.lr=0.1"], "after round 0 and before round 6"),
        (["3 local.lr=0.1", "3 hyper.tau=2"], "after round 3 and before round 6"),
        (["3 local.epochs=2"], "unknown key of a change 'local.epochs'"),
        (["3 lr=0.2"], "unknown key of a change 'lr'"),
        (["3 hyper.tua=2"], "Did you mean 'hyper.tau'?"),
        (["3 local.lr=-1"], "round 3: local.lr must be a finite number in (0, inf), got -1"),
        (["3 local.lr=NaN"], "round 3: local.lr must be a finite number"),
        (['3 local.lr="0.1"'], "round 3: local.lr must be a finite number"),
        (["3 local.momentum=1"], "round 3: local.momentum must be a finite number in [0, 1), got 1"),
        (["3 hyper.tau=0"], "round 3: tau (hyper-parameter of method kdia) must be"),
    ],
)
def test_a_schedule_that_could_not_be_is_refused(texts: list[str], said: str) -> None:
    assert said in refusal(*texts)


def test_a_refused_schedule_says_where_it_was_set() -> None:
    with pytest.raises(Refused, match=r"override .*: schedule: round 3: local.lr must be"):
        axes.run_sweep("fedavg", ["rounds=6", 'schedule=["3 local.lr=0"]'])


def test_a_change_may_not_change_what_a_method_needs(tmp_path: Path) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom algorithms.fedavg import FedAvg\n\n"
        "@dataclass(frozen=True)\nclass Greedy(FedAvg):\n    more: bool = False\n"
        "    needs = property(lambda self: frozenset({'one_net'} | ({'proxy'} if self.more else set())))\n"
    )
    assert "what method greedy needs can't change on the way" in refusal("3 hyper.more=true", method=str(path))


# ---- the trial


def test_a_schedule_has_one_spelling() -> None:
    """Keys in order, numbers as their fields have them, and nothing that changes nothing: .05 is the rate already."""
    spelled = trial(" 2  local.lr=1 hyper.tau=3e0", "3 local.lr=1.0", "4 local.lr=0.05 local.momentum=-0.0")
    assert spelled.schedule == ("2 hyper.tau=3.0 local.lr=1.0", "4 local.lr=0.05")
    assert config.resolve(spelled.model_dump()) == spelled
    assert config.Trial.model_validate_json(spelled.model_dump_json()) == spelled
    assert trial("3 local.lr=0.05") == trial()


def test_a_schedule_is_part_of_the_digest_where_there_is_one() -> None:
    digests = {config.digest(t) for t in (trial(), trial("3 local.lr=0.1"), trial("4 local.lr=0.1"))}
    assert len(digests) == 3
    assert "schedule" in trial().model_dump()


def test_fault_policies_are_part_of_the_digest_where_they_are_set() -> None:
    usual, named, other = trial(), trial(faults={"client": "fail"}), trial(faults={"client": "skip"})
    assert config.digest(usual) == config.digest(named) != config.digest(other)


def test_at_gives_the_trial_of_a_round() -> None:
    whole = trial("2 local.lr=0.2 hyper.tau=3", "4 local.lr=0.4")
    seen = [(now.local.lr, now.hyper["tau"]) for now in map(whole.at, range(6))]
    tau = trial().hyper["tau"]
    assert seen == [(0.05, tau)] * 2 + [(0.2, 3.0)] * 2 + [(0.4, 3.0)] * 2
    assert whole.at(5) == trial(local={**BASICS["local"], "lr": 0.4}, hyper={"tau": 3})  # type: ignore[dict-item]
    assert trial().at(3) == trial()


def test_the_command_of_a_trial_reproduces_its_schedule(tmp_path: Path) -> None:
    path = tmp_path / "worded.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom algorithms.fedavg import FedAvg\n\n"
        "@dataclass(frozen=True)\nclass Worded(FedAvg):\n    word: str = 'a'\n    depths: tuple[int, ...] = (1, 2)\n"
    )
    texts = ['2 hyper.word="it\'s, [so]" local.lr=1e-05', "3 hyper.depths=[3,4] hyper.word=true", "4 hyper.word=b"]
    texts[1] = texts[1].replace("=true", '="true"')
    whole = trial(*texts, method=str(path), faults={"nonfinite": "skip", "empty_rounds": 0})
    words = shlex.split(command_of(whole))
    assert words[:2] == ["fedstill", "run"]
    (again,) = axes.run_sweep(words[2], words[3:]).cells
    assert again == whole
    assert again.at(2).hyper["word"] == "it's, [so]"


def test_schedules_can_be_an_axis() -> None:
    sweep = axes.run_sweep("fedavg", ["rounds=6", 'schedule=[],["3 local.lr=0.1"],["4 local.lr=0.1"]'])
    assert [cell.schedule for cell in sweep.cells] == [(), ("3 local.lr=0.1",), ("4 local.lr=0.1",)]
    assert sweep.axes == ("schedule",)


# ---- what it does


def tables(done: Server) -> list[list[dict[str, Any]]]:
    return [[{k: v for k, v in row.items() if k not in CLOCKS} for row in t] for t in (done.rounds, done.clients)]


def started(settings: config.Trial, pool: Any) -> Server:
    setup, mixes = make_setup(settings, load(card("digits")))
    pool.load(*((setup,) if isinstance(pool, InlinePool) else (setup, ray.put(setup.arrays))))
    return Server(setup, pool, mixes=mixes)


def finished(server: Server) -> list[list[dict[str, Any]]]:
    while not server.done:
        server.step()
    return tables(server)


CHANGES = {
    "kdia": ("3 hyper.lambda_kd=0 hyper.tau=7 local.lr=0.2 local.momentum=0.5 local.clip=0.5", "5 hyper.lambda_kd=2"),
    "fedgkd": ("3 hyper.gamma=5 local.weight_decay=0.1", "5 local.lr=0.3"),
}
SHORT = {"kdia": {"generator_epochs": 1, "generator_iterations": 3, "noise": 8}}


def chained(method: str, pool: Any) -> list[list[dict[str, Any]]]:
    """Three trials without a schedule: each goes on from the snapshot of the one before, under its new settings."""
    whole = trial(*CHANGES[method], method=method, hyper=SHORT.get(method, {}))
    content, server = None, None
    for first, end in ((0, 3), (3, 5), (5, 6)):
        server = started(whole.at(first), pool)
        if content is not None:
            server.restore(unpack(content))
        while server.round < end:
            server.step()
        content = pack(server.snapshot())
    assert server is not None
    return tables(server)


@pytest.mark.parametrize("method", ["kdia", "fedgkd"])
def test_a_schedule_is_a_snapshot_restored_under_other_settings(method: str) -> None:
    """Changes at rounds 3 and 5 of 6 are the same, bit for bit, as two stops at which the settings were changed.

    And they change something: the rounds from 3 on differ from those of the trial without a schedule.
    """
    whole = trial(*CHANGES[method], method=method, hyper=SHORT.get(method, {}))
    found = finished(started(whole, InlinePool()))
    assert found == chained(method, InlinePool())
    plain = finished(started(whole.at(0), InlinePool()))
    differs = [a["round"] for a, b in zip(found[0], plain[0], strict=True) if a != b]
    assert min(differs) == 3


def test_a_trial_with_a_schedule_goes_on_from_a_checkpoint() -> None:
    whole = trial(*CHANGES["kdia"], hyper=SHORT["kdia"])
    first = started(whole, InlinePool())
    for _ in range(4):
        first.step()
    second = started(whole, InlinePool())
    second.restore(unpack(pack(first.snapshot())))
    assert finished(second) == finished(started(whole, InlinePool()))


def test_personal_models_are_scored_under_the_settings_of_their_round(lab: Any) -> None:
    """Evaluation runs late, when hosts may be in the next round's settings already."""
    seen = []
    setup = lab.setup(rounds=4, schedule=["2 local.lr=0.3"])
    server = lab.server(setup)
    host = server.pool.host
    for round in (3, 1, 2, 0):
        host._enter(round)
        seen.append(host.trial.local.lr)
    assert seen == [0.3, 0.1, 0.3, 0.1]


def test_a_change_of_roles_is_refused_before_training(tmp_path: Path, lab: Any) -> None:
    path = tmp_path / "shifty.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom algorithms.fedavg import FedAvg\n"
        "from harness.protocol import Role\n\n"
        "@dataclass(frozen=True)\nclass Shifty(FedAvg):\n    few: int = 0\n\n    def roles(self, world):\n"
        "        return {'global': Role(world.default_net, cohort=self.few or None)}\n"
    )
    with pytest.raises(Refused, match="a change may not make other roles"):
        lab.server(lab.setup(str(path), schedule=["2 hyper.few=1"]))


@pytest.fixture(scope="module")
def hosts(cluster: None) -> Iterator[RayPool]:
    made = RayPool(config.Execution(hosts=2), "cpu")
    yield made
    for host in made.hosts:
        ray.kill(host)


@pytest.mark.cluster
def test_a_schedule_is_the_same_on_hosts(hosts: RayPool) -> None:
    whole = trial(*CHANGES["kdia"], hyper=SHORT["kdia"])
    inline = finished(started(whole, InlinePool()))
    assert finished(started(whole, hosts)) == inline
    assert chained("kdia", hosts) == inline


def test_the_text_of_a_change_sorts_its_keys() -> None:
    assert str(Change(3, {"local.lr": 0.1, "hyper.a": "b c"})) == '3 hyper.a="b c" local.lr=0.1'
