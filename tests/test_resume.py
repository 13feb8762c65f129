"""A trial that is stopped between any two rounds and goes on from its checkpoint ends with the same numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from harness import config
from harness.checkpoint import pack, unpack
from harness.data import card, load
from harness.host import InlinePool
from harness.server import Server
from harness.work import make_setup

CLOCKS = ("seconds", "server_seconds")
ROUNDS = 6
HYPER = {"kdia": {"generator_epochs": 1, "generator_iterations": 3, "noise": 8}}
METHODS = ("fedavg", "scaffold", "kdia", "fedadam")


@cache
def trial(method: str) -> config.Trial:
    settings = {
        "clients": 8,
        "cohort": 3,
        "rounds": ROUNDS,
        "local": {"epochs": 1, "batch": 16, "lr": 0.05, "momentum": 0.5},
        "evaluation": {"every": 4},
        "hyper": HYPER.get(method, {}),
    }
    return config.resolve({"method": method, **settings})


def server(method: str) -> Server:
    setup, mixes = make_setup(trial(method), load(card("digits")))
    pool = InlinePool()
    pool.load(setup)
    return Server(setup, pool, mixes=mixes)


def tables(done: Server) -> list[list[dict[str, Any]]]:
    return [[{k: v for k, v in row.items() if k not in CLOCKS} for row in t] for t in (done.rounds, done.clients)]


@cache
def undisturbed(method: str) -> list[list[dict[str, Any]]]:
    whole = server(method)
    while not whole.done:
        whole.step()
    return tables(whole)


@pytest.mark.parametrize("stop", range(ROUNDS + 1))
@pytest.mark.parametrize("method", METHODS)
def test_stop_and_go_on_after_any_round(method: str, stop: int) -> None:
    """6 rounds, evaluated in rounds 3 and 5, interrupted after each number of rounds: the same bits every time."""
    first = server(method)
    for _ in range(stop):
        first.step()
    content = pack(first.snapshot())
    second = server(method)
    second.restore(unpack(content))
    assert second.round == stop
    while not second.done:
        second.step()
    assert tables(second) == undisturbed(method)


def test_taking_a_snapshot_changes_nothing() -> None:
    watched = server("kdia")
    while not watched.done:
        watched.snapshot()
        watched.step()
    assert tables(watched) == undisturbed("kdia")
