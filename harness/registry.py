"""Name -> method. The only door to the package `algorithms`; a path to a .py file is a name, too."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.protocol import Algorithm
from harness.refusal import Refused, unknown


def names() -> list[str]:
    """The shipped methods, by file name: fedavg, ema-teacher, ..."""
    folder = importlib.util.find_spec("algorithms")
    places = list(folder.submodule_search_locations or ()) if folder else []
    files = [f for place in places for f in Path(place).glob("*.py") if not f.name.startswith("_")]
    return sorted(f.stem.replace("_", "-") for f in files)


def label(name: str) -> str:
    """What a method is called in tables: the file's stem, with dashes."""
    return Path(name).stem.replace("_", "-") if name.endswith(".py") else name


@lru_cache
def load(name: str) -> type[Algorithm]:
    """The class behind a name or a path to a .py file. Raises Refused with the nearest name."""
    if name.endswith(".py"):
        return _method_of(_module_of(Path(name)), name)
    if name not in names():
        raise unknown("method", name, names())
    return _method_of(importlib.import_module(f"algorithms.{name.replace('-', '_')}"), name)


def make(name: str, hyper: Mapping[str, Any]) -> Algorithm:
    """The method with these hyper-parameters. Raises Refused for one it does not have or out of range."""
    method = load(name)
    allowed = [f.name for f in fields(method)]  # type: ignore[arg-type]
    for key in hyper:
        if key not in allowed:
            raise unknown(f"hyper-parameter of {label(name)}", key, allowed)
    return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in hyper.items()})


def _module_of(path: Path) -> ModuleType:
    if not path.is_file():
        raise Refused(f"no method file {str(path)!r}: give the path of an existing .py file, or one of {names()}")
    spec = importlib.util.spec_from_file_location(f"fedstill_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Refused(f"the method file {path} does not import: {type(error).__name__}: {error}") from error
    return module


def _method_of(module: ModuleType, name: str) -> type[Algorithm]:
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in own if issubclass(c, Algorithm) and not inspect.isabstract(c)]
    if len(found) != 1 or not is_dataclass(found[0]):
        raise Refused(f"method {name!r} must define exactly one frozen dataclass that derives from Algorithm")
    return found[0]
