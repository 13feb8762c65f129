"""FedAvg whose weights fall with the distance of a client's label mix from the uniform one.

Paper: Ye et al., FedDisco: Federated Learning with Discrepancy-Aware Collaboration, ICML 2023.
Travels down: the model. Travels up: the model; the server also knows every client's label counts, which are not
counted as bytes. Remembered by the client: nothing.
Differences from the authors' code: none for its divergence "kl"; where no weight is positive, which the code does
not handle, clients are weighted by their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from algorithms.fedavg import FedAvg
from harness.protocol import NonNegative, Server, State, Update, trees_of, weights
from harness.trees import mean


def discrepancies(counts: Tensor) -> list[float]:
    """d [K] from label counts [K, C]: KL(label mix || uniform), divided by its sum; zeros if all are uniform."""
    mix = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    apart = torch.xlogy(mix, mix * counts.shape[1]).sum(1)
    apart = torch.where(apart > 1e-12, apart, 0.0)  # a uniform mix gives zero up to rounding
    return (apart / apart.sum().clamp(min=1e-12)).tolist()


@dataclass(frozen=True)
class FedDisco(FedAvg):
    """Weights proportional to max(0, f_k - a d_k + b): f_k the share of rows, d_k the share of discrepancy."""

    needs: ClassVar[frozenset[str]] = frozenset({"one_net", "label_counts"})
    identity: ClassVar[Mapping[str, Any]] = {"a": 0.0, "b": 0.0}

    a: NonNegative = 0.5  # a, the authors' code
    b: NonNegative = 0.1  # b, the authors' code

    def shares(self, rows: Sequence[float], counts: Tensor) -> list[float]:
        """Weights [K], not normalised, from the rows n_k and the label counts [K, C] of a cohort."""
        total = sum(rows)  # everything times the total, so that a = b = 0 gives FedAvg's weights exactly
        pairs = zip(rows, discrepancies(counts), strict=True)
        raw = [max(0.0, n - total * (self.a * d - self.b)) for n, d in pairs]
        return raw if any(raw) else list(rows)

    def merge(self, state: State, updates: Sequence[Update], server: Server) -> State:
        """The mean by rows and discrepancy."""
        counts = torch.from_numpy(server.world.label_counts[[u.visit.client for u in updates]])
        return {**state, "params": mean(trees_of(updates, "params"), self.shares(weights(updates), counts))}
