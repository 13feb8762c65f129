"""Which training rows each client gets, and how skewed that came out.

A split is a pure function of (labels, clients, partition, seed) and covers all rows exactly once: what no client gets
is in `Split.left`. "alpha = 0.1" of two rules is not one difficulty, so realised statistics travel with every split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from harness.config import Partition
from harness.deals import Floats, Ints, deal
from harness.refusal import Refused
from harness.trees import numpy_stream


@dataclass(frozen=True, eq=False)
class Split:
    """A deal: the rows of each client, sorted, and the rows that no client got.

    counts: [clients, classes]. digest: sha256 (hex) over the clients' sorted rows. statistics: see `describe`.
    """

    clients: tuple[Ints, ...]
    left: Ints
    counts: Ints
    digest: str
    statistics: dict[str, float]


def split(labels: Ints, classes: int, clients: int, how: Partition, seed: int) -> Split:
    """Deal rows 0..n-1 with the given labels [n] to clients. Refused when the rule cannot be met with these rows."""
    if clients < 1:
        raise Refused(f"clients = {clients}: at least 1 is needed")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise Refused(f"labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    rng = numpy_stream(seed, "partition")
    piles = _piles(labels, classes, how, rng)
    counts = deal(np.array([len(pile) for pile in piles]), clients, how, rng)
    rows = _cut(piles, counts)
    left = np.setdiff1d(np.arange(len(labels)), np.concatenate(rows))
    return Split(rows, left, counts, _digest(rows), describe(counts))


def shift(how: Partition, clients: int, seed: int) -> Floats:
    """A feature shift's strength per client [clients], fixed for the trial and evenly spaced, in a seeded order.

    rotation: degrees within +-shift_level (the midpoints of N equal parts). noise: standard deviation of Gaussian
    noise on x/255, shift_level * i / N for i = 1..N (Li et al., ICDE 2022, "noise-based"). none: zeros.
    """
    order = numpy_stream(seed, "shift").permutation(clients)
    if how.shift == "rotation":
        return how.shift_level * ((2 * order + 1) / clients - 1)
    return how.shift_level * (order + 1) / clients if how.shift == "noise" else np.zeros(clients)


def describe(counts: Ints) -> dict[str, float]:
    """Realised skew of counts [clients, classes].

    js: Jensen-Shannon divergence between a client's label mix and that of all clients together, mean over clients,
    nats (0 to ln 2 = 0.693). classes: classes per client, mean. size_cv: standard deviation of the sizes over their
    mean. smallest, largest: rows. Clients without rows count in all but js.
    """
    sizes = counts.sum(axis=1)
    held = counts[sizes > 0]
    local = held / held.sum(axis=1, keepdims=True)
    both = np.broadcast_to(counts.sum(axis=0) / counts.sum(), local.shape)
    middle = (local + both) / 2
    return {
        "js": float((_kl(local, middle) + _kl(both, middle)).mean() / 2),
        "classes": float((counts > 0).sum(axis=1).mean()),
        "size_cv": float(sizes.std() / sizes.mean()),
        "smallest": float(sizes.min()),
        "largest": float(sizes.max()),
    }


def _kl(p: Floats, q: Floats) -> Floats:
    ratio: Floats = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    divergence: Floats = (p * np.log(ratio)).sum(axis=1)
    return divergence


def _digest(rows: tuple[Ints, ...]) -> str:
    digest = hashlib.sha256()
    for mine in rows:
        digest.update(len(mine).to_bytes(8, "little"))
        digest.update(mine.astype("<i8").tobytes())
    return digest.hexdigest()


def _piles(labels: Ints, classes: int, how: Partition, rng: np.random.Generator) -> list[Ints]:
    """The rows of each class in random order, after `fraction` and the long tail."""
    piles = [rng.permutation(np.flatnonzero(labels == c)) for c in range(classes)]
    piles = [pile[: _floor(how.fraction * len(pile))] for pile in piles]
    if how.long_tail == 1 or classes == 1:
        return piles
    # n_c = n_max * IF^(-c/(C-1)) (Cui et al., CVPR 2019), with the largest n_max that every class can serve.
    decay = how.long_tail ** (-np.arange(classes) / (classes - 1))
    largest = min(len(pile) / factor for pile, factor in zip(piles, decay, strict=True))
    kept = [_floor(largest * factor) for factor in decay]
    if min(kept) < 1:
        raise Refused(
            f"partition.long_tail = {how.long_tail:g} leaves classes without rows: at most {largest:.0f} here"
        )
    return [pile[:k] for pile, k in zip(piles, kept, strict=True)]


def _floor(x: float) -> int:
    return int(x + 1e-6)  # 0.1 * 30 and its like must not lose a row to rounding


def _cut(piles: list[Ints], counts: Ints) -> tuple[Ints, ...]:
    parts = [np.split(pile, np.cumsum(column))[:-1] for pile, column in zip(piles, counts.T, strict=True)]
    return tuple(np.sort(np.concatenate(mine)) for mine in zip(*parts, strict=True))
