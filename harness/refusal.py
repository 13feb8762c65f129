"""How bad input is answered: one line saying what was wrong, what is allowed and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class Refused(ValueError):
    """Input that cannot be served. Its text is one line for the user; the command prints it and exits with 2.

    Passwords in addresses are left out of it: such a line may end up in a log that others read. What a terminal would
    act on is spelled out: names in it are somebody's.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_without_passwords(plain(message)))


def plain(text: str) -> str:
    """The text on one line, with what can't be printed (escapes, marks that turn the direction round) spelled out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def masked(text: str) -> str:
    """The text with the credentials of every address in it, and every password or token that is set, as ***."""
    secret = r"(?i)\b([\w-]*(?:password|passwd|token|secret|key)=)[^&\s'\")]+"
    return re.sub(secret, r"\1***", _without_passwords(text))


def _without_passwords(text: str) -> str:
    return re.sub(r"(?<![\w/])[\w.+-]*:[^\s@/'\"]+@", "***@", re.sub(r"://\S*@", "://***@", text))


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The allowed name that was probably meant, or an empty string."""
    by_lower = {a.lower().replace("_", "-"): a for a in allowed}
    close = get_close_matches(name.lower().replace("_", "-"), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else ""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> Refused:
    """A refusal for a name that does not exist: lists the names that do and the nearest one."""
    names = sorted(allowed)
    guess = nearest(name, names)
    meant = f" Did you mean {guess!r}?" if guess else ""
    return Refused(f"unknown {kind} {name[:80]!r}.{meant} Allowed: {', '.join(names) or 'none'}.")
