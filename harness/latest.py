"""The latest model of each of many clients, as the rows of one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.trees import flat

RESERVED = 2**30  # bytes that a growing matrix may take ahead, if it may have so many rows


def update_rows(matrix: Tensor, owners: list[int], new: Mapping[int, Mapping[str, Any]], room: int = 0) -> Tensor:
    """The latest tree of each of many owners, one per row [n, P], with the `new` ones in their places.

    owners: whose row is where; it grows by those who had none. room: how many there may ever be. The matrix is
    changed in place, and grows in place while it has memory for more rows.
    """
    place = {owner: at for at, owner in enumerate(owners)}
    fresh = [owner for owner in new if owner not in place]
    place |= {owner: len(owners) + i for i, owner in enumerate(fresh)}
    owners += fresh
    if fresh:
        matrix = _longer(matrix, len(owners), room)
    for owner, tree in new.items():
        matrix[place[owner]] = flat(tree)
    return matrix


def _longer(matrix: Tensor, rows: int, room: int) -> Tensor:
    """A matrix with more rows, the new ones not yet written. Those that are never written take no memory of a CPU."""
    width, size = matrix.shape[1], matrix.shape[1] * matrix.element_size()
    if matrix.is_contiguous() and not matrix.storage_offset() and matrix.untyped_storage().nbytes() >= rows * size:
        return matrix.as_strided((rows, width), (width, 1))
    longer = matrix.new_empty(max(rows, min(room, max(2 * rows, RESERVED // size))), width)
    longer[: len(matrix)] = matrix
    return longer[:rows]
