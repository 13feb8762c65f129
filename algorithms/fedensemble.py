"""FedAvg whose clients' models answer together: the sum of the logits of all users' models.

Paper: the baseline FedEnsemble of Zhu, Hong, Zhou (FedGen), ICML 2021; training is McMahan et al.'s, AISTATS 2017.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the code: users that sit a round out answer with the latest model that they trained; the code
overwrites it with the global model at the start of each round (`absent`). Those never seen have none. Logits are
averaged, not added, which gives the same answers.
Cost: the server keeps one model per client and puts all of them into its checkpoints; an evaluation passes the test
set through all of them and sends them all to the hosts. Bytes of the rounds are FedAvg's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Generator

from algorithms.fedavg import FedAvg
from harness.latest import update_rows
from harness.protocol import Ensemble, Server, State, Update, World
from harness.trees import Tree, flat, unflat


@dataclass(frozen=True)
class FedEnsemble(FedAvg):
    """The prediction is argmax sum_k f_k(x) over users k; the mean of their models only starts the next round."""

    absent: Literal["latest", "global"] = "latest"  # the model of a user that did not take part; global: code

    def init(self, world: World, rng: Generator) -> State:
        """One model, and none of the clients'."""
        state = super().init(world, rng)
        return {**state, "clients": world.clients, "owners": [], "latest": flat(state["params"])[None, :][:0]}

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """FedAvg's mean; the clients' models are kept."""
        if self.absent == "global":  # everybody was sent the model that the round began with
            state = {**state, "owners": [], "latest": state["latest"][:0], "begin": state["params"]}
        new = {u.visit.client: u.payload["params"] for u in updates}
        state["latest"] = update_rows(state["latest"], state["owners"], new, state["clients"])
        return super().merge(state, updates, server)

    def models(self, state: State) -> Mapping[str, tuple[str, Tree] | Ensemble]:  # type: ignore[override]
        """The ensemble, then the model that it came from."""
        ranked = sorted(range(len(state["owners"])), key=lambda row: state["owners"][row])
        members = [unflat(state["latest"][row], like=state["params"]) for row in ranked]
        if "begin" in state:
            members += [state["begin"]] * (state["clients"] - len(members))
        whole = tuple((state["net"], p) for p in members or [state["params"]])
        return {"ensemble": Ensemble(whole), "global": (state["net"], state["params"])}
