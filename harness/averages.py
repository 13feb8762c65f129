"""Means of what clients send, which may be computed in parts wherever the clients are.

A cohort's visits are cut into chunks of `trees.CHUNK`, by their places in it, not by who comes back or when. A mean
is that of the chunks' means: its bits depend neither on where those were computed, nor on the number of hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from harness.protocol import Algorithm, Update
from harness.trees import Tree, mean

Weighting = Literal["samples", "equal"]


def mean_of(updates: Sequence[Update], key: str, by: Weighting = "samples") -> Tree:
    """The mean of a part of all payloads, weighted by sample counts n_k or equally."""
    parts: list[Tree] = []
    weights: list[float] = []
    for _, members in groupby(updates, key=lambda update: update.chunk):
        chunk = list(members)
        own = [weight(update.samples, by) for update in chunk]
        held = [update.payload[key] for update in chunk if key in update.payload]  # one, if it is their mean already
        if sum(own) > 0:
            parts.append(held[0] if len(held) < len(chunk) else mean(held, own))
            weights.append(sum(own))
    return mean(parts, weights)


def weight(samples: int, by: Weighting) -> float:
    """A client's in a mean."""
    return float(samples) if by == "samples" else 1.0


def summed(method: Algorithm) -> Mapping[str, Weighting]:
    """The parts of payloads that may travel as means: those that are declared beside the `merge` that is used."""
    owner: Any = next(kind for kind in type(method).__mro__ if "merge" in vars(kind))
    found: Mapping[str, Weighting] = vars(owner).get("summed", {})
    return found


def gathered(payloads: Sequence[Tree], samples: Sequence[int], parts: Mapping[str, Weighting]) -> list[Tree]:
    """The payloads of a whole chunk with one mean of each part, which the first of them keeps."""
    lean = [{key: value for key, value in payload.items() if key not in parts} for payload in payloads]
    for key, by in parts.items():
        held: list[Tree] = [payload[key] for payload in payloads if key in payload]
        own = [weight(count, by) for count in samples]
        if len(held) == len(payloads) and sum(own) > 0:
            lean[0][key] = mean(held, own)
        else:  # not all have it, or nobody counts: as they are
            for thin, whole in zip(lean, payloads, strict=True):
                thin |= {key: whole[key]} if key in whole else {}
    return lean
