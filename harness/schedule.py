"""Schedules: settings that change while a trial runs. Each change is a text: "20 local.lr=0.1 hyper.tau=3".

The number is the first round, counted from 0, that runs with the new values; they hold until a later change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from harness import hypers, registry
from harness.refusal import Refused, unknown
from harness.sections import Local
from harness.settings import Unfit, check

LOCAL = ("lr", "momentum", "weight_decay", "clip")  # what may change of the clients' optimizer
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_SETTING = re.compile(rf'\s+([^\s=]+)=({_QUOTED}|\[(?:[^\]"]|{_QUOTED})*\]|[^\s"\[\]]+)')
_WHOLE = re.compile(rf"\s*([0-9]{{1,10}})((?:{_SETTING.pattern})+)\s*")
_WORD = re.compile(r"(?!(?:true|false|null|nan|inf|NaN|Infinity)$)[A-Za-z_][\w./+-]*")  # texts without quotes


@dataclass(frozen=True)
class Change:
    """New values from a round on. settings: hyper.NAME, or local. and one of `LOCAL` -> value."""

    round: int
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return " ".join(
            [str(self.round), *(f"{key}={_spelled(self.settings[key])}" for key in sorted(self.settings))]
        )

    def part(self, table: str) -> dict[str, Any]:
        """The settings of a table, by their names in it."""
        return {key.partition(".")[2]: v for key, v in self.settings.items() if key.partition(".")[0] == table}


@lru_cache(maxsize=1024)
def parse(text: str) -> Change:
    """A change as it is written. Raises Refused for a text that is none; what its keys may be is `settled`'s."""
    whole = _WHOLE.fullmatch(text)
    if whole is None:
        raise Refused(f"a change is a round and its new settings, '20 local.lr=0.1 hyper.NAME=3', got {text!r:.80}")
    settings: dict[str, Any] = {}
    for key, value in _SETTING.findall(whole[2]):
        if key in settings:
            raise Refused(f"{key} is set twice in {text!r:.80}")
        settings[key] = _read(value)
    return Change(int(whole[1]), settings)


def applied(texts: Sequence[str], round: int, local: Local, hyper: Mapping[str, Any]) -> tuple[Local, dict[str, Any]]:
    """The clients' optimizer and the hyper-parameters of a settled schedule as they stand in a round."""
    now = dict(hyper)
    for change in map(parse, texts):
        if change.round <= round:
            local, now = local.model_copy(update=change.part("local")), now | change.part("hyper")
    return local, now


def settled(
    texts: Sequence[str], rounds: int, local: Local, method: str, hyper: Mapping[str, Any]
) -> tuple[str, ...]:
    """The changes in their one spelling: values as their fields have them, and none that change nothing.

    Each is checked as if its settings held from the start. Raises Unfit.
    """
    last, kept, needs = 0, [], registry.make(method, hyper).needs
    for text in texts:
        try:
            change = parse(text)
            if not last < change.round < rounds:
                where = f"after round {last} and before round {rounds}"
                raise Refused(f"the next change must come {where} (rounds count from 0), got {text!r:.80}")
            before, last = _flat(local, hyper), change.round
            local, hyper = _checked(change, local, method, hyper)
            if registry.make(method, hyper).needs != needs:
                raise Refused(f"round {last}: what method {registry.label(method)} needs can't change on the way")
        except Refused as error:
            raise Unfit("schedule", f"schedule: {error}") from error
        after = _flat(local, hyper)
        changed = {key: after[key] for key in change.settings if after[key] != before[key]}
        if changed:
            kept.append(str(Change(last, changed)))
    return tuple(kept)


def _checked(change: Change, local: Local, method: str, hyper: Mapping[str, Any]) -> tuple[Local, dict[str, Any]]:
    allowed = [*(f"local.{name}" for name in LOCAL), *(f"hyper.{name}" for name in hyper)]
    for key in change.settings:
        if key not in allowed:
            raise Refused(f"round {change.round}: {unknown('key of a change', key, allowed)}")
    try:
        given = {**hyper, **change.part("hyper")}
        return check(Local, local.model_dump() | change.part("local"), "local."), hypers.complete(method, given)
    except Refused as error:
        raise Refused(f"round {change.round}: {error}") from error


def _flat(local: Local, hyper: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{f"local.{name}": getattr(local, name) for name in LOCAL},
        **{f"hyper.{k}": v for k, v in hyper.items()},
    }


def _read(text: str) -> Any:
    """A value: a bare word is a text, all else is JSON."""
    if _WORD.fullmatch(text):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        raise Refused(f'{text[:40]} is no value: write a number, a word, a "quoted text" or [1, 2]') from None
    return tuple(value) if isinstance(value, list) else value


def _spelled(value: Any) -> str:
    """As it is read back."""
    if isinstance(value, str) and _WORD.fullmatch(value):
        return value
    value = value + 0.0 if isinstance(value, float) else value  # one zero
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
