"""Which training rows each client gets, and how skewed that came out.

A split is a pure function of (labels, clients, partition, seed) and covers all rows exactly once: what no client gets
is in `Split.left`. "alpha = 0.1" of two rules is not one difficulty, so realised statistics travel with every split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from harness.config import Fleet, Holdout, Partition, Trial
from harness.deals import Floats, Ints, deal
from harness.refusal import Refused
from harness.trees import numpy_stream


@dataclass(frozen=True, eq=False)
class Split:
    """A deal: the rows of each client, sorted, and the rows that no client got.

    counts: [clients, classes]. digest: sha256 (hex) over the clients' sorted rows. statistics: see `describe`.
    validation, test: rows that clients keep from training. proxy: the server's rows. levels: of each client, from 0.
    """

    clients: tuple[Ints, ...]
    left: Ints
    counts: Ints
    digest: str
    statistics: dict[str, float]
    validation: tuple[Ints, ...] = ()
    test: tuple[Ints, ...] = ()
    proxy: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    levels: tuple[int, ...] = ()

    def pooled(self) -> Split:
        """The same rows in the hands of one client: for the upper bound that is trained centrally."""
        rows = np.sort(np.concatenate(self.clients))
        return replace(self, clients=(rows,), counts=self.counts.sum(0, keepdims=True), levels=(0,))


def divide(labels: Ints, classes: int, trial: Trial, domains: Ints | None = None) -> Split:
    """Deals the training rows [n] of a trial: the server's proxy, the clients' rows, what they hold out.

    domains: [n] the domain of each row, for partition.domains = "card". Raises Refused as `split` does.
    """
    how, seed = trial.partition, trial.seed
    proxy = _proxy_rows(labels, classes, trial) if trial.proxy.source == "train" else np.empty(0, np.int64)
    rest = np.setdiff1d(np.arange(len(labels)), proxy)
    if how.domains == "none":
        whole, side = split(labels[rest], classes, trial.clients, how, seed), np.zeros(trial.clients, np.int64)
    else:
        side_of = _sides(labels, classes, how, domains)[rest]
        whole, side = _split_sides(labels[rest], side_of, classes, trial.clients, how, seed)
    parts = [_hold_out(rest[rows], trial.holdout, seed, client) for client, rows in enumerate(whole.clients)]
    train, validation, test = (tuple(part) for part in zip(*parts, strict=True))
    counts = np.stack([np.bincount(labels[rows], minlength=classes) for rows in train])
    levels = assign_levels(counts, side, trial.fleet, seed)
    kept = trial.holdout.test or trial.holdout.validation or len(proxy)
    digest = _digest((*train, *validation, *test, proxy)) if kept else whole.digest
    return Split(train, rest[whole.left], counts, digest, describe(counts), validation, test, proxy, levels)


def assign_levels(counts: Ints, side: Ints, fleet: Fleet, seed: int) -> tuple[int, ...]:
    """The level of each client. counts: [N, C]; side: [N] domains.

    Clients are ordered by what `fleet.by` says (seeded, ties too) and cut by the levels' shares, smallest net first;
    but with as many domains as levels and no shares given, the levels are the domains, whatever their sizes.
    """
    n, depth = len(counts), max(1, len(fleet.nets))
    tie = numpy_stream(seed, "levels").permutation(n)
    sizes = counts.sum(1)
    mix = counts / np.maximum(sizes, 1)[:, None]
    entropy = -(mix * np.log(np.where(mix > 0, mix, 1))).sum(1)
    keys = {"random": tie, "size": sizes, "labels": entropy, "domain": side}
    order = np.lexsort((tie, keys[fleet.by]))
    shares = np.array(fleet.shares or [1 / depth] * depth)
    cuts = np.round(np.cumsum(shares)[:-1] * n).astype(int)
    _, members_of = np.unique(side, return_counts=True)
    if fleet.by == "domain" and not fleet.shares and len(members_of) == depth:
        cuts = np.cumsum(members_of)[:-1]
    levels = np.empty(n, np.int64)
    for level, members in enumerate(np.split(order, cuts)):
        levels[members] = level
    return tuple(int(level) for level in levels)


def _proxy_rows(labels: Ints, classes: int, trial: Trial) -> Ints:
    wanted = trial.proxy.rows
    if wanted >= len(labels):
        raise Refused(f"proxy.rows = {wanted} leaves nothing to train on: there are {len(labels)} training rows")
    order = numpy_stream(trial.seed, "proxy").permutation(len(labels))
    if not trial.proxy.balanced:
        return np.sort(order[:wanted])
    rank = np.empty(len(labels), np.int64)  # how many rows of the same class come earlier in the order
    for c in range(classes):
        members = order[labels[order] == c]
        rank[members] = np.arange(len(members))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:wanted])


def halves(labels: Ints, classes: int) -> Ints:
    """[n]: 0 for rows of the lower half of the classes, 1 for the upper."""
    return (labels >= classes // 2).astype(np.int64)


def _sides(labels: Ints, classes: int, how: Partition, domains: Ints | None) -> Ints:
    if how.domains == "halves":
        return halves(labels, classes)
    if domains is None:
        raise Refused("partition.domains = 'card', but this data set has no domains: use 'halves' or 'none'")
    return domains


def _split_sides(
    labels: Ints, side: Ints, classes: int, clients: int, how: Partition, seed: int
) -> tuple[Split, Ints]:
    """A split within each domain, with clients in proportion to the domains' rows (at least one each)."""
    names, rows = np.unique(side, return_counts=True)
    if clients < len(names):
        raise Refused(f"clients = {clients} is less than the {len(names)} domains")
    parts: list[Ints] = []
    owner: list[int] = []
    left: list[Ints] = []
    for name, share in zip(names, _seats(rows, clients), strict=True):
        own = np.flatnonzero(side == name)
        part = split(labels[own], classes, int(share), how, seed + int(name))
        parts += [own[mine] for mine in part.clients]
        left.append(own[part.left])
        owner += [int(name)] * int(share)
    counts = np.stack([np.bincount(labels[mine], minlength=classes) for mine in parts])
    spare = np.sort(np.concatenate(left))
    return Split(tuple(parts), spare, counts, _digest(tuple(parts)), describe(counts)), np.array(owner)


def _seats(rows: Ints, clients: int) -> Ints:
    """Clients of each domain: by largest remainder, but one at least."""
    exact = rows / rows.sum() * clients
    seats: Ints = np.maximum(1, np.floor(exact)).astype(np.int64)
    while seats.sum() < clients:
        seats[np.argmax(exact - seats)] += 1
    while seats.sum() > clients:
        seats[np.argmin(np.where(seats > 1, exact - seats, np.inf))] -= 1
    return seats


def _hold_out(rows: Ints, holdout: Holdout, seed: int, client: int) -> tuple[Ints, Ints, Ints]:
    """A client's rows for training, validation and test, each sorted; at least one row is left to train on."""
    if not holdout.test and not holdout.validation:
        return rows, rows[:0], rows[:0]
    order = numpy_stream(seed, "holdout", client).permutation(rows)
    test = min(round(holdout.test * len(rows)), max(0, len(rows) - 1))
    validation = min(round(holdout.validation * len(rows)), max(0, len(rows) - test - 1))
    kept_test, kept_validation, train = np.split(order, [test, test + validation])
    return np.sort(train), np.sort(kept_validation), np.sort(kept_test)


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
    ends = np.cumsum(np.bincount(labels, minlength=classes))[:-1]
    piles = [rng.permutation(pile) for pile in np.split(np.argsort(labels, kind="stable"), ends)]
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
    """Each class's pile is cut in the clients' order; what is beyond the counts is left."""
    dealt = np.concatenate([pile[:taken] for pile, taken in zip(piles, counts.sum(0), strict=True)])
    owner = np.repeat(np.tile(np.arange(len(counts)), len(piles)), counts.T.ravel())
    by_owner = dealt[np.argsort(owner, kind="stable")]
    return tuple(np.sort(mine) for mine in np.split(by_owner, np.cumsum(counts.sum(1))[:-1]))
