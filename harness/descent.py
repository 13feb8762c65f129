"""What servers do beyond averaging: an optimizer on the mean delta, and training on the proxy data.

Everything here is a pure function of its arguments, `fit`'s steps excepted, which are charged to the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from harness.layers import BUFFERS
from harness.nets import FeatureGenerator, Net
from harness.protocol import Batch, Server
from harness.trees import Tree, add, noise, scale, tree_map

# (x [B, ...], y [B]) -> what teachers say about the rows, tensors [B, ...]
Teach: TypeAlias = Callable[[Tensor, Tensor], dict[str, Tensor]]
# (size, rng) -> proxy rows, drawn uniformly and without replacement, with what teachers say about them
Draw: TypeAlias = Callable[[int, Generator], Batch]


# ---- server optimizers: steps along a delta = end - start, which stands for a negative gradient


def momentum(p: Tree, velocity: Tree, delta: Tree, *, lr: float, beta: float) -> tuple[Tree, Tree]:
    """The next parameters and velocity: v = beta v + delta; p += lr v (Hsu et al. 2019)."""
    velocity = add(delta, scale(velocity, beta))
    return _settled(add(p, velocity, lr), p, delta), velocity


def adam(
    p: Tree, m: Tree, v: Tree, delta: Tree, *, lr: float, beta1: float, beta2: float, eps: float
) -> tuple[Tree, Tree, Tree]:
    """The next parameters and moments: m = beta1 m + (1 - beta1) delta; v = beta2 v + (1 - beta2) delta^2;
    p += lr m / (sqrt(v) + eps), without bias correction (Reddi et al. 2021, Algorithm 2).
    """
    m = tree_map(lambda m, d: beta1 * m + (1 - beta1) * d, m, delta)
    v = tree_map(lambda v, d: beta2 * v + (1 - beta2) * d * d, v, delta)
    moved = tree_map(lambda p, m, v: p + lr * m / (v.sqrt() + eps), p, m, v)
    return _settled(moved, p, delta), m, v


def _settled(moved: Mapping[str, Any], p: Mapping[str, Any], delta: Mapping[str, Any]) -> Tree:
    """`moved` with BatchNorm's running statistics just averaged: an optimizer could make a variance negative."""
    result: Tree = {}
    for name, value in moved.items():
        if isinstance(value, Mapping):
            result[name] = _settled(value, p[name], delta[name])
        else:
            result[name] = p[name] + delta[name] if name.endswith(BUFFERS) else value
    return result


# ---- training on the proxy data


@dataclass(frozen=True)
class Course:
    """A stretch of server-side training with Adam. cosine: the rate falls along half a cosine to zero."""

    steps: int
    batch: int
    lr: float
    cosine: bool = False

    @property
    def rows(self) -> int:
        """Rows drawn in all."""
        return self.steps * self.batch


def opinions(teachers: Iterable[tuple[Net, Tree]], x: Tensor) -> Tensor:
    """Logits [K, B, C] of frozen teachers on rows x [B, ...]."""
    return torch.stack([net.frozen(p, x) for net, p in teachers])


def divergence(target: Tensor, logits: Tensor, tau: float, *, tau_squared: bool) -> Tensor:
    """KL( target || softmax(logits / tau) ), mean over B, in nats; target: probabilities [B, C], logits: [B, C].

    If the target is a mixture sum_i w_i p_i, this has the gradient of sum_i w_i KL( p_i || softmax(logits / tau) ).
    """
    value = (torch.xlogy(target, target) - target * F.log_softmax(logits / tau, dim=-1)).sum(-1).mean()
    return value * tau**2 if tau_squared else value


def consult(server: Server, teach: Teach, wanted: int) -> Draw:
    """Draws of proxy rows with what frozen teachers say about them. The rows depend on the generator alone.

    Teachers are asked once about every row if `wanted`, the rows to be drawn in all, are more than there are, and
    else about each batch.
    """
    if wanted <= server.world.proxy_rows:

        def ask(size: int, rng: Generator) -> Batch:
            batch = server.sample(size, rng)
            with torch.no_grad():
                return batch.with_extra(**teach(batch.x, batch.y))

        return ask
    parts = server.scan(lambda x, y: {"x": x, "y": y, **teach(x, y)}, "proxy")
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def look_up(size: int, rng: Generator) -> Batch:
        index = torch.randperm(len(rows["y"]), generator=rng, device=rng.device)[:size]
        picked = {key: value[index] for key, value in rows.items()}
        return Batch(picked.pop("x"), picked.pop("y"), picked)

    return look_up


def study(
    server: Server,
    start: Tree,
    loss: Callable[[Tree, Batch], Tensor],
    draw: Draw,
    course: Course,
    rng: Generator,
    moments: Tree | None = None,
) -> Tree:
    """`start` after a course on proxy rows. moments: as for `Bench.fit`."""
    return server.fit(
        start,
        loss,
        lambda step: draw(course.batch, rng),
        course.steps,
        lr=course.lr,
        cosine=course.cosine,
        moments=moments,
    )


def tutor(
    server: Server,
    make: FeatureGenerator,
    start: Tree,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    how: str,
    course: Course,
    weight_decay: float = 0.0,
    moments: Tree | None = None,
) -> Tree:
    """A generator after a course on loss(z, what it made of z, y).

    Labels y are drawn from probabilities [C], noise z as `trees.noise` says. moments: as for `Bench.fit`.
    """
    rng = server.rng("generator")

    def draw(step: int) -> Batch:
        y = torch.multinomial(labels, course.batch, replacement=True, generator=rng)
        return Batch(noise(course.batch, make.noise, how, rng), y)

    def on_made(p: Tree, batch: Batch) -> Tensor:
        return loss(batch.x, make(p, batch.x, batch.y), batch.y)

    fit = partial(server.fit, lr=course.lr, weight_decay=weight_decay, cosine=course.cosine, moments=moments)
    return fit(start, on_made, draw, course.steps)
