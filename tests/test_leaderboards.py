"""The leaderboards that are part of the repository: their tables agree with themselves, their cards and the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import axes, cards
from harness.config import trial_id
from harness.record import Store
from harness.verify import verify

FOLDER = Path(__file__).resolve().parent.parent / "results" / "leaderboards"
FOLDERS = sorted(place.parent for place in FOLDER.glob("*/trials"))
CARDS = [name for name in cards.names("sweeps") if name.startswith("leaderboards/")]
FIVE = "methods=fedavg,kdia,fedgen,fedakd,ema-teacher,fedavg-matched,fedavg-proxy"  # the heart of the main table


def test_there_is_a_card_for_every_claim() -> None:
    words = " ".join(axes.load_sweep(name).title for name in CARDS)
    assert all(claim in words for claim in ("K4", "K5", "C1", "C2", "C3", "C4", "C5", "RQ1", "RQ2", "RQ3", "FedAKD"))


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The trials of all cards."""
    sweeps = [axes.load_sweep(name) for name in CARDS]
    sweeps.append(axes.load_sweep("leaderboards/methods", [FIVE, "seeds=5"]))
    return {trial_id(cell) for sweep in sweeps for cell in sweep.cells}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_all_trials_are_of_cards_that_are_here(folder: Path, known: set[str]) -> None:
    """What is shown as a result can be had again by a command that names a shipped card."""
    trials = Store(folder, writable=False).read("trials")
    assert len(trials) and set(trials["trial_id"]) <= known
    assert trials["clean"].all() and trials["commit"].str.len().ge(7).all()


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_leaderboard_agrees_with_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder, 0, None), capsys.readouterr().out
