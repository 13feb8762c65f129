"""`lab`: small worlds to try methods and the loop in. A test takes it as an argument: `def test_x(lab: Lab)`.

Hooks by hand: `world`, `update`, `bench` and `step`; numbers that a golden test writes down itself: `Table`, a net
whose answers are its parameters. A whole trial through the real server, in this process: `setup`, `run`, and the
pool's `log` of everything that travelled.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

from harness import config, nets, registry, trees
from harness.batches import Rows
from harness.data import Arrays
from harness.fit import Workbench
from harness.inline import InlinePool
from harness.partitions import Split
from harness.protocol import Algorithm, Batch, Inbox, Trained, Update, Visit, World
from harness.server import Server
from harness.trees import Tree
from harness.work import Answer, Order, Setup, WorkFailed

# A shell's background jobs ignore Ctrl-C, and hand that down to the commands that tests start and end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHAPE, CLASSES = (1, 8, 8), 4
LOCAL = {"epochs": 1, "batch": 8, "lr": 0.1}
hypothesis.settings.register_profile("fedstill", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("fedstill")
torch.set_num_threads(1)  # the tensors here are small: more threads only get into each other's way


@dataclass(frozen=True)
class Table:
    """A net whose answers are its parameters: x [B] numbers the rows of p["latent"] [n, Z] and p["logits"] [n, C].

    `classify` multiplies with p["head"] [Z, C].
    """

    classes: int = 3
    name: str = "table"

    def __call__(self, p: Tree, x: Tensor, train: bool = True) -> Tensor:
        logits: Tensor = p["logits"][x]
        return logits

    def embed(self, p: Tree, x: Tensor, at: str = "latent", train: bool = True) -> Tensor:
        z: Tensor = p["latent"][x]
        return z

    def classify(self, p: Tree, z: Tensor, at: str = "latent", train: bool = True) -> Tensor:
        logits: Tensor = z @ p["head"]
        return logits

    def frozen(self, p: Tree, x: Tensor) -> Tensor:
        return self(p, x, train=False).detach()

    def init(self, rng: torch.Generator) -> Tree:
        return {"logits": torch.zeros(1, self.classes)}


@dataclass(frozen=True)
class Sent:
    """A visit as it happened: what the client received and remembered, what it answered."""

    order: Order
    inbox: Inbox
    memory: Tree | None
    payload: Tree


class WatchedPool(InlinePool):
    """The inline pool, with a log of everything that travelled."""

    def load(self, setup: Setup) -> None:
        super().load(setup)
        self.log: list[Sent] = []

    def visit(self, order: Order, parts: Sequence[Tree], memory: Tree | None) -> Answer | WorkFailed:
        answer = super().visit(order, parts, memory)
        inbox = {key: value for part in parts for key, value in part.items()}
        if isinstance(answer, WorkFailed):
            return answer
        self.log.append(Sent(order, inbox, memory, answer[1]))
        return answer


@dataclass
class Lab:
    """See the module."""

    patch: pytest.MonkeyPatch
    Table: type[Table] = field(default=Table)

    def world(self, sizes: Sequence[int] = (10, 10, 10, 10), net: Any = "mlp", **more: Any) -> World:
        """A world of clients with these numbers of rows. net: a name of the zoo (for 1x8x8, 4 classes), or a net."""
        named = isinstance(net, str)
        basics = {
            "clients": len(sizes),
            "classes": CLASSES if named else net.classes,
            "rounds": 10,
            "sizes": tuple(sizes),
            "batch": 8,
            "epochs": 1,
            "lr": 0.1,
            "momentum": 0.0,
            "net": (lambda name: nets.build(name, SHAPE, CLASSES)) if named else (lambda name: net),
            "default_net": net if named else net.name,
        }
        return World(**{**basics, **more})

    def update(self, client: int, payload: Tree, samples: int = 10, steps: int = 5, role: str = "global") -> Update:
        """What `merge` gets from one client."""
        return Update(Visit(client, role), samples, steps, payload, {})

    def bench(self, world: World | None = None, round: int = 0, **sources: Rows) -> Workbench:
        """What hooks work with; for `merge` it is the server. sources: rows by name, such as proxy=Rows(x, y)."""
        world, made = (
            world or self.world(),
            {name: partial(lambda rows: rows, rows) for name, rows in sources.items()},
        )
        none = torch.zeros(world.classes, dtype=torch.int64)
        return Workbench((0, "server", round), torch.device("cpu"), none, made, world, round=round)

    def trained(self, start: Tree, end: Tree, inbox: Inbox, memory: Tree | None = None, **more: Any) -> Trained:
        """A visit after its training, for `reply`: client 0, 5 steps at rate .1 on 10 rows, unless told otherwise."""
        basics = {
            "visit": Visit(0, "global"),
            "round": 0,
            "net": None,
            "samples": 10,
            "steps": 5,
            "lr": 0.1,
            "momentum": 0.0,
            "metrics": {},
            "bench": self.bench(),
        }
        return Trained(**{**basics, **more}, start=start, end=end, inbox=inbox, memory=memory or {})

    def step(
        self,
        method: Algorithm,
        net: Any,
        p: Tree,
        batch: Batch,
        inbox: Inbox | None = None,
        memory: Tree | None = None,
    ) -> tuple[float, Tree, dict[str, Tensor]]:
        """One step as the harness does it, teach, draw and loss: the loss, its gradients, and what it recorded."""
        inbox, memory = inbox or {}, memory or {}
        learning = trees.tree_map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), p)
        batch = batch.with_extra(**method.teach(net, batch.x, inbox, memory))
        batch = method.draw(net, batch, inbox, memory, trees.stream("lab"))
        value, seen = method.loss(net, learning, batch, inbox, memory)
        value.backward()
        grads = trees.tree_map(lambda x: torch.zeros_like(x) if x.grad is None else x.grad, learning)
        return float(value.detach()), grads, seen

    def arrays(self, train: int, test: int = 40, classes: int = CLASSES) -> Arrays:
        """Images of noise with a bright row per class, which a net learns in a few steps. Labels go round."""
        rng = trees.numpy_stream("lab", "arrays")

        def side(rows: int) -> tuple[Any, Any]:
            y = np.arange(rows) % classes
            x = rng.integers(0, 120, (rows, *SHAPE), dtype=np.uint8)
            x[np.arange(rows), :, y] += 120
            return x, y.astype(np.int64)

        return Arrays(*side(train), *side(test))

    def split(self, arrays: Arrays, sizes: Sequence[int], classes: int = CLASSES) -> Split:
        """The training rows dealt at random in these sizes."""
        order = trees.numpy_stream("lab", "split").permutation(len(arrays.y_train))
        *clients, left = (np.sort(rows) for rows in np.split(order, np.cumsum(sizes)))
        counts = np.stack([np.bincount(arrays.y_train[rows], minlength=classes) for rows in clients])
        return Split(tuple(clients), left, counts, "lab", {})

    def setup(
        self,
        method: str | Algorithm = "fedavg",
        hyper: Mapping[str, Any] | None = None,
        sizes: Sequence[int] = (12, 20, 8, 16),
        **trial: Any,
    ) -> Setup:
        """A trial on a made data set. trial: settings as in a card; `method` may be an instance of any class."""
        if isinstance(method, Algorithm):
            self.patch.setattr(registry, "make", lambda name, hyper: method)
        raw = {
            "method": method if isinstance(method, str) else "fedavg",
            "hyper": dict(hyper or {}),
            "net": "mlp",
            "clients": len(sizes),
            "rounds": 3,
            **trial,
            "local": LOCAL | trial.get("local", {}),
        }
        arrays = self.arrays(sum(sizes))
        return Setup(config.resolve(raw), arrays, self.split(arrays, sizes))

    def server(self, setup: Setup) -> Server:
        """A server in round 0; its `pool.log` will hold what travels."""
        pool = WatchedPool()
        pool.load(setup)
        return Server(setup, pool)

    def run(self, method: str | Algorithm = "fedavg", hyper: Mapping[str, Any] | None = None, **more: Any) -> Server:
        """A whole trial, to its last round. more: as for `setup`."""
        server = self.server(self.setup(method, hyper, **more))
        while not server.done:
            server.step()
        return server

    def model(self, server: Server) -> Tree:
        """The parameters of its primary model."""
        model = next(iter(server.method.models(server.state).values()))
        assert isinstance(model, tuple)
        return model[1]

    def same(self, a: Tree, b: Tree) -> bool:
        """Whether two trees are equal: paths, types and bits."""
        left, right = list(trees.leaves(a)), list(trees.leaves(b))
        return [path for path, _ in left] == [path for path, _ in right] and all(
            x.dtype == y.dtype and torch.equal(x, y) for (_, x), (_, y) in zip(left, right, strict=True)
        )

    def close(self, a: Tree, b: Tree, **tolerance: Any) -> bool:
        """The same up to rounding."""
        other = dict(trees.leaves(b))
        return all(torch.allclose(x, other.pop(path), **tolerance) for path, x in trees.leaves(a)) and not other


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Small worlds; see `Lab`."""
    yield Lab(monkeypatch)
    torch.set_flush_denormal(False)  # hosts turn it on


@pytest.fixture(autouse=True)
def denormal_numbers() -> None:
    """A host that ran in this process has switched them off, and hypothesis draws no floats without them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests that need one. It counts four cores, so that the tests fit on any machine."""
    import os

    import ray

    from harness.cluster import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Diary:
    """A `sweep.Watcher` that keeps what it was told."""

    def __init__(self) -> None:
        self.todo = self.total_rounds = self.already = 0
        self.started: list[str] = []
        self.rested: list[str] = []
        self.notes: list[str] = []
        self.rounds: list[tuple[str, int, float | None]] = []
        self.ended: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, trials: int, rounds: int, done: int) -> None:
        self.todo, self.total_rounds, self.already = trials, rounds, done

    def start(self, trial: config.Trial) -> None:
        self.started.append(trial.method)

    def round(self, trial: config.Trial, rounds_done: int, accuracy: float | None) -> None:
        self.rounds.append((trial.method, rounds_done, accuracy))

    def rest(self, trial: config.Trial) -> None:
        self.rested.append(trial.method)

    def end(self, trial: config.Trial, row: Mapping[str, Any]) -> None:
        self.ended.append(row)


@pytest.fixture
def diary() -> Diary:
    """Watches a sweep; see `Diary`."""
    return Diary()


@pytest.fixture(scope="session")
def diary_of() -> type[Diary]:
    """The same for fixtures that live longer than a test."""
    return Diary
