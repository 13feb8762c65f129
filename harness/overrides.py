"""Settings as text: `key=value` on the command line, dotted keys in cards, and what their keys mean."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness import registry
from harness.config import Execution, Trial, hyper_fields
from harness.refusal import Refused, nearest
from harness.settings import Settings

# Digits and underscores are left to TOML's own rules; the pattern only keeps dates, tables and comments out.
_NUMBER = re.compile(r"[+-]?(?:inf|nan|[0-9][0-9_]*(?:\.[0-9_]+)?(?:[eE][+-]?[0-9_]+)?)")
_QUOTED = re.compile(r""""(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")


@dataclass(frozen=True)
class Target:
    """What a key sets. path: the way to it inside a trial or the execution settings."""

    scope: Literal["trial", "execution", "hyper", "search"]
    path: tuple[str, ...]
    method: str = ""  # of a hyper-parameter


@dataclass(frozen=True)
class Setting:
    """The values of a key: one, or several for an axis. source: where they were written, for messages."""

    key: str
    values: tuple[Any, ...]
    source: str

    @property
    def one(self) -> Any:
        """The only value. Raises Refused for an axis."""
        if len(self.values) > 1:
            raise Refused(f"{self.source}: {self.key} takes one value, not {len(self.values)}")
        return self.values[0]


def targets(methods: Sequence[str]) -> dict[str, Target]:
    """Every key that can be set when these methods run: dotted name -> what it sets."""
    found: dict[str, Target] = {}
    for path in _leaves(Trial):
        if path[0] not in ("method", "source", "hyper", "seed"):
            found[".".join(path)] = Target("trial", path)
    for path in _leaves(Execution):
        found[".".join(("execution", *path))] = Target("execution", path)
    for method in methods:
        for name in hyper_fields(method):
            found[f"{hyper_prefix(method)}.{name}"] = Target("hyper", (name,), method)
    return found


def hyper_prefix(method: str) -> str:
    """What stands before a hyper-parameter: the method's name, unless a table of settings has that name ("local")."""
    label = registry.label(method)
    return f"hyper.{label}" if label in (*Trial.model_fields, "execution") else label


def parse(texts: Sequence[str]) -> list[Setting]:
    """Overrides as written. A comma separates the values of an axis; [a, b] is one value. Raises Refused."""
    return [_parse(text) for text in texts]


def match(setting: Setting, known: Mapping[str, Target]) -> Setting:
    """The setting under its full key: an exact key, or the last part of exactly one. Raises Refused."""
    key = setting.key.removeprefix("hyper.") if setting.key not in known else setting.key
    if key in known:
        return Setting(key, setting.values, setting.source)
    candidates = [k for k in known if k.rpartition(".")[2] == key]
    if len(candidates) == 1:
        return Setting(candidates[0], setting.values, setting.source)
    if candidates:
        raise Refused(f"{setting.source}: {key!r} is ambiguous: say which of {', '.join(candidates)}")
    raise Refused(f"{setting.source}: {why_unknown(key, known)}")


def flatten(table: object, source: str, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys. source: what to call the table in a message. Refuses a key set twice."""
    if not isinstance(table, dict):
        raise Refused(f"{source} must be a table, got {table!r:.80}")
    flat: dict[str, Any] = {}
    for name, value in table.items():
        nested = isinstance(value, dict) and value  # an empty table is a value: its name may be misspelt
        inner = flatten(value, source, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
        for key in inner.keys() & flat.keys():
            raise Refused(f"{source}: {key} is set twice")
        flat |= inner
    return flat


def _leaves(model: type[Settings]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from ((name, *rest) for rest in _leaves(inner))
        else:
            yield (name,)


def why_unknown(key: str, known: Mapping[str, Target]) -> str:
    """Why a key is not known: a table, a method that is not run, a hyper-parameter or key that does not exist."""
    owner, _, name = key.partition(".")
    inside = [k for k in known if k.startswith(f"{owner}.") or k.startswith(f"hyper.{owner}.")]
    if inside and not name:
        return f"{owner[:80]} is a table: set one of {', '.join(inside)}"
    if not inside and owner in registry.names():
        why = "is not in this sweep" if hyper_fields(owner) else "has no hyper-parameters"
        return f"method {owner} {why}, so {key[:80]} sets nothing"
    lasts = {k.rpartition(".")[2]: k for k in known}
    guess = nearest(key, inside or known) or lasts.get(nearest(key.rpartition(".")[2], lasts), "")
    meant = f" Did you mean {guess!r}?" if guess else ""
    kind = "hyper-parameter" if inside and known[inside[0]].scope == "hyper" else "key"
    return f"unknown {kind} {key[:80]!r}.{meant} Allowed: {', '.join(inside or known) or 'none, with these methods'}."


def _parse(text: str) -> Setting:
    source = f"override {text[:80]!r}"
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise Refused(f"{source}: write key=value")
    try:
        pieces = _split(value)
        values = tuple(_value(piece) for piece in pieces)
    except ValueError as error:
        raise Refused(f"{source}: {error}") from None
    return Setting(key.strip(), values, source)


def _split(text: str) -> list[str]:
    """The parts between commas that are outside quotes and brackets. A quote opens only where a value begins."""
    pieces, depth, quote, last, escaped = [""], 0, "", ",", False
    for letter in text:
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and quote == '"' and not escaped
        elif letter in "\"'" and last in "[,":
            quote = letter
        else:
            depth += (letter == "[") - (letter == "]")
        last = last if letter.isspace() else letter
        if letter == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    if quote or depth:
        raise ValueError("a quote or bracket is not closed")
    return [piece.strip() for piece in pieces]


def _value(piece: str) -> Any:
    """A value as TOML would read it; a bare word is a string."""
    if piece.startswith("[") and piece.endswith("]"):
        members = piece[1:-1].strip()
        return [_scalar(m) for m in _split(members)] if members else []
    return _scalar(piece)


def _scalar(piece: str) -> Any:
    if not piece:
        raise ValueError("a value is missing")
    if _QUOTED.fullmatch(piece) or _NUMBER.fullmatch(piece) or piece in ("true", "false"):
        try:
            return tomllib.loads(f"value = {piece}")["value"]
        except ValueError:
            pass  # such as 007 or an unknown escape: TOML has no such value
    if set("[]{}\"'") & {piece[0], *(letter for letter in piece if letter in "[]{}")}:
        raise ValueError(f"{piece[:40]} is no value: write a number, a word, a quoted text or [a, b]")
    return piece
