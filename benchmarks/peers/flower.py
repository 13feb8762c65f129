"""Flower's simulation: FedAvg on its Ray backend, the evaluation in the server's process.

One worker for each process asked for, each with as many CPUs, and so threads, as are asked for. The rows lie in the
workers' memory from their first visit on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Log, Work, asked, once, versions


class Strict(FedAvg):
    """FedAvg that doesn't go on without the clients that failed, as Flower's does."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The mean, of all or none."""
        came = list(replies)
        for reply in came:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        return super().aggregate_train(server_round, came)


def client_app(folder: Path, threads: int, layout: str) -> ClientApp:
    """What a client does with the model."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        work, client = once(folder, layout), int(context.node_config["partition-id"])
        net = work.net()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        work.train(net, client)
        counted = MetricRecord({"num-examples": len(work.rows[client][1])})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": counted}), reply_to=message)

    return app


def server_app(work: Work, rounds: int, log: Log) -> ServerApp:
    """What the server does: FedAvg, and an evaluation of each model."""
    app, net = ServerApp(), work.net()

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        accuracy = work.accuracy(net)
        if round:
            log.round(accuracy)
        else:
            log.start()
        return MetricRecord({"accuracy": accuracy})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Strict(
            fraction_train=work.cohort / work.clients,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,
            min_available_nodes=work.clients,
        )
        strategy.start(grid, ArrayRecord(net.state_dict()), rounds, evaluate_fn=evaluate)

    return app


if __name__ == "__main__":
    told = asked()
    torch.set_num_threads(told.processes * told.threads)  # for the evaluation, when the workers are idle
    work, log = Work(told.folder, told.layout), Log(versions("flwr", "ray", "torch"))
    run_simulation(
        server_app(work, told.rounds, log),
        client_app(told.folder, told.threads, told.layout),
        work.clients,
        backend_config={
            "init_args": {"address": "local", "num_cpus": told.processes * told.threads},
            "client_resources": {"num_cpus": told.threads, "num_gpus": 0.0},
        },
    )
    log.write(told.out)
