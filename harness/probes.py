"""The single checks of the conformance suite. Each says what it tried, or raises `Failed`, on tiny trials."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from harness import catalogue, checkpoint, config, registry
from harness.protocol import Algorithm, Cohort, Ensemble
from harness.rig import RigServer, altered, declaring, luck, run, server, tiny, untested
from harness.watch import BoundedPool, FarPool, difference, prints
from harness.work import Setup

TELLING = ("labelled_proxy", "proxy", "label_counts", "validation")  # needs whose use shows when they are taken away


class Failed(Exception):
    """Why a check failed, in one line."""


@dataclass
class Subject:
    """A method under test, with the runs that several checks look at."""

    method: str
    hyper: Mapping[str, Any]
    owner: type[Algorithm] = field(init=False)

    def __post_init__(self) -> None:
        self.owner = registry.load(self.method)

    @property
    def needs(self) -> frozenset[str]:
        """With these hyper-parameters."""
        return registry.make(self.method, self.hyper).needs

    def setup(self, **how: Any) -> Setup:
        """The tiny trial."""
        return tiny(self.method, self.hyper, self.needs, **how)

    @cached_property
    def base(self) -> RigServer:
        """The trial as it is."""
        return run(self.setup(), BoundedPool(watches=True))

    @cached_property
    def log(self) -> BoundedPool:
        """What passed in it."""
        pool = self.base.pool
        assert isinstance(pool, BoundedPool)
        return pool

    @cached_property
    def marks(self) -> dict[str, str]:
        """What it left behind."""
        return self.base.marks()

    @cached_property
    def unmoved(self) -> bool:
        """Whether all that must not matter, changed at once, changed nothing: then no check has to try it alone."""
        return not self.differs(run(untested(self.setup()), FarPool(), seed=2))

    def differs(self, other: RigServer) -> str:
        """Where another run left something else behind; empty if nowhere."""
        return difference(self.marks, other.marks())


def _docstring(subject: Subject) -> str:
    parts = catalogue.sections(catalogue.doc(subject.owner))
    missing = [label for label in ("", *catalogue.SECTIONS) if not parts.get(label)]
    if missing:
        raise Failed(f"the head of the file lacks {', '.join(repr(m) if m else 'a first sentence' for m in missing)}")
    return "has its parts"


def _pickles(subject: Subject) -> str:
    one = registry.make(subject.method, subject.hyper)
    if not subject.owner.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise Failed("the dataclass must be frozen")
    if pickle.loads(pickle.dumps(one)) != one:
        raise Failed("another method comes back")
    return "a frozen dataclass, equal after pickling"


def _needs(subject: Subject) -> str:
    """That nothing more is used shows in that the tiny trial runs: it supplies nothing more."""
    nets = set(subject.base.trial.fleet.nets)
    trained = {seen.order.net for seen in subject.log.log}
    if nets - trained:
        raise Failed(
            f"does not declare one_net, but in a fleet of {sorted(nets)} nobody trains {sorted(nets - trained)}"
        )
    if idle := [need for need in TELLING if need in subject.needs and not _used(subject, need)]:
        raise Failed(f"declares {', '.join(idle)}, but nothing depends on it")
    return ", ".join(sorted(subject.needs)) or "nothing"


def _used(subject: Subject, need: str) -> bool:
    return any(_missed(one, need) for one in _variants(subject) if need in one.needs)


def _missed(subject: Subject, need: str) -> bool:
    less = subject.needs - {need} | ({"proxy"} if need == "labelled_proxy" else set())
    setup = subject.setup()
    with declaring(subject.method, frozenset(less)):
        try:
            return bool(subject.differs(run(setup)))
        except Exception:  # it reads what is not there, or cannot work with it
            return True


def _variants(subject: Subject) -> Iterator[Subject]:
    """The method as it is, then with other choices: a need may belong to one that is not the default."""
    yield subject
    for name, (annotation, _) in config.hyper_fields(subject.method).items():
        choices = get_args(annotation) if get_origin(annotation) is Literal else (True, False)
        for choice in choices if annotation is bool or get_origin(annotation) is Literal else ():
            if choice != subject.hyper[name]:
                yield Subject(subject.method, {**subject.hyper, name: choice})


def _finite(subject: Subject) -> str:
    rows = [*subject.base.rounds, *subject.base.clients]
    bad = [key for row in rows for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise Failed(f"{bad[0]} is not finite")
    for path, x in _walk(subject.base.state, "state"):
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise Failed(f"{path} is not finite")
    return "with a client of one class, a client smaller than a batch and a batch of one row"


def _walk(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    parts = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, part in parts:
        yield from _walk(part, f"{at}/{key}")
        if isinstance(value, Mapping) and not isinstance(key, str):
            yield f"{at}/{key}", key.__class__
    if not isinstance(value, Mapping | list | tuple):
        yield at, value


def _state(subject: Subject) -> str:
    memories = {f"{v.client}/{v.role}": memory for v, memory in subject.base.memories.items()}
    for path, value in (*_walk(subject.base.state, "state"), *_walk(memories, "memory")):
        if isinstance(value, type):
            raise Failed(f"{path}: keys must be strings, not {value.__name__}")
        if not (value is None or isinstance(value, Tensor | bool | int | float | str)):
            raise Failed(
                f"{path} is a {type(value).__name__}: tensors, numbers, strings, lists and dicts are allowed"
            )
    return "tensors, numbers, strings, lists and dicts"


def _resumes(subject: Subject) -> str:
    with luck(2):
        running = server(subject.setup())
        while not running.done:
            running.step()
            content = checkpoint.pack(running.snapshot())
            running = server(subject.setup())
            running.restore(checkpoint.unpack(content))
    if where := subject.differs(running):
        raise Failed(f"a run that goes on from a checkpoint in every round ends with another {where}")
    return "the same bits when every round starts from a checkpoint"


def _identity(subject: Subject) -> str:
    identity = vars(subject.owner).get("identity")
    if identity is None:
        return "declares none"
    hyper = {**subject.hyper, **identity}
    needs = registry.make(subject.method, hyper).needs
    setup = tiny(subject.method, hyper, needs, fleet=False)
    plain = {**setup.trial.model_dump(exclude={"source"}), "method": "fedavg", "hyper": {}}
    reference = run(replace(setup, trial=config.resolve(plain)))
    mine = run(setup)
    first = next(iter(mine.method.models(mine.state).values()))
    assert not isinstance(first, Ensemble)
    if where := difference(prints(first[1]), prints(reference.state["params"])):
        raise Failed(f"with {_spelled(identity)} the first model is not FedAvg's after {mine.round} rounds: {where}")
    return f"FedAvg's bits with {_spelled(identity)}"


def _spelled(hyper: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in hyper.items())


def _bytes(subject: Subject) -> str:
    base = subject.base
    booked = {(row["round"], row["client"], row["role"]): row for row in base.clients}
    held: set[int] = set()
    for seen in subject.log.log:
        client, role = seen.order.visit.client, seen.order.visit.role
        row, proxy = booked[seen.order.round, client, role], 0
        if seen.read_proxy and client not in held and base.setup.proxy is not None:
            held.add(client)
            proxy = sum(part.nbytes for part in base.setup.proxy)
        for way, sent in (("down", seen.down + proxy), ("up", seen.up)):
            if row[f"{way}_bytes"] != sent:
                what = f"{row[f'{way}_bytes']} bytes {way} are booked, {sent} were sent"
                raise Failed(f"client {client} in round {seen.order.round}: {what} (tensors must lie in dicts)")
    for way in ("up_bytes", "down_bytes"):
        if sum(row[way] for row in base.rounds) != sum(row[way] for row in base.clients):
            raise Failed(f"{way} of rounds and of clients do not agree")
    return f"{sum(s.down for s in subject.log.log)} down, {sum(s.up for s in subject.log.log)} up, as booked"


def _purity(subject: Subject) -> str:
    for seen in subject.log.log:
        if seen.changed:
            raise Failed(f"the hooks of client {seen.order.visit.client}'s visit change {seen.changed}")
    if subject.log.kept:
        raise Failed(f"keeps changes {subject.log.kept} of a memory")
    if subject.base.meddled:
        raise Failed(f"merge changes {subject.base.meddled} of a payload")
    base, method = subject.base, subject.base.method
    visits = tuple(s.order.visit for s in subject.log.log if s.order.round == base.round - 1)
    before = prints(base.state)
    for hook, call in (
        ("broadcast", lambda: method.broadcast(base.state, Cohort(base.round, tuple(sorted(visits))), base.world)),
        ("models", lambda: method.models(base.state)),
    ):
        call()
        if where := difference(before, prints(base.state)):
            raise Failed(f"{hook} changes {where} of the state")
    return "inboxes, memories, payloads and state stay as they are"


def _repeatable(subject: Subject) -> str:
    if not subject.unmoved and (where := subject.differs(run(subject.setup(), seed=2))):
        raise Failed(f"a second run ends with another {where}: draw from the generators that hooks are given")
    return "the same bits whatever the global generators hold"


def _order(subject: Subject) -> str:
    if not subject.unmoved and (where := subject.differs(run(subject.setup(), FarPool(ships=False)))):
        raise Failed(f"visits done in another order end with another {where}")
    return "the same bits in any order of visits"


def _ships(subject: Subject) -> str:
    if not subject.unmoved and (where := subject.differs(run(subject.setup(), FarPool()))):
        raise Failed(f"on fresh hosts that get everything as bytes, as under Ray, it ends with another {where}")
    return "the same bits when everything travels as bytes to fresh hosts"


def _test_rows(subject: Subject) -> str:
    if not subject.unmoved and (where := subject.differs(run(untested(subject.setup())))):
        raise Failed(f"{where} depends on rows that are there for testing")
    return "other test rows change nothing that is trained"


def _influence(subject: Subject) -> str:
    """In two rounds with everybody, on even data: a client's rows reach every model if all share a role, else one."""
    setup = subject.setup(rounds=2, participation=1.0, even=True)
    whole = run(setup)
    each = len({visit.role for visit in whole.memories}) == 1
    before = _models(whole)
    dealt = tiny(subject.method, subject.hyper, subject.needs - {"pooled"}, even=True).split.clients
    for client, rows in enumerate(dealt):
        other = run(altered(setup, rows))
        after = _models(other)
        same = [name for name in before if before[name] == after.get(name)]
        if before and (same if each else len(same) == len(before)):
            raise Failed(f"client {client} took part, but the {', '.join(same)} model does not depend on its rows")
        if not before and not difference(whole.marks(), other.marks()):
            raise Failed(f"client {client} took part, but nothing depends on its rows")
    return "every client's rows reach " + ("every model" if each and before else "a model" if before else "the state")


def _models(done: RigServer) -> dict[str, dict[str, str]]:
    models = done.method.models(done.state).items()
    return {name: prints(m.members if isinstance(m, Ensemble) else m) for name, m in models}


STILL: dict[str, Callable[[Subject], str]] = {"docstring": _docstring, "pickles": _pickles}
MOVING: dict[str, Callable[[Subject], str]] = {
    "needs": _needs,
    "finite": _finite,
    "state": _state,
    "resumes": _resumes,
    "identity": _identity,
    "bytes": _bytes,
    "purity": _purity,
    "repeatable": _repeatable,
    "order": _order,
    "ships": _ships,
    "test rows": _test_rows,
    "influence": _influence,
}
