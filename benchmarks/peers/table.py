"""From raw seconds to a table: medians, ranges, and ratios to fedstill. No simulator is needed for it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OURS = "fedstill"
APART = 0.05  # accuracies further from ours than this are of other work


class OtherWork(RuntimeError):
    """Simulators that were to do the same work ended with different accuracies."""


@dataclass(frozen=True)
class Measured:
    """One way to run one simulator in one setting.

    seconds: by turn, of the rounds after those that warm up. accuracy: on the test rows after all rounds, by turn;
    None where the driver can't tell. same: whether data, net and settings are those of the others. tried: median
    seconds of the ways to run it that it was tried in.
    """

    setting: str
    peer: str
    way: str
    seconds: Sequence[Sequence[float]]
    accuracy: Sequence[float | None]
    versions: Mapping[str, str] = field(default_factory=dict)
    same: bool = True
    tried: Mapping[str, float] = field(default_factory=dict)

    @property
    def rounds(self) -> list[float]:
        """The seconds of all turns."""
        return [s for turn in self.seconds for s in turn]

    @property
    def median(self) -> float:
        """Of a round, in seconds."""
        return statistics.median(self.rounds)


def check(found: Sequence[Measured]) -> None:
    """Raises OtherWork where a simulator that does the same work has another accuracy than ours, turn by turn."""
    ours = {one.setting: one for one in found if one.peer == OURS}
    for one in found:
        for theirs, own in zip(one.accuracy, ours[one.setting].accuracy, strict=True) if one.same else ():
            if theirs is None or own is None or not abs(theirs - own) <= APART:  # nor if it is no number
                raise OtherWork(f"{one.peer}, {one.setting}: accuracy {theirs}, ours is {own}: not the same work?")


def table(found: Sequence[Measured]) -> str:
    """Markdown: a row for each simulator in each setting. ratio: its median round to ours."""
    ours = {one.setting: one.median for one in found if one.peer == OURS}
    head = ["setting", "simulator", "run as", "seconds a round: median [min, max]", "rounds", "ratio", "accuracy"]
    lines = [head, ["---"] * len(head)]
    for one in found:
        accuracy = [a for a in one.accuracy if a is not None]
        versions = ", ".join(f"{name} {number}" for name, number in one.versions.items())
        lines.append(
            [
                one.setting,
                f"{one.peer} ({versions})" if versions else one.peer,
                one.way,
                f"{one.median:.3f} [{min(one.rounds):.3f}, {max(one.rounds):.3f}]",
                str(len(one.rounds)),
                f"{one.median / ours[one.setting]:.2f}" if one.same else "other work",
                f"{statistics.mean(accuracy):.3f}" if accuracy else "not told",
            ]
        )
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return rows + "".join(f"\n{line}\n" for line in map(ways, found) if line)


def ways(one: Measured) -> str:
    """What a simulator was tried in before the fastest was measured; empty for one that has one way."""
    if not one.tried:
        return ""
    told = "; ".join(f"{way}: {seconds:.3f}" for way, seconds in one.tried.items())
    return f"{one.setting}, {one.peer} was tried as (seconds a round): {told}."
