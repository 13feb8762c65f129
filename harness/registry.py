"""Name -> method. The only door to the package `algorithms`; a path to a .py file is a name, too."""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from harness import cards
from harness.protocol import Algorithm
from harness.refusal import Refused, unknown

SENT = Path(__file__).with_name("_methods")  # on the nodes of a cluster: users' files, sent along with this code
_pinned: dict[str, str] = {}  # path -> sha256 of the content that it stands for
_texts: dict[str, bytes] = {}  # sha256 -> content of the files read so far


def names() -> list[str]:
    """The shipped methods, by file name: fedavg, ema-teacher, ..."""
    return cards.methods()


def label(name: str) -> str:
    """What a method is called in tables: the file's stem, with dashes."""
    return Path(name).stem.replace("_", "-") if name.endswith(".py") else name


def load(name: str) -> type[Algorithm]:
    """The class behind a name or a path to a .py file. Raises Refused with the nearest name."""
    if name.endswith(".py"):
        return _of_text(name, text(name, _pinned.get(name, "")))
    return _shipped(name)


def text(name: str, source: str = "") -> bytes:
    """The content of a method file. source: its sha256 (hex), where it has to be that one.

    Then it may also have been read before, or have come along: other nodes do not have the driver's paths.
    """
    if source in _texts:
        return _texts[source]
    sent = SENT / f"{source}.py"
    path = sent if source and sent.is_file() else Path(name)
    if not path.is_file():
        raise Refused(
            f"no method file {str(path)!r}: give the path of an existing .py file, or one of {', '.join(names())}"
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if source not in ("", found):
        raise Refused(f"the method file {path} is not the one of this trial any more: its content changed")
    return _texts.setdefault(found, content)


def pin(name: str, source: str) -> None:
    """From now on a path stands for the content with this sha256, in this process. Nothing for shipped methods."""
    if source:
        _pinned[name] = source


def make(name: str, hyper: Mapping[str, Any]) -> Algorithm:
    """The method with these hyper-parameters. Raises Refused for one it does not have or out of range."""
    method = load(name)
    allowed = [f.name for f in fields(method)]  # type: ignore[arg-type]
    for key in hyper:
        if key not in allowed:
            raise unknown(f"hyper-parameter of {label(name)}", key, allowed)
    return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in hyper.items()})


@lru_cache
def _shipped(name: str) -> type[Algorithm]:
    if name not in names():
        raise unknown("method", name, names())
    return _method_of(importlib.import_module(f"algorithms.{name.replace('-', '_')}"), name)


@lru_cache
def _of_text(name: str, content: bytes) -> type[Algorithm]:
    """The class in a file of this content."""
    spec = importlib.util.spec_from_loader(f"fedstill_user_{Path(name).stem}", _Text(name, content))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Refused(f"the method file {name} does not import: {type(error).__name__}: {error}") from error
    return _method_of(module, name)


class _Text(importlib.abc.ExecutionLoader):
    """Imports a file from content that was read, and hashed, before."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self.content = path, content

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.content)


def _method_of(module: ModuleType, name: str) -> type[Algorithm]:
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in own if issubclass(c, Algorithm) and not inspect.isabstract(c)]
    if len(found) != 1 or not is_dataclass(found[0]):
        raise Refused(f"method {name!r} must define exactly one frozen dataclass that derives from Algorithm")
    return found[0]
