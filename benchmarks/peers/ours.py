"""fedstill itself, by its command: `fedstill run fedavg ...` with one host for each process, in a sweep of one trial.

Seconds are those of the table of rounds, which a user reads too. A round lasts until the evaluation of the round
before is in; its own runs while the next one trains. So any number of rounds in a row has as many evaluations, and
only the first one is short of one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.dataset
from work import Log, asked, versions

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    told = asked()
    words = json.loads((told.folder / "work.json").read_text())["command"]
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "harness.cli", "run", *words, f"rounds={told.rounds}"]
        subprocess.run([*run, f"hosts={told.processes}", "--results", folder], check=True, cwd=ROOT)
        found = pyarrow.dataset.dataset(f"{folder}/rounds").to_table(["round", "seconds", "accuracy"])
    rows = found.sort_by("round").to_pydict()
    log = Log(versions("ray", "torch"), rows["seconds"], rows["accuracy"])
    log.write(told.out)
