"""Every client's private mentor and a small shared mentee teach each other; the mentee's updates travel compressed.

Paper: Wu et al., Communication-efficient federated learning via knowledge distillation, Nature Communications, 2022.
Travels down: the mentee's last update as factors to whoever took part in the last round, else the whole mentee.
Travels up: the mentee's update as factors. Remembered by the client: its mentor, the mentee it had, W_h.
Differences from the paper: hidden states are those before the last layer, attention maps play no part. Kernels are
matrices [out, in * height * width]. A matrix whose factors would be larger travels as it is. The public code stops
short of the last singular value and sends nothing where all are needed; averages its divergences over classes too;
and lets all gradients flow through both losses, which is gradients = "joint".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness import protocol as fl
from harness.losses import cross_entropy, kl, squared_error
from harness.nets import Net, build, sibling
from harness.protocol import Batch, Inbox, Share, State, World
from harness.trees import Tree, add, mean, sub


def factors(x: Tensor, energy: float) -> Tensor | Tree:
    """The first singular triplets of x, as a matrix by its first dimension, that hold this share of its energy.

    {"u": [m, r], "s": [r], "v": [r, n]}, r the least rank whose squared singular values add up to it; or x itself,
    where that is no larger.
    """
    if x.dim() < 2 or not bool(x.isfinite().all()):  # the harness reports divergence, and how
        return x
    u, s, v = torch.linalg.svd(x.flatten(1), full_matrices=False)
    held = s.double().square().cumsum(0)
    rank = int((held < energy * held[-1]).sum()) + 1
    if rank * (u.shape[0] + 1 + v.shape[1]) >= x.numel():
        return x
    return {"u": u[:, :rank].contiguous(), "s": s[:rank].clone(), "v": v[:rank].contiguous()}


def compress(tree: Mapping[str, Any], energy: float) -> Tree:
    """Every leaf as its factors."""
    return {k: compress(x, energy) if isinstance(x, Mapping) else factors(x, energy) for k, x in tree.items()}


def restore(packed: Mapping[str, Any], like: Mapping[str, Any]) -> Tree:
    """The tree again, in the shapes of `like`."""

    def leaf(x: Any, shape: torch.Size) -> Tensor:
        return x if isinstance(x, Tensor) else ((x["u"] * x["s"]) @ x["v"]).view(shape)

    return {k: restore(packed[k], x) if isinstance(x, Mapping) else leaf(packed[k], x.shape) for k, x in like.items()}


@dataclass(frozen=True)
class FedKD(fl.Algorithm):
    """L = CE + (KL(other || own) + MSE(h, W_h h_shared)) / (CE_private + CE_shared), for either model."""

    needs: ClassVar[frozenset[str]] = frozenset({"private_test"})

    shared_net: str = ""  # of the mentee; empty: the trial's net
    energy_start: Share = 0.95  # T_start
    energy_end: Share = 0.98  # T_end; in between linear in the rounds done
    gradients: Literal["own", "joint"] = "own"  # own: each model follows its own loss, as in the paper
    weighting: Literal["uniform", "samples"] = "uniform"  # of updates, as in the public code

    def __post_init__(self) -> None:
        """A net that does not exist is refused before the trial starts."""
        if self.shared_net:
            build(self.shared_net, (3, 32, 32), 2)

    def energy(self, t: int, rounds: int) -> float:
        """T of round t: the share of the energy that a compressed update keeps."""
        return self.energy_start + (t + 1) / rounds * (self.energy_end - self.energy_start)

    def roles(self, world: World) -> Mapping[str, fl.Role]:
        """Mentors may be of different nets."""
        return world.roles_by_net()

    def init(self, world: World, rng: Generator) -> State:
        """The mentee; nobody holds it."""
        net = self.shared_net or world.default_net
        return {"net": net, "params": world.net(net).init(rng), "holders": [], "update": {}}

    def broadcast(self, state: State, cohort: fl.Cohort, world: World) -> fl.Broadcast:
        """What brings each client's mentee up to date."""
        sent = {True: {"update": state["update"]}, False: {"shared": state["params"]}}
        personal = {visit: sent[visit.client in state["holders"]] for visit in cohort.visits}
        return fl.Broadcast({"net": state["net"], "energy": self.energy(cohort.round, world.rounds)}, {}, personal)

    def remember(self, net: Net, inbox: Inbox, rng: Generator) -> Tree:
        """A mentor of its own, and W_h [Z_private, Z_shared] as a linear layer starts."""
        width = sibling(net, inbox["net"]).latent_width
        uniform = torch.rand(net.latent_width, width, generator=rng, device=rng.device)
        return {"private": net.init(rng), "hidden": (2 * uniform - 1) / math.sqrt(width)}

    def start(self, net: Net, inbox: Inbox, memory: Tree) -> Tree:
        """Mentor, mentee and W_h are trained together."""
        old = memory.get("shared", {})
        mentee = inbox["shared"] if "shared" in inbox else add(old, restore(inbox["update"], old))
        return {"private": memory["private"], "shared": mentee, "hidden": memory["hidden"]}

    def loss(self, net: Net, p: Tree, batch: Batch, inbox: Inbox, memory: Tree) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both losses."""
        nets, names = {"private": net, "shared": sibling(net, inbox["net"])}, ("private", "shared")
        h = {k: nets[k].embed(p[k], batch.x) for k in names}
        z = {k: nets[k].classify(p[k], h[k]) for k in names}
        ce = {k: cross_entropy(z[k], batch.y, batch.mask) for k in names}
        value = ce["private"] + ce["shared"]
        for own, other in (names, names[::-1]):
            given = (lambda x: x.detach()) if self.gradients == "own" else (lambda x: x)
            side = {own: h[own], other: given(h[other])}
            hidden = squared_error(side["private"], side["shared"] @ p["hidden"].T, batch.mask)
            value = value + (kl(given(z[other]), z[own], mask=batch.mask) + hidden) / (ce[own] + given(ce[other]))
        return value, {f"{k}_ce": ce[k].detach() for k in names}

    def reply(self, trained: fl.Trained) -> tuple[Tree, Tree]:
        """The compressed update; the mentee as it came is kept, for the next update."""
        came = trained.start["shared"]
        update = compress(sub(trained.end["shared"], came), trained.inbox["energy"])
        return {"update": update}, {**trained.end, "shared": came}

    def merge(self, state: State, updates: Sequence[fl.Update], server: fl.Server) -> State:
        """The mean of the updates, compressed again: the server takes the step that its clients can take, too."""
        share = fl.weights(updates) if self.weighting == "samples" else [1.0] * len(updates)
        whole = mean((restore(u.payload["update"], state["params"]) for u in updates), share)
        packed = compress(whole, self.energy(server.round, server.world.rounds))
        params = add(state["params"], restore(packed, state["params"]))
        return {**state, "update": packed, "params": params, "holders": [u.visit.client for u in updates]}

    def models(self, state: State) -> dict[str, tuple[str, Tree]]:
        """The mentee; mentors are measured at the clients."""
        return {"shared": (state["net"], state["params"])}

    def keeps(self, net: Net, memory: Tree) -> Tree:
        """The mentor."""
        return dict(memory["private"])
