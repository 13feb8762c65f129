"""The hot path: a step, a client's visit, a server-side fit.

Parameters live in one flat buffer; the tree that a loss sees is made of views into it, so that an optimizer step is a
handful of operations. Gradients are put into one only where a rule wants them so: every pass over large ones counts.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from harness.batches import Rows, augment, passes
from harness.layers import BUFFERS
from harness.nets import Net
from harness.protocol import Algorithm, Batch, Inbox, Phase, Source, World
from harness.trees import Tree, flattened, leaves, stream, tree_map

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
KEPT_BYTES = 2**29
StepLoss = Callable[[Tree, Batch], tuple[Tensor, dict[str, Tensor]]]
# `Algorithm.loss`: of a net, its parameters, a batch, an inbox and a memory
VisitLoss = Callable[[Net, Tree, Batch, Inbox, Tree], tuple[Tensor, dict[str, Tensor]]]
Kind = Literal["sgd", "adam"]
Step = Callable[[tuple[Tensor, ...], float], None]  # of `Weights.slopes` and a factor of the rate


def settle(threads: int = 1) -> None:
    """Makes this process one for training: its threads, and what would slow it down."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # dying activations would otherwise slow training sevenfold
    if sys.platform == "linux":
        # glibc gives large blocks back at once, and the kernel clears every page of the next one: for nets of 10
        # million parameters that is most of the time of a copy.
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def trains(path: str, x: Tensor) -> bool:
    """BatchNorm's running statistics and integers are part of a tree, but no gradient moves them."""
    return x.is_floating_point() and not path.endswith(BUFFERS)


class Weights:
    """A copy of a tree that can be trained: leaves are views into one vector."""

    def __init__(self, tree: Tree) -> None:
        named = list(leaves(tree))
        trained = [x for path, x in named if trains(path, x)]
        self.vector = flattened(x.detach() for x in trained)
        views = zip(trained, torch.split(self.vector, [x.numel() for x in trained]), strict=True)
        self.trained = tuple(value.view(x.shape).detach().requires_grad_() for x, value in views)
        fill = iter(self.trained)
        names = iter(named)  # leaves() and tree_map() walk in the same order
        self.tree = tree_map(lambda x: next(fill) if trains(*next(names)) else x.detach().clone(), tree)

    def slopes(self, value: Tensor) -> tuple[Tensor, ...]:
        """The gradient of a scalar by every leaf that is trained; zeros where it does not depend on it."""
        return torch.autograd.grad(value, self.trained, allow_unused=True, materialize_grads=True)

    def result(self) -> Tree:
        """The tree as it is now, without gradients. Shares memory with this object: use it once training is over."""
        return tree_map(Tensor.detach, self.tree)


@dataclass(frozen=True)
class Optimizer:
    """Stochastic gradient descent with heavy-ball momentum, or Adam; L2 added to gradients."""

    kind: Kind = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0  # largest norm of a gradient; 0: as it is
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's

    def bind(self, weights: Weights, moments: Tree | None = None) -> Step:
        """An optimizer: what it returns takes a step along `weights.slopes`, at a factor of the rate.

        It is fresh, unless Adam is given the moments of an earlier one, which it updates in place.
        """
        w = weights.vector
        if self == Optimizer("sgd", self.lr):
            return lambda slopes, factor: self._plainly(weights.trained, slopes, factor)
        if self.kind == "adam":
            zeros = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
            kept = {} if moments is None else moments
            kept.update({"step": torch.zeros(()), **zeros, **kept})
            return lambda slopes, factor: self._adapt(w, flattened(slopes), kept, factor)
        velocity = torch.zeros_like(w) if self.momentum else None
        return lambda slopes, factor: self.move(w, flattened(slopes), velocity, factor)

    def during(self, phase: Phase) -> Optimizer:
        """The same at the rate of a phase."""
        return replace(self, lr=self.lr * phase.lr_factor)

    def move(self, w: Tensor, g: Tensor, velocity: Tensor | None, factor: float) -> None:
        """A step of descent, in place: of a vector w [P], or of the rows of a matrix [K, P], each for itself."""
        with torch.no_grad():
            if self.clip:
                g.mul_(torch.clamp(self.clip / (g.norm(dim=-1, keepdim=True) + 1e-6), max=1.0))
            if self.weight_decay:
                g.add_(w, alpha=self.weight_decay)
            if velocity is not None:
                g = velocity.mul_(self.momentum).add_(g)
            w.add_(g, alpha=-self.lr * factor)

    @torch.no_grad()
    def _plainly(self, trained: tuple[Tensor, ...], slopes: tuple[Tensor, ...], factor: float) -> None:
        torch._foreach_add_(trained, slopes, alpha=-self.lr * factor)

    def _adapt(self, w: Tensor, g: Tensor, kept: Tree, factor: float) -> None:
        """Adam as torch.optim has it, bit for bit; importing that would take seconds in every new process."""
        with torch.no_grad():
            if self.weight_decay:
                g.add_(w, alpha=self.weight_decay)
            kept["step"] += 1
            (beta1, beta2), t = self.betas, float(kept["step"])
            kept["exp_avg"].lerp_(g, 1 - beta1)
            kept["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            spread = (kept["exp_avg_sq"].sqrt() / (1 - beta2**t) ** 0.5).add_(1e-8)
            w.addcdiv_(kept["exp_avg"], spread, value=-self.lr * factor / (1 - beta1**t))


@dataclass(frozen=True)
class Fitted:
    """The end of a stretch of training. metrics: [steps] of each metric and of "loss", on the device."""

    tree: Tree
    steps: int
    samples: int
    metrics: dict[str, Tensor]

    def then(self, more: Fitted) -> Fitted:
        """This stretch and the next one as one."""
        names = {**self.metrics, **more.metrics}
        metrics = {n: torch.cat([f.metrics[n] for f in (self, more) if n in f.metrics]) for n in names}
        return Fitted(more.tree, self.steps + more.steps, self.samples + more.samples, metrics)


def descend(
    start: Tree,
    loss: StepLoss,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    schedule: Callable[[int], float] | None = None,
    moments: Tree | None = None,
) -> Fitted:
    """One optimizer step per batch, from a copy of `start`. schedule: step -> factor of the rate; moments: Adam's."""
    weights = Weights(start)
    step = optimizer.bind(weights, moments)
    seen: dict[str, list[Tensor]] = {}
    steps = samples = 0
    for batch in batches:
        value, metrics = loss(weights.tree, batch)
        step(weights.slopes(value), 1.0 if schedule is None else schedule(steps))
        steps += 1
        samples += len(batch.y)
        for name, metric in (("loss", value), *metrics.items()):
            seen.setdefault(name, []).append(metric.detach())
    return Fitted(weights.result(), steps, samples, {name: torch.stack(values) for name, values in seen.items()})


@dataclass(frozen=True)
class Streams:
    """Three independent streams of a visit: the order of the rows, their augmentation, the method's own draws."""

    order: Generator
    augment: Generator
    draw: Generator


def visit_batches(
    method: Algorithm,
    net: Net,
    inbox: Inbox,
    memory: Tree,
    phase: Phase,
    rows: Rows,
    streams: Streams,
    *,
    batch: int,
    epochs: float,
    work: float,
    drop_last: bool,
) -> Iterable[Batch]:
    """The batches of a phase with everything beside their rows. work: the share of the epochs that the client does.

    What teachers say about a row is computed once per visit where its inputs are the same in every pass, and batch by
    batch where they are augmented.
    """
    told: dict[str, Tensor] = {}
    if phase.rows is not None:
        rows = replace(rows, x=rows.x[phase.rows], y=rows.y[phase.rows])
    if rows.augment is None:
        parts = [method.teach(net, x, inbox, memory) for x in torch.split(rows.x, max(batch, 256))]
        told = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    wanted = work * (epochs if phase.epochs is None else phase.epochs)
    for index in passes(len(rows), batch, wanted, drop_last, streams.order):
        x = rows.x[index]
        if rows.augment is None:
            extra = {key: value[index] for key, value in told.items()}
        else:
            x = augment(x, rows.augment, streams.augment)
            extra = method.teach(net, x, inbox, memory)
        rows_now = Batch(x, rows.y[index], {**extra, "row": index}, phase=phase.name)
        yield method.draw(net, rows_now, inbox, memory, streams.draw)


@dataclass(frozen=True)
class Training:
    """A visit's local training, ready to begin. begin: winds its streams back; then phase -> batches of the phase."""

    net: Net
    start: Tree
    inbox: Inbox
    memory: Tree
    phases: tuple[Phase, ...]
    begin: Callable[[], Callable[[Phase], Iterable[Batch]]]


def train(one: Training, loss: VisitLoss, rule: Optimizer) -> Fitted:
    """The phases of a visit, one after the other. loss: a method's; rule: the optimizer at the round's rate."""
    batches, fitted = one.begin(), Fitted(one.start, 0, 0, {})
    for phase in one.phases:
        more = descend(
            fitted.tree, lambda p, b: loss(one.net, p, b, one.inbox, one.memory), batches(phase), rule.during(phase)
        )
        fitted = fitted.then(more)
    return fitted


@dataclass
class Workbench:
    """Implements `protocol.Bench`, and with a world and a round `protocol.Server`; counts what is spent."""

    key: tuple[object, ...]  # of its streams
    device: torch.device
    label_counts: Tensor
    sources: Mapping[str, Callable[[], Rows]]  # made only when asked for
    world: World
    batch: int = 256
    round: int = 0
    steps: int = 0
    samples: int = 0
    read_proxy: bool = False

    def rng(self, purpose: str) -> Generator:
        """A stream of the bench's key and the purpose."""
        return stream(*self.key, purpose, device=self.device)

    @torch.no_grad()
    def scan(self, fn: Callable[[Tensor, Tensor], Any], source: Source = "private") -> list[Any]:
        """fn(x, y) in batches, in order."""
        rows = self.sources[source]()
        self.samples += len(rows)
        parts = (torch.split(part, self.batch) for part in (rows.x, rows.y))
        return [fn(x, y) for x, y in zip(*parts, strict=True)]

    def sample(self, size: int, rng: Generator, source: Source = "proxy") -> Batch:
        """Some rows of a source."""
        rows = self.sources[source]()
        index = torch.randperm(len(rows), generator=rng, device=rng.device)[:size]
        return Batch(rows.x[index], rows.y[index])

    def fit(
        self,
        p: Tree,
        loss: Callable[[Tree, Batch], Tensor],
        draw: Callable[[int], Batch],
        steps: int,
        *,
        optimizer: Kind = "adam",
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        cosine: bool = False,
        moments: Tree | None = None,
    ) -> Tree:
        """`steps` steps on `loss` from `p`."""
        rule = Optimizer(optimizer, lr, weight_decay=weight_decay, betas=betas)
        schedule = (lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)) if cosine else None
        batches = (draw(step) for step in range(steps))
        fitted = descend(p, lambda tree, batch: (loss(tree, batch), {}), batches, rule, schedule, moments)
        self.steps += fitted.steps
        self.samples += fitted.samples
        return fitted.tree
