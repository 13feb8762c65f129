"""Several visits at once: their models stacked, and one step of all of them as one operation (vmap over grad).

What comes out is what `fit.train` gives for each of them, up to rounding: the same rows, the same noise, the same
steps. Visits are stacked if they are of one kind (see `groups`). A batch that is shorter than others is filled up
with rows that its mask leaves out, so a loss has to heed `batch.mask`; whether it does is not believed but looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from harness.fit import Fitted, Optimizer, Training, VisitLoss, Weights, trains
from harness.nets import Net
from harness.protocol import Batch, Phase
from harness.trees import Tree, flat, flattened, leaves, tree_map, unflat

ROUNDING = 1e-4  # how far a stacked gradient may be from the plain one, as a share of its norm
Seen = dict[str, Tensor]  # [K, ...] of each metric


class Apart(Exception):
    """Stacked, these visits would get other numbers than one by one."""


def groups(trainings: Sequence[Training]) -> list[list[int]]:
    """Which of them can be trained together, by their places, in order; who can not has a group of its own.

    Together are visits of one net whose parameters, inboxes, memories and phases differ in values of tensors alone.
    Running statistics keep a visit apart: rows that fill up a batch would move them, whatever its mask says.
    """
    found: dict[Hashable, list[int]] = {}
    for at, one in enumerate(trainings):
        steady = all(trains(path, x) for path, x in leaves(one.start))
        phases = [(phase.name, phase.lr_factor) for phase in one.phases]
        kind = _outline([one.net.name, one.start, one.inbox, one.memory, phases]) if steady else at
        found.setdefault(kind, []).append(at)
    return list(found.values())


def train(group: Sequence[Training], loss: VisitLoss, rule: Optimizer) -> list[Fitted]:
    """`fit.train` of each of a group. Raises Apart, or whatever vmap does, if they must be trained one by one."""
    begun = [one.begin() for one in group]
    fitted = [Fitted(one.start, 0, 0, {}) for one in group]
    for number, phase in enumerate(group[0].phases):
        feeds = [iter(batches(one.phases[number])) for one, batches in zip(group, begun, strict=True)]
        stack = _Stack(group, [one.tree for one in fitted], phase, loss, rule.during(phase))
        fitted = [one.then(more) for one, more in zip(fitted, stack.descend(feeds), strict=True)]
    return fitted


class _Stack:
    """The models of K visits as the rows of a matrix, through a phase. Who has no batches left, leaves."""

    def __init__(
        self, group: Sequence[Training], starts: Sequence[Tree], phase: Phase, loss: VisitLoss, rule: Optimizer
    ) -> None:
        self.group, self.starts, self.loss, self.rule = group, starts, loss, rule
        self.who = list(range(len(group)))  # whose row is where
        self.matrix = torch.stack([flat(start) for start in starts])  # [K, P]
        self.velocity = torch.zeros_like(self.matrix) if rule.momentum else None
        self.given = _Given(group)
        self.step = vmap(grad(_visit_loss(loss, group[0].net, self.given, phase.name), has_aux=True))
        self.ends = list(starts)
        self.unseen = {True, False}  # ragged batches or even ones: which of them no step was compared of yet

    def descend(self, feeds: Sequence[Iterator[Batch]]) -> list[Fitted]:
        """A step per batch. feeds: the batches of each."""
        steps: list[tuple[list[int], list[int], Seen]] = []  # who took it, of how many rows, what was seen
        while self.who:
            drawn = {i: batch for i in self.who if (batch := next(feeds[i], None)) is not None}
            if len(drawn) < len(self.who):
                self._leave(drawn)
            if drawn:
                batches = list(drawn.values())
                steps.append((list(drawn), [len(batch.y) for batch in batches], self._take(batches)))
        return _booked(steps, self.ends)

    def _take(self, batches: Sequence[Batch]) -> Seen:
        sizes = [len(batch.y) for batch in batches]
        slopes, seen = self.step(self._tree(), _rows(batches, sizes, self.matrix), self.given.own)
        gradient = torch.cat([x.reshape(len(batches), -1) for _, x in leaves(slopes)], 1)
        ragged = len(set(sizes)) > 1
        if ragged in self.unseen:
            # What a batch is filled up with is its last row: of one row that leaves any mean as it is.
            telling = [size for size in sizes if 1 < size < max(sizes)]
            if telling or not ragged:
                self.unseen.discard(ragged)
            at = sizes.index(min(telling or sizes))
            self._compare(at, batches[at], gradient[at], {name: metric[at] for name, metric in seen.items()})
        self.rule.move(self.matrix, gradient, self.velocity, 1.0)
        return {name: metric.detach() for name, metric in seen.items()}

    def _tree(self) -> Tree:
        """Views of the matrix, [K, ...] each."""
        like = self.starts[0]
        parts = iter(torch.split(self.matrix, [x.numel() for _, x in leaves(like)], 1))
        return tree_map(lambda x: next(parts).view(len(self.matrix), *x.shape), like)

    def _compare(self, at: int, batch: Batch, gradient: Tensor, seen: Seen) -> None:
        """The same step as it is without the others. Raises Apart if it is another one."""
        one = self.group[self.who[at]]
        weights = Weights(unflat(self.matrix[at], like=self.starts[0]))
        value, metrics = self.loss(one.net, weights.tree, batch, one.inbox, one.memory)
        plain = flattened(weights.slopes(value))
        same = bool((gradient - plain).norm() <= ROUNDING * plain.norm() + 1e-6)
        pairs = [(seen["loss"], value), *((seen[name], metric) for name, metric in metrics.items())]
        if not same or not all(torch.allclose(x, y.detach(), rtol=1e-3, atol=1e-5) for x, y in pairs):
            raise Apart("a step of several visits at once is another one than that of each")

    def _leave(self, stay: Mapping[int, Batch]) -> None:
        """Those who do not stay are done."""
        for at, i in enumerate(self.who):
            if i not in stay:
                self.ends[i] = unflat(self.matrix[at].clone(), like=self.starts[i])
        left = torch.tensor([at for at, i in enumerate(self.who) if i in stay], dtype=torch.int64)
        left = left.to(self.matrix.device)
        self.who = list(stay)
        self.matrix, self.given.own = self.matrix[left], [x[left] for x in self.given.own]
        self.velocity = None if self.velocity is None else self.velocity[left]


class _Given:
    """What several visits were given, inbox and memory. own: [K, ...] of the tensors that are not shared.

    Shared is what is one object for all in their inboxes. Memories are not, even where they are one object here: on
    another host they would be copies, and the numbers may not depend on that.
    """

    def __init__(self, group: Sequence[Training]) -> None:
        self.like = (group[0].inbox, group[0].memory)
        received = len(_flattened(group[0].inbox))
        columns = list(zip(*(_flattened((one.inbox, one.memory)) for one in group), strict=True))
        shared = [at < received and all(x is c[0] for x in c) for at, c in enumerate(columns)]
        self.personal = [isinstance(c[0], Tensor) and not one for c, one in zip(columns, shared, strict=True)]
        self.own = [torch.stack(c) for c, personal in zip(columns, self.personal, strict=True) if personal]

    def of_one(self, own: Sequence[Tensor]) -> Any:
        """As one visit was given it, with its own tensors in their places."""
        mine = iter(own)
        whole = zip(_flattened(self.like), self.personal, strict=True)
        return _filled(self.like, iter([next(mine) if personal else x for x, personal in whole]))


def _visit_loss(loss: VisitLoss, net: Net, given: _Given, phase: str) -> Callable[..., tuple[Tensor, Seen]]:
    """The loss of one visit, of what can be stacked; and all that is recorded of it."""

    def one(p: Tree, rows: Tree, own: Sequence[Tensor]) -> tuple[Tensor, Seen]:
        batch = Batch(rows["x"], rows["y"], rows["extra"], rows.get("mask"), phase)
        value, metrics = loss(net, p, batch, *given.of_one(own))
        return value, {"loss": value, **metrics}

    return one


def _rows(batches: Sequence[Batch], sizes: Sequence[int], like: Tensor) -> Tree:
    """Batches as one, [K, B, ...], with a mask [K, B] where they are of different lengths. like: the mask's type."""
    rows: Tree = {"x": _even([b.x for b in batches]), "y": _even([b.y for b in batches])}
    rows["extra"] = {name: _even([b.extra[name] for b in batches]) for name in batches[0].extra}
    if len(set(sizes)) > 1:
        places, ends = torch.arange(max(sizes)), torch.tensor(sizes)
        rows["mask"] = (places < ends[:, None]).to(like)
    return rows


def _even(parts: Sequence[Tensor]) -> Tensor:
    """[b, ...] each, stacked: [K, B, ...]. The last row is repeated: any other filling could make a loss NaN."""
    most = max(map(len, parts))
    return torch.stack(
        [x if len(x) == most else torch.cat([x, x[-1:].expand(most - len(x), *x.shape[1:])]) for x in parts]
    )


def _booked(steps: Sequence[tuple[list[int], list[int], Seen]], ends: Sequence[Tree]) -> list[Fitted]:
    """What each of them has done, of the steps of all."""
    done = [Fitted(end, 0, 0, {}) for end in ends]
    for who, stretch in groupby(steps, key=lambda step: step[0]):
        taken = list(stretch)
        names = dict.fromkeys(name for _, _, seen in taken for name in seen)
        metrics = {name: torch.stack([seen[name] for _, _, seen in taken if name in seen], 1) for name in names}
        for at, i in enumerate(who):
            rows, own = sum(sizes[at] for _, sizes, _ in taken), {name: x[at] for name, x in metrics.items()}
            done[i] = done[i].then(Fitted(ends[i], len(taken), rows, own))
    return done


def _outline(value: Any) -> Hashable:
    """All of a nest of dicts and lists but the values of its tensors."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device
    if isinstance(value, Mapping):
        return "dict", tuple((key, _outline(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_outline, value))
    plain = value is None or isinstance(value, bool | int | float | str)
    return type(value), value if plain else id(value)


def _flattened(value: Any) -> list[Any]:
    """What a nest of dicts and lists holds, in order."""
    if isinstance(value, Mapping):
        return [x for part in value.values() for x in _flattened(part)]
    return [x for part in value for x in _flattened(part)] if isinstance(value, list | tuple) else [value]


def _filled(like: Any, parts: Iterator[Any]) -> Any:
    """The nest again, of what it shall hold."""
    if isinstance(like, Mapping):
        return {key: _filled(value, parts) for key, value in like.items()}
    if isinstance(like, list | tuple):
        members = [_filled(value, parts) for value in like]
        return tuple(members) if isinstance(like, tuple) else members
    return next(parts)
