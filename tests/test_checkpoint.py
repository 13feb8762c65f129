"""Checkpoints: what goes in comes out, and what is damaged is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import KEPT, Shelf, pack, unpack

PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
LEAF = PLAIN | st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(torch.tensor)
VALUE = st.dictionaries(
    st.text(max_size=6),
    st.recursive(LEAF, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=6), s, max_size=3)),
    max_size=4,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(VALUE)
def test_everything_comes_back_as_it_was(value: dict[str, object]) -> None:
    assert same(unpack(pack(value)), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_types_and_views_survive(dtype: torch.dtype) -> None:
    base = torch.arange(12).to(dtype).view(3, 4)
    back = unpack(pack({"t": base.t(), "row": base[1], "empty": base[:0], "scalar": base[0, 1]}))
    assert torch.equal(back["t"], base.t()) and torch.equal(back["row"], base[1])
    assert back["empty"].shape == (0, 4) and back["scalar"].shape == ()


@pytest.mark.parametrize("value", [{"x": object()}, {"x": {1: 2}}, {"x": {"a", "b"}}])
def test_what_json_cannot_say_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        pack(value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"x" * 100, b"\xff" * 16])
def test_strange_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a checkpoint"):
        unpack(content)


def test_the_shelf_keeps_two_and_gives_the_newest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for round in (9, 10, 100):
        shelf.put("a", round, pack({"round": round}))
    assert len(list((tmp_path / "checkpoints" / "a").iterdir())) == KEPT
    content, warnings = shelf.latest("a")
    assert content is not None and unpack(content) == {"round": 100} and not warnings
    assert shelf.latest("b") == (None, [])
    shelf.drop("a")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    shelf = Shelf(tmp_path)
    for round in (1, 2):
        shelf.put("a", round, pack({"round": round, "x": torch.ones(100)}))
    newest = max((tmp_path / "checkpoints" / "a").iterdir())
    content = newest.read_bytes()
    broken = content[:-7] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])
    newest.write_bytes(broken)
    good, warnings = shelf.latest("a")
    assert good is not None and unpack(good)["round"] == 1
    assert len(warnings) == 1 and newest.name in warnings[0]


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path)
    shelf.put("a", 1, pack({"round": 1}))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        shelf.put("a", 2, pack({"round": 2}))
    content, warnings = shelf.latest("a")
    assert content is not None and unpack(content) == {"round": 1} and not warnings
    assert len(list((tmp_path / "checkpoints" / "a").iterdir())) == 1
