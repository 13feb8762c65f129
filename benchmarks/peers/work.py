"""The work that every peer does, read from a folder that `deal.py` wrote. Needs torch and numpy, and no fedstill.

A driver is a script that takes the folder, a number of rounds and the way to run them, and writes one JSON file:
`seconds` and `accuracy` of each round and the `versions` that ran. The rest is what users of any simulator bring:
the rows in memory, a plain loop of SGD, an evaluation.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_flush_denormal(True)

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCORED = 1000  # test rows at once
Rows = tuple[Tensor, Tensor]


class Work:
    """A folder's rows and settings, ready for the net: x float32 [n, C, H, W] normalised, y int64 [n].

    layout: the memory format of images and net, a name in FORMATS.
    """

    def __init__(self, folder: Path, layout: str) -> None:
        kept, settings = np.load(folder / "rows.npz"), json.loads((folder / "work.json").read_text())
        self.clients, self.cohort = int(settings["clients"]), int(settings["cohort"])
        self.epochs, self.batch, self.lr = int(settings["epochs"]), int(settings["batch"]), float(settings["lr"])
        self.folder, self.format = folder, FORMATS[layout]
        mean, std = (torch.from_numpy(kept[name]).view(1, -1, 1, 1) for name in ("mean", "std"))

        def ready(x: np.ndarray[Any, Any]) -> Tensor:
            return ((torch.from_numpy(x).float() / 255 - mean) / std).contiguous(memory_format=self.format)

        self.rows: list[Rows] = []
        x, y = kept["x_train"], kept["y_train"]
        for own in np.split(kept["order"], np.cumsum(kept["sizes"])[:-1]):
            self.rows.append((ready(x[own]), torch.from_numpy(y[own])))
        self.test: Rows = ready(kept["x_test"]), torch.from_numpy(kept["y_test"])

    def net(self) -> nn.Module:
        """The net with the parameters that all begin with; `deal.py` wrote it, so it may be unpickled."""
        net: nn.Module = torch.load(self.folder / "net.pt", weights_only=False)
        return net.to(memory_format=self.format)  # type: ignore[call-overload,no-any-return]

    def train(self, net: nn.Module, client: int) -> None:
        """A client's visit: some epochs of SGD over its rows, in another order each time."""
        x, y = self.rows[client]
        rule = torch.optim.SGD(net.parameters(), self.lr)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(y)).split(self.batch):
                rule.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                rule.step()

    def accuracy(self, net: nn.Module) -> float:
        """The share of the test rows that are told right."""
        x, y = self.test
        with torch.no_grad():
            parts = zip(x.split(SCORED), y.split(SCORED), strict=True)
            return sum(int((net(part).argmax(1) == truth).sum()) for part, truth in parts) / len(y)


@cache
def once(folder: Path, layout: str) -> Work:
    """The work, read once in each process."""
    return Work(folder, layout)


@dataclass
class Log:
    """What a driver measured. A round lasts from the end of the evaluation before to the end of its own."""

    versions: dict[str, str]
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    _last: float | None = None

    def start(self) -> None:
        """The first round begins."""
        self._last = time.perf_counter()

    def round(self, accuracy: float) -> None:
        """A round has ended, and the next begins."""
        now = time.perf_counter()
        if self._last is None:
            raise RuntimeError("a round ended before the first began")
        self.seconds.append(now - self._last)
        self.accuracy.append(accuracy)
        self._last = now

    def write(self, file: Path) -> None:
        """All of it as JSON."""
        told = asdict(self)
        del told["_last"]
        file.write_text(json.dumps(told))


def versions(*packages: str) -> dict[str, str]:
    """The installed versions."""
    return {name: version(name) for name in packages}


def arguments() -> argparse.ArgumentParser:
    """What every driver is told: folder, rounds and out."""
    words = argparse.ArgumentParser()
    words.add_argument("folder", type=Path)
    words.add_argument("--rounds", type=int, required=True)
    words.add_argument("--out", type=Path, required=True)
    return words


def asked() -> argparse.Namespace:
    """A driver's arguments: folder, rounds, processes, threads, layout and out."""
    words = arguments()
    words.add_argument("--processes", type=int, required=True)
    words.add_argument("--threads", type=int, required=True)
    words.add_argument("--layout", choices=FORMATS, required=True)
    return words.parse_args()
