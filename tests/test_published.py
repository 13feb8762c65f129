"""Published numbers: every file is well-formed, every replay card resolves, and verdicts say what they are about."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest

from harness import axes, cards, published, registry
from harness.config import Trial
from harness.places import grouped
from harness.published import COLUMNS, Published
from harness.refusal import Refused
from harness.sections import Kind
from harness.sheets import beside_text
from harness.tables import beside
from harness.verdicts import Verdict, verdicts

REPLAYS = [name for name in cards.names("sweeps") if name.startswith("replay/")]


@pytest.mark.parametrize("name", published.names())
def test_every_source_is_well_formed(name: str) -> None:
    rows = published.read(name)
    assert rows
    assert all(row.source and row.value > 0 for row in rows)
    for row in rows:
        if row.method in registry.names():
            known = {*registry.load(row.method).__dataclass_fields__, "share"}  # share: of nets, for any method there
            assert {part.partition("=")[0] for part in row.hyper.split(";") if part} <= known, row


def test_the_kinds_are_those_of_partitions_and_two_more() -> None:
    assert set(published.KINDS) == {*get_args(Kind), "dirichlet-any", "groups"}


def test_values_are_those_of_the_sources() -> None:
    """Spot checks: FedMut's Table 1, FedGen's Table 1 (with its deviation over three seeds), MOON's Table 1."""
    [one] = [r for r in published.read("fedmut") if (r.method, r.net, r.alpha) == ("fedmut", "lenet5", 0.1)]
    assert (one.value, one.rounds, one.batch, one.lr, one.dataset) == (51.25, 1000, 50, 0.01, "cifar10")
    rows = [r for r in published.read("fedgen") if r.table == "Table 1" and r.dataset == "emnist-letters"]
    [one] = [r for r in rows if (r.method, r.alpha) == ("feddf", 0.05)]
    assert (one.value, one.sd, one.seeds, one.lr_decay) == (70.40, 0.79, 3, 0.99)
    [one] = [
        r
        for r in published.read("moon")
        if (r.method, r.dataset, r.clients) == ("moon", "cifar10", 10) and r.metric == "accuracy"
    ]
    assert (one.value, one.hyper, one.net, one.epochs) == (69.1, "mu=5", "kdia-lenet", 10)


def line(**changes: str) -> dict[str, str]:
    usual = {"source": "S", "table": "T", "read": "paper", "method": "fedavg", "dataset": "digits", "value": "50"}
    return {**dict.fromkeys(COLUMNS, ""), **usual, "metric": "accuracy", **changes}


def sheet(folder: Path, *lines: dict[str, str]) -> Path:
    out = StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(lines)
    path = folder / "some.csv"
    path.write_text(out.getvalue())
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": "many"}, "line 2: value must be a number, got 'many'"),
        ({"value": "nan"}, "value must lie in"),
        ({"value": "101"}, "value is in percent, got 101"),
        ({"value": ""}, "value is missing"),
        ({"participation": "1.5"}, r"participation must lie in \[0, 1\], got 1.5"),
        ({"rounds": "10.5"}, "rounds must be a whole number, got 10.5"),
        ({"partition": "dirichlett"}, "partition is 'dirichlett'; did you mean 'dirichlet'"),
        ({"read": "somewhere"}, "read is 'somewhere'"),
        ({"method": "FedAvg"}, "method is written in lower case"),
        ({"hyper": "mu"}, "hyper is name=value"),
        ({"dataset": " digits"}, "dataset has spaces around it"),
    ],
)
def test_a_file_that_is_not_well_formed_is_refused(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(Refused, match=said):
        published.load(sheet(tmp_path, line(**changes)))


def test_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="line 3: the same as line 2"):
        published.load(sheet(tmp_path, line(), line()))
    path = sheet(tmp_path, line())
    path.write_text(path.read_text().replace("source,", "origin,", 1))
    with pytest.raises(Refused, match="the columns must be source, year"):
        published.load(path)
    sheet(tmp_path, line()).write_text(",".join(COLUMNS) + "\nS,2020\n")
    with pytest.raises(Refused, match="not as many cells as columns"):
        published.load(path)
    with pytest.raises(Refused, match=r"unknown published source 'kdai'\. Did you mean 'kdia'"):
        published.read("kdai")


@pytest.mark.parametrize("name", REPLAYS)
def test_every_replay_resolves_and_meets_its_source(name: str) -> None:
    """Without data. Some published value must be meant by some cell, or the card replays nothing."""
    sweep = axes.load_sweep(name)
    assert sweep.published in published.names()
    text = (cards.root("sweeps") / f"{name}.toml").read_text()
    assert text.startswith("# ") and "Source:" in text and "published = " in text
    rows = [row(cell, sweep.published) for cell in sweep.cells if cell.seed == 0]
    found = verdicts(rows, grouped(rows))
    datasets = {cell.dataset for cell in sweep.cells}
    assert [one for one in found if one.cell is not None] or datasets == {"cinic10"}  # of which nothing was readable


def test_a_card_names_a_source_that_there_is(tmp_path: Path) -> None:
    card = tmp_path / "mine.toml"
    card.write_text('methods = ["fedavg"]\npublished = "kdai"\n')
    with pytest.raises(Refused, match=r"mine.toml, line 2, published: unknown published source 'kdai'. Did you mean"):
        axes.load_sweep(card)
    card.write_text('methods = ["fedavg"]\npublished = ["kdia"]\n')
    with pytest.raises(Refused, match="unknown published source"):
        axes.load_sweep(card)


def row(cell: Trial, source: str = "", value: float = 0.5, **more: Any) -> dict[str, Any]:
    """The row of a trial that ended at a value, in the roles that the method has."""
    nets = [name for name in cell.fleet.nets if len(set(cell.fleet.nets)) > 1]
    roles = {"kdia": ["student", "teacher"], "fedproto": ["personal"]}.get(cell.method, nets or ["global"])
    made = {"trial_id": f"{abs(hash(cell.model_dump_json())):x}", "status": "done", "reason": None, "seed": cell.seed}
    made |= {"method": cell.method, "dataset": cell.dataset, "config": cell.model_dump_json(), "partition_hash": "p"}
    names = ("accuracy_last10", "accuracy_last", "accuracy_best", "accuracy_auc", "own_label_accuracy_last10")
    made |= {f"{role}_{name}": value for role in roles for name in names}
    return made | {"published": source or None} | more


def judged(theirs: Published, cells: list[tuple[Trial, float]], **more: Any) -> Verdict:
    rows = [row(cell, "some", value, **more) for cell, value in cells]
    [one] = verdicts(rows, grouped(rows), {"some": [theirs]})
    return one


@pytest.fixture
def theirs() -> Published:
    """MOON's FedAvg on CIFAR-10, with a round that is said."""
    [one] = [
        r for r in published.read("moon") if (r.method, r.dataset, r.metric) == ("fedavg", "cifar10", "accuracy")
    ]
    return replace(one, reported="last", augment="true")


def ours(seeds: int = 3, **settings: Any) -> list[tuple[Trial, float]]:
    """The replay's FedAvg trials, ending at 65, 66, 67 %: mean 66, interval 66 -/+ 4.302653 / sqrt 3 = 2.484138."""
    cells = [cell for cell in axes.load_sweep("replay/moon-cifar10").cells if cell.method == "fedavg"]
    return [(cell.model_copy(update=settings), 0.65 + cell.seed / 100) for cell in cells[:seeds]]


def test_a_published_value_within_our_interval_is_inside(theirs: Published) -> None:
    one = judged(theirs, ours())
    assert (one.finding, one.why, str(one)) == ("inside", (), "inside")
    assert one.difference == pytest.approx(66 - 66.3)
    assert judged(replace(theirs, value=63.6), ours()).finding == "inside"
    assert judged(replace(theirs, value=63.5), ours()).finding == "outside"


def test_what_is_not_stated_is_named(theirs: Published) -> None:
    bare = replace(theirs, reported="", batch=None, partition="dirichlet-any")
    one = judged(bare, ours())
    assert str(one) == "inside (not stated there: batch, rule of the partition, best or last round)"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rounds": 200}, "rounds 200 there, 100 here"),
        ({"lr": 0.1}, "lr 0.1 there, 0.01 here"),
        ({"lr_decay": 0.99}, "lr decay 0.99 there, 1.0 here"),
        ({"fraction": 0.5}, "fraction 0.5 there, 1.0 here"),
        ({"steps": 20, "epochs": None}, "20 steps a visit there, 10 epochs here"),
        ({"schedule": "50 local.lr=0.001"}, "schedule 50 local.lr=0.001 there, none here"),
        ({"augment": "false"}, "augment false there, true here"),
        ({"net": "vgg16"}, "net vgg16 there, kdia-lenet here"),
        ({"tested": "private"}, "tested on users' own rows there, by the global confusion matrix here"),
        ({"tested": "own-labels"}, "tested on users' own rows there, by the global confusion matrix here"),
    ],
)
def test_settings_that_differ_make_it_not_comparable(theirs: Published, changes: dict[str, Any], why: str) -> None:
    one = judged(replace(theirs, **changes), ours())
    assert (one.finding, one.why) == ("not comparable", (why,))
    assert one.difference is not None


def test_what_no_source_has_makes_it_not_comparable(theirs: Published) -> None:
    cell = ours()[0][0]
    clipped = ours(local=cell.local.model_copy(update={"clip": 1.0}))
    assert judged(theirs, clipped).why == ("local.clip 1.0 here",)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "fedmut"}, "no trial of fedmut, which fedstill does not have"),
        ({"method": "kdia"}, "no trial of kdia"),
        ({"dataset": "cifar100"}, "no trial of fedavg on cifar100"),
        *(({key: value}, "no trial of fedavg with these settings") for key, value in
          (("alpha", 0.1), ("clients", 20), ("participation", 0.5), ("partition", "iid"),
           ("role", "teacher"))),
    ],
)  # fmt: skip
def test_what_was_not_run_says_why(theirs: Published, changes: dict[str, Any], why: str) -> None:
    one = judged(replace(theirs, **changes), ours())
    assert (one.finding, one.why, one.cell) == ("not run", (why,), None)


def test_failed_trials_and_single_seeds(theirs: Published) -> None:
    failed = judged(theirs, ours(), status="failed", reason="diverged: nan")
    assert str(failed) == "not run: 3 diverged"
    assert judged(theirs, ours(seeds=1)).why == ("one seed here, which has no interval",)


def test_hyper_parameters_and_the_best_fit_are_told_apart() -> None:
    """Of two rows of MOON, mu 5 and mu 1, the one that the source means; its own when none is."""
    sweep = axes.load_sweep("replay/moon-cifar10", ["moon.mu=1,5"])
    cells = [(cell, 0.6 + cell.seed / 100) for cell in sweep.cells if cell.method == "moon"]
    [one] = [r for r in published.read("moon") if (r.method, r.dataset, r.metric) == ("moon", "cifar10", "accuracy")]
    assert judged(one, cells).name == "moon mu=5.0"
    assert judged(replace(one, hyper="mu=2"), cells).why == ("mu 2 there, 1.0 here",)


def test_personal_models_are_compared_on_private_rows() -> None:
    """FedProto's models are the clients' own: what PFLlib measures on users' rows is measured here, too."""
    sweep = axes.load_sweep("replay/pfllib-fashion")
    cells = [(cell, 0.96 + cell.seed / 100) for cell in sweep.cells if cell.method == "fedproto"]
    [one] = [r for r in published.read("pfllib") if (r.method, r.dataset) == ("fedproto", "fashion-mnist")]
    found = judged(one, cells)
    assert (found.difference, found.why) == (
        pytest.approx(97 - 97.40),
        ("net pfllib-cnn there, mcmahan-cnn here",),
    )


def test_pools_are_found_by_their_size() -> None:
    sweep = axes.load_sweep("replay/codist-cifar100")
    rows = [row(cell, "codist", 0.3 + cell.seed / 100) for cell in sweep.cells]
    found = {(one.theirs.role, one.theirs.hyper): one.name for one in verdicts(rows, grouped(rows))}
    assert found["small", "mode=merged"] == "codist mode=merged (resnet8)"
    assert found["large", "mode=separate"] == "codist mode=separate (resnet18)"


def test_other_sweeps_see_only_what_is_exactly_theirs(theirs: Published) -> None:
    rows = [row(cell, "", value) for cell, value in ours()]
    for source, count in ((theirs, 1), (replace(theirs, rounds=200), 0), (replace(theirs, method="kdia"), 0)):
        assert len(verdicts(rows, grouped(rows), {"some": [source]})) == count


def test_verdicts_are_shown_and_written(theirs: Published) -> None:
    found = [judged(theirs, ours()), judged(replace(theirs, method="fedmut"), ours())]
    lines = beside(found)
    assert lines[1] == [
        "fedavg",
        "cifar10, dirichlet-capped, alpha=0.5, clients=10, participation=1, kdia-lenet",
        "MOON, CVPR 2021, arXiv 2103.16257, Table 1",
        "66.3",
        "66.00 ± 1.00 [63.52, 68.48] (n=3)",
        "-0.30",
        "inside",
    ]
    assert lines[2][4:] == ["-", "-", "not run: no trial of fedmut, which fedstill does not have"]
    written = list(csv.DictReader(StringIO(beside_text(found))))
    assert [one["verdict"] for one in written] == ["inside", "not run"]
    assert float(written[0]["low"]) == pytest.approx(63.515862)
    assert json.loads(f"[{written[0]['difference']}]")[0] == pytest.approx(-0.3)
