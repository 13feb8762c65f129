"""The hyper-parameters of a method: the fields of its class, with their ranges and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from harness import registry
from harness.refusal import Refused, unknown
from harness.settings import RULES, Unfit, unfit


@lru_cache
def hyper_fields(method: str) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of a method's hyper-parameters; the default is MISSING where there is none."""
    algorithm = registry.load(method)
    hints = get_type_hints(algorithm, include_extras=True)
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(algorithm)  # type: ignore[arg-type]
    }
    return {name: (hints[name], default) for name, default in defaults.items()}


@lru_cache
def _adapter(method: str, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(hyper_fields(method)[name][0], config=RULES)


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
        try:
            values[name] = _adapter(method, name).validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            what = f"{name} (hyper-parameter of method {label})"
            raise unfit(f"hyper.{name}", error.errors(include_url=False)[0], annotation, what) from error
    try:
        registry.make(method, values)
    except Refused as error:
        raise Unfit("hyper", f"method {label}: {error}") from error
    return values
