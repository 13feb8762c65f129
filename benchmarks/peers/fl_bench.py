"""Research code by its own entry point, in a checkout of yours: FL-bench, and the official code of KDIA and FedGen.

**These drivers were never run**: they were written from the projects' READMEs and argument parsers. What they start
is `PATH/.venv/bin/python main.py ...` in the checkout; you make that environment and its data as the README says:

- FL-bench (KarhouTam/FL-bench): `python generate_data.py -d fmnist --iid 1 -cn CLIENTS`, with all rows for training
  as far as it lets one. Same net, rows per client, epochs, batch and rate; its evaluation is on clients' rows.
- KDIA (maxiaum/KDIA) knows colour images only: CIFAR-10 below its data folder. FedAvg, not of the same work.
- FedGen (zhuangdizhu/FedGen): its MNIST files for CLIENTS users, made by its `generate_niid_dirichlet.py` with
  alpha=0.1 and ratio=0.5. FedAvg, not of the same work.

They tell no times of rounds that mean the same, so the clock is outside: wall time of a run of n rounds less that of
a run of m, by n - m. One figure for each turn, no accuracy.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from work import Log, arguments

Numbers = Mapping[str, Any]
FEW = 3  # rounds of the shorter run: imports, data and warming up are in both


def fl_bench(work: Numbers, rounds: int) -> list[str]:
    """FL-bench's words."""
    return [
        *("method=fedavg", "dataset.name=fmnist", "model.name=lenet5", "mode=serial", "common.use_cuda=false"),
        *("optimizer.name=sgd", f"optimizer.lr={work['lr']}", f"common.global_epoch={rounds}"),
        *(f"common.join_ratio={work['cohort'] / work['clients']}", f"common.local_epoch={work['epochs']}"),
        *(f"common.batch_size={work['batch']}", "common.test_interval=1", "common.save_fig=false"),
    ]


def kdia(work: Numbers, rounds: int) -> list[str]:
    """KDIA's words."""
    return [
        *("--dataset=cifar10", "--resnet_model=0", "--alg=fedavg", "--partition=iid", "--device=cpu"),
        *(f"--n_parties={work['clients']}", f"--sample_fraction={work['cohort'] / work['clients']}"),
        *(f"--epochs={work['epochs']}", f"--batch_size={work['batch']}", f"--lr={work['lr']}"),
        f"--comm_round={rounds}",
    ]


def fedgen(work: Numbers, rounds: int) -> list[str]:
    """FedGen's words."""
    return [
        *("--dataset", "Mnist-alpha0.1-ratio0.5", "--algorithm", "FedAvg", "--model", "cnn", "--times", "1"),
        *("--num_users", str(work["cohort"]), "--local_epochs", str(work["epochs"]), "--device", "cpu"),
        *("--batch_size", str(work["batch"]), "--learning_rate", str(work["lr"]), "--num_glob_iters", str(rounds)),
    ]


CODES: dict[str, Callable[[Numbers, int], list[str]]] = {"fl-bench": fl_bench, "kdia": kdia, "fedgen": fedgen}


def timed(checkout: Path, words: list[str]) -> float:
    """Seconds that its main.py takes."""
    started = time.perf_counter()
    subprocess.run([checkout / ".venv" / "bin" / "python", "main.py", *words], check=True, cwd=checkout)
    return time.perf_counter() - started


if __name__ == "__main__":
    words = arguments()
    words.add_argument("--code", choices=CODES, required=True)
    words.add_argument("--checkout", type=Path, required=True)
    told = words.parse_args()
    work = json.loads((told.folder / "work.json").read_text())
    short, long = (timed(told.checkout, CODES[told.code](work, n)) for n in (FEW, FEW + told.rounds))
    Log({}, [(long - short) / told.rounds]).write(told.out)
