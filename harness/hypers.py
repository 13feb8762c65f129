"""The hyper-parameters of a method: the fields of its class, with their ranges and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from harness import registry
from harness.refusal import Refused, unknown
from harness.settings import RULES, Unfit, unfit

# What methods may need of a trial, see `protocol.Algorithm`.
NEEDS = (
    *("one_net", "fleet", "same_latent", "proxy", "labelled_proxy", "label_counts", "private_test", "validation"),
    "pooled",
)


KINDS = "true or false, numbers, texts, or tuples of these"


@lru_cache
def hyper_fields(method: str) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of a method's hyper-parameters; the default is MISSING where there is none.

    Raises Refused for annotations that can't be read.
    """
    algorithm = registry.load(method)
    try:
        hints = get_type_hints(algorithm, include_extras=True)
    except (Exception, SystemExit) as error:
        raise Refused(f"method {registry.label(method)}: its annotations can't be read: {_said(error)}") from error
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(algorithm)  # type: ignore[arg-type]
    }
    return {name: (hints[name], default) for name, default in defaults.items()}


@lru_cache
def _adapter(method: str, name: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hyper_fields(method)[name][0], config=RULES)
    except PydanticUserError as error:
        label = registry.label(method)
        raise Unfit(
            f"hyper.{name}", f"{name} (hyper-parameter of method {label}) must be annotated with {KINDS}"
        ) from error


def complete(method: str, given: object) -> dict[str, Any]:
    """Every hyper-parameter of the method with its value, checked against its annotation and by the method itself."""
    label = registry.label(method)
    if not isinstance(given, Mapping):
        raise Unfit("hyper", f"hyper must be a table of {label}'s hyper-parameters, got {given!r:.80}")
    allowed = hyper_fields(method)
    for name in given:
        if name not in allowed:
            raise Unfit(f"hyper.{name}", str(unknown(f"hyper-parameter of method {label}", str(name), allowed)))
    values = {}
    for name, (annotation, default) in allowed.items():
        value = given.get(name, default)
        if value is MISSING:
            raise Unfit(f"hyper.{name}", f"method {label} needs a value for its hyper-parameter {name}")
        what = f"{name} (hyper-parameter of method {label})"
        try:
            values[name] = _adapter(method, name).validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            raise unfit(f"hyper.{name}", error.errors(include_url=False)[0], annotation, what) from error
        if not all(map(_plain, values[name] if isinstance(values[name], tuple) else (values[name],))):
            raise Unfit(f"hyper.{name}", f"{what} must be of {KINDS}, got {values[name]!r:.80}")
    _check_made(method, values)
    return values


def _check_made(method: str, values: Mapping[str, Any]) -> None:
    """Whether the method takes these values, and can say what it needs with them."""
    label = registry.label(method)
    try:
        needs = registry.make(method, values).needs
    except Refused as error:
        raise Unfit("hyper", f"method {label}: {error}") from error
    except (Exception, SystemExit) as error:  # what a method throws is its own affair, but no crash
        raise Unfit("hyper", f"method {label} can't be made: {_said(error)}") from error
    if not isinstance(needs, frozenset):
        raise Unfit("method", f"method {label}: needs must be a frozenset of {', '.join(NEEDS)}, got {needs!r:.80}")
    for need in needs.difference(NEEDS):
        raise Unfit("method", f"method {label}: {unknown('need', str(need), NEEDS)}")


def _plain(value: object) -> bool:
    """Whether a value can be written down, and read back equal."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
