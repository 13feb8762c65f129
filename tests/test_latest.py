"""The latest model of each of many clients, as the rows of one matrix."""

from __future__ import annotations

import torch

from harness.latest import update_rows
from harness.trees import Tree


def pair(a: float) -> Tree:
    return {"w": torch.tensor([a]), "b": torch.tensor([a + 1])}


def test_rows_of_the_latest_trees() -> None:
    """Owner 7 has a row, and gets a new one there; owners 5 and 2 are new and stand behind, in their order."""
    old, owners = torch.tensor([[1.0, 1.0]]), [7]
    matrix = update_rows(old, owners, {5: pair(5), 7: pair(7), 2: pair(2)})
    assert owners == [7, 5, 2]
    assert matrix.tolist() == [[7.0, 8.0], [5.0, 6.0], [2.0, 3.0]]
    assert old.tolist() == [[1.0, 1.0]]


def test_rows_grow_in_place_while_there_is_room() -> None:
    """Memory is taken once for 3 rows, none touched before it is somebody's; for a fourth row all is copied."""
    owners: list[int] = []
    one = update_rows(torch.zeros(0, 2), owners, {4: pair(4)}, room=3)
    three = update_rows(one, owners, {1: pair(1), 4: pair(5), 0: pair(0)}, room=3)
    assert three.data_ptr() == one.data_ptr()
    assert one.tolist() == [[5.0, 6.0]]
    assert three.tolist() == [[5.0, 6.0], [1.0, 2.0], [0.0, 1.0]]
    four = update_rows(three, owners, {9: pair(9)}, room=3)
    assert four.data_ptr() != one.data_ptr()
    assert four.tolist() == [[5.0, 6.0], [1.0, 2.0], [0.0, 1.0], [9.0, 10.0]]
    part = three[1:]  # whose memory begins with another row
    assert update_rows(part, [1, 0], {7: pair(7)}).tolist() == [[1.0, 2.0], [0.0, 1.0], [7.0, 8.0]]
    assert three.tolist() == [[5.0, 6.0], [1.0, 2.0], [0.0, 1.0]]
