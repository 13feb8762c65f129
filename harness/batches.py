"""Rows on the device: normalised once, picked by index, augmented in batches. No loader, no per-image work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from harness.data import Augment, Card
from harness.layers import channels_last


def augment(x: Tensor, how: Augment, rng: Generator) -> Tensor:
    """x: [B, C, H, W] normalised; the same shape back, cropped and mirrored at random, row by row.

    A border of zeros is one of the data set's mean colour, since x is normalised.
    """
    if how.crop_pad:
        x = _crop(x, how.crop_pad, how.pad_mode, rng)
    if how.flip:
        turned = torch.rand(len(x), generator=rng, device=x.device) < 0.5
        x = torch.where(turned[:, None, None, None], x.flip(3), x)
    return x


def _crop(x: Tensor, pad: int, mode: str, rng: Generator) -> Tensor:
    b, c, h, w = x.shape
    wide = F.pad(x, (pad, pad, pad, pad), mode="reflect" if mode == "reflect" else "constant")
    top, left = torch.randint(2 * pad + 1, (2, b, 1), generator=rng, device=x.device)
    rows = top + torch.arange(h, device=x.device)
    columns = left + torch.arange(w, device=x.device)
    index = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).view(b, 1, h * w)
    return wide.flatten(2).gather(2, index.expand(b, c, h * w)).view(b, c, h, w)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, C, H, W] -> float32 (x / 255 - mean) / std per channel."""
    center = torch.tensor(mean, device=x.device).view(-1, 1, 1) * 255
    spread = torch.tensor(std, device=x.device).view(-1, 1, 1) * 255
    return x.float().sub_(center).div_(spread)


def ready(x: Tensor, about: Card) -> Tensor:
    """Rows of a data set as nets take them: images normalised, tokens [B, T] as int64."""
    return x.long() if about.tokens else channels_last(normalise(x, about.mean, about.std))


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Every image of x [B, C, H, W] turned about its centre, bilinear, with the edge's values beyond the edge."""
    if not len(x):  # torch makes no grid for no images
        return x
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(turn.to(x).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Rows:
    """A client's rows on the device: x [n, ...] ready for the net, y [n], and how batches of it are augmented."""

    x: Tensor
    y: Tensor
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.y)


def passes(rows: int, batch: int, epochs: float, drop_last: bool, rng: Generator) -> Iterator[Tensor]:
    """Index batches [<= batch] of `epochs` passes, each in a new order; part of a pass is that share of its batches.

    With `drop_last` the short batch at the end of a pass is left out, but never the only one. No rows, no batches.
    """
    for epoch in range(math.ceil(epochs - 1e-9) if rows else 0):  # .07 * 100 is more than 7
        order = torch.randperm(rows, generator=rng, device=rng.device)
        chunks = torch.split(order, batch)
        if drop_last and len(chunks) > 1 and len(chunks[-1]) < batch:
            chunks = chunks[:-1]
        share = min(1.0, epochs - epoch)
        yield from chunks[: max(1, round(share * len(chunks)))]
