"""Label mixes: how alike, how even and how complementary they are; who may teach whom by them, and who makes a group.

A mix is the share of each class among a client's rows, [C], float64; adds up to 1. Divergences are in nats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def mixes(counts: np.ndarray[Any, np.dtype[np.int64]]) -> Floats:
    """Mixes [N, C] of row counts [N, C]; a client without rows gets the even mix, because it leans to no class."""
    rows = counts.sum(-1, keepdims=True)
    share: Floats = np.where(rows > 0, counts / np.maximum(rows, 1), 1 / counts.shape[-1])
    return share


def entropy(q: Floats) -> Floats:
    """-sum_c q(c) ln q(c) of mixes [..., C]: [...], 0 to ln C."""
    value: Floats = -(q * np.log(np.where(q > 0, q, 1))).sum(-1)
    return value


def js(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence of mixes [..., C], which are broadcast: [...], 0 to ln 2."""
    value: Floats = np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)
    return value


def similarity(p: Floats, q: Floats) -> Floats:
    """1 - JS / ln 2: [...], 1 for equal mixes, 0 for mixes without a common class."""
    value: Floats = 1 - js(p, q) / np.log(2)
    return value


def uniformity(q: Floats) -> Floats:
    """Entropy over ln C: [...], 1 for the even mix, 0 for a single class."""
    value: Floats = entropy(q) / np.log(q.shape[-1])
    return value


def complementarity(student: Floats, teacher: Floats) -> Floats:
    """The teacher's mass on classes that the student has too little of: sum_c q_T(c) (1 - min(1, C q_S(c)))."""
    value: Floats = (teacher * (1 - np.minimum(1, student.shape[-1] * student))).sum(-1)
    return value


def scores(q: Floats, weights: tuple[float, float, float]) -> Floats:
    """How good a teacher t is for a student s, [N, N] by (s, t), of mixes [N, C].

    weights: of similarity, of the teacher's uniformity, of complementarity; the first and the last pull apart.
    """
    alike, even, other = weights
    parts = (alike * similarity(own, q) + even * uniformity(q) + other * complementarity(own, q) for own in q)
    return np.stack(list(parts))


def teachers(
    score: Floats, q: Floats, levels: Sequence[int], students: Iterable[int], able: Iterable[int], most: int
) -> dict[int, int]:
    """Student -> teacher, greedily from the best of score [N, N] (by s, t; ties by number) down. No cycles.

    q: mixes [N, C]. A teacher is one of `able`, has at most `most` students, and is of the next larger level or of
    the student's own; there its mix must be more even (ties: its number larger), so that no path comes back.
    """
    even, able = uniformity(q), list(able)
    edges = [
        (-score[s, t], s, t)
        for s in students
        for t in able
        if levels[t] == levels[s] + 1 or (levels[t] == levels[s] and (even[t], t) > (even[s], s))
    ]
    found: dict[int, int] = {}
    busy: Counter[int] = Counter()
    for _, s, t in sorted(edges):
        if s not in found and busy[t] < most:
            found[s] = t
            busy[t] += 1
    return found


def neighbours(score: Floats, size: int) -> dict[int, list[int]]:
    """Client -> the others of its group. A group of at most `size` begins with the first client who is left and takes
    in, again and again, the one who is best for its members: score [N, N] by (member, newcomer); ties by number.
    """
    left, found = list(range(len(score))), dict[int, list[int]]()
    while left:
        group = [left.pop(0)]
        while left and len(group) < size:
            group.append(left.pop(int(score[np.ix_(group, left)].sum(0).argmax())))
        found |= {i: [j for j in group if j != i] for i in group}
    return found
