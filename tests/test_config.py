"""Cards, overrides and trials: what is accepted, what is refused and how, and what the hash depends on.

A small data card stands in for the shipped ones, so that these tests say nothing about data.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import RULES_VERSION, axes, cards, config, overrides, registry
from harness.refusal import Refused

SHIPPED = cards.root  # before the fixture below puts its own cards in place

CARD = """
title = "Two settings"  # a comment
methods = ["fedavg", "fedprox", "kdia"]
seeds = 2

[base]
clients = 10
local.lr = 0.1

[base.partition]
min_samples = 1

[hyper.kdia]
tau = 3

[grid]
"partition.alpha" = [0.1, 1]
"kdia.lambda_kd" = [0, 0.5, 1.0]

[execution]
hosts = 2
"""

OWN_METHOD = """
from dataclasses import dataclass
from typing import Literal
from algorithms.fedavg import FedAvg
from harness.refusal import Refused

@dataclass(frozen=True)
class Own(FedAvg):
    depths: tuple[int, ...] = (1, 2)
    mode: Literal["low", "high"] = "low"
    share: float = 1
    on: bool = True
    word: str = "a"

    def __post_init__(self):
        if self.share > 1:
            raise Refused(f"share must be at most 1, got {self.share}")
"""


@pytest.fixture(scope="module", autouse=True)
def small_cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shipped cards for these tests: one data set, one sweep."""
    folder = tmp_path_factory.mktemp("cards")
    for kind in ("datasets", "sweeps"):
        (folder / kind).mkdir()
    (folder / "datasets" / "digits.toml").write_text('shape = [1, 8, 8]\nclasses = 10\ndefault_net = "lenet5"\n')
    (folder / "sweeps" / "two.toml").write_text(CARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "root", lambda kind: folder / kind)
        yield folder


@pytest.fixture
def card(tmp_path: Path) -> Any:
    """Writes a card and loads it as a sweep."""

    def load(text: str, *texts: str) -> axes.Sweep:
        path = tmp_path / "own.toml"
        path.write_text(text)
        return axes.load_sweep(path, texts)

    return load


@pytest.fixture
def own_method(tmp_path: Path) -> str:
    path = tmp_path / "own_method.py"
    path.write_text(OWN_METHOD)
    return str(path)


OTHER_SETTINGS = [
    "seed=1",
    "rounds=51",
    "clients=21",
    "participation=0.5",
    "net=mlp",
    "alpha=0.4",
    "kind=iid",
    "min_samples=9",
]
OTHER_SETTINGS += [
    "long_tail=10",
    "epochs=4",
    "lr=0.02",
    "momentum=0.9",
    "augment=false",
    "drop_last=true",
    "every=2",
    "targets=[0.5]",
    "tail=0.2",
    "nonfinite=skip",
    "empty_rounds=3",
    'schedule=["3 local.lr=0.5"]',
]


def one(*texts: str, method: str = "fedavg") -> config.Trial:
    sweep = axes.run_sweep(method, texts)
    assert len(sweep.cells) == 1
    return sweep.cells[0]


def refusal(*texts: str, method: str = "fedavg") -> str:
    with pytest.raises(Refused) as caught:
        axes.run_sweep(method, texts)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


# --- a trial


def test_defaults_are_filled_in() -> None:
    trial = config.resolve({"method": "kdia"})
    assert (trial.dataset, trial.net, trial.clients, trial.cohort, trial.rounds) == ("digits", "lenet5", 20, 20, 50)
    assert trial.hyper.keys() == config.hyper_fields("kdia").keys()
    assert trial.hyper["tau"] == 2.0
    assert registry.make(trial.method, trial.hyper) == registry.make("kdia", {})


def test_resolving_is_idempotent_also_through_json() -> None:
    trial = one("cohort=3", "targets=[0.5,0.8]", "kind=iid", method="kdia")
    assert config.resolve(trial.model_dump()) == trial
    assert config.resolve(json.loads(trial.model_dump_json())) == trial


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_a_cohort_and_its_ratio_say_the_same(sizes: tuple[int, int]) -> None:
    """k of N clients, given as a count or as the ratio k / N, is one trial: floor(N * (k / N)) must not lose one."""
    clients, cohort = sizes
    by_count = config.resolve({"method": "fedavg", "clients": clients, "cohort": cohort})
    by_ratio = config.resolve({"method": "fedavg", "clients": clients, "participation": cohort / clients})
    assert by_count == by_ratio
    assert by_count.cohort == cohort


@pytest.mark.parametrize(
    ("clients", "share", "cohort"), [(100, 0.29, 29), (10, 0.19, 1), (20, 0.01, 1), (1, 1.0, 1), (7, 0.5, 3)]
)
def test_the_cohort_is_rounded_down_but_never_empty(clients: int, share: float, cohort: int) -> None:
    """100 * 0.29 is 28.999999999999996 in binary; a user who writes 0.29 of 100 means 29."""
    assert one(f"clients={clients}", f"participation={share}").cohort == cohort


def test_an_override_of_the_cohort_takes_back_the_cards_ratio(card: Any) -> None:
    text = 'methods = ["fedavg"]\n[base]\nclients = 10\nparticipation = 0.5'
    assert card(text).cells[0].cohort == 5
    sweep = card(text, "cohort=2")
    assert (sweep.cells[0].cohort, sweep.cells[0].participation) == (2, 0.2)


def test_a_whole_number_serves_as_a_float_and_is_the_same_setting() -> None:
    assert one("lr=1") == one("lr=1.0")
    assert isinstance(one("lr=1").local.lr, float)
    whole = one("tau=2", method="kdia")
    assert whole == one(method="kdia")
    assert isinstance(whole.hyper["tau"], float)


# --- the hash


def test_the_digest_of_a_known_trial() -> None:
    """This digest names rows in published tables. It may change only together with `harness.RULES_VERSION`, or
    when a setting, a default or a hyper-parameter of fedavg is added, removed or changed: then old rows are of
    another protocol, and the new digest belongs in here with a word in the change log.

    It is sha256 of the text below: keys sorted, no spaces, every default spelled out.
    """
    trial = one("net=mlp", "seed=1", "alpha=0.1")
    text = (
        '{"rules":2,"trial":{"availability":{"dropout":0.0,"pattern":"uniform","period":24,"straggler_work":0.5,'
        '"stragglers":0.0,"trace":"","trace_hash":"","window":0.5},"clients":20,"cohort":20,"dataset":"digits",'
        '"evaluation":{"batch":1000,"every":1,"tail":0.3,"targets":[]},"fleet":{"by":"random","nets":[],"shares":[]},'
        '"holdout":{"test":0.0,"validation":0.0},"hyper":{},"local":{"augment":true,"batch":64,"clip":0.0,'
        '"drop_last":false,"epochs":5,"lr":0.01,"lr_decay":1.0,"momentum":0.0,"weight_decay":0.0},"method":"fedavg",'
        '"net":"mlp","participation":1.0,"partition":{"alpha":0.1,"classes_per_client":2,"domains":"none",'
        '"fraction":1.0,"group":10,"kind":"dirichlet","long_tail":1.0,"min_samples":10,"shards_per_client":2,'
        '"shift":"none","shift_level":0.0,"size_alpha":0.5},"proxy":{"balanced":false,"rows":0,"source":"none"},'
        '"rounds":50,"seed":1,"source":""}}'
    )
    assert config.digest(trial) == hashlib.sha256(text.encode()).hexdigest()
    assert config.digest(trial) == "964257f9012a44e86e2ad634d5386b4d90488c98235d1ca0e61b38073b18b64a"
    assert config.trial_id(trial) == config.digest(trial)[:16]


def _shuffled(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict):
        return value
    items = [(k, _shuffled(v, rng)) for k, v in value.items()]
    rng.shuffle(items)
    return dict(items)


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(rng: random.Random) -> None:
    trial = one(method="kdia")
    assert config.digest(config.resolve(_shuffled(trial.model_dump(), rng))) == config.digest(trial)


@pytest.mark.parametrize(
    "text",
    [
        "hosts=3",
        "gpus_per_host=0.25",
        "device=cpu",
        "parallel=2",
        "data=/tmp/x",
        "mlflow=false",
        "address=auto",
        "retries=0",
        "visit_timeout_s=1",
    ],
)
def test_execution_settings_do_not_matter(text: str) -> None:
    assert config.digest(one(text)) == config.digest(one())


@pytest.mark.parametrize(
    "text",
    OTHER_SETTINGS,
)
def test_every_other_setting_matters(text: str) -> None:
    assert config.digest(one(text)) != config.digest(one())


def test_a_hyper_parameter_matters() -> None:
    assert config.digest(one("tau=3", method="kdia")) != config.digest(one(method="kdia"))


def test_the_rules_version_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.digest(one())
    monkeypatch.setattr("harness.config.RULES_VERSION", RULES_VERSION + 1)
    assert config.digest(one()) != before


def test_zero_has_one_spelling() -> None:
    assert config.digest(one("momentum=-0.0")) == config.digest(one("momentum=0"))


def test_fields_that_a_kind_does_not_read_do_not_make_two_trials() -> None:
    iid = {"method": "fedavg", "partition": {"kind": "iid", "alpha": 0.1}}
    assert config.resolve(iid) == config.resolve({"method": "fedavg", "partition": {"kind": "iid"}})


def test_a_users_method_counts_by_name_and_content(own_method: str, tmp_path: Path) -> None:
    """Moving the file changes nothing; changing it gives other trials, and refuses to go on with the old ones."""
    trial = one(method=own_method)
    assert Path(trial.method).is_absolute()
    moved = tmp_path / "elsewhere" / "own_method.py"
    moved.parent.mkdir()
    moved.write_text(OWN_METHOD)
    assert config.digest(one(method=str(moved))) == config.digest(trial)
    moved.write_text(OWN_METHOD + "# changed\n")
    assert config.digest(one(method=str(moved))) != config.digest(trial)
    Path(own_method).write_text(OWN_METHOD + "# changed\n")
    with pytest.raises(Refused, match="content changed"):
        config.resolve(trial.model_dump())


# --- cards, axes, precedence


def test_a_card_gives_its_cells() -> None:
    """2 alphas x 2 seeds x (fedavg + fedprox + 3 kdia) = 20; lambda_kd multiplies kdia alone."""
    sweep = axes.load_sweep("two")
    assert (sweep.name, sweep.title) == ("two", "Two settings")
    assert len(sweep.cells) == 20
    assert sweep.axes == ("partition.alpha", "kdia.lambda_kd")
    assert sweep.execution.hosts == 2
    assert {c.method: sum(d.method == c.method for d in sweep.cells) for c in sweep.cells} == {
        "fedavg": 4,
        "fedprox": 4,
        "kdia": 12,
    }
    assert {c.hyper["tau"] for c in sweep.cells if c.method == "kdia"} == {3.0}
    assert {(c.clients, c.local.lr, c.partition.min_samples) for c in sweep.cells} == {(10, 0.1, 1)}
    assert [c.partition.alpha for c in sweep.cells] == [0.1] * 10 + [1.0] * 10
    assert [c.seed for c in sweep.cells[:10]] == [0] * 5 + [1] * 5
    assert axes.load_sweep("two") == sweep


def test_what_is_set_last_wins(card: Any) -> None:
    base = 'methods = ["kdia"]\n[base]\nlocal.lr = 0.1\n'
    assert card('methods = ["kdia"]').cells[0].local.lr == 0.01
    assert card(base).cells[0].local.lr == 0.1
    assert [c.local.lr for c in card(base, "lr=0.2,0.3").cells] == [0.2, 0.3]
    grid = 'methods = ["kdia"]\n[grid]\n"local.lr" = [0.4, 0.5]\n"kdia.tau" = [1, 2]\n'
    assert card(grid).axes == ("local.lr", "kdia.tau")
    narrowed = card(grid, "lr=0.2", "tau=3")
    assert [(c.local.lr, c.hyper["tau"]) for c in narrowed.cells] == [(0.2, 3.0)]
    assert narrowed.axes == ()
    assert card(grid, "hosts=1").execution.hosts == 1


def test_overrides_replace_methods_and_seeds() -> None:
    sweep = axes.load_sweep("two", ["methods=fedavg,fedprox", "seeds=5,7", "alpha=1"])
    assert [(c.method, c.seed) for c in sweep.cells] == [("fedavg", 5), ("fedprox", 5), ("fedavg", 7), ("fedprox", 7)]
    assert sweep.axes == ()
    only = axes.load_sweep("two", ["method=fedavg", "seed=3", "alpha=1"])
    assert [(c.method, c.seed) for c in only.cells] == [("fedavg", 3)]
    assert [c.seed for c in axes.run_sweep("fedavg", ["seeds=3"]).cells] == [0, 1, 2]
    assert [c.seed for c in axes.run_sweep("fedavg", ["seeds=[3]"]).cells] == [3]


def test_equal_cells_are_one() -> None:
    """1 and 1.0 are one value; alpha means nothing to iid, so iid x 2 alphas is one cell."""
    assert len(axes.run_sweep("fedavg", ["alpha=1,1.0,1e0"]).cells) == 1
    assert axes.run_sweep("fedavg", ["alpha=1,1.0"]).axes == ()
    crossed = axes.run_sweep("fedavg", ["kind=iid,dirichlet", "alpha=0.1,1"])
    assert [(c.partition.kind, c.partition.alpha) for c in crossed.cells] == [
        ("iid", 0.5),
        ("dirichlet", 0.1),
        ("dirichlet", 1.0),
    ]


def test_brackets_make_one_value_and_commas_make_an_axis() -> None:
    assert one("targets=[0.5, 0.8]").evaluation.targets == (0.5, 0.8)
    sweep = axes.run_sweep("fedavg", ["targets=[0.5,0.8],[],[0.9]"])
    assert [c.evaluation.targets for c in sweep.cells] == [(0.5, 0.8), (), (0.9,)]
    assert sweep.axes == ("evaluation.targets",)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=1", (1,)),
        ("k=-1.5", (-1.5,)),
        ("k=1e-3", (0.001,)),
        ("k=1_000", (1000,)),
        ("k=true,false", (True, False)),
        ("k=True", ("True",)),
        ("k=007", ("007",)),
        ("k=a b", ("a b",)),
        ("k= a , b ", ("a", "b")),
        ('k="a,b",c', ("a,b", "c")),
        ("k='[x]'", ("[x]",)),
        (r'k=["a \"b, c\" d", e]', (['a "b, c" d', "e"],)),
        (r'k="a\\",b', ("a\\", "b")),
        ("k=[a, 'b,c', 1]", (["a", "b,c", 1],)),
        ("k=/home/o'neil/x", ("/home/o'neil/x",)),
        ("k=a=b", ("a=b",)),
        ("k=2020-01-01", ("2020-01-01",)),
        ("k=1 # one", ("1 # one",)),
    ],
)
def test_values_are_read_as_in_toml(text: str, values: tuple[Any, ...]) -> None:
    read = overrides.parse([text])[0].values
    assert read == values
    assert [type(v) for v in read] == [type(v) for v in values]


@pytest.mark.parametrize(
    "text",
    ["k", "=1", " =1", "k=", "k=1,", "k=,", "k=[1", "k=1]", "k=[[1]]", 'k="a', 'k="a"\nb="c"', "k={a=1}", "k=[,]"],
)
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(Refused, match="override"):
        overrides.parse([text])


def test_a_key_is_its_full_name_or_a_unique_last_part() -> None:
    assert one("alpha=0.3") == one("partition.alpha=0.3")
    same = {config.digest(one(text, method="kdia")) for text in ("tau=3", "kdia.tau=3", "hyper.kdia.tau=3")}
    assert len(same) == 1
    assert "ambiguous" in refusal("batch=1")
    assert "local.batch, evaluation.batch" in refusal("batch=1")


def test_a_method_with_the_name_of_a_table_keeps_its_hyper_parameters_apart(tmp_path: Path) -> None:
    """A method called `local` with a hyper-parameter called lr must not shadow local.lr."""
    path = tmp_path / "local.py"
    path.write_text(OWN_METHOD.replace("share: float = 1", "lr: float = 1\n    share: float = 1"))
    trial = one("local.lr=0.5", "hyper.local.lr=0.25", method=str(path))
    assert (trial.local.lr, trial.hyper["lr"]) == (0.5, 0.25)
    assert "ambiguous" in refusal("lr=1", method=str(path))


def test_hyper_parameters_are_checked_against_their_annotations(own_method: str) -> None:
    trial = one("depths=[3,4]", "mode=high", "share=0", "on=false", "word='1'", method=own_method)
    assert trial.hyper == {"depths": (3, 4), "mode": "high", "share": 0.0, "on": False, "word": "1"}
    assert config.resolve(json.loads(trial.model_dump_json())) == trial
    for text, said in [
        ("depths=[1.5]", "a list, each a whole number"),
        ("depths=3", "a list"),
        ("mode=hihg", "Did you mean 'high'"),
        ("share=x", "finite number"),
        ("share=inf", "finite number"),
        ("share=true", "finite number"),
        ("on=1", "true or false"),
        ("word=1", "plain text"),
        ("share=2", "at most 1"),
        ("own-method.shar=2", "Did you mean 'own-method.share'"),
    ]:
        message = refusal(text, method=own_method)
        assert said in message
        assert f"override {text!r}" in message
        assert "own-method" in message or "ambiguous" in message


def test_resolve_setting_gives_one_trial() -> None:
    assert axes.resolve_setting(["alpha=0.1", "clients=7"]).method == "fedavg"
    with pytest.raises(Refused, match="one setting"):
        axes.resolve_setting(["alpha=0.1,1"])


# --- refusals


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # a name that does not exist: the key, a choice, a data set, a net
        ("alhpa=1", "Did you mean 'partition.alpha'?"),
        ("local.lrr=1", "Did you mean 'local.lr'?"),
        ("partiton.alpha=1", "Did you mean 'partition.alpha'?"),
        ("partition=iid", "set one of partition.kind"),
        ("kdia.tau=1", "kdia is not in this sweep"),
        ("kind=dirichelt", "Did you mean 'dirichlet'?"),
        ("shift=rotate", "Did you mean 'rotation'?"),
        ("dataset=digit", "Did you mean 'digits'?"),
        ("dataset=../datasets/digits", "unknown dataset"),
        ("net=lenet", "Did you mean 'lenet5'?"),
        ("device=gpu", "Allowed: auto, cpu, cuda"),
        # ranges
        ("alpha=0", "partition.alpha must be a finite number in (0, 1e+06], got 0"),
        ("alpha=-1", "(0, 1e+06]"),
        ("alpha=nan", "got nan"),
        ("alpha=inf", "got inf"),
        ("size_alpha=0", "size_alpha"),
        ("participation=0", "participation must be a finite number in (0, 1], got 0"),
        ("participation=1.01", "(0, 1]"),
        ("cohort=21", "at most the 20 clients"),
        ("cohort=-1", "cohort"),
        ("clients=0", "clients"),
        ("rounds=0", "rounds"),
        ("rounds=-3", "got -3"),
        ("rounds=99999999999999999999", "rounds"),
        ("lr=0", "local.lr must be a finite number in (0, inf), got 0"),
        ("lr=-0.1", "local.lr"),
        ("momentum=1", "[0, 1)"),
        ("local.batch=0", "local.batch"),
        ("epochs=0", "local.epochs"),
        ("lr_decay=1.1", "(0, 1]"),
        ("fraction=0", "(0, 1]"),
        ("long_tail=0.5", "[1, 1e+06]"),
        ("tail=0", "(0, 1]"),
        ("targets=[0.5,1.5]", "a list, each a finite number in (0, 1), got 1.5"),
        ("seed=-1", "seed must be"),
        ("hosts=-1", "execution.hosts"),
        ("gpus_per_host=0.4", "1/n"),
        ("gpus_per_host=1.5", "1/n"),
        ("gpus_per_server=0.7", "1/n"),
        ("cpus_per_host=0", "execution.cpus_per_host"),
        # types
        ('lr="0.1"', "got '0.1'"),
        ("lr=true", "got True"),
        ("clients=true", "a whole number"),
        ("clients=10.0", "got 10.0"),
        ("clients=1e3", "a whole number"),
        ("augment=1", "true or false"),
        ("dataset=1", "plain text"),
        ("seed=a", "a whole number"),
        ("targets=0.5", "a list"),
        ("data=a\x00b", "plain text"),
        # contradictions
        ("seeds=0", "at least one"),
        ("methods=kdia", "already"),
        ("hosts=1,2", "one value"),
        ("shards_per_client=3", "changes nothing"),
        ("shift_level=3", "changes nothing"),
        ("seeds=100001", "split it"),
    ],
)
def test_bad_settings_are_refused_in_one_line(text: str, said: str) -> None:
    extra = ["kind=quantity"] if text.startswith("size_alpha") else []
    message = refusal(text, *extra)
    assert said in message
    assert text.startswith("seeds=100001") or "override" in message


def test_contradicting_overrides_are_refused() -> None:
    assert "set twice" in refusal("alpha=1", "partition.alpha=2")
    assert "set twice" in refusal("seed=1", "seeds=2")
    assert "give one of them" in refusal("participation=0.5", "cohort=3")
    assert "changes nothing with iid" in refusal("kind=iid", "alpha=0.1")
    assert "split it" in refusal("seeds=1000", f"alpha={','.join(str(i / 1000) for i in range(1, 1000))}")


@pytest.mark.parametrize("gpus", [0.0, 0.5, 0.25, 0.2, 0.33, 0.3333, 0.14, 1.0, 2.0])
def test_fractions_that_ray_can_place_are_accepted(gpus: float) -> None:
    assert axes.run_sweep("fedavg", [f"gpus_per_host={gpus}"]).execution.gpus_per_host == gpus


def test_the_server_has_a_core_when_it_trains() -> None:
    assert axes.run_sweep("fedavg").execution.server_cpus == 1.0
    assert axes.run_sweep("fedavg", ["hosts=2"]).execution.server_cpus == 0.0
    assert axes.run_sweep("fedavg", ["hosts=2", "cpus_per_server=0.5"]).execution.server_cpus == 0.5


@pytest.mark.parametrize("method", ["fedavgg", "../fedavg", "missing.py", "", "x" * 400 + ".py", "a\x00.py", "a\nb"])
def test_unknown_methods_are_refused(method: str) -> None:
    assert "method" in refusal(method=method)


def test_a_net_that_cannot_take_the_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, shape: tuple[int, ...], classes: int) -> None:
        raise Refused(f"too small: {shape}, {classes}")

    monkeypatch.setattr("harness.nets.build", build)
    assert "override 'net=mlp': net mlp on digits: too small: (1, 8, 8), 10" in refusal("net=mlp")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "fedavg"),
        ({"method": 3}, "method"),
        ({"method": "fedavg", "hyper": []}, "table"),
        ({"method": "fedprox", "hyper": {"m": 1}}, "hyper-parameter of method fedprox 'm'"),
        ({"method": "fedavg", "local": {"lrr": 1}}, "Did you mean 'local.lr'"),
        ({"method": "fedavg", "roundss": 1}, "Did you mean 'rounds'"),
        ({"method": "fedavg", "local": 1}, "local must be a table"),
        ({"method": "fedavg", 1: 2}, "1"),
    ],
)
def test_resolve_refuses_by_itself(raw: Any, said: str) -> None:
    with pytest.raises(Refused) as caught:
        config.resolve(raw)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods = ]\n", "at line 1"),
        ('methods = ["fedavg"]\nmethods = ["kdia"]\n', "line 2"),
        ("", "no methods"),
        ("methods = []", "no methods"),
        ("methods = [1]", "line 1, methods"),
        ('methods = ["fedavgg"]', "Did you mean 'fedavg'?"),
        ('mehtods = ["fedavg"]', "own.toml, line 1, mehtods: unknown key 'mehtods'. Did you mean 'methods'?"),
        ('methods = ["fedavg"]\n[base]\nclients = 10\nlrr = 1', "own.toml, line 4, base.lrr"),
        ('methods = ["fedavg"]\n[base.local]\nlrr = 1', "own.toml, line 3, base.local.lrr"),
        ('methods = ["fedavg"]\n[base]\nlocal.lr = "0.1"', "own.toml, line 3, base.local.lr"),
        ('methods = ["fedavg"]\n[base]\nlr = 0.1', "Did you mean 'local.lr'?"),
        ('methods = ["fedavg"]\n[base]\nseed = 1', "seeds = [...]"),
        ('methods = ["fedavg"]\n[base]\nhosts = 1', "unknown key 'hosts'"),
        ('methods = ["fedavg"]\n[base]\npartition.alpha = nan', "got nan"),
        ('methods = ["fedavg"]\n[base]\npartition.kind = "iid"\npartition.alpha = 1', "changes nothing"),
        ('methods = ["fedavg"]\n[base]\ndataset = 2020-01-01', "dataset must be"),
        ('methods = ["fedavg"]\n[base]\nlocal.lr = 1\n[grid]\n"local.lr" = [1]', "set already at own.toml, line 3"),
        ('methods = ["fedavg"]\n[base]\n"local.lr" = 1\n[base.local]\nlr = 1', "set twice"),
        ('methods = ["fedavg"]\nbase = 1', "must be a table"),
        ('methods = ["fedavg"]\n[[base]]\nclients = 1', "must be a table"),
        ('methods = ["fedavg"]\n[grid]\n"local.lr" = 0.1', "an axis is a list"),
        ('methods = ["fedavg"]\n[grid]\n"local.lr" = []', "an axis is a list"),
        ('methods = ["fedavg"]\n[grid]\n"execution.hosts" = [1]', "line 3"),
        ('methods = ["fedavg"]\n[grid]\nmethod = ["kdia"]', "methods = [...]"),
        ('methods = ["fedavg"]\n[grid]\n"kdia.tau" = [1]', "kdia is not in this sweep"),
        ('methods = ["kdia"]\n[hyper.kdia]\ntua = 1', "own.toml, line 3, hyper.kdia.tua"),
        ('methods = ["kdia"]\n[hyper.kdia]\ntau = -1', "own.toml, line 3, hyper.kdia.tau"),
        ('methods = ["kdia"]\n[hyper]\ntau = 1', "hyper.tau"),
        ('methods = ["fedavg"]\n[execution]\nhost = 1', "Did you mean 'execution.hosts'"),
        ('methods = ["fedavg"]\n[execution]\nhosts = [1]', "own.toml, line 3, execution.hosts"),
        ('methods = ["fedavg"]\nseeds = ["a"]', "own.toml, line 2, seeds"),
        ('methods = ["fedavg"]\nseeds = true', "seed"),
        ('methods = ["fedavg"]\nseeds = []', "at least one"),
        ('methods = ["fedavg"]\ntitle = 1', "title"),
        ('name = "../x"\nmethods = ["fedavg"]', "own.toml, line 1, name"),
        ("methods = " + "[" * 5000, "own.toml"),
        ('methods = ["fedavg"]\n[base]\nclients = 0x' + "f" * 9000, "thousands of digits"),
        ('methods = ["fedavg"]\n[base]\nclients = ' + "9" * 9000, "own.toml"),
    ],
)
def test_bad_cards_are_refused_with_their_place(card: Any, text: str, said: str) -> None:
    with pytest.raises(Refused) as caught:
        card(text)
    message = str(caught.value)
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "~", "", ".x", "-x", "a/b", "a\nb", "a\x00", "x" * 65, "naïve", "аbc", "a b", 3, None, "x\n"],
)
def test_names_that_could_lead_elsewhere_are_refused(name: Any) -> None:
    with pytest.raises(Refused, match="name must be"):
        axes.checked_name(name, "card")


@pytest.mark.parametrize("name", ["a", "quickstart", "run-fedavg", "A.b_c-9", "x" * 64])
def test_plain_names_are_accepted(name: str) -> None:
    assert axes.checked_name(name, "card") == name


def test_missing_and_broken_card_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"title = '\xe9'")
    (tmp_path / "folder.toml").mkdir()
    for name, said in [
        ("towo", "Did you mean 'two'?"),
        ("../sweeps/two", "unknown sweeps card"),
        (str(tmp_path / "none.toml"), "no sweeps card at"),
        (str(tmp_path / "folder.toml"), "no sweeps card at"),
        (str(tmp_path / "latin.toml"), "not UTF-8"),
        ("x" * 5000 + ".toml", "no sweeps card at"),
        ("a\x00.toml", "no sweeps card at"),
    ]:
        with pytest.raises(Refused, match=said.replace("?", r"\?")):
            axes.load_sweep(name)


def test_cards_are_found_by_name(small_cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_cards / "datasets" / "more").mkdir()
    (small_cards / "datasets" / "more" / "letters.toml").write_text("classes = 26")
    assert cards.names("datasets") == ["digits", "more/letters"]
    assert cards.read("datasets", "more/letters") == {"classes": 26}
    for other in ("./digits", "more//letters", "more/../digits", "digits/", "/digits", "../datasets/digits", ""):
        with pytest.raises(Refused, match="unknown datasets card"):  # one data set, one spelling, one hash
            cards.find("datasets", other)
    monkeypatch.setattr(cards, "root", SHIPPED)
    assert "digits" in cards.names("datasets")


def test_two_methods_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fedavg.py"
    path.write_text(OWN_METHOD)
    with pytest.raises(Refused, match="two methods are called 'fedavg'"):
        axes.load_sweep("two", [f"methods=fedavg,{path}"])


KEYS = sorted(
    {k for full in overrides.targets(["kdia"]) for k in (full, full.rpartition(".")[2])} | {"seeds", "seed"}
)
VALUES = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.sampled_from(["0.1", "1", "-1", "nan", "true", "a", "[0.5]", "[", "]", '"', "'", "[]", "1e400"])).map(
        ",".join
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(), st.tuples(st.sampled_from(KEYS), VALUES).map("=".join)), max_size=3))
@example(["alpha=" + "9" * 5000])
@example(["alpha=0x" + "f" * 5000])
@example(["alpha=" + "[" * 5000])
@example(["local.lr=1\u2028local.lr=2"])
@example(["seed=\x85\x1c"])
def test_any_overrides_give_a_sweep_or_one_line(texts: list[str]) -> None:
    try:
        sweep = axes.run_sweep("kdia", texts)
    except Refused as refused:
        assert len(str(refused).splitlines()) == 1
    else:
        assert sweep.cells
        for cell in sweep.cells[:3]:
            assert config.resolve(json.loads(cell.model_dump_json())) == cell


LINES = [
    *CARD.splitlines(),
    "methods = 1",
    "seeds = -1",
    "[grid]",
    "[[grid]]",
    "local.lr = []",
    "[base.local]",
    "kind = 1",
]
LINES += [
    "base = {}",
    '"" = 1',
    "seeds = [[]]",
    "hyper.kdia = 1",
    '"kdia.tau" = [true]',
    "x = 2020-01-01",
    "search = 1",
    "[search]",
    "[search.space]",
    "[search.kdia]",
    '"local.lr" = { uniform = [0.1, 1] }',
    "tau = { choice = [1.0, 2020-01-01] }",
    "holdout = { validation = 0.1 }",
    "[",
    "title = 1",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(LINES), st.text(max_size=10)), max_size=8))
def test_any_card_gives_a_sweep_or_one_line(small_cards: Path, lines: list[str]) -> None:
    path = small_cards / "any.toml"
    path.write_text("\n".join(['methods = ["fedavg", "kdia"]', *lines]), encoding="utf-8")
    try:
        assert axes.load_sweep(path).cells
    except Refused as refused:
        assert len(str(refused).splitlines()) == 1
