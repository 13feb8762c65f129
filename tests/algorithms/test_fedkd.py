from __future__ import annotations

from typing import Any

import pytest
import torch

from algorithms.fedkd import FedKD, compress, factors, restore
from harness import config, work
from harness.protocol import Batch, Cohort, Visit
from harness.refusal import Refused
from harness.trees import add, leaves, nbytes, size, stream, sub

PRIVATE, SHARED = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
ROW = Batch(torch.tensor([0]), torch.tensor([0]))


def run(lab: Any, hyper: dict[str, Any] | None = None, **trial: Any) -> Any:
    basics: dict[str, Any] = {"method": "fedkd", "hyper": hyper or {}, "net": "mlp", "clients": 4, "rounds": 3}
    basics |= {"local": {"epochs": 1, "batch": 16, "lr": 0.1}, "holdout": {"test": 0.2}, **trial}
    server = lab.server(work.make_setup(config.resolve(basics), lab.arrays(160))[0])
    while not server.done:
        server.step()
    return server


def model(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """A table whose latent rows are its logits."""
    return {"latent": rows, "head": torch.eye(3)}


@pytest.mark.parametrize("gradients", ["own", "joint"])
def test_both_losses(lab: Any, gradients: Any) -> None:
    """Private logits (2, .5, -1), shared (1, 1, 0), y = 0: CE .241312 and .861995, their sum D = 1.103307;
    KL(shared || private) .323519, KL(private || shared) .279523; W_h = I: MSE (1 + .25 + 1) / 3 = .75.
    D + (.323519 + .75 + .279523 + .75) / D = 3.009433.
    """
    p = {"private": model(PRIVATE), "shared": model(SHARED), "hidden": torch.eye(3)}
    found, _, seen = lab.step(FedKD(gradients=gradients), lab.Table(), p, ROW, {"net": "table"})
    assert found == pytest.approx(3.009433, abs=3e-6)
    assert float(seen["private_ce"]) == pytest.approx(0.241312, abs=1e-6)
    assert float(seen["shared_ce"]) == pytest.approx(0.861995, abs=1e-6)


def test_gradients_own_follow_a_models_own_loss_and_joint_ones_the_sum(lab: Any) -> None:
    """The private model's loss as a function of its logits z alone, checked by central differences in double."""

    def losses(z: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, q = z.softmax(1), s.softmax(1)
        ce, other = -p[0, 0].log(), -q[0, 0].log()
        hidden = (z - s).square().mean()
        return (
            ce + ((q * (q / p).log()).sum() + hidden) / (ce + other),
            other + ((p * (p / q).log()).sum() + hidden) / (ce + other),
        )

    z, s = PRIVATE.double(), SHARED.double()
    p = {"private": model(PRIVATE), "shared": model(SHARED), "hidden": torch.eye(3)}
    for gradients in ("own", "joint"):
        _, grads, _ = lab.step(FedKD(gradients=gradients), lab.Table(), p, ROW, {"net": "table"})
        for i in range(3):
            step = torch.zeros(1, 3, dtype=torch.float64)
            step[0, i] = 1e-6
            up, down = losses(z + step, s), losses(z - step, s)
            wanted = (up[0] - down[0]) if gradients == "own" else sum(up) - sum(down)
            assert float(grads["private"]["latent"][0, i]) == pytest.approx(float(wanted) / 2e-6, abs=2e-5)


def test_the_hidden_map_goes_from_shared_to_private() -> None:
    """W_h: [Z_private, Z_shared]; mlp has 200 and lenet5 84. Uniform within 1 / sqrt(Z_shared)."""
    from harness.nets import build

    memory = FedKD().remember(build("mlp", (1, 8, 8), 4), {"net": "lenet5"}, stream("visit"))
    assert memory["hidden"].shape == (200, 84)
    assert 0.9 / 84**0.5 < float(memory["hidden"].abs().max()) <= 1 / 84**0.5


def diagonal(values: list[float], width: int = 12) -> torch.Tensor:
    x = torch.zeros(len(values), width)
    x[torch.arange(len(values)), torch.arange(len(values))] = torch.tensor(values)
    return x


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.92, 2), (0.93, 3), (1.0, 3)])
def test_the_least_rank_that_holds_the_energy(energy: float, rank: int) -> None:
    """Singular values 3, 2, 1 hold 9/14 = .643, 13/14 = .929 and 1 of the energy; rank r of 12x12 takes 25 r."""
    x = diagonal([3.0, 2.0, 1.0] + [0.0] * 9)
    packed = factors(x, energy)
    assert isinstance(packed, dict)
    assert (packed["u"].shape, packed["s"].shape, packed["v"].shape) == ((12, rank), (rank,), (rank, 12))
    kept = diagonal([3.0, 2.0, 1.0][:rank] + [0.0] * (12 - rank))
    assert torch.allclose(restore({"w": packed}, {"w": x})["w"], kept, atol=1e-6)


def test_what_would_grow_travels_as_it_is() -> None:
    """Rank 2 of 3x3 would take 14 numbers instead of 9. Vectors have no factors."""
    tree = {"a": {"w": diagonal([3.0, 2.0, 1.0], 3), "b": torch.ones(5)}, "k": torch.ones(4, 2, 3, 3)}
    packed = compress(tree, 0.9)
    assert packed["a"]["w"] is tree["a"]["w"] and packed["a"]["b"] is tree["a"]["b"]
    assert packed["k"]["u"].shape == (4, 1) and packed["k"]["v"].shape == (1, 18), "a kernel is a matrix [out, rest]"
    back = restore(packed, tree)
    assert all(torch.allclose(x, y, atol=1e-6) for (_, x), (_, y) in zip(leaves(back), leaves(tree), strict=True))


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.zeros(20, 20)
    assert torch.equal(restore(compress({"w": x}, 0.95), {"w": x})["w"], x)
    x[3, 3] = torch.nan
    assert factors(x, 0.95) is x, "left for the harness to find"


def test_the_threshold_rises_with_the_rounds() -> None:
    """.95 + (t + 1) / R * .03."""
    method = FedKD()
    assert [method.energy(t, 10) for t in (0, 4, 9)] == pytest.approx([0.953, 0.965, 0.98])


def test_whoever_took_part_gets_the_update_and_others_the_model(lab: Any) -> None:
    method, world = FedKD(), lab.world()
    state = method.init(world, stream("init")) | {"holders": [1], "update": {"u": torch.ones(1)}}
    sent = method.broadcast(state, Cohort(3, (Visit(0, "global"), Visit(1, "global"))), world)
    assert sent.shared["energy"] == pytest.approx(0.962)
    assert [set(inbox) for inbox in sent.personal.values()] == [{"shared"}, {"update"}]


@pytest.mark.parametrize(("weighting", "value"), [("uniform", 1.8), ("samples", 1.7)])
def test_updates_are_averaged_and_added(lab: Any, weighting: Any, value: float) -> None:
    """1 + (.6 + 1) / 2 = 1.8; with 30 and 10 rows 1 + (3 * .6 + 1) / 4 = 1.7."""
    updates = [
        lab.update(3, {"update": {"w": torch.tensor([0.6])}}, 30),
        lab.update(1, {"update": {"w": torch.tensor([1.0])}}, 10),
    ]
    state = {"net": "mlp", "params": {"w": torch.ones(1)}, "holders": [], "update": {}}
    merged = FedKD(weighting=weighting).merge(state, updates, lab.bench())
    assert float(merged["params"]["w"]) == pytest.approx(value)
    assert merged["holders"] == [3, 1] and float(merged["update"]["w"]) == pytest.approx(value - 1)


def test_clients_and_server_hold_the_same_mentee_and_bytes_are_those_of_factors(lab: Any) -> None:
    """Half of the clients a round. The mentee from which a client starts is the server's, bit for bit, whether it
    came whole or was made from the last update.
    """
    basics = {"rounds": 4, "clients": 6, "cohort": 3}
    server = run(lab, **basics)
    mentees = {}
    again = lab.server(server.setup)
    kinds = set()
    while not again.done:
        mentees[again.round] = again.state["params"]
        again.step()
    for s in again.pool.log:
        kinds |= set(s.inbox) - {"net", "energy"}
        whole = s.inbox.get("shared") or add(s.memory["shared"], restore(s.inbox["update"], s.memory["shared"]))
        assert lab.same(whole, mentees[s.order.round])
        assert nbytes(s.payload) < 0.5 * nbytes(whole), "a step of ten rows has few directions"
    assert kinds == {"shared", "update"}
    assert sum(row["up_bytes"] for row in again.rounds) == sum(nbytes(s.payload) for s in again.pool.log)


def test_all_energy_gives_the_updates_back(lab: Any) -> None:
    """With T = 1 nothing is lost: the server's mentee is the mean of its clients' up to rounding."""
    server = run(lab, {"energy_start": 1.0, "energy_end": 1.0}, rounds=1)
    states = [memory["shared"] for memory in server.memories.values()]
    updates = [restore(s.payload["update"], states[0]) for s in server.pool.log]
    mean = sub(server.state["params"], states[0])
    for (_, total), *parts in zip(leaves(mean), *(leaves(u) for u in updates), strict=True):
        assert torch.allclose(total, sum(x for _, x in parts) / len(parts), atol=1e-5)


def test_mentors_may_be_of_different_nets(lab: Any) -> None:
    server = run(lab, {"shared_net": "lenet5"}, fleet={"nets": ["mlp", "lenet5"]})
    assert {row["role"] for row in server.rounds} == {"shared", "personal-mlp", "personal-lenet5"}
    assert len({size(memory["shared"]) for memory in server.memories.values()}) == 1
    with pytest.raises(Refused, match="lenet5"):
        FedKD(shared_net="lenet")
