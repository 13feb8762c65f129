"""Who takes part in a round, who drops out and who is slow: all drawn ahead from the seed, for every method alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.protocol import Cohort, Role, Visit
from harness.refusal import Refused
from harness.sections import Availability
from harness.trees import numpy_stream

Trace = Mapping[int, Sequence[int]]  # round -> the clients that are there


def read_trace(path: Path | str, clients: int) -> tuple[dict[int, list[int]], str]:
    """A Parquet file with whole-number columns round and client; also the sha256 (hex) of its sorted rows.

    Raises Refused for a file that can't be read as such, or that names a client from `clients` on.
    """
    import pandas as pd

    if not Path(path).is_file():
        raise Refused(
            f"availability.trace = {str(path)!r} is no file: give a Parquet file with columns round and client"
        )
    try:
        rows = pd.read_parquet(path, columns=["round", "client"]).to_numpy()
    except (OSError, ValueError, KeyError) as error:
        why = f"no Parquet file with columns round and client: {error}"
        raise Refused(f"availability.trace = {str(path)!r}: {why}") from None
    if rows.dtype.kind not in "iu" or (len(rows) and (rows.min() < 0 or rows[:, 1].max() >= clients)):
        raise Refused(
            f"availability.trace = {str(path)!r} must hold rounds from 0 and clients from 0 to {clients - 1}"
        )
    rows = np.unique(rows.astype(np.int64), axis=0)
    trace: dict[int, list[int]] = {}
    for round, client in rows.tolist():
        trace.setdefault(round, []).append(client)
    return trace, hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Roster:
    """A round's cohort; the visits whose work is lost; the share of its epochs that each visit does."""

    cohort: Cohort
    dropped: frozenset[Visit]
    work: Mapping[Visit, float]


def draw_cohort(
    seed: int,
    round: int,
    roles: Mapping[str, Role],
    clients: int,
    participation: float,
    how: Availability | None = None,
    sizes: npt.ArrayLike = (),
    trace: Trace | None = None,
) -> Cohort:
    """Drawn without replacement, from the seed, the round and the role's name. sizes: [N] training rows; all alike
    if none are given.

    A role's cohort is a share of those who may be picked, whoever of them is there in this round; if too few are
    there, all of them come.
    """
    how, held = how or Availability(), np.asarray(sizes, dtype=np.float64)
    visits: list[Visit] = []
    for name, role in roles.items():
        eligible = np.arange(clients) if role.clients is None else np.array(sorted(role.clients), dtype=np.int64)
        size = min(len(eligible), role.cohort or max(1, int(len(eligible) * participation + 1e-9)))
        there = eligible[_there(eligible, clients, round, seed, how, trace)]
        rows = held[there] if len(held) else np.ones(len(there))
        there, rows = there[rows > 0], rows[rows > 0]  # who has no rows has nothing to do
        odds = rows / rows.sum() if how.pattern == "weighted" else None
        rng = numpy_stream(seed, "cohort", round, name)
        picked = there if how.pattern == "trace" else rng.choice(there, min(size, len(there)), replace=False, p=odds)
        visits += [Visit(int(client), name) for client in picked]
    return Cohort(round, tuple(sorted(visits)))


def draw_roster(seed: int, cohort: Cohort, how: Availability) -> Roster:
    """What becomes of the visits of a cohort: each drops out, or is slow, by itself."""
    luck = {visit: _luck(seed, cohort.round, visit) for visit in cohort.visits}
    dropped = frozenset(visit for visit, (drop, _) in luck.items() if drop < how.dropout)
    work = {visit: how.straggler_work if slow < how.stragglers else 1.0 for visit, (_, slow) in luck.items()}
    return Roster(cohort, dropped, work)


def _luck(seed: int, round: int, visit: Visit) -> tuple[float, float]:
    drop, slow = numpy_stream(seed, "luck", round, visit.client, visit.role).random(2)
    return float(drop), float(slow)


def _there(
    eligible: npt.NDArray[np.int64], clients: int, round: int, seed: int, how: Availability, trace: Trace | None
) -> npt.NDArray[np.bool_]:
    """[eligible] of bool: who is there in this round."""
    if how.pattern == "trace":
        return np.isin(eligible, list((trace or {}).get(round, ())))
    if how.pattern == "cyclic":
        # Clients live in time zones, evenly spread: each is there for the first part of its own day.
        zone = numpy_stream(seed, "zones").permutation(clients)[eligible] * how.period / clients
        return (round + zone) % how.period < how.window * how.period
    return np.ones(len(eligible), dtype=bool)
