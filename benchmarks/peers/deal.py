"""Writes a setting's work into a folder, for simulators in whose environments there is no fedstill.

`rows.npz`: the data set as it is stored (x_train, y_train, x_test, y_test; mean, std), and the deal: `order`, the
rows of all clients one after the other, and `sizes`, how many each has. `net.pt`: the net as a plain torch module,
with the parameters that fedstill begins with. `work.json`: the numbers, and the words of fedstill's own command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import config
from harness.config import Trial
from harness.data import card, load
from harness.layers import seeded
from harness.nets import build
from harness.timings import LARGE, SMALL, USUAL
from harness.trees import stream
from harness.work import make_setup

SETTINGS: dict[str, dict[str, Any]] = {"usual": USUAL, "small": SMALL, "large": LARGE}
# Rounds that are measured in one turn, after those that warm up: enough for an accuracy that says something.
MEASURED = {"usual": 6, "small": 37, "large": 17}
WARM = 3


def trial_of(setting: str) -> Trial:
    """The trial behind a setting."""
    return config.resolve({**SETTINGS[setting], "method": "fedavg", "rounds": WARM + MEASURED[setting]})


def command(trial: Trial) -> list[str]:
    """The words after `fedstill run` that make this trial, but for its rounds."""
    local = trial.local
    return [
        *(trial.method, f"dataset={trial.dataset}", f"net={trial.net}", f"seed={trial.seed}"),
        *(f"clients={trial.clients}", f"cohort={trial.cohort}", f"partition.kind={trial.partition.kind}"),
        *(f"local.epochs={local.epochs:g}", f"local.batch={local.batch}", f"local.lr={local.lr}"),
        f"evaluation.every={trial.evaluation.every}",
    ]


def deal(trial: Trial, folder: Path) -> None:
    """Writes the folder."""
    about = card(trial.dataset)
    arrays = load(about)
    setup, _ = make_setup(trial, arrays)
    np.savez(
        folder / "rows.npz",
        x_train=arrays.x_train,
        y_train=arrays.y_train,
        x_test=arrays.x_test,
        y_test=arrays.y_test,
        mean=np.array(about.mean, np.float32),
        std=np.array(about.std, np.float32),
        order=np.concatenate(setup.split.clients),
        sizes=np.array([len(own) for own in setup.split.clients]),
    )
    net = build(trial.net, arrays.x_train.shape[1:], about.classes)
    torch.save(seeded(net.module, stream(trial.seed, "init")), folder / "net.pt")
    local = trial.local
    numbers = {"clients": trial.clients, "cohort": trial.cohort, "epochs": int(local.epochs)}
    (folder / "work.json").write_text(
        json.dumps({**numbers, "batch": local.batch, "lr": local.lr, "command": command(trial)})
    )
