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

# What the server keeps: tensors, numbers, strings, and lists and dicts of those, so that checkpoints need no pickle.
State: TypeAlias = dict[str, Any]
# What a client receives. Tensors are data and are counted as bytes; anything else is a setting.
Inbox: TypeAlias = dict[str, Any]
# Where rows come from: the client's own for training or validation, or the proxy data.
Source: TypeAlias = Literal["private", "validation", "proxy"]
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
    """A kind of model that clients train: its net, who may be picked (None: everybody), and how many in a round."""

    net: str
    clients: tuple[int, ...] | None = None
    cohort: int | None = None  # None: the trial's participation ratio of those who may be picked


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
    participation: float = 1.0
    nets: tuple[str, ...] = ()  # the levels' nets, from small to large
    levels: tuple[int, ...] = ()  # [N] index into nets
    proxy_rows: int = 0
    counts: np.ndarray[Any, np.dtype[np.int64]] | None = None  # [N, C], only for methods that need "label_counts"

    @property
    def label_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows per client and class, [N, C]. Raises if the method did not declare the need: it is private data."""
        if self.counts is None:
            raise RuntimeError('reading label counts takes needs = frozenset({"label_counts"})')
        return self.counts

    def roles_by_net(self) -> dict[str, Role]:
        """A role per net of the fleet, named after it, for the clients of its level; "global" if all are equal."""
        if len(set(self.nets)) < 2:
            return {"global": Role(self.default_net)}
        members = {name: [k for k, level in enumerate(self.levels) if self.nets[level] == name] for name in self.nets}
        return {name: Role(name, tuple(clients)) for name, clients in members.items()}


@dataclass(frozen=True)
class Broadcast:
    """What travels down: to everybody, to everybody of a role, to one visit. Shared parts are sent once."""

    shared: Inbox = field(default_factory=dict)
    by_role: Mapping[str, Inbox] = field(default_factory=dict)
    personal: Mapping[Visit, Inbox] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A stretch of local training: passes over data with the trial's local optimizer."""

    name: str = "local"
    epochs: float | None = None  # passes, also parts of one; None: the trial's own number
    source: Source = "private"
    lr_factor: float = 1.0  # times the round's rate
    rows: Tensor | None = None  # which rows of the source, by number; None: all


@dataclass(frozen=True)
class Batch:
    """Rows to learn from. x: [B, ...], y: [B]; mask: [B], None for all ones; extra: what `teach` and `draw` added,
    and in local training "row", [B], their places among the phase's rows."""

    x: Tensor
    y: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    phase: str = "local"

    def with_extra(self, **more: Tensor) -> Batch:
        """The same batch with more tensors beside its rows."""
        return replace(self, extra={**self.extra, **more})


class Bench(Protocol):
    """What a hook may work with beyond the given loop. Every step and second spent here is charged to the method."""

    @property
    def label_counts(self) -> Tensor:
        """Rows of each class [C] among the client's own; zeros on the server."""

    def rng(self, purpose: str) -> Generator:
        """A stream that depends on the seed, the round, the client and the purpose alone."""

    def scan(self, fn: Callable[[Tensor, Tensor], Any], source: Source = "private") -> list[Any]:
        """fn(x, y) on every row of a source, in order and in batches, without gradients or augmentation."""

    def sample(self, size: int, rng: Generator, source: Source = "proxy") -> Batch:
        """Rows drawn uniformly, without replacement within a batch. Proxy rows have y = -1 unless labelled."""

    def fit(
        self,
        p: Tree,
        loss: Callable[[Tree, Batch], Tensor],
        draw: Callable[[int], Batch],
        steps: int,
        *,
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        cosine: bool = False,
        moments: Tree | None = None,
    ) -> Tree:
        """`steps` steps on `loss` from a copy of `p` with a fresh optimizer; `draw(step)` gives each step's batch.

        cosine: the rate falls along half a cosine to zero. betas: Adam's. moments: Adam's, updated; {} to begin with.
        """


class Server(Bench, Protocol):
    """What `merge` may use."""

    world: World
    round: int  # that is being merged, from 0


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
    metrics: Mapping[str, Tensor]  # [steps, ...] of every metric that the loss returned, and "loss"
    bench: Bench


@dataclass(frozen=True)
class Update:
    """What came back from a visit. `samples` is n_k; `merge` gets updates in the order of their visits."""

    visit: Visit
    samples: int
    steps: int
    payload: Tree
    metrics: Mapping[str, float]
    chunk: int = 0  # the visits of a chunk may come with one mean of what is `summed`: its first one has it then


@dataclass(frozen=True)
class Ensemble:
    """Several models that answer together: the mean of their logits. members: (net, parameters)."""

    members: tuple[tuple[str, Tree], ...]


class Algorithm(ABC):
    """A method. Subclasses are frozen dataclasses whose fields are the hyper-parameters.

    needs: what it asks of a trial; a property where that depends on a hyper-parameter. "one_net": all clients train
    the same net; "fleet": several nets; "same_latent": nets of one latent width; "proxy", "labelled_proxy": data on
    the server; "label_counts": every client's label counts; "private_test", "validation": rows that clients keep from
    training; "pooled": all rows at one client, for upper bounds.
    identity: hyper-parameters with which its first model equals FedAvg's bit for bit (a class's own, not inherited).
    summed: parts of payloads that the `merge` beside it only takes `averages.mean_of`, and how clients weigh in it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"one_net"})
    identity: ClassVar[Mapping[str, Any] | None] = None
    summed: ClassVar[Mapping[str, Literal["samples", "equal"]]] = {}

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

    def plan(self, world: World, inbox: Inbox, memory: Tree) -> tuple[Phase, ...]:
        """The phases of a visit."""
        return (Phase(),)

    def prepare(self, net: Net, inbox: Inbox, memory: Tree, bench: Bench) -> Inbox:
        """The inbox that training sees: may add what the client makes for itself before it trains."""
        return inbox

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
    def models(self, state: State) -> Mapping[str, tuple[str, Tree] | Ensemble]:
        """What to evaluate on the global test set: name -> (net, parameters). The first one is the primary model."""

    def keeps(self, net: Net, memory: Tree) -> Tree | None:
        """A client's own model, evaluated on its test rows, for methods that need "private_test"."""
        return None


def weights(updates: Sequence[Update]) -> list[float]:
    """Sample counts n_k, the usual weights of an average."""
    return [float(u.samples) for u in updates]


def trees_of(updates: Sequence[Update], key: str) -> Iterator[Tree]:
    """One part of every payload, in order."""
    return (u.payload[key] for u in updates)
