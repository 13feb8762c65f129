"""What is known of the trials of a results folder: how they ended, and how far those on a checkpoint have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.books import rows_in
from harness.checkpoint import Shelf, unpack
from harness.desk import Result
from harness.record import Store
from harness.summary import final

Row = Mapping[str, Any]
SEEN = ("round", "role")  # of a row of `rounds`, beside its validation columns


class Ledger:
    """Reads the tables once, then is told. What it says never differs from what is on the disk.

    problems: what was found damaged, or could not be written.
    """

    def __init__(self, store: Store, shelf: Shelf, problems: list[str]) -> None:
        self.store, self.shelf, self.problems = store, shelf, problems
        self._results: dict[str, Result] = {}
        self._content: dict[str, bytes] = {}  # checkpoints that could not be written down
        self._reached: dict[str, int] = {}
        self._over: set[str] = set()  # trials that will never run again
        for row in store.rows("trials") if store.path.is_dir() else ():
            searched = row.get("stage") == "search"
            self.add(row, store.rows("rounds", row["trial_id"]) if searched else ())

    def tidy(self) -> None:
        """Takes away what a driver left that was killed between a row and its checkpoint. Only for the writer."""
        for name in self._over & set(self.shelf.names()):
            self.shelf.drop(name)

    def add(self, row: Row, rounds: Sequence[Row] = ()) -> None:
        """A trial has a row. rounds: its rows there, if a search has to look at them."""
        steps = (row["steps"] or 0) + (row["server_steps"] or 0)
        kept = [{k: v for k, v in r.items() if k in SEEN or k.startswith("validation")} for r in rounds]
        self._results[row["trial_id"]] = Result(row["status"], row["reason"] or "", steps, kept)
        if final(row["status"], row["reason"] or "", row.get("stage") or ""):
            self._over.add(row["trial_id"])
        self._reached.pop(row["trial_id"], None)
        self._content.pop(row["trial_id"], None)

    def result(self, name: str) -> Result | None:
        """See `desk.Book`, here and below."""
        return self._results.get(name)

    def curve(self, name: str) -> Sequence[Row]:  # noqa: D102
        ended = self._results.get(name)
        if ended is not None:
            return ended.rounds
        content = self.content(name)
        return [] if content is None else rows_in(unpack(content)["server"], "rounds")

    def reached(self, name: str) -> int:  # noqa: D102
        if name not in self._reached:
            content = self.content(name)
            self._reached[name] = 0 if content is None else int(unpack(content)["server"]["round"])
        return self._reached[name]

    def adopt(self, donor: str, heir: str) -> None:  # noqa: D102
        content = self.content(donor)
        if content is not None:
            self.keep(heir, self.reached(donor), content)

    def content(self, name: str) -> bytes | None:
        """The newest good checkpoint of a trial."""
        if name in self._content:
            return self._content[name]
        content, warnings = self.shelf.latest(name)
        self._worry(*warnings)
        return content

    def keep(self, name: str, round: int, content: bytes, needed: bool = True) -> None:
        """Writes a checkpoint down. One that can't be written is a worry for later: the one before it still stands.

        needed: somebody waits for just this one, so without room on the disk it stays in memory.
        """
        try:
            self.shelf.put(name, round, content)
        except OSError as error:
            self._worry(f"no checkpoint could be written to {self.shelf.path}: {error.strerror or error}")
            if not needed:
                return
            self._content[name] = content
        self._reached[name] = round

    def _worry(self, *worries: str) -> None:
        self.problems += [worry for worry in worries if worry not in self.problems]
