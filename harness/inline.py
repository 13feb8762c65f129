"""The pool of one host in this very process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from harness.evaluate import Counts
from harness.host import ClientHost
from harness.trees import Tree
from harness.work import Answer, Asked, Event, Order, Personal, Setup, Shard, WorkFailed, event, said

T = TypeVar("T")


class InlinePool:
    """One host; work is done when it is given."""

    brisk = False  # nothing is sent

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        self.host = ClientHost(device, threads)
        self.events: list[Event] = []

    def load(self, setup: Setup) -> None:
        """Begins a trial."""
        self.events = []
        self.host.load(setup)

    def put(self, tree: Tree) -> Tree:  # noqa: D102
        return tree

    def fetch(self, handle: Tree) -> Tree:  # noqa: D102
        return handle

    def visit(self, order: Order, parts: Sequence[Tree], memory: Tree | None) -> Answer | WorkFailed:
        """A visit; what it raises is kept until it is asked for."""
        try:
            return self._twice(partial(self.host.visit, order, parts, memory), order.round, order.visit.client)
        except Exception as error:
            return WorkFailed(said(error)).with_traceback(error.__traceback__)

    def visits(self, asked: Sequence[Asked]) -> list[Answer | WorkFailed]:
        """Visits that belong together."""
        try:
            return self._twice(partial(self.host.visits, asked), asked[0][0].round, None)
        except Exception as error:
            return [WorkFailed(said(error)).with_traceback(error.__traceback__)] * len(asked)

    def answer(self, ticket: Answer | WorkFailed) -> Answer:  # noqa: D102
        if isinstance(ticket, WorkFailed):
            raise ticket
        return ticket

    def score(self, what: Shard | Personal, params: Tree) -> Counts:  # noqa: D102
        return self._twice(partial(self.host.score, what, params), None, None)

    def counts(self, ticket: Counts) -> Counts:  # noqa: D102
        return ticket

    def drain(self) -> list[Event]:  # noqa: D102
        found, self.events = self.events, []
        return found

    def _twice(self, work: Callable[[], T], round: int | None, client: int | None) -> T:
        """Work that finds no room on the GPU is done once more, after all that can be made again was let go."""
        try:
            return work()
        except torch.cuda.OutOfMemoryError as error:
            self.events.append(event("out_of_memory", f"{said(error)}; tried again", round, client))
        self.host.relax()  # only here: until the error is forgotten it holds the tensors of its frames
        return work()
