"""The vocabulary, and `Algorithm`: everything that the author of a method must read.

The harness owns the loop: data order, optimizer, learning rate, epochs, evaluation, clocks and byte counts. A method
owns its loss and what goes on the wire. Its hooks are pure: they change nothing that they are given, with one
exception, `merge`, which owns the state it receives. All randomness enters through the generators handed to hooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from torch import Generator, Tensor

from harness.nets import Net
from harness.trees import Tree

# What the server keeps between rounds: tensors, numbers, strings, and lists and dicts of those, so that a
# checkpoint holds it without pickle. The keys are the method's own.
State: TypeAlias = dict[str, Any]

# What a client receives. Tensors are data and are counted as bytes; anything else is a setting.
Inbox: TypeAlias = dict[str, Any]

Source: TypeAlias = Literal["private", "proxy"]

# Ranges of hyper-parameters: annotate a field with one of these and bad values are refused with a clear message.
Positive: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]
Count: TypeAlias = Annotated[int, Ge(1)]
Times: TypeAlias = Annotated[int, Ge(0)]


@dataclass(frozen=True, order=True)
class Visit:
    """One client doing one role in one round."""

    client: int
    role: str


@dataclass(frozen=True)
class Role:
    """A kind of model that clients train.

    net: name of the net; clients: who may be picked (None: everybody); cohort: how many of them in a round
    (None: the trial's participation ratio of those eligible).
    """

    net: str
    clients: tuple[int, ...] | None = None
    cohort: int | None = None


@dataclass(frozen=True)
class Cohort:
    """Who takes part in a round. The whole schedule follows from the seed; methods do not influence it."""

    round: int
    visits: tuple[Visit, ...]


@dataclass(frozen=True)
class World:
    """What a method may know about a trial."""

    clients: int
    classes: int
    rounds: int
    sizes: tuple[int, ...]  # training rows per client
    batch: int
    epochs: int
    lr: float  # in round 0
    momentum: float
    net: Callable[[str], Net]  # name -> net for this data set
    default_net: str
    counts: np.ndarray[Any, np.dtype[np.int64]] | None = None  # [N, C], only for methods that need "label_counts"

    @property
    def label_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows per client and class, [N, C]. Raises if the method did not declare the need: it is private data."""
        if self.counts is None:
            raise RuntimeError('reading label counts takes needs = frozenset({"label_counts"})')
        return self.counts


@dataclass(frozen=True)
class Broadcast:
    """What travels down: to everybody, to everybody of a role, to one visit. Shared parts are sent once."""

    shared: Inbox = field(default_factory=dict)
    by_role: Mapping[str, Inbox] = field(default_factory=dict)
    personal: Mapping[Visit, Inbox] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A stretch of local training: passes over data with the trial's local optimizer.

    epochs: passes, None for the trial's own number; source: which data; lr_factor multiplies the round's rate.
    """

    name: str = "local"
    epochs: int | None = None
    source: Source = "private"
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Rows to learn from. x: [B, ...], y: [B]; extra: what `teach` and `draw` added; mask: [B], None for all ones."""

    x: Tensor
    y: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    phase: str = "local"

    def with_extra(self, **more: Tensor) -> Batch:
        """The same batch with more tensors beside its rows."""
        return replace(self, extra={**self.extra, **more})


@dataclass(frozen=True)
class Trained:
    """A visit after its local training, for `reply`. `steps` K and `lr` are those really used."""

    visit: Visit
    round: int
    net: Net
    start: Tree
    end: Tree
    inbox: Inbox
    memory: Tree
    samples: int
    steps: int
    lr: float
    momentum: float
    metrics: Mapping[str, Tensor]  # [steps] of every metric that the loss returned, and "loss"


@dataclass(frozen=True)
class Update:
    """What came back from a visit, for `merge`. `samples` is n_k; updates come in the order of their visits."""

    visit: Visit
    samples: int
    steps: int
    payload: Tree
    metrics: Mapping[str, float]


# The loss of a server step: parameters and a batch give a scalar.
ServerLoss: TypeAlias = Callable[[Tree, Batch], Tensor]


class Server(Protocol):
    """What `merge` may use. Every step and second spent here is charged to the method."""

    @property
    def world(self) -> World:
        """The trial."""

    @property
    def round(self) -> int:
        """The round that is being merged, from 0."""

    def rng(self, purpose: str) -> Generator:
        """A stream that depends on the seed, the round and the purpose alone."""

    def fit(
        self,
        p: Tree,
        loss: ServerLoss,
        draw: Callable[[int], Batch],
        steps: int,
        *,
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float,
        weight_decay: float = 0.0,
    ) -> Tree:
        """`steps` steps on `loss` from `p` with a fresh optimizer; `draw(step)` gives each step's batch."""


class Algorithm(ABC):
    """A method. Subclasses are frozen dataclasses whose fields are the hyper-parameters."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def roles(self, world: World) -> Mapping[str, Role]:
        """Role -> net, eligible clients, cohort."""
        return {"global": Role(world.default_net)}

    @abstractmethod
    def init(self, world: World, rng: Generator) -> State:
        """The server's state before round 0."""

    @abstractmethod
    def broadcast(self, state: State, cohort: Cohort, world: World) -> Broadcast:
        """What the cohort receives. Tensors are counted as bytes down, per visit."""

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A client's memory at its first visit in a role. It never travels and is never counted."""
        return {}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """The parameters that local training starts from. Every floating leaf is trained, buffers excepted."""
        params: Tree = inbox["params"]
        return params

    def plan(self, world: World) -> tuple[Phase, ...]:
        """The phases of a visit."""
        return (Phase(),)

    def teach(self, net: Net, x: Tensor, inbox: Inbox, memory: Tree) -> dict[str, Tensor]:
        """What frozen teachers say about the rows x [B, ...]: tensors [B, ...], found in `batch.extra`.

        A function of each row alone, without gradients: where the inputs do not change between epochs the harness
        computes it once per visit instead of at every step.
        """
        return {}

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: Generator) -> Batch:
        """All other randomness of a step enters here, such as noise for a generator."""
        return batch

    @abstractmethod
    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and detached scalars to record. Pure."""

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """Payload (counted as bytes up) and the client's next memory."""
        return {"params": trained.end}, trained.memory

    @abstractmethod
    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """Aggregation and server-side training. Owns `state`: its buffers may be reused in the result."""

    @abstractmethod
    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """What to evaluate: name -> (net, parameters). The first one is the primary model."""


def weights(updates: Sequence[Update]) -> list[float]:
    """Sample counts n_k, the usual weights of an average."""
    return [float(u.samples) for u in updates]


def trees_of(updates: Sequence[Update], key: str) -> Iterator[Tree]:
    """One part of every payload, in order."""
    return (u.payload[key] for u in updates)
