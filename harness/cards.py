"""Cards: the TOML files that describe data sets and sweeps. A card is data: nothing in it is ever run."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

from harness.refusal import Refused, unknown

_HEADER = re.compile(r"\[+([^\[\]]+)\]+\s*(?:#.*)?")
_HERE = Path(__file__).resolve().parent
_ELSEWHERE = {"published": "results/published"}  # the others lie at the top


def root(kind: str) -> Path:
    """The folder of what is shipped of a kind ("datasets", "sweeps", "published").

    In a wheel it travels inside this package; in a checkout it lies where people look for it.
    """
    packaged = _HERE / "_cards" / kind
    return packaged if packaged.is_dir() else _HERE.parent / _ELSEWHERE.get(kind, kind)


def methods() -> list[str]:
    """The shipped methods, by file name: fedavg, ema-teacher, ... None of them is imported."""
    folder = importlib.util.find_spec("algorithms")
    places = list(folder.submodule_search_locations or ()) if folder else []
    files = [f for place in places for f in Path(place).glob("*.py") if not f.name.startswith("_")]
    return sorted(f.stem.replace("_", "-") for f in files)


def names(kind: str) -> list[str]:
    """The names of the shipped cards of a kind, sorted. A card in a sub-folder is called "folder/name"."""
    folder = root(kind)
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.toml"))


def find(kind: str, name_or_path: str | Path) -> Path:
    """The file of a card: a shipped name, or a path that ends in .toml. Refused when there is no such file."""
    text = str(name_or_path)
    if text.endswith(".toml"):
        path = Path(text)
        if _is_file(path):
            return path
        raise Refused(f"no {kind} card at {text!r}: give a TOML file or one of {', '.join(names(kind))}")
    folder = root(kind)
    path = folder / f"{text}.toml"
    spelled = path.is_relative_to(folder) and path.relative_to(folder).as_posix() == f"{text}.toml"
    if ".." in path.parts or not spelled or not _is_file(path):
        raise unknown(f"{kind} card", text, names(kind))
    return path


def read(kind: str, name_or_path: str | Path) -> dict[str, Any]:
    """The content of a card. Refused, with the file and the line, when it is missing or is not valid TOML."""
    path = find(kind, name_or_path)
    try:
        return tomllib.loads(_text(path))
    except RecursionError:
        raise Refused(f"{path}: nested too deeply for a card") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, OSError) as error:  # tomllib's message ends in "(at line 3, column 7)"
        twice = ": a key is there twice" if "overwrite" in str(error) else ""
        raise Refused(f"{path}: {error}{twice}") from None


def place(path: Path, key: str) -> str:
    """Where a dotted key stands in a card, for messages: "quickstart.toml, line 7, base.local.lr".

    tomllib keeps no positions, so the text is searched; a key that is not found goes without a line.
    """
    table, shown = "", key[:80]
    for number, line in enumerate(_text(path).splitlines(), start=1):
        text = line.strip()
        if header := _HEADER.fullmatch(text):
            table = _bare(header[1])
            if table == key:
                return f"{path.name}, line {number}, {shown}"
        elif "=" in text and key == ".".join(filter(None, (table, _bare(text.split("=")[0])))):
            return f"{path.name}, line {number}, {shown}"
    return f"{path.name}, {shown}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark


def _bare(key: str) -> str:
    return re.sub(r"[\s\"']", "", key)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return False
