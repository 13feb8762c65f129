"""Rows on the device: their order, augmentation against a slow loop, normalisation and rotation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import trees
from harness.batches import augment, normalise, passes, rotate
from harness.data import Augment


def images(rows: int = 6, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    """Every pixel differs from every other, and none is 0."""
    return torch.arange(1.0, 1 + rows * channels * height * width).view(rows, channels, height, width)


# ---- order


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 4), st.booleans())
def test_every_pass_sees_every_row_once(rows: int, batch: int, epochs: int, drop_last: bool) -> None:
    """Full batches, then what is left over; with drop_last not that, unless it is all there is. No rows: no batch."""
    found = list(passes(rows, batch, epochs, drop_last, trees.stream("order")))
    full, rest = divmod(rows, batch)
    sizes = [batch] * full + ([rest] if rest and not (drop_last and full) else [])
    assert [len(index) for index in found] == sizes * epochs
    for epoch in range(epochs):
        seen = torch.cat(found[epoch * len(sizes) : (epoch + 1) * len(sizes)]).tolist() if sizes else []
        assert len(set(seen)) == len(seen) == sum(sizes)
        assert set(seen) <= set(range(rows))


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.01, 3))
def test_part_of_a_pass_is_that_share_of_its_batches(rows: int, batch: int, epochs: float) -> None:
    """Whole passes, then round(share * batches) of one more, at least one: a prefix of what more passes give."""
    found = list(passes(rows, batch, epochs, False, trees.stream("order")))
    whole = list(passes(rows, batch, math.ceil(epochs), False, trees.stream("order")))
    each = math.ceil(rows / batch)
    full, share = divmod(epochs, 1)
    if not 1e-6 < share < 1 - 1e-6:
        return
    assert len(found) == full * each + max(1, round(share * each))
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=False))


@pytest.mark.parametrize(("share", "epochs"), [(0.07, 100), (0.29, 100), (0.2, 5), (1.1, 10)])
def test_rounding_adds_no_pass(share: float, epochs: int) -> None:
    """.07 * 100 is 7.000000000000001 in doubles, and .29 * 100 is 28.999999999999996."""
    found = list(passes(8, 4, share * epochs, False, trees.stream("order")))
    assert len(found) == 2 * round(share * epochs)


def test_passes_differ_and_follow_the_stream() -> None:
    """Each pass is one permutation of the stream, in turn."""
    rng = trees.stream("order")
    expected = [torch.randperm(50, generator=rng) for _ in range(2)]
    found = torch.cat(list(passes(50, 8, 2, False, trees.stream("order"))))
    assert torch.equal(found, torch.cat(expected))
    assert not torch.equal(expected[0], expected[1])


# ---- augmentation


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_crops_are_windows_of_the_padded_image(mode: str) -> None:
    """Each row is one of the (2 pad + 1)^2 windows of its own padded image, the same one in all channels."""
    x, pad = images(), 2
    wide = torch.nn.functional.pad(x, (pad,) * 4, mode="reflect" if mode == "reflect" else "constant")
    out = augment(x, Augment(crop_pad=pad, pad_mode=mode), trees.stream("crop"))  # type: ignore[arg-type]
    assert out.shape == x.shape
    chosen = []
    for row in range(len(x)):
        windows = {(top, left): wide[row, :, top : top + 5, left : left + 7] for top in range(5) for left in range(5)}
        chosen.append([at for at, window in windows.items() if torch.equal(window, out[row])])
    assert all(len(at) == 1 for at in chosen)
    assert len({at[0] for at in chosen}) > 1


def test_every_shift_is_equally_likely() -> None:
    """pad 1: nine shifts, 9,000 rows, each expected 1,000 times with a standard deviation of 30."""
    x = torch.zeros(9000, 1, 3, 3)
    x[:, 0, 1, 1] = 1.0
    out = augment(x, Augment(crop_pad=1), trees.stream("shifts"))
    counts = out.sum(0).flatten()
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 150


def test_flips_mirror_half_of_the_rows() -> None:
    """Whole rows, left to right; 2,000 coins with a standard deviation of 22."""
    x = images(2000, 1, 2, 3)
    out = augment(x, Augment(flip=True), trees.stream("flip"))
    flipped = (out == x.flip(3)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert torch.equal(flipped, ~kept)
    assert abs(int(flipped.sum()) - 1000) < 120


def test_augmentation_follows_its_stream_and_spares_its_input() -> None:
    x, how = images(), Augment(crop_pad=2, flip=True)
    first = augment(x, how, trees.stream("a"))
    assert torch.equal(augment(x, how, trees.stream("a")), first)
    assert not torch.equal(augment(x, how, trees.stream("b")), first)
    assert torch.equal(x, images())
    assert torch.equal(augment(x, Augment(), trees.stream("a")), x)


# ---- pixels


@given(st.integers(0, 255), st.floats(0.05, 0.95), st.floats(0.05, 1))
@settings(max_examples=40)
def test_normalise(value: int, mean: float, std: float) -> None:
    """(x / 255 - mean) / std, each channel with its own."""
    x = torch.full((2, 2, 1, 3), value, dtype=torch.uint8)
    out = normalise(x, (mean, 0.5), (std, 0.25))
    assert out.dtype == torch.float32
    assert torch.allclose(out[:, 0], torch.tensor((value / 255 - mean) / std), atol=1e-4)
    assert torch.allclose(out[:, 1], torch.tensor((value / 255 - 0.5) / 0.25), atol=1e-4)
    assert x.eq(value).all()


def test_rotations() -> None:
    """0 and 360 degrees are nothing, four quarter turns too, and a quarter turn moves pixels without mixing them."""
    x = torch.rand(2, 3, 8, 8, generator=trees.stream("rotate"))
    assert torch.allclose(rotate(x, 0.0), x, atol=1e-5)
    assert torch.allclose(rotate(x, 360.0), x, atol=1e-4)
    quarter = rotate(x, 90.0)
    turns = [torch.rot90(x, k, (2, 3)) for k in (1, -1)]
    assert sum(torch.allclose(quarter, turn, atol=1e-4) for turn in turns) == 1
    assert torch.allclose(rotate(quarter, -90.0), x, atol=1e-4)
    assert not torch.allclose(rotate(x, 20.0), x, atol=1e-2)


def test_a_rotation_takes_the_edge_for_what_lies_beyond() -> None:
    """A flat image stays flat at any angle: no dark corners."""
    x = torch.full((1, 1, 8, 8), 0.7)
    assert torch.allclose(rotate(x, 33.0), x)
