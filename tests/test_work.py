"""What a trial's setup holds: domains of text and of images, proxy rows, and models measured in every domain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from harness import config, data
from harness.data import Arrays
from harness.evaluate import metrics
from harness.inline import InlinePool
from harness.server import Server
from harness.settings import Unfit
from harness.work import Setup, Shard, make_setup, make_world, proxy_rows

if TYPE_CHECKING:
    from tests.conftest import Lab

TOKENS = 30
COSTS = ("up_bytes", "down_bytes", "steps", "server_steps", "samples", "seconds", "server_seconds")


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arrays]:
    """A small stand-in for the glosses: two domains of windows, the next word is the last one plus the domain.

    The card of wordnet is kept but for the size of the vocabulary.
    """
    real = data.card("wordnet").model_copy(update={"classes": TOKENS, "train": 0, "test": 0, "arrays": ""})
    for module in ("harness.work", "harness.host"):
        monkeypatch.setattr(f"{module}.card", lambda name: real)
    monkeypatch.setattr(config, "_rows_of", lambda name: (real.shape, TOKENS))
    rng = np.random.default_rng(0)

    def side(rows: int) -> tuple[Any, Any, Any]:
        x = rng.integers(2, TOKENS - 1, (rows, 8)).astype(np.int16)
        domain = (np.arange(rows) % 3 == 0).astype(np.int64)
        return x, x[:, -1] + domain, domain

    train, test = side(300), side(70)
    yield Arrays(train[0], train[1], test[0], test[1], train[2], test[2])
    torch.set_flush_denormal(False)  # hosts turn it on


def text_trial(**more: Any) -> config.Trial:
    raw = {
        "method": "fedavg",
        "dataset": "wordnet",
        "clients": 6,
        "rounds": 2,
        "partition": {"kind": "iid", "domains": "card", "min_samples": 1},
        "local": {"epochs": 1, "batch": 16, "lr": 0.5},
        "evaluation": {"batch": 16},
    }
    return config.resolve({**raw, **more})


def run(setup: Setup) -> Server:
    pool = InlinePool()
    pool.load(setup)
    server = Server(setup, pool)
    while not server.done:
        server.step()
    return server


def test_domains_of_the_card_reach_partition_and_test_set(words: Arrays) -> None:
    """300 rows, every third of the second domain: 4 and 2 clients. Test rows of both cover the test set."""
    setup, mixes = make_setup(text_trial(), words)
    assert words.domains_train is not None and words.domains_test is not None
    assert [set(words.domains_train[rows]) for rows in setup.split.clients] == [{0}] * 4 + [{1}] * 2
    assert {name: set(words.domains_test[rows]) for name, rows in setup.domains.items()} == {"noun": {0}, "verb": {1}}
    assert sorted(np.concatenate(list(setup.domains.values()))) == list(range(70))
    assert mixes.shape == (6, TOKENS)


def test_pools_are_the_domains(words: Arrays) -> None:
    fleet = {"nets": ["gru-small", "gru-large"], "by": "domain"}
    trial = text_trial(method="codist", fleet=fleet, hyper={"mode": "separate", "pools": "domain"})
    setup, _ = make_setup(trial, words)
    world = make_world(setup, frozenset())
    assert world.levels == (0, 0, 0, 0, 1, 1)
    assert {name: role.clients for name, role in world.roles_by_net().items()} == {
        "gru-small": (0, 1, 2, 3),
        "gru-large": (4, 5),
    }
    assert world.net("gru-large").input_shape == (8,)


def test_halves_of_the_classes_are_domains_of_images(lab: Lab) -> None:
    """Ten classes, of which the last two have no rows here."""
    trial = config.resolve({"method": "fedavg", "clients": 4, "partition": {"kind": "iid", "domains": "halves"}})
    arrays = lab.arrays(200, classes=8)
    setup, _ = make_setup(trial, arrays)
    assert {name: sorted(set(arrays.y_test[rows])) for name, rows in setup.domains.items()} == {
        "lower": [0, 1, 2, 3, 4],
        "upper": [5, 6, 7],
    }
    plain = config.resolve({"method": "fedavg", "clients": 4})
    assert make_setup(plain, arrays)[0].domains == {}


def test_every_model_has_a_row_for_each_domain(words: Arrays) -> None:
    """From the very counts of its own row: accuracies and losses are means weighted by the domains' test rows."""
    setup, _ = make_setup(text_trial(evaluation={"batch": 16, "every": 2}), words)
    server = run(setup)
    assert [(row["round"], row["role"]) for row in server.rounds] == [
        (0, "global"), (1, "global"), (1, "global@noun"), (1, "global@verb"),
    ]  # fmt: skip
    _, whole, noun, verb = server.rounds
    n, v = (len(rows) for rows in setup.domains.values())
    for name in ("accuracy", "loss"):
        assert whole[name] == pytest.approx((n * noun[name] + v * verb[name]) / (n + v), rel=1e-12)
    assert whole["up_bytes"] > 0
    assert all(not row[cost] for row in (noun, verb) for cost in COSTS)
    assert noun["train_loss"] is verb["train_loss"] is None


def test_a_domains_row_is_what_its_test_rows_alone_would_give(words: Arrays) -> None:
    setup, _ = make_setup(text_trial(), words)
    server = run(setup)
    rows = setup.domains["verb"]
    net, p = server.world.net("gru-small"), server.method.models(server.state)["global"][1]
    guesses = net.frozen(p, torch.from_numpy(words.x_test[rows]).long()).argmax(1).numpy()
    found = next(row for row in reversed(server.rounds) if row["role"] == "global@verb")
    assert found["accuracy"] == (guesses == words.y_test[rows]).mean()


def test_domains_change_no_number_of_the_models_own_row(lab: Lab) -> None:
    """The same trial without the domains of its setup: counts, and so accuracy, are equal; sums of losses but for
    the order of addition."""
    trial = config.resolve({"method": "fedavg", "clients": 4, "rounds": 2, "partition": {"domains": "halves"}})
    setup, _ = make_setup(trial, lab.arrays(300, classes=8))
    split = [row for row in run(setup).rounds if "@" not in row["role"]]
    whole = run(Setup(trial, setup.arrays, setup.split)).rounds
    for one, other in zip(split, whole, strict=True):
        exact = ("accuracy", "balanced_accuracy", "macro_f1", "recall", "steps", "up_bytes", "train_loss")
        np.testing.assert_equal([one[name] for name in exact], [other[name] for name in exact])  # NaN equals NaN
        assert [one[name] for name in ("loss", "ece")] == pytest.approx([other[name] for name in ("loss", "ece")])


def test_text_learns(words: Arrays) -> None:
    """The next word is the last one or the one after it: chance is 1 in 28, and a net that learns does far better."""
    server = run(make_setup(text_trial(rounds=10, local={"epochs": 3, "batch": 8, "lr": 1.0, "clip": 1.0}), words)[0])
    assert server.rounds[-3]["role"] == "global"
    assert server.rounds[-3]["accuracy"] > 0.3


def test_proxy_rows_of_text_are_tokens(words: Arrays) -> None:
    trial = text_trial(method="fedavg-proxy", proxy={"source": "train", "rows": 12})
    setup, _ = make_setup(trial, words)
    rows = proxy_rows(setup, frozenset({"proxy"}), torch.device("cpu"))
    assert rows.x.dtype == torch.int64
    assert np.array_equal(rows.x.numpy(), words.x_train[setup.split.proxy])
    assert set(rows.y.tolist()) == {-1}


def test_shards_of_a_domain_add_up_to_it(words: Arrays) -> None:
    setup, _ = make_setup(text_trial(), words)
    pool = InlinePool()
    pool.load(setup)
    net = make_world(setup, frozenset()).net("gru-small")
    params = {"0": net.init(torch.Generator().manual_seed(0))}
    rows = setup.domains["noun"]
    parts = [pool.score(Shard(("gru-small",), "m", a, b, "noun"), params) for a, b in ((0, 20), (20, len(rows)))]
    total = parts[0] + parts[1]
    assert np.array_equal(total.rows, np.bincount(words.y_test[rows], minlength=TOKENS))
    assert 0 <= metrics(total, np.ones(TOKENS, dtype=bool))["accuracy"] <= 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition": {"domains": "card"}}, "digits has no domains of its own"),
        ({"fleet": {"nets": ["mlp", "lenet5"], "by": "domain"}}, "needs domains"),
        ({"dataset": "wordnet", "partition": {"shift": "noise", "shift_level": 0.1}}, "wordnet is text"),
        ({"dataset": "wordnet", "proxy": {"source": "stackoverflow", "rows": 9}}, "stackoverflow"),
        ({"dataset": "wordnet", "net": "mlp"}, "images of shape"),
        ({"net": "gru-small"}, "tokens of shape"),
    ],
)
def test_what_does_not_go_with_the_data_is_refused(settings: dict[str, Any], said: str) -> None:
    method = "codist" if "fleet" in settings else "fedavg"
    hyper = {"mode": "separate"} if "fleet" in settings else {}
    with pytest.raises(Unfit, match=said):
        config.resolve({"method": method, "hyper": hyper, **settings})
