"""The floor under a round: the same arithmetic as a plain PyTorch loop by hand, with no harness around it.

`fedstill bench` divides by its time. Modules, torch.optim, tensors that lie ready: nothing is sent, counted, checked
or derived from seeds. What a method passes through nets beyond FedAvg is done here too, as seldom as it can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import registry
from harness.batches import ready
from harness.data import card
from harness.layers import channels_last
from harness.nets import FeatureGenerator, build, generator
from harness.protocol import Algorithm
from harness.work import Setup

Layout = Literal["contiguous", "channels_last"]
Told = Mapping[str, Tensor]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCANNED = 256  # rows in a batch of what needs no gradient


class FedAvgFloor:
    """One process's share of a trial's rounds. `tell`, `loss` and `serve` say what a method does beyond FedAvg."""

    def __init__(self, setup: Setup, layout: Layout, device: str = "cpu") -> None:
        trial, about = setup.trial, card(setup.trial.dataset)
        self.trial, self.format, self.device = trial, FORMATS[layout], torch.device(device)
        self.net = build(trial.net, setup.arrays.x_train.shape[1:], about.classes)
        self.method: Algorithm = registry.make(trial.method, trial.hyper)
        arrays = setup.arrays
        x, y, test, self.truth = (
            torch.tensor(part, device=self.device)
            for part in (arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test)
        )
        owned = [torch.tensor(rows, device=self.device) for rows in setup.split.clients]
        self.rows = [(self.laid(ready(x[own], about)), y[own]) for own in owned]
        self.test = self.laid(ready(test, about))
        self.model, self.teacher = self.module(self.net.module()), self.module(self.net.module()).eval()
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.prepare()

    def laid(self, x: Tensor) -> Tensor:
        """Images in the memory format of this loop."""
        return channels_last(x) if self.format is torch.channels_last else x

    def module(self, made: nn.Module) -> nn.Module:
        """A module in it."""
        laid: nn.Module = made.to(self.device).to(memory_format=self.format)
        return laid

    def prepare(self) -> None:
        """What has to lie ready before the first round."""

    def tell(self, x: Tensor) -> dict[str, Tensor]:
        """What frozen nets say of a client's rows, once per visit."""
        return {}

    def loss(self, x: Tensor, y: Tensor, told: Told) -> Tensor:
        """Of a batch."""
        return F.cross_entropy(self.model(x), y)

    def visit(self, client: int) -> None:
        """A client's round."""
        local, (x, y), parameters = self.trial.local, self.rows[client], list(self.model.parameters())
        with torch.no_grad():
            for own, start in zip(parameters, self.start, strict=True):
                own.copy_(start)
            parts = [self.tell(part) for part in torch.split(x, SCANNED)]
            told = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        rule = torch.optim.SGD(parameters, local.lr, local.momentum, weight_decay=local.weight_decay)
        for _ in range(int(local.epochs)):
            for index in torch.randperm(len(y), device=self.device).split(local.batch):
                rule.zero_grad()
                self.loss(x[index], y[index], {key: value[index] for key, value in told.items()}).backward()
                rule.step()

    def evaluate(self, part: int, of: int) -> int:
        """Right answers on every `of`-th slice of the test set, as often as the method has models."""
        right = 0
        with torch.no_grad():
            for x, y in list(zip(self.test.split(1000), self.truth.split(1000), strict=True))[part::of]:
                right += int((self.teacher(x).argmax(1) == y).sum())
        return right

    def serve(self, cohort: int) -> None:
        """What a server does beyond averaging, after a round of so many clients."""

    def round(self, clients: Sequence[int], part: int, of: int, models: int) -> float:
        """Seconds for these visits and a share of the evaluation of so many models."""
        started = time.perf_counter()
        for client in clients:
            self.visit(client)
        for _ in range(models):
            self.evaluate(part, of)
        return self.since(started)

    def served(self, cohort: int) -> float:
        """Seconds for what a server does."""
        started = time.perf_counter()
        self.serve(cohort)
        return self.since(started)

    def since(self, started: float) -> float:
        """Seconds since then, when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


class FedNtdFloor(FedAvgFloor):
    """A teacher's logits, and the divergence over the other classes."""

    def tell(self, x: Tensor) -> dict[str, Tensor]:
        """The teacher's logits."""
        return {"teacher": self.teacher(x)}

    def loss(self, x: Tensor, y: Tensor, told: Told) -> Tensor:
        """Cross-entropy and divergence."""
        logits = self.model(x)
        others = torch.ones_like(logits).scatter_(1, y[:, None], 0.0).bool()
        ours, theirs = (part[others].view(len(y), -1) for part in (logits, told["teacher"]))
        soft = F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, y) + soft


class MoonFloor(FedAvgFloor):
    """The representations of two frozen nets, and the contrast to them."""

    def tell(self, x: Tensor) -> dict[str, Tensor]:
        """What the global and the previous net make of the rows."""
        latent = nn.Sequential(*list(self.teacher.children())[:2])
        return {"global": latent(x), "previous": latent(x)}

    def loss(self, x: Tensor, y: Tensor, told: Told) -> Tensor:
        """Cross-entropy and contrast."""
        features, latent, head = self.model.children()
        z = latent(features(x))
        near = torch.stack([F.cosine_similarity(z, told["global"]), F.cosine_similarity(z, told["previous"])], 1)
        return F.cross_entropy(head(z), y) + 5 * F.cross_entropy(near / 0.5, torch.zeros_like(y))


class Maker:
    """A generator that is frozen on clients, and learns from all their heads on the server."""

    def __init__(
        self, make: FeatureGenerator, net: nn.Module, at: Literal["features", "latent"], device: torch.device
    ) -> None:
        self.make, self.device = make, device
        self.learning, self.frozen = make.module().to(device), make.module().to(device).eval()
        self.adam = torch.optim.Adam(self.learning.parameters(), 1e-3, weight_decay=1e-5)
        self.tail = nn.Sequential(*list(net.children())[1 if at == "features" else 2 :])

    def labels(self, count: int) -> Tensor:
        """Uniform ones."""
        return torch.randint(self.make.classes, (count,), device=self.device)

    def generate(self, made: nn.Module, y: Tensor) -> Tensor:
        """Features for labels."""
        z = torch.randn(len(y), self.make.noise, device=self.device)
        if self.make.style == "kdia":
            labels, body = made.children()
            out: Tensor = body(torch.cat([z, labels(y)], 1))
        else:
            out = made(torch.cat([z, F.one_hot(y, self.make.classes).float()], 1))
        return out

    def taught(self, y: Tensor) -> Tensor:
        """Features for labels, of the frozen one."""
        with torch.no_grad():
            return self.generate(self.frozen, y)

    def learn(self, cohort: int, steps: int, batch: int) -> None:
        """Steps of the generator against all heads at once."""
        stacked = {k: p.detach().expand(cohort, *p.shape).clone() for k, p in self.tail.named_parameters()}
        heads = torch.func.vmap(lambda p, z: torch.func.functional_call(self.tail, p, (z,)), in_dims=(0, None))
        for _ in range(steps):
            y = self.labels(batch)
            self.adam.zero_grad()
            F.cross_entropy(heads(stacked, self.generate(self.learning, y)).mean(0), y).backward()
            self.adam.step()


class KdiaFloor(FedAvgFloor):
    """A teacher's logits, generated features, a teacher over all clients, a generator."""

    def prepare(self) -> None:
        """A generator and everybody's latest model."""
        hyper: Any = self.method
        self.hyper = hyper
        make = generator(self.net, "features", hyper.noise, style="kdia")
        self.maker = Maker(make, self.model, "features", self.device)
        self.latest = torch.zeros(self.trial.clients, sum(p.numel() for p in self.start), device=self.device)

    def tell(self, x: Tensor) -> dict[str, Tensor]:
        """The teacher's logits."""
        return {"teacher": self.teacher(x)}

    def loss(self, x: Tensor, y: Tensor, told: Told) -> Tensor:
        """Cross-entropy, divergence, cross-entropy on what was generated."""
        logits, label = self.model(x), self.maker.labels(len(y))
        ours, theirs = (F.log_softmax(part / 2, 1) for part in (logits, told["teacher"]))
        soft = F.kl_div(theirs, ours, log_target=True, reduction="batchmean")
        _, latent, head = self.model.children()
        return (
            F.cross_entropy(logits, y) + 0.5 * soft + F.cross_entropy(head(latent(self.maker.taught(label))), label)
        )

    def serve(self, cohort: int) -> None:
        """The teacher as one product; the generator as often as the method has it."""
        self.latest.new_full((len(self.latest),), 1 / len(self.latest)) @ self.latest
        steps = self.hyper.generator_epochs * self.hyper.generator_iterations
        self.maker.learn(cohort, steps, self.hyper.generator_batch)


class FedGenFloor(FedAvgFloor):
    """Latents generated for two sets of labels, the head on both."""

    def prepare(self) -> None:
        """A generator."""
        hyper: Any = self.method
        self.hyper = hyper
        make = generator(self.net, "latent", hyper.noise_width, hyper.hidden, "fedgen")
        self.maker = Maker(make, self.model, "latent", self.device)

    def loss(self, x: Tensor, y: Tensor, told: Told) -> Tensor:
        """Cross-entropy, cross-entropy on what was generated, divergence from what the head says of it."""
        features, latent, head = self.model.children()
        logits, label = head(latent(features(x))), self.maker.labels(len(y))
        made = self.maker.taught(torch.cat([label, y]))
        with torch.no_grad():
            likely = F.log_softmax(head(made[len(y) :]), 1)
        soft = F.kl_div(F.log_softmax(logits, 1), likely, log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, y) + F.cross_entropy(head(made[: len(y)]), label) + soft

    def serve(self, cohort: int) -> None:
        """The generator as often as the method has it."""
        self.maker.learn(cohort, self.hyper.generator_steps, self.hyper.generator_batch)


class FedDfFloor(FedAvgFloor):
    """Distillation of the mean from the mean logits of all clients, on rows that the server has."""

    def serve(self, cohort: int) -> None:
        """Each row is asked about once, if it is drawn more than once on average; then as many steps as it has."""
        hyper: Any = self.method
        x, rows = self.test[: self.trial.proxy.rows], self.trial.proxy.rows

        def opinion(x: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.stack([self.teacher(x) for _ in range(cohort)]).mean(0).softmax(1)

        often = hyper.proxy_steps * hyper.proxy_batch > rows
        known = torch.cat([opinion(part) for part in x.split(SCANNED)]) if often else None
        adam = torch.optim.Adam(self.model.parameters(), hyper.proxy_lr)
        for _ in range(hyper.proxy_steps):
            index = torch.randperm(rows, device=self.device)[: hyper.proxy_batch]
            target = opinion(x[index]) if known is None else known[index]
            adam.zero_grad()
            F.kl_div(F.log_softmax(self.model(x[index]), 1), target, reduction="batchmean").backward()
            adam.step()


FLOORS: dict[str, Callable[[Setup, Layout, str], FedAvgFloor]] = {
    "fedavg": FedAvgFloor,
    "fedntd": FedNtdFloor,
    "moon": MoonFloor,
    "kdia": KdiaFloor,
    "fedgen": FedGenFloor,
    "feddf": FedDfFloor,
}
MODELS = {"kdia": 2}  # that are evaluated; one for the others
