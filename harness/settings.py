"""Strict settings models, and what is wrong with a setting in one line."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from harness.refusal import Refused, unknown

RULES = ConfigDict(strict=True, allow_inf_nan=False)


class Unfit(Refused):
    """A refused setting. key: its dotted name ("partition.alpha"), so that a caller can say where it was set."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Settings(BaseModel):
    """A frozen table of settings: unknown keys, text for numbers, true for 1, nan and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", **RULES)


Model = TypeVar("Model", bound=Settings)


def check(model: type[Model], settings: Mapping[str, Any], prefix: str = "") -> Model:
    """An instance of a settings model. prefix: what its keys are called in a message. Raises Unfit."""
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    named = first["type"] in ("extra_forbidden", "invalid_key")
    key = prefix + ".".join(str(part) for part in first["loc"] if named or not isinstance(part, int))
    owner: Any = model
    for part in path[:-1]:
        annotation = owner.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        owner = annotation
    if named:
        raise Unfit(key, str(unknown("key", key, [key.removesuffix(path[-1]) + n for n in owner.model_fields])))
    field: FieldInfo = next(owner.model_fields[part] for part in path if part in owner.model_fields)
    raise unfit(key, first, Annotated[field.annotation, field])


def unfit(key: str, error: Mapping[str, Any], annotation: Any, name: str = "") -> Unfit:
    """The refusal for pydantic's error, in the words of the field's annotation. name: what to call the key."""
    name, shown = name or key, _shown(error["input"])
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):
        return Unfit(key, str(error["ctx"]["error"]))  # of a whole table: it names its settings itself
    if error["type"] == "value_error":
        return Unfit(key, f"{name} {error['ctx']['error']}, got {shown}")
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        choices = get_args(_plain(annotation))
        return Unfit(key, str(unknown(f"value of {name}", error["input"][:80], map(str, choices))))
    return Unfit(key, f"{name} must be {wanted(annotation)}, got {shown}")


def wanted(annotation: Any) -> str:
    """What a type with its range allows, in words: "a number in (0, 1]"."""
    kind, limits = _plain(annotation), _limits(annotation)
    if get_origin(kind) in (tuple, list):
        return f"a list, each {wanted(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_args(kind):
        return " or ".join(wanted(a) for a in get_args(kind) if a is not NoneType)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "plain text on one line"}
    text = words.get(kind, "a table" if isinstance(kind, type) and issubclass(kind, BaseModel) else str(kind))
    number = {name: f"{limit:g}" if isinstance(limit, float) else str(limit) for name, limit in limits.items()}
    low = f"[{number['ge']}" if "ge" in number else f"({number.get('gt', '-inf')}"
    high = f"{number['le']}]" if "le" in number else f"{number.get('lt', 'inf')})"
    return f"{text} in {low}, {high}" if limits else text


def _plain(annotation: Any) -> Any:
    return _plain(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _limits(annotation: Any) -> dict[str, float]:
    if get_origin(annotation) is not Annotated:
        return {}
    inner, *notes = get_args(annotation)
    flat = [m for note in notes for m in (note.metadata if isinstance(note, FieldInfo) else [note])]
    own = {name: getattr(m, name, None) for m in flat for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    return {**_limits(inner), **{name: limit for name, limit in own.items() if limit is not None}}


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number with thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."
