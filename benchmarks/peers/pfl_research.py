"""Apple's pfl-research: FedAvg on its simulated backend, in one process or, started by torchrun, in several.

The script is not called `pfl`, which would hide the package. pfl cuts a client's rows into the same batches again and
again; it shuffles nothing, which is cheaper than what the others do.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics, StringMetricName, Weighted, get_overall_value
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from work import SCORED, Log, Work, asked, versions


class Judged(nn.Module):
    """The net as pfl wants it: with a loss and with metrics."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """How many are told right, of how many."""
        return {"accuracy": Weighted(int((self.net(x).argmax(1) == y).sum()), len(y))}


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Looks at the clock after the evaluation."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The first round begins."""
        self.log.start()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round ends. pfl doesn't evaluate after its first."""
        name = StringMetricName("Central val | accuracy")
        found = get_overall_value(aggregate_metrics[name]) if name in aggregate_metrics else float("nan")
        self.log.round(found)
        return False, Metrics()


def run(work: Work, rounds: int, log: Log) -> None:
    """All rounds."""

    @cache
    def rows(client: int) -> PyTorchTensorDataset:
        return PyTorchTensorDataset(work.rows[client], user_id=str(client))

    net = Judged(work.net())
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    data = FederatedDataset(rows, get_user_sampler("minimize_reuse", list(range(work.clients))))
    scored = NNEvalHyperParams(local_batch_size=SCORED)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,  # on clients' rows: never but in the first round
            train_cohort_size=work.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=work.batch, local_num_epochs=work.epochs, local_learning_rate=work.lr),
        scored,
        callbacks=[CentralEvaluationCallback(PyTorchTensorDataset(work.test), scored), Clock(log)],
    )


if __name__ == "__main__":
    told = asked()
    torch.set_num_threads(told.threads)
    np.random.seed(0)  # the same in all processes: the cohorts are drawn from it
    torch.manual_seed(0)
    log = Log(versions("pfl", "torch"))
    run(Work(told.folder, told.layout), told.rounds, log)
    if get_framework_module().distributed.global_rank == 0:
        log.write(told.out)
    os._exit(0)  # what connects its processes sometimes aborts an orderly end, when all is done
