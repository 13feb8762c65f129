"""Training in bfloat16: what is lower in precision, what is not, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import config, precision, trees
from harness.refusal import Refused

CPU = torch.device("cpu")
HAS = precision.has_bfloat16(CPU)


def test_it_is_part_of_the_hash_where_it_is_set() -> None:
    plain, lower = (config.resolve({"method": "fedavg", **more}) for more in ({}, {"precision": "bfloat16"}))
    assert config.resolve({"method": "fedavg", "precision": "float32"}) == plain
    assert config.digest(plain) != config.digest(lower)
    with pytest.raises(Refused, match="precision"):
        config.resolve({"method": "fedavg", "precision": "float16"})


def test_a_device_without_it_is_refused(monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    precision.check("float32", CPU)
    with pytest.raises(Refused, match="this cpu has no bfloat16 arithmetic; allowed here: float32"):
        lab.run(precision="bfloat16")


@pytest.mark.skipif(not HAS, reason="this CPU has no bfloat16")
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedntd", "kdia"])
def test_it_trains_nearly_as_float32(lab: Any, method: str) -> None:
    """Three rounds. bfloat16 keeps 8 bits of a number, so the way the model went differs by a few percent, not by
    nothing; what is sent and kept is float32.
    """
    hyper = {"generator_epochs": 1, "generator_iterations": 2} if method == "kdia" else {}
    start = lab.server(lab.setup(method, hyper, net="lenet5")).state["params"]
    plain, lower = (
        lab.run(method, hyper, net="lenet5", precision=how).state["params"] for how in ("float32", "bfloat16")
    )
    assert all(x.dtype == torch.float32 for _, x in trees.leaves(lower))
    way = trees.flat(trees.sub(plain, start)).norm()
    off = trees.flat(trees.sub(plain, lower)).norm()
    assert 0 < off < 0.15 * way
