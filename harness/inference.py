"""Statistics of small samples: intervals, paired tests, ranks, letters. Numbers in, numbers out, always the same.

Only numpy and scipy.special, which load at once; the tests hold every figure against scipy.stats and scikit-posthocs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
SIGNED_FROM = 12  # pairs, from which signs and ranks are tested: see `paired`
MOST_EXACT = 60  # pairs, up to which the signed-rank distribution is counted out
GRID = 4001  # points of the quadrature

Strata = Sequence[Sequence[float]]


class Interval(NamedTuple):
    """Where the true value lies, with 95 % confidence."""

    low: float
    high: float
    kind: Literal["t", "bootstrap"]


class Paired(NamedTuple):
    """What n differences say of their mean. p: two-sided, that it is 0; not corrected for other comparisons."""

    n: int
    mean: float
    interval: Interval | None
    p: float | None
    test: Literal["t", "signed-rank", "none"]


def iqm(values: Sequence[float]) -> float:
    """The interquartile mean: without the lowest and the highest quarter, rounded down (Agarwal et al. 2021)."""
    return float(_iqm(np.asarray(values, float)))


def interval(strata: Strata, of: Literal["mean", "iqm"] = "mean") -> Interval | None:
    """The 95 % interval of the mean of the strata's means, or of the interquartile mean of all values.

    strata: the values of one cell, or those of several cells, between which seeds are not exchanged. The bootstrap
    resamples within each; its percentiles are taken further out than 2.5 and 97.5, as Student's t is further out
    than the normal and n - 1 smaller than n, or they would be too narrow for few values (Hesterberg 2015, section
    5.5). Where no resample can lie that far out (one cell of fewer than 5 values; 2 of 3) it is Student's t interval
    of the mean. None with fewer than two values in a stratum.
    """
    sizes = [len(stratum) for stratum in strata]
    if not sizes or min(sizes) < 2:
        return None
    from scipy.special import ndtr, stdtrit

    free, least = sum(sizes) - len(sizes), min(sizes)
    reach = float(stdtrit(free, (1 + CONFIDENCE) / 2))
    tail = float(ndtr(-math.sqrt(least / (least - 1)) * reach))
    cells = [np.sort(np.asarray(stratum, float)) for stratum in strata]
    centre = float(np.mean([cell.mean() for cell in cells]) if of == "mean" else _iqm(np.concatenate(cells)))
    if math.log(tail) <= -sum(n * math.log(n) for n in sizes):
        if of == "iqm":
            return None
        half = reach * math.sqrt(sum(cell.var(ddof=1) / cell.size for cell in cells)) / len(cells)
        return Interval(centre - half, centre + half, "t")
    if of == "mean":
        found = np.mean([_weights(cell.size, at) @ cell for at, cell in enumerate(cells)], axis=0)
    else:
        drawn = [cell[_resamples(cell.size, at)] for at, cell in enumerate(cells)]
        found = _iqm(np.concatenate(drawn, axis=1))
    return _between(found, centre, tail)


def paired(differences: Sequence[float]) -> Paired:
    """Whether paired runs differ. Fewer than two pairs can not say.

    Student's t below 12 pairs; from 12 on Wilcoxon's signed-rank test, which needs no normal distribution. Its
    smallest p with n pairs is 2^(1-n): only from 12 on does that outlast a correction for a hundred comparisons.
    """
    n, mean = len(differences), float(np.mean(differences)) if len(differences) else math.nan
    if n < 2:
        return Paired(n, mean, None, None, "none")
    if n >= SIGNED_FROM:
        return Paired(n, mean, interval([differences]), signed_rank(differences), "signed-rank")
    from scipy.special import stdtr, stdtrit

    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    # Seeds that all differ by the same amount, up to rounding, leave no doubt; equal runs leave no difference.
    exact = error <= 1e-12 * max(abs(mean), 1e-300)
    p = float(mean == 0) if exact else 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Paired(n, mean, Interval(mean - half, mean + half, "t"), p, "t")


def signed_rank(differences: Sequence[float]) -> float:
    """Wilcoxon's two-sided p, zeros left out, ties with their mean rank. Exact up to 60 pairs, then normal."""
    values = np.asarray([d for d in differences if d], float)
    n = values.size
    if not n:
        return 1.0
    ranks = _ranks(np.abs(values))
    lower = min(ranks[values > 0].sum(), ranks[values < 0].sum())
    if n <= MOST_EXACT:
        doubled = np.rint(2 * ranks).astype(int)  # mean ranks are multiples of a half
        counts = np.zeros(doubled.sum() + 1)
        counts[0] = 1
        for rank in doubled:  # every rank is positive or negative, with equal chance
            counts[rank:] = counts[rank:] + counts[:-rank]
        return min(1.0, 2 * float(counts[: round(2 * lower) + 1].sum()) / 2.0**n)
    from scipy.special import ndtr

    return float(2 * ndtr((lower - n * (n + 1) / 4) / math.sqrt((ranks**2).sum() / 4)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the p values with which the chance of any false claim stays below the level asked for."""
    known = sorted((p, at) for at, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    worst = 0.0
    for done, (p, at) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - done)))
        adjusted[at] = worst
    return adjusted


class Ranking(NamedTuple):
    """Average ranks (1 is best) over n settings. p: Friedman's, that no method differs. critical: Nemenyi's."""

    ranks: tuple[float, ...]
    n: int
    p: float
    critical: float
    cliques: tuple[tuple[int, ...], ...]  # largest groups, of two or more, that are not told apart


def ranking(scores: np.ndarray, high: bool = True) -> Ranking | None:
    """Methods ranked in every setting (Demsar 2006). scores: [settings, methods]. None below 2 settings or methods.

    Two methods are told apart where their average ranks differ by `critical` or more, at 5 %.
    """
    n, k = scores.shape
    if n < 2 or k < 2:
        return None
    from scipy.special import chdtrc

    ranks = np.array([_ranks(-row if high else row) for row in scores])
    means = ranks.mean(axis=0)
    spread = (ranks**2).sum() - n * k * (k + 1) ** 2 / 4  # 0 where all are tied everywhere
    chi2 = (k - 1) * n**2 * ((means - (k + 1) / 2) ** 2).sum() / spread if spread > 0 else 0.0
    critical = range_quantile(k) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    order = np.argsort(means, kind="stable")
    groups = [tuple(int(at) for at in order[i:] if means[at] - means[order[i]] < critical) for i in range(k)]
    largest = [g for i, g in enumerate(groups) if len(g) > 1 and not any(set(g) <= set(b) for b in groups[:i])]
    return Ranking(tuple(map(float, means)), n, float(chdtrc(k - 1, chi2)), critical, tuple(largest))


def nemenyi(ranks: Sequence[float], n: int) -> np.ndarray:
    """p of every pair of average ranks over n settings: [k, k], 1 on the diagonal."""
    k, means = len(ranks), np.asarray(ranks, float)
    width = np.abs(means[:, None] - means) / math.sqrt(k * (k + 1) / (6 * n)) * math.sqrt(2)
    return np.array([[1 - range_chance(q, k) if q else 1.0 for q in row] for row in width])


def range_chance(width: float, k: int) -> float:
    """P(range of k standard normal values < width): the studentized range with infinite freedom."""
    from scipy.special import ndtr

    z = np.linspace(-8.0, 8.0 + width, GRID)
    inner = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (ndtr(z) - ndtr(z - width)) ** (k - 1)
    return min(1.0, k * float(np.trapezoid(inner, z)))


@lru_cache
def range_quantile(k: int, chance: float = CONFIDENCE) -> float:
    """The width that the range of k standard normal values stays below with this chance, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if range_chance(middle, k) < chance else (low, middle)
    return high


def letters(differs: np.ndarray) -> list[str]:
    """Compact letter display: two methods share a letter if and only if they are not told apart.

    differs: [k, k] of bool, symmetric, best method first. Columns are inserted and absorbed (Piepho 2004).
    """
    columns = [frozenset(range(len(differs)))]
    for one, other in zip(*np.nonzero(np.triu(differs, 1)), strict=True):
        split = [column for column in columns if {one, other} <= column]
        kept = [column for column in columns if column not in split]
        for half in (column - {out} for column in split for out in (one, other)):
            if not any(half <= larger for larger in kept):
                kept = [*(smaller for smaller in kept if not smaller <= half), half]
        columns = kept
    ordered = sorted(columns, key=sorted)
    return ["".join(_letter(at) for at, column in enumerate(ordered) if row in column) for row in range(len(differs))]


def _letter(at: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return alphabet[at] if at < 26 else f"({at + 1})"


def improvement(ours: Strata, theirs: Strata) -> tuple[float, Interval | None]:
    """The chance that a run of ours is better than one of theirs, ties half, mean over the strata (Agarwal et al.
    2021), with the percentiles of a bootstrap that resamples both within each stratum. Larger is better.
    """
    wins = []  # per stratum [n, m]: 1 where ours is the larger, .5 for a tie
    for a, b in zip(ours, theirs, strict=True):
        one, other = np.sort(np.asarray(a, float))[:, None], np.sort(np.asarray(b, float))
        wins.append((one > other) + 0.5 * (one == other))
    chance = float(np.mean([won.mean() for won in wins]))
    if any(min(won.shape) < 2 for won in wins):
        return chance, None
    found = [
        ((_weights(won.shape[0], 2 * at) @ won) * _weights(won.shape[1], 2 * at + 1)).sum(axis=1)
        for at, won in enumerate(wins)
    ]
    return chance, _between(np.mean(found, axis=0), chance, (1 - CONFIDENCE) / 2)


def profile(strata: Strata, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of runs above each threshold, mean over the strata, with its 95 % band by the stratified bootstrap.

    A performance profile, or run-score distribution (Agarwal et al. 2021). returns: three of [thresholds].
    """
    above = [np.sort(np.asarray(stratum, float))[:, None] > thresholds for stratum in strata]  # [n, thresholds]
    drawn = [_weights(len(a), at) @ a for at, a in enumerate(above)]
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return np.mean([a.mean(axis=0) for a in above], axis=0), low, high


def _between(found: np.ndarray, centre: float, tail: float) -> Interval:
    """The resamples' percentiles; rounding must not put the estimate itself outside."""
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(min(float(low), centre), max(float(high), centre), "bootstrap")


def _iqm(values: np.ndarray) -> Any:
    """Along the last axis."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    below, equal = values[None] < values[:, None], values[None] == values[:, None]
    return np.asarray(below.sum(axis=1) + (equal.sum(axis=1) + 1) / 2)


@lru_cache(maxsize=64)
def _resamples(n: int, stream: int) -> np.ndarray:
    """Row numbers of every resample, [RESAMPLES, n]: the same for all cells of n values, in whatever order they come.

    stream: cells that are resampled together have one each, so that they are drawn independently.
    """
    return np.random.default_rng([n, stream]).integers(0, n, (RESAMPLES, n), dtype=np.int32)


@lru_cache(maxsize=64)
def _weights(n: int, stream: int) -> np.ndarray:
    """How much each of n values counts in every resample's mean: [RESAMPLES, n]."""
    places = _resamples(n, stream) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n
