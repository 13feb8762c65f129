"""The books of a trial: rows go in and come out as they were, and weigh little."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.books import Pages
from harness.checkpoint import pack, unpack

PAGE = Pages.PAGE


def row(i: int) -> dict[str, Any]:
    """As the server books them; a third of its weight is the recall of ten classes."""
    kinds = {"params": 4 * i}
    seen = {"accuracy": 1 / (i + 1), "recall": [i / 7] * 10, "train_loss": None if i % 5 else 0.1 * i}
    return {"round": i, "role": "global", **seen, "up_kinds": kinds, "steps": i, "seconds": 1e-3 * i}


@settings(max_examples=25)
@given(st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 7]), st.data())
def test_pages_are_a_list_of_rows(size: int, data: st.DataObject) -> None:
    rows = [row(i) for i in range(size)]
    pages = Pages(rows)
    assert len(pages) == size
    assert list(pages) == rows
    assert list(reversed(pages)) == rows[::-1]
    assert pages == rows
    assert pages != [*rows, row(0)]
    start, stop, step = (data.draw(st.none() | st.integers(-size - 2, size + 2)) for _ in range(3))
    assert pages[start : stop : step or 1] == rows[start : stop : step or 1]
    for at in data.draw(st.lists(st.integers(-size, size - 1), max_size=20)) if size else ():
        assert pages[at] == rows[at]


def test_there_are_no_other_rows() -> None:
    for at in (PAGE, -PAGE - 1):
        with pytest.raises(IndexError):
            Pages(row(i) for i in range(PAGE))[at]


def test_pages_go_on_from_a_checkpoint() -> None:
    """With the pages that were full and the one that was not, the same bits; so does a list from before."""
    rows = [row(i) for i in range(2 * PAGE + 5)]
    again = Pages.unpacked(unpack(pack({"rows": Pages(rows[:-5]).packed()}))["rows"])
    for one in rows[-5:]:
        again.append(one)
    assert again == rows
    assert Pages.unpacked(unpack(pack({"rows": rows}))["rows"]) == rows


def test_a_page_weighs_little() -> None:
    """A row as a dict weighs over a kilobyte; a packed one is allowed a tenth."""
    pages = Pages(row(i) for i in range(40 * PAGE))
    assert sum(map(sys.getsizeof, pages._pages)) < 100 * len(pages)
    list(pages)
    assert len(pages._opened) <= Pages.OPENED
