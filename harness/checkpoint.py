"""Checkpoints: a trial between two rounds as one file of safetensors and JSON. Nothing in it is ever executed.

The driver alone writes them. A file is named by its round and the SHA-256 of its content, so a torn or altered one
is known for what it is, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness.durable import write

KEPT = 2  # files per trial
FORMAT = 1
NAME = re.compile(r"round-(\d{6,})-([0-9a-f]{64})\.safetensors")


def pack(value: Mapping[str, Any]) -> bytes:
    """Nested dicts and lists of tensors, numbers, strings and None as bytes. Raises TypeError for anything else."""
    tensors: dict[str, Tensor] = {}

    def plain(part: Any) -> Any:
        if isinstance(part, Tensor):
            name = str(len(tensors))
            tensors[name] = part.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
            return {"tensor": name}
        if isinstance(part, Mapping):
            if not all(isinstance(key, str) for key in part):
                raise TypeError(f"a checkpoint's keys are strings, not {list(part)[:3]}")
            return {"dict": {key: plain(member) for key, member in part.items()}}
        if isinstance(part, list | tuple):
            return {"list": [plain(member) for member in part]}
        if part is None or isinstance(part, bool | int | float | str):
            return part
        raise TypeError(f"a checkpoint holds tensors, numbers, strings, lists and dicts, not {type(part).__name__}")

    text = json.dumps({"format": FORMAT, "value": plain(value)})
    return save(tensors, {"fedstill": text})


def unpack(content: bytes) -> dict[str, Any]:
    """What `pack` was given; tuples come back as lists. Raises ValueError for anything that it did not write."""
    try:
        length = int.from_bytes(content[:8], "little")
        told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedstill"])
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a checkpoint: {error}") from error
    if told["format"] != FORMAT:
        raise ValueError(f"a checkpoint of format {told['format']}, this version reads {FORMAT}")

    def whole(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        (kind, inner), *rest = part.items()
        assert not rest
        if kind == "tensor":
            return tensors[inner]
        return [whole(m) for m in inner] if kind == "list" else {key: whole(m) for key, m in inner.items()}

    value = whole(told["value"])
    assert isinstance(value, dict)
    return value


class Shelf:
    """The checkpoints of a results folder: `<results>/checkpoints/<trial_id>/`."""

    def __init__(self, results: Path) -> None:
        self.path = results / "checkpoints"

    def put(self, trial_id: str, round: int, content: bytes) -> None:
        """Writes one, whole or not at all, and keeps the last two. Raises OSError; the older ones then stay."""
        folder = self.path / trial_id
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"round-{round:06d}-{hashlib.sha256(content).hexdigest()}.safetensors"
        write(target, content)
        for old in self._files(trial_id)[KEPT:]:
            old.unlink(missing_ok=True)

    def latest(self, trial_id: str) -> tuple[bytes | None, list[str]]:
        """The newest good one, if there is any, and a warning for each that is damaged."""
        warnings: list[str] = []
        for file in self._files(trial_id):
            try:
                content = file.read_bytes()
            except FileNotFoundError:  # whoever runs the sweep has just dropped it
                continue
            named = NAME.fullmatch(file.name)
            if named and hashlib.sha256(content).hexdigest() == named[2]:
                return content, warnings
            warnings.append(f"checkpoint {file} is damaged: its content does not have the hash in its name")
        return None, warnings

    def names(self) -> list[str]:
        """The trials that have any."""
        return sorted(folder.name for folder in self.path.glob("*") if folder.is_dir())

    def drop(self, trial_id: str) -> None:
        """Takes a trial's checkpoints away, once its row is there."""
        shutil.rmtree(self.path / trial_id, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()  # only when it is empty

    def _files(self, trial_id: str) -> list[Path]:
        """Newest first; drafts and strangers are passed over."""
        files = (self.path / trial_id).glob("round-*.safetensors")
        return sorted((f for f in files if NAME.fullmatch(f.name)), reverse=True)
