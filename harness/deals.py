"""The rules by which rows are dealt: rows per class [C] -> counts [clients, C]. Which rows is settled later.

Every rule hands out all rows, but for classes that no client holds under `pathological`. Rules whose sizes are left
to chance are redrawn until every client has `min_samples` rows, at most REDRAWS times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from harness.config import Partition
from harness.refusal import Refused

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

REDRAWS = 1000


def deal(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Counts [clients, C] by the rule `how.kind`. Refused if a client would get under max(1, min_samples) rows."""
    n, least = int(rows.sum()), max(1, how.min_samples)
    if clients * least > n:
        raise Refused(
            f"{clients} clients with at least {least} rows each need {clients * least} rows, there are {n}: "
            "lower clients or partition.min_samples, or use more of the data (partition.fraction, long_tail)"
        )
    counts = _RULES[how.kind](rows, clients, how, rng)
    if (smallest := int(counts.sum(axis=1).min())) < least:
        raise _unreachable(how, clients, n, f"gives a client {smallest} rows, min_samples is {least}")
    return counts


def _iid(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """A random deal in equal sizes (they differ by at most one)."""
    return _hypergeometric(rows, _equal(int(rows.sum()), clients), rng)


def _quantity(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """A random deal in unequal sizes: min_samples for all, the rest by Dirichlet(size_alpha)."""
    return _hypergeometric(rows, _unequal(int(rows.sum()), clients, how, rng), rng)


def _dirichlet(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Every class is divided by its own q ~ Dirichlet(alpha * 1_N): label skew and size skew (Hsu et al. 2019)."""
    return _redraw(lambda: _divide(rows, clients, how.alpha, np.inf, rng), how.min_samples, how, clients, rows)


def _capped(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """The same, but a client that holds n/N rows or more gets none of the next classes (MOON, KDIA)."""
    cap = rows.sum() / clients
    return _redraw(lambda: _divide(rows, clients, how.alpha, cap, rng), how.min_samples, how, clients, rows)


def _grouped(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """The capped rule in groups of clients, on random shares of the rows, none below half the mean size (FedDF)."""
    starts = range(0, clients, how.group)
    members = [min(how.group, clients - start) for start in starts]
    total = int(rows.sum())
    edges = np.cumsum([0, *members]) * total // clients
    shares = _hypergeometric(rows, np.diff(edges), rng)

    def draw(share: Ints, size: int) -> Ints:
        mean = share.sum() / size
        least = max(how.min_samples, int(0.5 * mean))
        return _redraw(lambda: _divide(share, size, how.alpha, mean, rng), least, how, size, share)

    return np.concatenate([draw(share, size) for share, size in zip(shares, members, strict=True)])


def _per_client(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Every client draws its label mix from Dirichlet(alpha * 1_C), in equal sizes (FedDyn)."""
    return _fill(rows, _equal(int(rows.sum()), clients), how.alpha, rng)


def _quantity_per_client(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Label mixes as in dirichlet-client, sizes as in quantity."""
    return _fill(rows, _unequal(int(rows.sum()), clients, how, rng), how.alpha, rng)


def _shards(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Rows sorted by label, in equal shards, `shards_per_client` of them to each at random (McMahan et al. 2017)."""
    number = clients * how.shards_per_client
    total = int(rows.sum())
    if number > total:
        raise Refused(f"partition.shards_per_client = {how.shards_per_client}: {number} shards from {total} rows")
    ends = np.cumsum(_equal(total, number))
    classes = np.concatenate([[0], np.cumsum(rows)])
    # Shard s holds the overlap of [ends[s-1], ends[s]) with every class's stretch of the sorted rows.
    inside = np.clip(classes[None, :], np.concatenate([[0], ends[:-1]])[:, None], ends[:, None])
    shards = np.diff(inside, axis=1)[rng.permutation(number)]
    counts: Ints = shards.reshape(clients, how.shards_per_client, -1).sum(axis=1)
    return counts


def _pathological(rows: Ints, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Exactly `classes_per_client` classes each; a class's holders share it by Dirichlet(size_alpha) (after PFLlib).

    Classes are given out evenly. With fewer than C / classes_per_client clients some have no holder: they are left.
    """
    classes, k = len(rows), how.classes_per_client
    if k > np.count_nonzero(rows):
        raise Refused(f"partition.classes_per_client = {k}: there are {np.count_nonzero(rows)} classes with rows")
    holds = np.zeros((clients, classes), dtype=bool)
    for client in range(clients):  # the classes with the fewest holders, ties at random
        burden = np.where(rows > 0, holds.sum(axis=0), clients + 1)
        holds[client, np.lexsort((rng.random(classes), burden))[:k]] = True
    if (crowded := np.flatnonzero(holds.sum(axis=0) > rows)).size:
        raise Refused(
            f"class {crowded[0]} has {rows[crowded[0]]} rows for {holds[:, crowded[0]].sum()} clients: lower clients"
        )

    def draw() -> Ints:
        counts = holds.astype(np.int64)  # one row for each holder, so that it does hold the class
        for c in np.flatnonzero(holds.any(axis=0)):
            holders = np.flatnonzero(holds[:, c])
            shares = rng.dirichlet(np.full(len(holders), how.size_alpha))
            counts[holders, c] += _proportional(int(rows[c]) - len(holders), shares)
        return counts

    return _redraw(draw, how.min_samples, how, clients, rows)


_RULES: dict[str, Callable[[Ints, int, Partition, np.random.Generator], Ints]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "dirichlet-capped": _capped,
    "dirichlet-grouped": _grouped,
    "dirichlet-client": _per_client,
    "shards": _shards,
    "pathological": _pathological,
    "quantity": _quantity,
    "quantity-dirichlet": _quantity_per_client,
}


# What the rules are made of


def _redraw(draw: Callable[[], Ints | None], least: int, how: Partition, clients: int, rows: Ints) -> Ints:
    best, least = 0, max(1, least)  # nobody is left without any
    for _ in range(REDRAWS):
        counts = draw()
        smallest = int(counts.sum(axis=1).min()) if counts is not None else 0
        if counts is not None and smallest >= least:
            return counts
        best = max(best, smallest)
    raise _unreachable(
        how, clients, int(rows.sum()), f"needs {least} rows for each client; in {REDRAWS} draws the best was {best}"
    )


def _unreachable(how: Partition, clients: int, n: int, problem: str) -> Refused:
    named = {"alpha": how.alpha} if "dirichlet" in how.kind else {"size_alpha": how.size_alpha}
    drawn = {} if how.kind == "shards" else named
    setting = "".join(f" with {name} = {value:g}" for name, value in drawn.items())
    raised = "".join(f", or raise partition.{name}" for name in drawn)
    return Refused(
        f"partition {how.kind}{setting} of {n} rows over {clients} clients {problem}: "
        f"lower partition.min_samples or clients{raised}"
    )


def _divide(rows: Ints, clients: int, alpha: float, cap: float, rng: np.random.Generator) -> Ints | None:
    """One draw of a class-wise Dirichlet deal. None when all the clients with room got a share of zero."""
    counts = np.zeros((clients, len(rows)), dtype=np.int64)
    for c, n in enumerate(rows):
        shares = rng.dirichlet(np.full(clients, alpha)) * (counts.sum(axis=1) < cap)
        if shares.sum() == 0:
            return None
        counts[:, c] = _proportional(int(n), shares / shares.sum())
    return counts


def _proportional(n: int, shares: Floats) -> Ints:
    """n rows cut at the cumulative shares, rounded down: sums to n exactly."""
    ends = np.floor(np.cumsum(shares) * n + 1e-9).astype(np.int64).clip(max=n)
    ends[-1] = n
    return np.diff(ends, prepend=0)


def _equal(n: int, parts: int) -> Ints:
    return np.diff(np.arange(parts + 1) * n // parts)


def _unequal(n: int, clients: int, how: Partition, rng: np.random.Generator) -> Ints:
    """Sizes of at least min_samples. (Redrawing instead, as NIID-Bench does, never ends for 100 clients at 0.5.)"""
    least = max(1, how.min_samples)
    return least + _proportional(n - clients * least, rng.dirichlet(np.full(clients, how.size_alpha)))


def _hypergeometric(rows: Ints, sizes: Ints, rng: np.random.Generator) -> Ints:
    """Counts [parts, C] of a random deal of all rows in the given sizes."""
    deck = rng.permutation(np.repeat(np.arange(len(rows)), rows))
    return np.stack([np.bincount(hand, minlength=len(rows)) for hand in np.split(deck, np.cumsum(sizes)[:-1])])


def _fill(rows: Ints, sizes: Ints, alpha: float, rng: np.random.Generator) -> Ints:
    """Counts [clients, C] with the given sizes, each client drawing from its own label mix until a class runs out.

    The clients' places stand in one random queue and take rows class by class; those whose class has run out draw
    again from their mix over the classes that are left, uniformly if the mix has no weight there.
    """
    mixes = rng.dirichlet(np.full(len(rows), alpha), size=len(sizes))
    counts = np.zeros(mixes.shape, dtype=np.int64)
    queue = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    left = rows.copy()
    while len(queue):  # every pass empties the queue or at least one class
        weights = mixes * (left > 0)
        total = weights.sum(axis=1, keepdims=True)
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1), (left > 0) / (left > 0).sum())
        bounds = np.cumsum(weights, axis=1)
        wanted = (rng.random(len(queue))[:, None] >= bounds[queue, :-1]).sum(axis=1)
        waiting = []
        for c in range(len(rows)):
            places = np.flatnonzero(wanted == c)
            np.add.at(counts[:, c], queue[places[: left[c]]], 1)
            waiting.append(places[left[c] :])
            left[c] -= min(left[c], len(places))
        queue = queue[np.sort(np.concatenate(waiting))]
    return counts
