"""What a pool gives its hosts: pieces of work, and calls that hold one or several of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.actors import Placed
from harness.work import Asked


@dataclass(eq=False)
class Work:
    """A piece of work, a visit or several that stay together or something to score, and what came of it."""

    name: str
    round: int | None = None
    client: int | None = None
    score: Callable[[Any], Any] | None = None  # gives a host something to score; None: this is a visit
    asked: Sequence[Asked] = ()  # the visits
    alone: bool = False  # never again together with others: it may have been the trouble of all of them
    done: bool = False
    found: Any = None  # report, payload and next memory of each visit, or counts
    error: Exception | None = None
    thinned: int = 1  # how thinly work was spread over the hosts when it was given
    trouble: Counter[str] = field(default_factory=Counter)  # kind of event -> times

    def end(self, found: Any = None, error: Exception | None = None) -> None:
        """It is over, well or with an error."""
        self.done, self.found, self.error = True, found, error


@dataclass(frozen=True)
class Call:
    """Work under way: what a host does at once. refs: of the answer, then of the memories."""

    at: int
    works: list[Work]
    refs: list[Any]

    @property
    def size(self) -> int:
        """How many visits it holds; something to score counts as one."""
        return sum(max(1, len(work.asked)) for work in self.works)


def give(host: Any, at: int, works: list[Work]) -> Call:
    """Hands work over. What several visits receive alike is sent once."""
    if works[0].score is not None:
        return Call(at, works, [works[0].score(host)])
    sent: dict[Any, int] = {}  # what was sent -> its place

    def placed(one: Asked) -> Placed:
        order, parts, memory = one
        places = tuple(sent.setdefault(part, len(sent)) for part in parts)
        return order, places, None if memory is None else sent.setdefault(memory, len(sent))

    asked = [[placed(one) for one in work.asked] for work in works]
    count = 1 + sum(map(len, asked))
    return Call(at, works, host.visits.options(num_returns=count).remote(asked, *sent))


def joins(work: Work, last: Work, room: int) -> bool:
    """Whether a visit goes along with the one before it. A new chunk does if there is room for the whole of it."""
    if not work.asked or work.alone or last.alone or len(work.asked) > room:
        return False
    chunk, before = work.asked[0][0].chunk, last.asked[0][0].chunk
    return chunk is None or chunk == before or chunk.size <= room
