"""Pictures that need no results: who holds which classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness import plots
from harness.plots import partition_heatmap


def picture(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(imread(path))


def test_heatmap_shows_who_holds_what(tmp_path: Path) -> None:
    """Two clients, one class each: two coloured quarters on a diagonal, two white ones."""
    image = picture(partition_heatmap(np.array([[9, 0], [0, 9]]), "title", tmp_path / "deep" / "map.png"))
    full = (
        np.abs(image[:, :, :3] - np.array([0x44, 0x01, 0x54]) / 255).max(axis=2) < 0.02
    )  # viridis' end: the largest holding
    full = full[:, full.mean(axis=0) > 0.3]  # without the colour bar, whose end has that colour, too
    rows, columns = np.nonzero(full)
    held = full[rows.min() : rows.max(), columns.min() : columns.max()]
    down, across = held.shape[0] // 2, held.shape[1] // 2
    quarters = [[held[:down, :across], held[:down, across:]], [held[down:, :across], held[down:, across:]]]
    assert [[quarter.mean() > 0.9 for quarter in line] for line in quarters] == [[True, False], [False, True]]
    assert quarters[0][1].mean() < 0.05


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (20, 10), (100, 10), (100, 100), (1000, 62)])
def test_heatmaps_stay_of_a_size_that_can_be_looked_at(tmp_path: Path, clients: int, classes: int) -> None:
    counts = np.random.default_rng(0).multinomial(300, np.full(classes, 1 / classes), size=clients)
    height, width = picture(partition_heatmap(counts, "Dirichlet", tmp_path / "map.png")).shape[:2]
    assert 400 < height < 3000
    assert 900 < width < 4000


def test_heatmap_of_nothing_held(tmp_path: Path) -> None:
    assert picture(partition_heatmap(np.zeros((3, 4), int), "empty", tmp_path / "map.png")).size


@pytest.mark.parametrize("count", [1, 9, 10, 62, 100, 1000, 100_000])
def test_ticks_fit_their_room(count: int) -> None:
    assert math.ceil(count / plots.stride(count, 20)) <= 20
