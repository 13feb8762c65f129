"""Means that are taken in parts: the same bits wherever a part was taken, whoever failed, however it is weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.fedadam import FedAdam
from algorithms.fedavg import FedAvg
from algorithms.fedprox import FedProx
from algorithms.kdia import Kdia
from algorithms.scaffold import Scaffold
from harness import trees
from harness.averages import gathered, mean_of, summed
from harness.protocol import Update, Visit
from harness.trees import CHUNK, Tree


def model(seed: int) -> Tree:
    rng = trees.stream("averages", seed)
    return {"a": {"w": torch.randn(3, 2, generator=rng)}, "b": {"w": torch.randn(4, generator=rng)}}


def updates(samples: Sequence[int], missing: Sequence[int] = ()) -> list[Update]:
    """A cohort's, as it comes from its clients one by one. missing: places from which nothing came back."""
    return [
        Update(Visit(at, "global"), n, 1, {"params": model(at), "other": {"x": torch.tensor([at])}}, {}, at // CHUNK)
        for at, n in enumerate(samples)
        if at not in missing
    ]


def sent_in_chunks(of: Sequence[Update], whole: Sequence[int], by: Any) -> list[Update]:
    """The same, with the means of these chunks taken where the clients are."""
    found: list[Update] = []
    for number in dict.fromkeys(u.chunk for u in of):
        own = [u for u in of if u.chunk == number]
        payloads: list[Tree] = [u.payload for u in own]
        if number in whole:
            payloads = gathered(payloads, [u.samples for u in own], {"params": by})
        pairs = zip(own, payloads, strict=True)
        found += [Update(u.visit, u.samples, u.steps, payload, u.metrics, u.chunk) for u, payload in pairs]
    return found


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.randoms(), st.sampled_from(["samples", "equal"]))
@settings(max_examples=40)
def test_a_mean_does_not_depend_on_where_parts_of_it_were_taken(samples: list[int], chance: Any, by: Any) -> None:
    """Any chunks may be taken elsewhere; those in which somebody is missing never are, and stay as they are."""
    samples[0] += 1  # somebody counts
    missing = [at for at in range(1, len(samples)) if chance.random() < 0.1]
    plain = updates(samples, missing)
    numbers = {u.chunk for u in plain} - {at // CHUNK for at in missing}
    taken = sent_in_chunks(plain, [n for n in numbers if chance.random() < 0.5], by)
    expected = trees.flat(mean_of(plain, "params", by))
    assert torch.equal(trees.flat(mean_of(taken, "params", by)), expected)
    assert [u.payload["other"]["x"].item() for u in taken] == [u.visit.client for u in plain]
    share = torch.tensor([float(u.samples) if by == "samples" else 1.0 for u in plain]).double()
    rows = torch.stack([trees.flat(u.payload["params"]).double() for u in plain])
    torch.testing.assert_close(expected.double(), (share[:, None] * rows).sum(0) / share.sum(), rtol=1e-5, atol=1e-6)


def test_a_gathered_chunk_carries_its_mean_once() -> None:
    """Weights 1 and 3: (a + 3 b) / 4. The first keeps it, the second has what is not summed alone."""
    first, second = gathered([u.payload for u in updates([1, 3])], [1, 3], {"params": "samples"})
    expected = 0.25 * trees.flat(model(0)) + 0.75 * trees.flat(model(1))
    torch.testing.assert_close(trees.flat(first["params"]), expected)
    assert set(first) == {"params", "other"}
    assert set(second) == {"other"}


def test_what_not_all_have_and_what_nobody_weighs_stays_as_it_is() -> None:
    payloads = [{"params": model(0)}, {"else": model(1)}]
    assert [set(p) for p in gathered(payloads, [1, 1], {"params": "equal"})] == [{"params"}, {"else"}]
    nobody = gathered([{"params": model(0)}, {"params": model(1)}], [0, 0], {"params": "samples"})
    assert [set(p) for p in nobody] == [{"params"}, {"params"}]


def test_a_declaration_belongs_to_the_merge_beside_it() -> None:
    """FedProx inherits FedAvg's merge and its declaration; KDIA's own merge looks at every client's model."""

    class Looks(FedAvg):
        def merge(self, state: Any, updates: Any, server: Any) -> Any:
            return super().merge(state, updates, server)

    assert summed(FedAvg()) == summed(FedProx()) == summed(FedAdam()) == {"params": "samples"}
    assert summed(Scaffold()) == {"params": "equal", "c_delta": "equal"}
    assert summed(Looks()) == summed(Kdia()) == {}


@pytest.mark.parametrize("by", ["samples", "equal"])
def test_nobody_with_any_weight_is_refused(by: Any) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        mean_of(updates([0, 0]) if by == "samples" else [], "params", by)
