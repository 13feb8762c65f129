"""Peers: what a client's neighbours are worth to it, measured by short probes on a copy that is thrown away.

A record is a tensor [3]: the revenue of a peer (nats of validation loss, a moving average over probes), the number of
probes, and the number of the last probes in a row that left the revenue at zero or below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.losses import soft_labels
from harness.nets import Net, sibling
from harness.protocol import Batch, Bench, Trained
from harness.trees import Tree


def peer_weights(records: Mapping[str, Tensor], peers: Iterable[str], temperature: float) -> dict[str, float]:
    """omega: the softmax of max(revenue, 0) / temperature. The revenue of a peer without a record is 0."""
    revenue = {peer: float(records[peer][0]) if peer in records else 0.0 for peer in peers}
    share = (torch.tensor(list(revenue.values()), dtype=torch.float64).clamp(min=0) / temperature).softmax(0)
    return dict(zip(revenue, share.tolist(), strict=True))


def ema(values: Iterable[float], decay: float, start: float | None = None) -> float:
    """Exponential moving average; it begins with the first value, or goes on from `start`. NaN if there is none."""
    for value in values:
        start = value if start is None else decay * start + (1 - decay) * value
    return math.nan if start is None else start


def running(metrics: Mapping[str, Tensor], names: Sequence[str], decay: float, start: Tensor | None) -> Tensor:
    """Moving averages [len(names)] over steps; they go on from `start` where there is one."""
    before = [None] * len(names) if start is None else start.tolist()
    pairs = zip(names, before, strict=True)
    return torch.tensor([ema(metrics[name].tolist(), decay, old) for name, old in pairs], dtype=torch.float64)


def validation_loss(bench: Bench, net: Net, p: Tree) -> float:
    """Mean cross-entropy in nats on the client's validation rows; NaN if it has none."""
    sums = bench.scan(lambda x, y: F.cross_entropy(net.frozen(p, x), y, reduction="sum"), "validation")
    rows = sum(bench.scan(lambda x, y: len(y), "validation"))
    return float(torch.stack(sums).sum()) / rows if rows else math.nan


def booked(record: Tensor | None, gain: float, decay: float) -> Tensor:
    """The record with one more probe. record None: there was none yet; a gain that is NaN says nothing."""
    revenue, probes, poor = (0.0, 0.0, 0.0) if record is None else (float(x) for x in record)
    if not math.isnan(gain):
        revenue = ema([gain], decay, revenue if probes else None)
        probes, poor = probes + 1, 0.0 if revenue > 0 else poor + 1
    return torch.tensor([revenue, probes, poor], dtype=torch.float64)


def probe(
    trained: Trained, own: Tree, how: tuple[float, bool], steps: int, decay: float, patience: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Probes the peer with the fewest probes: all records, and those of peers that did not pay `patience` times.

    The gain is how far `steps` steps of SGD from the model `own`, on private rows and on nothing but
    the peer's soft labels (how: tau, own_first), lower the validation loss. Read from the inbox: "peers" by name,
    "nets" (their names), "batch" (rows of a step); from the memory: "revenue", the records so far.
    """
    records, peers = dict(trained.memory["revenue"]), trained.inbox["peers"]
    if not peers:
        return records, {}
    name = min(peers, key=lambda peer: float(records[peer][1]) if peer in records else 0.0)
    net, other, bench = trained.net, sibling(trained.net, trained.inbox["nets"][name]), trained.bench
    rng, size = bench.rng("probe"), trained.inbox["batch"]

    def loss(p: Tree, rows: Batch) -> Tensor:
        return soft_labels(net(p, rows.x), other.frozen(peers[name], rows.x), *how)

    def draw(step: int) -> Batch:
        return bench.sample(size, rng, "private")

    after = bench.fit(own, loss, draw, steps, optimizer="sgd", lr=trained.lr)
    gain = validation_loss(bench, net, own) - validation_loss(bench, net, after)
    records[name] = booked(records.get(name), gain, decay)
    return records, {name: records[name]} if records[name][2] >= patience else {}
