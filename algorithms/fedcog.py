"""FedAvg whose clients make inputs of the classes they lack and distil the global model on them.

Paper: Ye et al., Fake It Till Make It: Federated Learning with Consensus-Oriented Generation, ICLR 2024.
Travels down: the model. Travels up: the model.
Remembered by the client: the model with which it ended its last participation, used to make inputs.
Differences from the authors' code: the teacher's logits are those of the inputs that training sees (the code pairs
the last inputs with the logits of the best iteration); a client that never took part makes inputs without the
disagreement (the code takes a random model); every step draws as many synthetic rows as real ones, with replacement;
no augmentation and no matching of BatchNorm's statistics, both off in the code. Before start_round it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from algorithms.fedavg import FedAvg
from harness.losses import cross_entropy, kl
from harness.nets import Net
from harness.protocol import Batch, Bench, Count, Inbox, NonNegative, Positive, Times, Trained
from harness.trees import Tree


def missing(counts: Tensor) -> Tensor:
    """What each class lacks to be as frequent as the most frequent one: max - counts, [C]."""
    return counts.max() - counts


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """1 - the code's Jensen-Shannon divergence of two logits [B, C]: (KL(M || P) + KL(M || Q)) / 2, M their mean.

    Mean over B; probabilities are clamped to [.01, .99] and the divergence to [0, 1], as in the code.
    """
    p, q = first.softmax(1), second.softmax(1)
    m, p, q = (x.clamp(0.01, 0.99) for x in ((p + q) / 2, p, q))
    apart = sum((m * (m.log() - x.log())).sum(1).mean() for x in (p, q)) / 2
    return 1 - torch.as_tensor(apart).clamp(0, 1)


@dataclass(frozen=True)
class FedCog(FedAvg):
    """r_real CE(real rows) + r_syn tau^2 KL(global || local) on synthetic ones; r by real and missing rows.

    Inputs are noise, moved to minimise CE under the global model + disagreement (1 - JS(local, global)).
    """

    identity: ClassVar[Mapping[str, Any]] = {"start_round": 1_000_000}

    start_round: Times = 50  # the first round, from 0, with synthetic inputs; the authors' code
    inputs: Count = 256  # made per visit, shared out over the classes and rounded down
    input_steps: Count = 500  # of Adam, per visit
    input_lr: Positive = 0.01  # of Adam, with betas .5 and .9
    disagreement: NonNegative = 0.1  # weight of the term that sets global and local model apart
    tau: Positive = 1.0  # temperature, the authors' code

    def prepare(self, net: Net, inbox: Inbox, memory: Tree, bench: Bench) -> Inbox:
        """Makes inputs of the missing classes; adds them, the teacher's logits, and the share of real rows."""
        if inbox["round"] < self.start_round:
            return inbox
        lack = missing(bench.label_counts)
        parts = (self.inputs * lack.double() / lack.sum().clamp(min=1)).long()  # to whole numbers, downwards
        y = torch.repeat_interleave(torch.arange(len(parts), device=parts.device), parts)
        if not len(y):
            return inbox  # a client with all classes alike lacks nothing
        rng = bench.rng("inputs")
        noise = torch.randn(len(y), *net.input_shape, generator=rng, device=rng.device)

        def loss(p: Tree, batch: Batch) -> Tensor:
            logits = net(inbox["params"], p["x"], train=False)
            value = cross_entropy(logits, batch.y)
            if "local" in memory:
                local = net(memory["local"], p["x"], train=False)
                value = value + self.disagreement * agreement(local, logits)
            return value

        made = bench.fit(
            {"x": noise}, loss, lambda step: Batch(y, y), self.input_steps, lr=self.input_lr, betas=(0.5, 0.9)
        )
        synthetic = {"x": made["x"], "teacher": net.frozen(inbox["params"], made["x"])}
        real = int(bench.label_counts.sum())
        return {**inbox, "synthetic": synthetic, "real": real / (real + int(lack.sum()))}

    def draw(self, net: Net, batch: Batch, inbox: Inbox, memory: Tree, rng: Generator) -> Batch:
        """As many synthetic rows as real ones."""
        if "synthetic" not in inbox:
            return batch
        made = inbox["synthetic"]
        index = torch.randint(len(made["x"]), (len(batch.y),), generator=rng, device=rng.device)
        return batch.with_extra(synthetic=made["x"][index], teacher=made["teacher"][index])

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy on real rows, distillation on synthetic ones."""
        value, seen = super().loss(net, p, batch, inbox, memory)
        if "synthetic" not in inbox:
            return value, seen
        student = net(p, batch.extra["synthetic"])
        apart = kl(batch.extra["teacher"], student, self.tau, tau_squared=True, mask=batch.mask)
        return inbox["real"] * value + (1 - inbox["real"]) * apart, {**seen, "distillation": apart.detach()}

    def reply(self, trained: Trained) -> tuple[Tree, Tree]:
        """The model up, and kept for the next participation."""
        return {"params": trained.end}, {"local": trained.end} if self.disagreement else {}
