"""The conformance suite: what every method must hold to, tried out on a tiny trial. A new method gets it for free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness import config, registry
from harness.fit import settle
from harness.probes import MOVING, STILL, Failed, Subject
from harness.server import Diverged


@dataclass(frozen=True)
class Finding:
    """What a check found. why: the reason why it failed, or what was tried."""

    check: str
    passed: bool
    why: str


def check(method: str, hyper: Mapping[str, Any] | None = None) -> list[Finding]:
    """Runs every check on a method, by name or by the path of its .py file, with some of its hyper-parameters.

    If the tiny trial itself does not run, that is the last finding. Raises Refused for a method or hyper-parameter
    that there is not.
    """
    settle()
    values = config.resolve(tiny_settings(method, dict(hyper or {}))).hyper
    subject = Subject(method, values)
    findings = [_judged(name, probe, subject) for name, probe in STILL.items()]
    try:
        subject.base  # noqa: B018 - made here, so that its failure is told once
    except Exception as error:
        kind = "finite" if isinstance(error, Diverged) else "needs" if "takes needs" in str(error) else "runs"
        return [*findings, Finding(kind, False, _line(error))]
    return [*findings, *(_judged(name, probe, subject) for name, probe in MOVING.items())]


def tiny_settings(method: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with which any method resolves: everything that methods may need is there."""
    known = {"proxy": {"source": "train", "rows": 1}, "holdout": {"test": 0.2, "validation": 0.2}}
    one = "one_net" in registry.make(method, hyper).needs
    fleet = {} if one else {"fleet": {"nets": ("mlp", "mlp")}}
    return {"method": method, "hyper": hyper, **known, **fleet}


def _judged(name: str, probe: Callable[[Subject], str], subject: Subject) -> Finding:
    try:
        return Finding(name, True, probe(subject))
    except Failed as failure:
        return Finding(name, False, str(failure))
    except Exception as error:  # what a method throws is its own finding
        return Finding(name, False, _line(error))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"
