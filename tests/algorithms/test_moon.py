"""MOON: the contrastive term, whose model stands for the past, and what mu = 0 means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from algorithms.moon import Moon, contrast
from harness import trees
from harness.protocol import Batch, Visit

if TYPE_CHECKING:
    from tests.conftest import Lab

Z, Z_GLOBAL, Z_PREVIOUS = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0]])


def test_the_term_by_hand() -> None:
    """z (1, 0), z_g (.6, .8), z_prev (0, 1): cosines .6 and 0; over .5: 1.2 and 0; ln(1 + e^-1.2) = .263282.

    With the two swapped ln(1 + e^1.2) = 1.463282; lengths do not matter.
    """
    assert contrast(Z, Z_GLOBAL, Z_PREVIOUS, 0.5).item() == pytest.approx(0.263282, abs=1e-6)
    assert contrast(Z, Z_PREVIOUS, Z_GLOBAL, 0.5).item() == pytest.approx(1.463282, abs=1e-6)
    assert contrast(3 * Z, 7 * Z_GLOBAL, Z_PREVIOUS, 0.5).item() == pytest.approx(0.263282, abs=1e-6)


def test_masked_rows_do_not_count() -> None:
    """The mean is over the rows whose mask is 1."""
    z, first, second = (torch.cat(pair) for pair in ((Z, Z), (Z_GLOBAL, Z_PREVIOUS), (Z_PREVIOUS, Z_GLOBAL)))
    assert contrast(z, first, second, 0.5).item() == pytest.approx((0.263282 + 1.463282) / 2, abs=1e-6)
    assert contrast(z, first, second, 0.5, torch.tensor([1.0, 0.0])).item() == pytest.approx(0.263282, abs=1e-6)


@pytest.mark.parametrize("mu", [5.0, 1.0])
def test_loss_and_gradient_by_hand(lab: Lab, mu: float) -> None:
    """The row above with logits z @ 0 = 0, so CE = ln 3. By z_2 (z_1 only scales): d cos_g = .8, d cos_prev = 1.

    The softmax gives the past s = 1 / (1 + e^1.2) = .231475; gradient mu s (1 - .8) / .5 = mu .092590.
    """
    head = torch.zeros(2, 3)
    p, center, past = ({"latent": z, "head": head} for z in (Z, Z_GLOBAL, Z_PREVIOUS))
    batch = Batch(torch.tensor([0]), torch.tensor([0]))
    value, grads, seen = lab.step(Moon(mu=mu), lab.Table(), p, batch, {"params": center}, {"previous": past})
    assert value == pytest.approx(math.log(3) + mu * 0.263282, abs=1e-5)
    assert grads["latent"][0].tolist() == pytest.approx([0.0, mu * 0.092590], abs=1e-5)
    assert seen["contrast"].item() == pytest.approx(0.263282, abs=1e-6)


def test_the_past_is_the_client_s_own_last_model(lab: Lab) -> None:
    """Not the one of the last round: over three rounds of two in four clients. It never travels."""
    server = lab.run("moon", rounds=4, participation=0.5)
    last: dict[Visit, Any] = {}
    again = 0
    for sent in server.pool.log:  # type: ignore[attr-defined]
        assert list(sent.payload) == ["params"]
        assert list(sent.inbox) == ["params"]
        if sent.order.visit in last:
            again += 1
            assert lab.same(sent.memory["previous"], last[sent.order.visit])
        else:
            assert not sent.memory
        last[sent.order.visit] = sent.payload["params"]
    assert again > 0


def test_a_first_participation_is_fedavg_s(lab: Lab) -> None:
    """Bit for bit: there is nothing to push from. The second one is not."""
    plain, server = lab.run("fedavg", rounds=2), lab.run("moon", rounds=2)
    for a, b in zip(plain.pool.log, server.pool.log, strict=True):  # type: ignore[attr-defined]
        assert lab.same(a.payload["params"], b.payload["params"]) == (a.order.round == 0)


def test_mu_zero_is_fedavg_bit_for_bit(lab: Lab) -> None:
    settings: dict[str, Any] = {"rounds": 4, "participation": 0.5, "local": {"momentum": 0.9, "epochs": 2}}
    plain, off = lab.run("fedavg", **settings), lab.run("moon", {"mu": 0.0}, **settings)
    assert lab.same(lab.model(off), lab.model(plain))
    assert not any(off.memories.values())
    assert not lab.same(lab.model(lab.run("moon", **settings)), lab.model(plain))


def test_frozen_models_get_no_gradient(lab: Lab) -> None:
    net = lab.world().net("lenet5")
    p, center, past = (net.init(trees.stream(i)) for i in range(3))
    batch = Batch(torch.randn(6, 1, 8, 8, generator=trees.stream(3)), torch.arange(6) % 4)
    told = Moon().teach(net, batch.x, {"params": center}, {"previous": past})
    assert not any(z.requires_grad for z in told.values())
    assert {tuple(z.shape) for z in told.values()} == {(6, net.latent_width)}
    _, with_mu, _ = lab.step(Moon(mu=1.0), net, p, batch, {"params": center}, {"previous": past})
    _, without, _ = lab.step(Moon(mu=1.0), net, p, batch, {"params": center})
    assert lab.same(with_mu["head"], without["head"])  # the term ends at the head's input
    assert not lab.close(with_mu["latent"], without["latent"], atol=1e-4)
